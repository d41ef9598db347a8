import json

import pytest

from comfy_mminterleaved import ImageSegment
from comfy_mminterleaved.errors import StoryError
from comfy_mminterleaved.stories.images import encode_png
from comfy_mminterleaved.stories.storyboard import Step, load_storyboard


@pytest.fixture
def write(tmp_path, pictures):
    (tmp_path / "art").mkdir()
    for name, picture in zip("abc", pictures):
        (tmp_path / "art" / f"{name}.png").write_bytes(encode_png(picture.pixels))

    def write(data):
        path = tmp_path / "board.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return path

    return write


def parts(story, pictures):
    names = {p.digest: name for p, name in zip(pictures, "abc")}
    return [names[s.digest] if isinstance(s, ImageSegment) else s.text for s in story]


def own(*stories):
    return {"format": "mm-interleaved-storyboard", "version": 1, "stories": list(stories)}


def test_own_format(write, pictures):
    board = own(
        {"title": "Zoë", "opening": [{"text": "One."}, {"picture": "art/b.png"}], "panels": 2, "seed": 5},
        {"opening": "Two."},
        {"opening": [], "panels": 1, "picture_first": True},
    )
    first, second, third = load_storyboard(write(board))
    assert parts(first.opening, pictures) == ["One.", "b"] and (first.title, first.seed) == ("Zoë", 5)
    assert first.steps_after(first.opening) == ((Step.TEXT, Step.IMAGE),) * 2
    assert second.steps_after(second.opening) == ((Step.IMAGE,), (Step.TEXT, Step.IMAGE), (Step.TEXT, Step.IMAGE))
    assert third.opening.image_first and third.steps_after(third.opening) == ((Step.IMAGE, Step.TEXT),)


def annotation(**changes):
    data = {
        "sentences": ["one", "two", "three"],
        "images": ["./art/a.png", "art/b.png", "art/c.png"],
        "sentence_ixs": [0, 1, 2],
        "image_first": [True, False, False],
        "generate_mode": "generate_texts",
        "num_iter": 3,
    }
    return [{**data, **changes}]


def test_the_references_format(write, pictures):
    plan = load_storyboard(write(annotation()))[0]
    assert parts(plan.opening, pictures) == ["a", "one", "two", "b", "three", "c"]
    assert plan.steps == ((Step.TEXT, Step.IMAGE), (Step.TEXT,)) and plan.panels == 1
    drawn = load_storyboard(write(annotation(generate_mode="generate_images", num_iter=2)))[0]
    assert parts(drawn.opening, pictures) == ["a", "one", "two", "b", "three"]
    assert drawn.steps == ((Step.IMAGE, Step.TEXT),)


def test_pictures_fill_their_places_in_the_order_listed(write, pictures):
    """As in the reference: the place is the sentence's, the order the list's."""
    plan = load_storyboard(write(annotation(sentence_ixs=[2, 0, 0], image_first=[False, False, True])))[0]
    assert parts(plan.opening, pictures) == ["a", "one", "b", "two", "three", "c"]


def test_the_picture_to_draw_need_not_exist(write, pictures):
    board = annotation(images=["art/a.png", "art/b.png", "nowhere.png"], generate_mode="generate_images", num_iter=1)
    assert load_storyboard(write(board))[0].steps == ((Step.IMAGE,),)


@pytest.mark.parametrize(
    "data, message",
    [
        ("{", "is not JSON in UTF-8"),
        ("{}", "is no storyboard"),
        ("[]", "holds no stories"),
        ("[3]", "Story 1 of 'board.json' must be an object, not 3"),
        (own({"opening": "x", "panels": 0}), "panels must be a whole number from 1 to 1000, not 0"),
        (own({"opening": "x", "seed": "a"}), "seed must be a whole number from 0 to .*, not 'a'"),
        (own({"opening": "x", "title": 3}), "title must be text, not 3"),
        (own({"opening": [{"picture": "../a.png"}]}), "Story 1 of 'board.json': .*'../a.png' must be named by a path"),
        (own({"opening": [{"bild": "a.png"}]}), "Story 1 of 'board.json': Segment 1 .* must be a text or an image"),
        (own({"opening": 7}), "opening must be text or a list of texts and images, not 7"),
        (own({"opening": "x", "panel": 3}), "settings that are not known: panel"),
        (own({"opening": "x", "seed": 2**64}), "seed must be a whole number from 0 to .*, not 18446744073709551616"),
        (own({"opening": "x", "seed": 10**40}), "one of over thirty digits"),
        (json.dumps(own({"opening": "x", "seed": 7})).replace("7", "7" * 5000), "is not JSON in UTF-8"),
        (own({"opening": "x", "panels": 300_000_000}), "panels must be a whole number from 1 to 1000, not 300000000"),
        (own({"opening": "x", "panels": []}), "must list 1 to 1000 panels, not 0"),
        (own({"opening": "x", "panels": ["a", {"txt": "b"}]}), "panel 2 must be text, or an object with its text"),
        (own({"opening": "x", "panels": [["a"]]}), "panel 1 must be text, or an object with its text"),
        (own({"opening": "x", "title": ["a"]}), "title must be text"),
        (own({"opening": "x", "image_first": "no"}), "image_first must be true or false, not 'no'"),
        (own({"opening": "x", "picture_first": "no"}), "picture_first must be true or false, not 'no'"),
        ({**own({"opening": "x"}), "version": 2}, "has version 2; this release reads version 1"),
        ("[" * 100_000, "is not JSON in UTF-8"),
        (own({"opening": [{"picture": "art/z.png"}]}), "no image file"),
        (annotation(images=["a"]), "has 1 images, 3 sentence_ixs and 3 image_first; they must agree"),
        (annotation(sentence_ixs=[0, 1, 3]), "a sentence_ix must be from 0 to 2, not 3"),
        (annotation(generate_mode="sing"), "generate_mode must be one of generate_images, generate_texts, not 'sing'"),
        (annotation(num_iter=0), "num_iter must be a whole number from 1 to 2000, not 0"),
        (annotation(sentences="x"), "must have the lists"),
        (annotation(sentences=[1, 2, 3]), "must hold texts"),
        (annotation(generate_mode="generate_images", image_first=[True] * 3), "must be at the end"),
        (annotation(images=["/etc/a.png", "art/b.png", "art/c.png"]), "'/etc/a.png' must be named"),
    ],
)
def test_bad_boards(write, data, message):
    with pytest.raises(ValueError, match=message):
        load_storyboard(write(data))


def test_no_board(tmp_path):
    with pytest.raises(StoryError, match="cannot be read: No such file"):
        load_storyboard(tmp_path / "none.json")
