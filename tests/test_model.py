from dataclasses import replace

import pytest

from comfy_mminterleaved import Drawing, MMInterleaved, Picture, Sampling, Story, Text
from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryError, StoryTooLong
from comfy_mminterleaved.stories.storyboard import plan_panels

S, D = Sampling(max_new_tokens=9), Drawing(steps=1, scheduler="ddim")


def kinds(story):
    return "".join("t" if isinstance(s, Text) else "p" for s in story)


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
def test_tell_keeps_its_promise(untrained, pictures, opening, picture_first, kind):
    story = Story.of(*({"t": "Otto woke up.", "p": pictures[0]}[part] for part in opening))
    told = untrained.tell(story, 2, picture_first, S, D)
    assert kinds(told) == kind
    assert told.image_first == (kind[0] == "p")
    pairs = [(bool(p.text), p.picture is not None) for p in told.panels()]
    assert pairs == [(True, True)] * len(told.pictures)
    assert len(told.pictures) - len(story.pictures) == 2


def test_tell_is_write_and_draw_by_hand(untrained, pictures):
    story = Story.of("Otto woke up.", pictures[0])
    told = untrained.tell(story, 2, sampling=S, drawing=D, seeds=[7, 9])
    hand = story
    for seed in (7, 9):
        written = untrained.write(hand, replace(S, seed=seed))
        hand = hand.add(Text(written.text, written.tokens))
        hand = hand.add(untrained.draw(hand, replace(D, seed=seed)))
    assert [s.key if isinstance(s, Picture) else s.tokens for s in told] == [
        s.key if isinstance(s, Picture) else s.tokens for s in hand
    ]


def test_rerolling_the_last_panel_leaves_the_others(untrained, pictures):
    one, two = (untrained.tell(Story.of("Otto."), 2, sampling=S, drawing=D, seeds=[0, seed]) for seed in (1, 2))
    assert one.pictures[0].key == two.pictures[0].key
    assert one.pictures[1].key != two.pictures[1].key


def test_nothing_is_encoded_or_read_twice(untrained, pictures, monkeypatch):
    encoded, read = [], []
    encode, forward = untrained.encoder.forward, untrained.llm.forward
    monkeypatch.setattr(untrained.encoder, "forward", lambda x: encoded.append(len(x)) or encode(x))
    monkeypatch.setattr(untrained.llm, "forward", lambda x, *a: read.append(x.shape[1]) or forward(x, *a))
    untrained.forget()
    told = untrained.tell(Story.of("Otto woke up.", pictures[0]), 3, sampling=S, drawing=D)
    assert sum(encoded) == 3  # the last picture is not looked at by anyone
    assert sum(read) == len(untrained.layout(Story(told.segments[:-1]))) + 1  # and the last start-of-image


def test_segments_are_reported_as_they_come(untrained):
    seen = []
    told = untrained.tell(Story(), 2, sampling=S, drawing=D, on_segment=lambda s: seen.append(kinds(s)))
    assert seen == ["t", "tp", "tpt", "tptp"] and kinds(told) == seen[-1]


def test_a_story_too_long_says_by_how_much(untrained):
    story = Story.of("x" * 1100)
    with pytest.raises(
        StoryTooLong,
        match=r"needs 1110 tokens \(1101 to read and up to 9 to come\), 86 more than the LLM's context of 1024",
    ):
        untrained.write(story, S)
    with pytest.raises(StoryTooLong, match="drop_oldest"):
        untrained.write(story, S, drop_oldest=True)  # one text alone cannot be made shorter


def test_oldest_panels_are_dropped_only_when_asked(untrained, pictures):
    story = Story.of("x" * 500, pictures[0], "y" * 505, pictures[1], "z")
    with pytest.raises(StoryTooLong, match="drop_oldest"):
        untrained.write(story, S)
    written = untrained.write(story, S, drop_oldest=True)
    assert written.tokens == untrained.write(story.without_oldest(), S).tokens


def test_a_promise_that_may_not_fit_is_refused_before_any_work(untrained, monkeypatch):
    monkeypatch.setattr(untrained, "draw", None)
    monkeypatch.setattr(untrained, "write", None)
    with pytest.raises(StoryTooLong, match="A story with 30 more panels needs"):
        untrained.tell(Story.of("Otto."), 30, sampling=Sampling(max_new_tokens=30))
    with pytest.raises(StoryTooLong, match="51 pictures, 2 more than the 49 that the LLM can tell apart"):
        untrained.tell(Story.of("Otto."), 51, sampling=Sampling(max_new_tokens=1, min_new_tokens=0))
    with pytest.raises(SettingError, match="scheduler 'no'"):
        untrained.tell(Story.of("Otto."), 2, drawing=Drawing(scheduler="no"))
    with pytest.raises(SettingError, match="panels must be at least 1, not 0"):
        untrained.tell(Story.of("Otto."), 0)
    with pytest.raises(SettingError, match="one seed a panel, 2, not 1"):
        untrained.tell(Story.of("Otto."), 2, seeds=[1])
    with pytest.raises(SettingError, match="'write', 'draw' or a Text, not 'sing'"):
        untrained.follow(Story.of("Otto."), [("sing",)])


def test_a_long_story_goes_on_when_the_oldest_may_go(untrained):
    plan = plan_panels(Story(), 3)
    told = untrained.follow(Story.of("x" * 990), plan, Sampling(max_new_tokens=20), D, drop_oldest=True)
    assert len(told.pictures) == 3 and told.segments[0].text == "x" * 990


def test_more_pictures_than_the_table_holds(untrained, pictures):
    story = Story.of(*pictures * 7)
    with pytest.raises(StoryTooLong, match="56 pictures, 7 more than the 49"):
        untrained.write(story, S)
    assert untrained.write(story, S, drop_oldest=True).tokens


def test_ask_caption_choose(untrained, pictures):
    story = Story.of(pictures[0])
    assert untrained.ask(story, "What is it?").tokens == untrained.ask(story, " What is it? ").tokens
    captions = untrained.caption(pictures[0], count=2)
    assert len(captions) == 2 and captions[0].score >= captions[1].score
    ranked = untrained.choose(story, ["a bear", "a fox", "a bee"], "What is it?")
    assert [c.log_probability for c in ranked] == sorted((c.log_probability for c in ranked), reverse=True)
    assert {c.option for c in ranked} == {"a bear", "a fox", "a bee"}
    for bad in (
        lambda: untrained.ask(story, " "),
        lambda: untrained.caption(Story.of("no picture")),
        lambda: untrained.choose(story, []),
        lambda: untrained.choose(story, [""]),
    ):
        with pytest.raises(StoryError):
            bad()


def test_the_question_stands_around_the_story(untrained, pictures):
    prompted = untrained._prompted("Look. {story}{question} Answer:", Story.of("One.", pictures[0]), question="Who?")
    assert [s.text if isinstance(s, Text) else "p" for s in prompted] == ["Look.", "One.", "p", "Who? Answer:"]


def test_forget_lets_go(untrained, pictures):
    untrained.write(Story.of(pictures[0]), S)
    assert untrained._read is not None
    untrained.forget()
    assert untrained._read is None


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there(device):
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(CheckpointError, match=f"The device '{device}' cannot be used"):
        MMInterleaved.load("untrained", device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["plain", "bag"])
def test_half_precision(pictures, monkeypatch, dtype, backend):
    """What CUDA runs by default, through the gather that it takes and the CPU's: all of it, near to float32."""
    import torch

    from comfy_mminterleaved.models import deform_attn as sampling

    monkeypatch.setitem(sampling.BACKENDS, "bag", sampling.BACKENDS[backend])
    half, full = (MMInterleaved.load("untrained", "cpu", getattr(torch, d)) for d in (dtype, "float32"))
    story = Story.of("Otto.", pictures[0], "They met", pictures[1])
    drawn = [model.draw(story, D).pixels for model in (half, full)]
    assert (drawn[0] - drawn[1]).abs().mean() < 0.05
    scores = [model.score(story, ["a bear", "a fox"]) for model in (half, full)]
    assert scores[0] == pytest.approx(scores[1], rel=0.03)
    assert len(half.write(story, S).tokens) == 9


def test_another_models_features_are_not_taken_for_its_own(untrained, pictures):
    from comfy_mminterleaved.pipeline import untrained as make

    other, story = make(seed=5), Story.of(pictures[0], "Otto.")
    want = untrained.write(story, S).tokens
    untrained.forget()
    foreign = other.encode(story)
    assert untrained.write(foreign, S).tokens == want
    assert untrained.encode(foreign).pictures[0].features.made_by is untrained.encoder.identity
