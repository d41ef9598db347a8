import json
import os
import re

import pytest
from PIL import Image

from comfy_mminterleaved import Story
from comfy_mminterleaved.book import METADATA_KEY, load_story, page, save_story
from comfy_mminterleaved.errors import OutputError, StoryError


def test_a_saved_story_comes_back(tmp_path, pictures):
    story = Story.of("Zoë met <b>a 猫</b>.", pictures[0], "Then & then.", pictures[1])
    files = save_story(tmp_path, story, "A title", {"seed": 3})
    assert [f.name for f in files] == ["01.png", "02.png", "story.json", "story.html"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files)
    again = load_story(tmp_path / "story.json")
    assert again.text == story.text and [p.key for p in again.pictures] == [p.key for p in story.pictures]
    data = json.loads(Image.open(tmp_path / "02.png").text[METADATA_KEY])
    assert data == {"picture": "02.png", "panel": 2, "text": "Then & then.", "title": "A title", "settings": {"seed": 3}}
    assert json.loads(Image.open(tmp_path / "01.png").text[METADATA_KEY])["text"] == "Zoë met <b>a 猫</b>."


def test_the_page_holds_everything_and_nothing_else(pictures):
    html = page(Story.of('One <script>alert("1")</script> & more.', pictures[0], "Two."), "")
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
    assert f"<title>{title}</title>" in page(Story.of(text))


def test_a_story_that_opens_with_a_picture_is_called_by_its_first_text(pictures):
    assert "<title>Otto runs</title>" in page(Story.of(pictures[0], "Otto runs. It rains.", pictures[1]))


def test_curly_braces_of_a_story_stay(pictures):
    assert page(Story.of("Write {{sheets}} here.", pictures[0]), "").count("<img") == 1
    assert "{{sheets}}" in page(Story.of("Write {{sheets}} here."), "T")


def test_nothing_half_written(tmp_path, pictures, monkeypatch):
    save_story(tmp_path, Story.of("Old.", pictures[0]))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    monkeypatch.setattr("os.fdopen", lambda handle, mode: FullDisk(handle))
    with pytest.raises(OutputError, match="01.png' cannot be written: No space left on device"):
        save_story(tmp_path, Story.of("New.", pictures[1]))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


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
