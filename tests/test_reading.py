import pytest
import torch

from comfy_mminterleaved import Story
from comfy_mminterleaved.config import LLMConfig, SpecialTokens
from comfy_mminterleaved.generation.prefix_cache import read
from comfy_mminterleaved.models.init_weights import initialize
from comfy_mminterleaved.models.llama_mmfs import StoryLLM

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def hidden(model, *stories, before=None):
    layouts = [model.layout(model.encode(story)) for story in stories]
    return read(model.llm, layouts, before)


def stories(pictures):
    a, b, c, *rest = pictures
    return [
        Story.of("Otto met a bear.", a, "It was asleep.", b, "They left.", c),
        Story.of(b),
        Story.of("No picture at all, and rather a long text beside the others, so that padding shows."),
        Story.of(a, b, c, *rest, "eight of them"),
    ]


def test_a_batch_is_each_story_alone(untrained, pictures):
    together = hidden(untrained, *stories(pictures))
    for story, found in zip(stories(pictures), together.hidden):
        assert torch.allclose(found, hidden(untrained, story).hidden[0], **CLOSE)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5])
def test_a_prefix_read_before_is_read_in_pieces_with_the_same_result(untrained, pictures, cut):
    whole = stories(pictures)[0]
    first = hidden(untrained, Story(whole.segments[:cut]))
    length = len(first.ids[0])
    pieces = hidden(untrained, whole, before=first)
    assert pieces.reused == length
    assert torch.allclose(pieces.hidden[0], hidden(untrained, whole).hidden[0], **CLOSE)


def test_an_edit_is_read_from_where_it_is(untrained, pictures):
    old = Story.of("Otto met a bear.", pictures[0], "It was asleep.", pictures[1])
    new = Story.of("Otto met a bear.", pictures[0], "It was asleep.", pictures[2], "Gone.")
    kept = len(untrained.layout(Story(old.segments[:3])))
    found = hidden(untrained, new, before=hidden(untrained, old))
    assert found.reused == kept + 1  # the start-of-image token is the same, the picture is not
    assert torch.allclose(found.hidden[0], hidden(untrained, new).hidden[0], **CLOSE)


def test_batches_reuse_row_by_row(untrained, pictures):
    first = stories(pictures)[:3]
    then = [first[0].add("More."), Story.of(pictures[4]), first[2].add(pictures[5], "So.")]
    found = hidden(untrained, *then, before=hidden(untrained, *first))
    assert 0 < found.reused < sum(len(untrained.layout(s)) for s in then)
    for story, states in zip(then, found.hidden):
        assert torch.allclose(states, hidden(untrained, story).hidden[0], **CLOSE)


def test_a_shorter_story_reads_nothing(untrained, pictures, monkeypatch):
    whole = stories(pictures)[0]
    reading = hidden(untrained, whole)
    want = reading.hidden[0].clone()
    monkeypatch.setattr(untrained.llm, "forward", None)
    shorter = hidden(untrained, Story(whole.segments[:4]), before=reading)
    assert torch.equal(shorter.hidden[0], want[: len(shorter.ids[0])])


def test_pictures_reach_the_text_through_the_synchronizer_too(untrained, pictures):
    """With the same visual tokens but other maps the hidden states differ, from the first slot on."""
    from dataclasses import replace

    story = untrained.encode(Story.of("Look:", pictures[0], "Nice."))
    features = story.pictures[0].features
    other = story.with_features([replace(features, maps=tuple(m.flip(-1) for m in features.maps))])
    a, b = (read(untrained.llm, [untrained.layout(s)]).hidden[0] for s in (story, other))
    slot = untrained.layout(story).ids.index(untrained.config.llm.tokens.image)
    assert torch.allclose(a[:slot], b[:slot], **CLOSE)
    assert (a[slot:] - b[slot:]).abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sync_every", [1, 3])
def test_llm_in_one_go_and_token_by_token(kv_heads, sync_every):
    from comfy_mminterleaved.models.llama_mmfs import KVCache

    c = LLMConfig(
        slots=2,
        vocab_size=20,
        width=16,
        layers=3,
        heads=4,
        kv_heads=kv_heads,
        ffn_width=16,
        sync_every=sync_every,
        tokens=SpecialTokens(1, 2, 17, 18, 19),
        sync_levels=(4, 2),
        sync_heads=2,
        sync_points=2,
        sync_width=8,
        feature_width=8,
        context_length=400,
    )
    torch.manual_seed(0)
    llm = StoryLLM(c).requires_grad_(False)
    initialize(llm, std=0.2)
    for layer in llm.layers:
        if layer.synchronizer is not None:
            torch.nn.init.ones_(layer.synchronizer.gate)
    maps = [torch.randn(1, 2, 8, side, side) for side in (4, 2)]
    x = llm.embed(torch.randint(3, 17, (1, 150)))
    visible = torch.rand(1, 150, 2) < 0.5
    pictures = llm.prepare(maps)
    want = llm(x, pictures, visible)
    cache, found = KVCache(1), []
    for i in range(150):  # past the cache's first step of growth
        found.append(llm(x[:, i : i + 1], pictures, visible[:, i : i + 1], cache))
    assert torch.allclose(torch.cat(found, 1), want, **CLOSE)


def test_reading_ahead_is_reading(untrained, pictures):
    whole, seen = untrained.encode(stories(pictures)[0]), []
    untrained.forget()
    untrained.read(whole, lambda *state: seen.append(state))
    assert seen == [(count, len(whole)) for count in range(1, len(whole) + 1)]
    ahead = untrained.contexts([whole])[0]
    assert untrained._read.reused == len(ahead) - 1
    untrained.forget()
    assert torch.allclose(ahead, untrained.contexts([whole])[0], **CLOSE)


def test_a_reading_that_is_stopped_keeps_what_it_has(untrained, pictures):
    def stop(count, _):
        if count == 3:
            raise InterruptedError

    whole = untrained.encode(stories(pictures)[0])
    untrained.forget()
    with pytest.raises(InterruptedError):
        untrained.read(whole, stop)
    untrained.contexts([whole])
    assert untrained._read.reused == len(untrained.layout(Story(whole.segments[:3])))


def test_the_last_query_of_causal_attention_sees_all_keys():
    from comfy_mminterleaved.models.attention import attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator) for length in (3, 7, 7))
    found = attention(q, k, v, causal=True)
    for i in range(3):
        alone = attention(q[:, :, i : i + 1], k[:, :, : 5 + i], v[:, :, : 5 + i])
        assert torch.allclose(found[:, :, i : i + 1], alone, **CLOSE)


def test_a_compiled_token_step_is_the_same(untrained, pictures):
    """Captured as one graph a part; "eager" needs no compiler."""
    from comfy_mminterleaved import MMInterleaved, Sampling

    sampling = Sampling(max_new_tokens=12, min_new_tokens=12, sample=False)
    story = stories(pictures)[0]
    wanted = untrained.write(story, sampling)
    other = MMInterleaved.load("untrained", "cpu")
    other.llm.load_state_dict(untrained.llm.state_dict())
    other.encoder.load_state_dict(untrained.encoder.state_dict())
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    other.compiled(backend=backend, fullgraph=True)
    assert other.write(story, sampling).tokens == wanted.tokens
    assert 3 <= len(calls) <= 6  # all layers share them
