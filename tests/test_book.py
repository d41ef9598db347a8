import json
import os
import re

import pytest
from PIL import Image

from comfy_mminterleaved import Story
from comfy_mminterleaved.errors import OutputError, StoryError
from comfy_mminterleaved.stories.page import METADATA_KEY, load_story, render_page, save_story


def test_a_saved_story_comes_back(tmp_path, pictures):
    story = Story.of("Zoë met <b>a 猫</b>.", pictures[0], "Then & then.", pictures[1])
    files = save_story(tmp_path, story, "A title", {"seed": 3})
    assert [f.name for f in files] == ["01.png", "02.png", "story.json", "story.html"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files)
    again = load_story(tmp_path / "story.json")
    assert again.text == story.text and [p.digest for p in again.images] == [p.digest for p in story.images]
    data = json.loads(Image.open(tmp_path / "02.png").text[METADATA_KEY])
    about = {"image": "02.png", "panel": 2, "text": "Then & then.", "title": "A title", "settings": {"seed": 3}}
    assert data == about
    assert json.loads(Image.open(tmp_path / "01.png").text[METADATA_KEY])["text"] == "Zoë met <b>a 猫</b>."


def test_the_page_holds_everything_and_nothing_else(pictures):
    html = render_page(Story.of('One <script>alert("1")</script> & more.', pictures[0], "Two."), "")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r'(src|href)="(?!data:)', html) and "url(" not in html
    assert html.count('<img src="data:image/png;base64,') == 1
    assert html.count("<section") == 2
    assert "{{" not in html


@pytest.mark.parametrize(
    "text, title",
    [
        ("Mia ran. She fell.", "Mia ran"),
        ("", "A story"),
        ("word " * 40, "word word word word word word word word word word word word…"),
    ],
)
def test_titles(text, title):
    assert f"<title>{title}</title>" in render_page(Story.of(text))


def test_a_story_that_opens_with_a_picture_is_called_by_its_first_text(pictures):
    assert "<title>Otto runs</title>" in render_page(Story.of(pictures[0], "Otto runs. It rains.", pictures[1]))


def test_curly_braces_of_a_story_stay(pictures):
    assert render_page(Story.of("Write {{sheets}} here.", pictures[0]), "").count("<img") == 1
    assert "{{sheets}}" in render_page(Story.of("Write {{sheets}} here."), "T")


def test_nothing_half_written(tmp_path, pictures, monkeypatch):
    save_story(tmp_path, Story.of("Old.", pictures[0]))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    monkeypatch.setattr("os.fdopen", lambda handle, mode: FullDisk(handle))
    with pytest.raises(OutputError, match="01.png' cannot be written: No space left on device"):
        save_story(tmp_path, Story.of("New.", pictures[1]))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_second_save_writes_the_new_panel_only(tmp_path, pictures, monkeypatch):
    from comfy_mminterleaved.stories import page as book

    story = Story.of("One.", pictures[0], "Two.", pictures[1])
    save_story(tmp_path, story)
    written, write = [], book.atomic_write
    monkeypatch.setattr(book, "atomic_write", lambda path, data: written.append(path.name) or write(path, data))
    save_story(tmp_path, story.add("Three.", pictures[2]))
    assert written == ["03.png", "story.html"]
    written.clear()
    save_story(tmp_path, Story.of("One.", pictures[3], "Two.", pictures[1]))
    assert written == ["01.png", "story.html"]


def test_a_picture_first_story_names_the_text_of_a_picture_once_it_is_there(tmp_path, pictures):
    story = Story((pictures[0],), image_first=True)
    save_story(tmp_path, story)
    save_story(tmp_path, story.add("Otto runs."))
    assert json.loads(Image.open(tmp_path / "01.png").text[METADATA_KEY])["text"] == "Otto runs."
    assert load_story(tmp_path).image_first is True


def test_a_photograph_is_kept_as_it_is_and_embedded_scaled(tmp_path):
    """Case 12: the folder has the camera's own bytes, and going on sees the same pixels."""
    import numpy as np

    from comfy_mminterleaved import ImageSegment

    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype="uint8")).resize((2000, 1500), 3)
    noise = np.asarray(colours).astype(int) + rng.integers(-6, 7, (1500, 2000, 3))
    Image.fromarray(noise.clip(0, 255).astype("uint8")).save(tmp_path / "photo.jpg", quality=92)
    (tmp_path / "book").mkdir()
    story = Story.of(ImageSegment.of(tmp_path / "photo.jpg"), "Mia waves.")
    save_story(tmp_path / "book", story)
    assert (tmp_path / "book" / "01.jpg").read_bytes() == (tmp_path / "photo.jpg").read_bytes()
    page_size = (tmp_path / "book" / "story.html").stat().st_size
    assert page_size < (tmp_path / "photo.jpg").stat().st_size and page_size < 1_500_000
    again = load_story(tmp_path / "book")
    assert again.images[0].digest == story.images[0].digest
    save_story(tmp_path / "book", again.add("Then."))
    assert (tmp_path / "book" / "01.jpg").read_bytes() == (tmp_path / "photo.jpg").read_bytes()


@pytest.mark.parametrize(
    "text, language, initial",
    [
        ("Mia waves.", "en", True),
        ("שלום, מיה מנופפת בכפר.", "he", True),
        ("ميا تلوح في القرية.", "ar", False),
        ("ミアは村で手を振る。", "ja", False),
        ("米娅在村里挥手。", "zh", False),
        ("미아가 손을 흔든다.", "ko", False),
        ("Миа машет.", "ru", True),
        ("", "en", True),
        ("123", "en", True),
        ("Mia said שלום.", "en", True),
    ],
)
def test_the_page_is_in_the_script_of_its_text(pictures, text, language, initial):
    """Case 4: a large first letter stands where the text begins, and only in scripts whose letters stand apart."""
    html = render_page(Story.of(text, pictures[0]))
    assert f'<html lang="{language}">' in html and 'dir="auto"' in html
    assert ('<main class="initials">' in html) == initial
    assert "float: inline-start" in html and "float: left" not in html


class FullDisk:
    """A file on a full disk."""

    def __init__(self, handle):
        self.handle = handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.handle)

    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_story_that_is_not_there(tmp_path):
    with pytest.raises(StoryError, match="cannot be read: No such file"):
        load_story(tmp_path / "story.json")


def test_a_story_replaces_the_one_before_and_nothing_else(tmp_path, pictures):
    (tmp_path / "07.png").write_bytes(b"mine")
    save_story(tmp_path, Story.of(*pictures[:3]))
    save_story(tmp_path, Story.of(pictures[4]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["01.png", "07.png", "story.html", "story.json"]
