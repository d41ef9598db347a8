import json
from pathlib import Path

import pytest
from places import HERE

from comfy_mminterleaved import ImageSegment
from comfy_mminterleaved.errors import MMInterleavedError, StoryError
from comfy_mminterleaved.stories import storyboard
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
        ("{", "is not JSON"),
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
        (json.dumps(own({"opening": "x", "seed": 7})).replace("7", "7" * 5000), "is not JSON"),
        (own({"opening": "x", "panels": 300_000_000}), "panels must be a whole number from 1 to 1000, not 300000000"),
        (own({"opening": "x", "panels": []}), "must list 1 to 1000 panels, not 0"),
        (own({"opening": "x", "panels": ["a", {"txt": "b"}]}), "panel 2 must be text, or an object with its text"),
        (own({"opening": "x", "panels": [["a"]]}), "panel 1 must be text, or an object with its text"),
        (own({"opening": "x", "title": ["a"]}), "title must be text"),
        (own({"opening": "x", "image_first": "no"}), "image_first must be true or false, not 'no'"),
        (own({"opening": "x", "picture_first": "no"}), "picture_first must be true or false, not 'no'"),
        ({**own({"opening": "x"}), "version": 2}, "has version 2; this release reads version 1"),
        ("[" * 100_000, "is not JSON"),
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


# ---- Markdown and CSV ----

MARKDOWN = """# Otto & Mia
panels: 4
seed: 7
image_first: no

![Otto](art/a.png) Otto waves
in the village.

Otto runs: it snows.

## Zoë 猫 ##

Zoë sleeps.
"""
ROWS = 'Otto,Otto waves.,art/b.png,3,2,He runs.,\n"Mia, the fox",Hello.,,,,,\n'
TABLE = f"title,text,image,panels,seed,panel 1,panel 2\n{ROWS}"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_markdown(write, tmp_path, pictures, line_end, encoding):
    write("{}")
    path = tmp_path / "board.md"
    path.write_bytes(MARKDOWN.replace("\n", line_end).encode(encoding))
    first, second = load_storyboard(path)
    assert (first.title, first.panels, first.seed, first.opening.image_first) == ("Otto & Mia", 4, 7, False)
    assert parts(first.opening, pictures) == ["a", "Otto waves in the village."]
    assert first.script == ("Otto runs: it snows.", None, None, None)
    assert (second.title, second.panels, second.script) == ("Zoë 猫", 3, ("Zoë sleeps.", None, None))


@pytest.mark.parametrize("delimiter, suffix", [(",", "csv"), (";", "csv"), ("\t", "tsv")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(write, tmp_path, pictures, delimiter, suffix, line_end, encoding):
    write("{}")
    text = TABLE.replace(", the fox", "\0").replace(",", delimiter).replace("\0", ", the fox").replace("\n", line_end)
    path = tmp_path / f"board.{suffix}"
    path.write_bytes(text.encode(encoding))
    first, second = load_storyboard(path)
    assert parts(first.opening, pictures) == ["Otto waves.", "b"]
    assert (first.panels, first.seed, first.script) == (3, 2, ("He runs.", None, None))
    assert (second.title, second.panels, second.opening.text) == ("Mia, the fox", 3, "Hello.")


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("b.md", "Otto waves.", "begins with 'Otto waves.'; each story begins with a heading"),
        ("b.md", "", "holds no stories"),
        ("b.md", "# A\nseed: many\n\nHi.", "seed must be a whole number, not 'many'"),
        ("b.md", "# A\npanels: 1\n\nOne.\n\nTwo.", "the story 'A' has 2 texts for 1 panels"),
        ("b.md", "# A\n\nOne.\n\n![x](art/a.png)", "has the image 'art/a.png' after the text of a panel"),
        ("b.md", "# A\n\n![x](../a.png) Hi.", "below"),
        ("b.md", "# A\npanels: 5000\n\nHi.", "1 to 1000"),
        ("b.csv", "title,texts\nA,b\n", "has the columns texts; the first row must name columns among title, text"),
        ("b.csv", "title\nA\n", "has no column text, image or panel"),
        ("b.csv", "title,text\nA,b,c,d\n", "the row of 'A' has 4 fields for 2 columns"),
        ("b.csv", "text,image_first\nA,perhaps\n", "image_first must be true or false, not 'perhaps'"),
        ("b.json", "# Otto", "or a file in Markdown (.md) or CSV (.csv)"),
        (
            "b.json",
            '{"format": "mm-interleaved-storyboard", "stories": [{"pannels": 3}]}',
            "storyboard.schema.json has all",
        ),
    ],
)
def test_bad_tables(write, tmp_path, name, text, sentence):
    write("{}")
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(MMInterleavedError) as error:
        load_storyboard(tmp_path / name)
    assert sentence in str(error.value)


def test_text_in_another_encoding(tmp_path):
    (tmp_path / "b.md").write_bytes("# Zoë\n\nHi.".encode("utf-16"))
    with pytest.raises(StoryError, match="is not text in UTF-8.*save it as UTF-8"):
        load_storyboard(tmp_path / "b.md")


def test_the_schema_describes_what_is_read():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(storyboard.__file__).with_name("storyboard.schema.json").read_text())
    example = HERE.parent / "workflows" / "example storyboard" / "storyboard.json"
    jsonschema.validate(json.loads(example.read_text(encoding="utf-8")), schema)
    for bad in ({"panels": 0}, {"pannels": 1}, {"opening": 3}, {"seed": -1}, {"panels": [{"texts": "x"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(own(bad), schema)
