from dataclasses import replace

import pytest

from comfy_mminterleaved import (
    ImageGenerationConfig,
    ImageSegment,
    MMInterleavedPipeline,
    Story,
    TextGenerationConfig,
    TextSegment,
)
from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryError, StoryTooLongError
from comfy_mminterleaved.stories.storyboard import plan_panels

S, D = TextGenerationConfig(max_new_tokens=9), ImageGenerationConfig(num_inference_steps=1, scheduler="ddim")


def kinds(story):
    return "".join("t" if isinstance(s, TextSegment) else "p" for s in story)


@pytest.mark.parametrize(
    "opening, picture_first, kind",
    [
        ("", False, "tptp"),
        ("", True, "ptpt"),
        ("t", False, "tptp"),
        ("t", True, "ptpt"),
        ("tp", False, "tptptp"),
        ("t", None, "tptp"),
        ("p", None, "ptptpt"),
        ("tp", None, "tptptp"),
        ("pt", None, "ptptpt"),
        ("pt", False, "tptptp"),
        ("tp", True, "ptptpt"),
        ("p", True, "ptptpt"),
        ("p", False, "tptptp"),
    ],
)
def test_tell_keeps_its_promise(tiny_random, pictures, opening, picture_first, kind):
    story = Story.of(*({"t": "Otto woke up.", "p": pictures[0]}[part] for part in opening))
    told = tiny_random.generate_story(story, 2, picture_first, S, D)
    assert kinds(told) == kind
    assert told.image_first == (kind[0] == "p")
    pairs = [(bool(p.text), p.image is not None) for p in told.panels()]
    assert pairs == [(True, True)] * len(told.images)
    assert len(told.images) - len(story.images) == 2


def test_tell_is_write_and_draw_by_hand(tiny_random, pictures):
    story = Story.of("Otto woke up.", pictures[0])
    told = tiny_random.generate_story(story, 2, text_config=S, image_config=D, seeds=[7, 9])
    hand = story
    for seed in (7, 9):
        written = tiny_random.generate_text(hand, replace(S, seed=seed))
        hand = hand.add(TextSegment(written.text, written.tokens))
        hand = hand.add(tiny_random.generate_image(hand, replace(D, seed=seed)))
    assert [s.digest if isinstance(s, ImageSegment) else s.token_ids for s in told] == [
        s.digest if isinstance(s, ImageSegment) else s.token_ids for s in hand
    ]


def test_rerolling_the_last_panel_leaves_the_others(tiny_random, pictures):
    one, two = (
        tiny_random.generate_story(Story.of("Otto."), 2, text_config=S, image_config=D, seeds=[0, seed])
        for seed in (1, 2)
    )
    assert one.images[0].digest == two.images[0].digest
    assert one.images[1].digest != two.images[1].digest


def test_nothing_is_encoded_or_read_twice(tiny_random, pictures, monkeypatch):
    encoded, read = [], []
    encode, forward = tiny_random.encoder.forward, tiny_random.llm.forward
    monkeypatch.setattr(tiny_random.encoder, "forward", lambda x: encoded.append(len(x)) or encode(x))
    monkeypatch.setattr(tiny_random.llm, "forward", lambda x, *a: read.append(x.shape[1]) or forward(x, *a))
    tiny_random.clear_cache()
    told = tiny_random.generate_story(Story.of("Otto woke up.", pictures[0]), 3, text_config=S, image_config=D)
    assert sum(encoded) == 3  # the last picture is not looked at by anyone
    assert sum(read) == len(tiny_random.text.tokenize(Story(told.segments[:-1]))) + 1  # and the last start-of-image


def test_segments_are_reported_as_they_come(tiny_random):
    seen = []
    told = tiny_random.generate_story(
        Story(), 2, text_config=S, image_config=D, on_segment=lambda s: seen.append(kinds(s))
    )
    assert seen == ["t", "tp", "tpt", "tptp"] and kinds(told) == seen[-1]


def test_a_story_too_long_says_by_how_much(tiny_random):
    story = Story.of("x" * 1100)
    with pytest.raises(
        StoryTooLongError,
        match=r"needs 1110 tokens \(1101 of the story and up to 9 new\), 86 more than the LLM's context of 1024"
        r"; make it shorter, or let its oldest panels be dropped \(drop_oldest",
    ):
        tiny_random.generate_text(story, S)
    with pytest.raises(StoryTooLongError, match=r"; make it shorter\.$"):
        tiny_random.generate_text(story, S, drop_oldest=True)  # one text alone cannot be made shorter


def test_oldest_panels_are_dropped_only_when_asked(tiny_random, pictures):
    story = Story.of("x" * 500, pictures[0], "y" * 505, pictures[1], "z")
    with pytest.raises(StoryTooLongError, match="drop_oldest"):
        tiny_random.generate_text(story, S)
    written = tiny_random.generate_text(story, S, drop_oldest=True)
    assert written.tokens == tiny_random.generate_text(story.drop_oldest_panel(), S).tokens


def test_a_promise_that_may_not_fit_is_refused_before_any_work(tiny_random, monkeypatch):
    monkeypatch.setattr(tiny_random, "generate_image", None)
    monkeypatch.setattr(tiny_random, "generate_text", None)
    with pytest.raises(StoryTooLongError, match="A story with 30 more panels needs"):
        tiny_random.generate_story(Story.of("Otto."), 30, text_config=TextGenerationConfig(max_new_tokens=30))
    with pytest.raises(StoryTooLongError, match="51 images, 2 more than the 49 that the LLM can tell apart"):
        tiny_random.generate_story(
            Story.of("Otto."), 51, text_config=TextGenerationConfig(max_new_tokens=1, min_new_tokens=0)
        )
    with pytest.raises(SettingError, match="scheduler 'no'"):
        tiny_random.generate_story(Story.of("Otto."), 2, image_config=ImageGenerationConfig(scheduler="no"))
    with pytest.raises(SettingError, match="panels must be at least 1, not 0"):
        tiny_random.generate_story(Story.of("Otto."), 0)
    with pytest.raises(SettingError, match="one seed per panel, 2, not 1"):
        tiny_random.generate_story(Story.of("Otto."), 2, seeds=[1])
    with pytest.raises(SettingError, match="Step.TEXT, Step.IMAGE or a TextSegment, not 'sing'"):
        tiny_random.run_plan(Story.of("Otto."), [("sing",)])


def test_a_long_story_goes_on_when_the_oldest_may_go(tiny_random):
    plan = plan_panels(Story(), 3)
    told = tiny_random.run_plan(Story.of("x" * 990), plan, TextGenerationConfig(max_new_tokens=20), D, drop_oldest=True)
    assert len(told.images) == 3 and told.segments[0].text == "x" * 990


def test_more_pictures_than_the_table_holds(tiny_random, pictures):
    story = Story.of(*pictures * 7)
    with pytest.raises(StoryTooLongError, match="56 images, 7 more than the 49"):
        tiny_random.generate_text(story, S)
    assert tiny_random.generate_text(story, S, drop_oldest=True).tokens


def test_ask_caption_choose(tiny_random, pictures):
    story = Story.of(pictures[0])
    assert tiny_random.answer(story, "What is it?").tokens == tiny_random.answer(story, " What is it? ").tokens
    captions = tiny_random.caption(pictures[0], num_outputs=2)
    assert len(captions) == 2 and captions[0].score >= captions[1].score
    ranked = tiny_random.rank(story, ["a bear", "a fox", "a bee"], "What is it?")
    assert [c.log_prob for c in ranked] == sorted((c.log_prob for c in ranked), reverse=True)
    assert {c.text for c in ranked} == {"a bear", "a fox", "a bee"}
    for bad in (
        lambda: tiny_random.answer(story, " "),
        lambda: tiny_random.caption(Story.of("no picture")),
        lambda: tiny_random.rank(story, []),
        lambda: tiny_random.rank(story, [""]),
    ):
        with pytest.raises(StoryError):
            bad()


def test_the_question_stands_around_the_story(pictures):
    from comfy_mminterleaved.generation.vqa import prompted

    found = prompted("Look. {story}{question} Answer:", Story.of("One.", pictures[0]), question="Who?")
    assert [s.text if isinstance(s, TextSegment) else "p" for s in found] == ["Look.", "One.", "p", "Who? Answer:"]


def test_forget_lets_go(tiny_random, pictures):
    tiny_random.generate_text(Story.of(pictures[0]), S)
    assert tiny_random.text.cache is not None
    tiny_random.clear_cache()
    assert tiny_random.text.cache is None


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there(device):
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(CheckpointError, match=f"The device '{device}' cannot be used"):
        MMInterleavedPipeline.load("tiny-random", device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["eager", "embedding_bag"])
def test_half_precision(pictures, monkeypatch, dtype, backend):
    """What CUDA runs by default, through the gather that it takes and the CPU's: all of it, near to float32."""
    import torch

    from comfy_mminterleaved.models import deform_attn as sampling

    monkeypatch.setitem(sampling.BACKENDS, "embedding_bag", sampling.BACKENDS[backend])
    half, full = (MMInterleavedPipeline.load("tiny-random", "cpu", getattr(torch, d)) for d in (dtype, "float32"))
    story = Story.of("Otto.", pictures[0], "They met", pictures[1])
    drawn = [model.generate_image(story, D).pixels for model in (half, full)]
    assert (drawn[0] - drawn[1]).abs().mean() < 0.05
    scores = [model.score(story, ["a bear", "a fox"]) for model in (half, full)]
    assert scores[0] == pytest.approx(scores[1], rel=0.03)
    assert len(half.generate_text(story, S).tokens) == 9


def test_captions_of_many_images_are_scored_at_once(tiny_random, pictures):
    """As after each image alone; what was read stays read."""
    images = tiny_random.encode_images(Story.of(*pictures[:3])).images
    text = tiny_random.text
    alone = [text.score(text.caption_story(Story.of(image)), ["A bear waves"])[0] for image in images]
    cache = text.cache
    assert text.caption_scores(images, "A bear waves") == pytest.approx(alone, rel=1e-4) and text.cache is cache
    with pytest.raises(StoryError, match="must not be empty"):
        text.caption_scores(images, "")
    with pytest.raises(StoryError, match="no features"):
        text.caption_scores(pictures[:1], "A bear")


def test_another_models_features_are_not_taken_for_its_own(tiny_random, pictures):
    from comfy_mminterleaved.pipeline import tiny_random_pipeline as make

    other, story = make(seed=5), Story.of(pictures[0], "Otto.")
    want = tiny_random.generate_text(story, S).tokens
    tiny_random.clear_cache()
    foreign = other.encode_images(story)
    assert tiny_random.generate_text(foreign, S).tokens == want
    assert tiny_random.encode_images(foreign).images[0].features.encoder_id is tiny_random.encoder.encoder_id
