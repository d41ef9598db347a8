import json

import pytest

from comfy_mminterleaved import ImageSegment, Story, TextSegment
from comfy_mminterleaved.errors import StoryError
from comfy_mminterleaved.generation.tokens import tokenize_story


def panels(story):
    return [(p.text, p.image.digest[:4] if p.image else None) for p in story.panels()]


def test_adding_returns_a_new_story(pictures):
    story = Story.of("One.")
    longer = story.add(pictures[0], "Two.", "")
    assert len(story) == 1 and len(longer) == 3 and longer.text == "One.\nTwo."
    with pytest.raises(AttributeError):
        story.segments = ()
    with pytest.raises(StoryError, match="must be a str, not int"):
        TextSegment(7)


def test_panels(pictures):
    a, b = pictures[:2]
    ka, kb = a.digest[:4], b.digest[:4]
    assert panels(Story.of("x", "y ", a, " z", b)) == [("x y", ka), ("z", kb)]
    assert panels(Story.of(a, "x", b, "y", "z")) == [("x", ka), ("y z", kb)]
    assert panels(Story.of(a, "x", b, "y", a)) == [("", ka), ("x", kb), ("y", ka)]
    assert panels(Story.of(a, b)) == [("", ka), ("", kb)] and panels(Story.of(a)) == [("", ka)]
    assert panels(Story.of(a, b, "y")) == [("", ka), ("y", kb)]
    assert panels(Story.of("x", a, b, "end")) == [("x", ka), ("", kb), ("end", None)]
    assert panels(Story()) == []


def test_without_oldest(pictures):
    a, b = pictures[:2]
    assert Story.of("x", a, "y", b).drop_oldest_panel().text == "y"
    assert Story.of(a, "x", "z", b, "y").drop_oldest_panel().segments[0] is b
    assert Story.of("x", "y").drop_oldest_panel().text == "y"


@pytest.mark.parametrize(
    "parts, image_first, arranged",
    [
        ("pt", False, "tp"),
        ("tp", True, "pt"),
        ("tp", False, "tp"),
        ("p", False, "p"),
        ("ptpt", False, "tptp"),
        ("ttp", True, "ptt"),
        ("ppt", False, "ptp"),
        ("tpt", True, "ptt"),
        ("", True, ""),
    ],
)
def test_arranged_panels_stay_together(pictures, parts, image_first, arranged):
    supply = iter(pictures)
    story = Story.of(*(next(supply) if part == "p" else f"text {i}" for i, part in enumerate(parts)))
    other = story.arrange(image_first)
    assert "".join("p" if isinstance(s, ImageSegment) else "t" for s in other) == arranged
    assert other.image_first is image_first
    if parts != "tpt":  # an unfinished panel of text first is, picture first, more of the text before
        assert panels(other) == panels(story)


def test_the_order_is_kept(pictures):
    """A picture-first story that ends with a picture, as while it is told, is not taken for a text-first one."""
    a, b = pictures[:2]
    ka, kb = a.digest[:4], b.digest[:4]
    told = Story((a,), image_first=True).add("x", b)
    assert panels(told) == [("x", ka), ("", kb)] and panels(told.add("y")) == [("x", ka), ("y", kb)]
    again = Story.from_json(json.dumps(told.to_json()))
    assert again.image_first is True and panels(again) == [("x", ka), ("", kb)]
    assert panels(Story((a, TextSegment("x")), image_first=False)) == [("", ka), ("x", None)]
    old = {"format": "mm-interleaved-story", "picture_first": False, "segments": []}
    assert Story.from_json(old).image_first is False


def test_what_the_model_wrote_keeps_its_token_ids(pictures):
    story = Story.of("One.", TextSegment("Two.", (5, 6)), pictures[0])
    data = json.loads(json.dumps(story.to_json()))
    assert [s.get("token_ids") for s in data["segments"]] == [None, [5, 6], None]
    again = Story.from_json(data)
    assert again.segments[1].token_ids == (5, 6) and again.segments[0].token_ids is None
    for bad in ("x", [1.5], [-1], [True], {}):
        data["segments"][1]["token_ids"] = bad
        with pytest.raises(StoryError, match="Segment 2 of the story file: token_ids must be a list of whole numbers"):
            Story.from_json(data)


def test_json_round_trip(pictures, tmp_path):
    story = Story.of("Zoë sah\neine 猫.", pictures[0], "<b>&", pictures[1])
    data = json.loads(json.dumps(story.to_json()))
    again = Story.from_json(data)
    assert panels(again) == panels(story)
    assert Story.from_json(json.dumps(data)).text == story.text


@pytest.mark.parametrize(
    "data, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (
            {"format": "mm-interleaved-story", "version": 2, "segments": []},
            "has version 2; this release reads version 1",
        ),
        ({"format": "mm-interleaved-story", "segments": [{"text": "a\ud800b"}]}, "has half a character at place 1"),
        (
            {"format": "mm-interleaved-story", "segments": [{"picture": "data:image/png;base64,\xe4"}]},
            "not valid base64",
        ),
        ("[]", "must hold an object, not a list"),
        ({}, "no format"),
        (
            {"format": "mm-interleaved-story", "segments": [7]},
            "Segment 1 of the story file must be a text or an image, not 7",
        ),
        (
            {"format": "mm-interleaved-story", "segments": [{"picture": "../x.png"}]},
            "'../x.png' must be named by a path below",
        ),
        ({"format": "mm-interleaved-story", "image_first": 3, "segments": []}, "image_first must be true or false"),
        ({"format": "mm-interleaved-story", "segments": [{"image": "..\\x.png"}]}, "must be named by a path below"),
        ({"format": "mm-interleaved-story", "segments": [{"image": "a\0b.png"}]}, "must be named by a path below"),
        ({"format": "mm-interleaved-story", "segments": [{"picture": "/etc/x.png"}]}, "'/etc/x.png' must be named"),
        ({"format": "mm-interleaved-story", "segments": [{"picture": "C:\\x.png"}]}, "must be named"),
        ({"format": "mm-interleaved-story", "segments": [{"picture": "nothing.png"}]}, "no image file"),
    ],
)
def test_bad_json(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Story.from_json(data, tmp_path)


# ---- tokens ----


def ids(model, *parts):
    return list(tokenize_story(Story.of(*parts), model.tokenizer, model.config.llm).input_ids)


def test_layout(tiny_random, pictures):
    c, t = tiny_random.config.llm, tiny_random.config.llm.special_tokens
    picture = [t.soi] + [t.image] * c.num_img_token
    a, b = (tiny_random.tokenizer.encode(x) for x in ("Hello.", "Bye."))
    assert ids(tiny_random) == [t.bos]
    assert ids(tiny_random, "Hello. ", pictures[0], " Bye.") == [t.bos, *a, *picture, *b]
    assert ids(tiny_random, "Hello.", "Bye.") == [t.bos, *tiny_random.tokenizer.encode("Hello. Bye.")]
    written = TextSegment("Hello.", (40, 41))
    assert ids(tiny_random, written, "Bye.") == [t.bos, 40, 41, *tiny_random.tokenizer.encode(" Bye.")]
    assert ids(tiny_random, pictures[0], "Bye.") == [t.bos, *picture, *b]


def test_visibility_restarts_at_a_bos(tiny_random, pictures):
    c, t = tiny_random.config.llm, tiny_random.config.llm.special_tokens
    story = Story.of(pictures[0], TextSegment("", (t.bos, 9)), pictures[1], TextSegment("", (9,)))
    visible = tokenize_story(story, tiny_random.tokenizer, c).image_mask(c)
    first, second = 2, 2 + c.num_img_token + 3
    assert visible[:first].sum() == 0
    assert visible[first : first + c.num_img_token, 0].all() and not visible[first + c.num_img_token :, 0].any()
    assert visible[second:, 1].all() and not visible[:second, 1].any()


@pytest.mark.parametrize(
    "text",
    ["<|image|>", "<|beginofimage|>", "<s>", "</s>", "a <s> b</s>", "<unk>", "<|endoftext|>", "\x00", "猫🐈 Zoë"],
)
def test_special_tokens_written_out_stay_text(tiny_random, text):
    special = tiny_random.config.llm.special_tokens.all()
    found = ids(tiny_random, text)[1:]
    assert not set(found) & special
    if text.isprintable():
        assert tiny_random.tokenizer.decode(found) == text


def test_special_tokens_stay_text_in_a_vocabulary_that_lists_them(tiny_random, tmp_path):
    """As in Vicuna's tokenizer.json, with <s> and the picture tokens added as special tokens."""
    from tokenizers import AddedToken

    from comfy_mminterleaved.tokenizer import Tokenizer, byte_level

    backend = byte_level(260)
    backend.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<s>", "</s>", "<|beginofimage|>", "<|image|>")]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", tiny_random.config.llm.special_tokens, 260)
    text = "See <|beginofimage|><|image|> and <s>."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < 260


def test_without_a_tokenizer_text_is_refused_in_a_sentence(tiny_random, pictures):
    with pytest.raises(StoryError, match="no tokenizer"):
        tokenize_story(Story.of("x"), None, tiny_random.config.llm)
    assert tokenize_story(Story.of(pictures[0], TextSegment("", (5,))), None, tiny_random.config.llm).images


def test_a_picture_can_be_anything_a_picture_can_be(photo):
    story = Story.of("x", ImageSegment.of(photo))
    assert story.images[0].size == (451, 300)
