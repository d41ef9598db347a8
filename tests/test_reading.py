import pytest
import torch

from comfy_mminterleaved import Story
from comfy_mminterleaved.config import LlamaMMFSConfig, MMFSConfig, SpecialTokens
from comfy_mminterleaved.generation.prefix_cache import prefill
from comfy_mminterleaved.models.init_weights import init_weights
from comfy_mminterleaved.models.llama_mmfs import LlamaMMFS

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def hidden(model, *stories, before=None):
    layouts = [model.text.tokenize(model.encode_images(story)) for story in stories]
    return prefill(model.llm, layouts, before)


def stories(pictures):
    a, b, c, *rest = pictures
    return [
        Story.of("Otto met a bear.", a, "It was asleep.", b, "They left.", c),
        Story.of(b),
        Story.of("No picture at all, and rather a long text beside the others, so that padding shows."),
        Story.of(a, b, c, *rest, "eight of them"),
    ]


def test_a_batch_is_each_story_alone(tiny_random, pictures):
    together = hidden(tiny_random, *stories(pictures))
    for story, found in zip(stories(pictures), together.hidden_states):
        assert torch.allclose(found, hidden(tiny_random, story).hidden_states[0], **CLOSE)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5])
def test_a_prefix_read_before_is_read_in_pieces_with_the_same_result(tiny_random, pictures, cut):
    whole = stories(pictures)[0]
    first = hidden(tiny_random, Story(whole.segments[:cut]))
    length = len(first.input_ids[0])
    pieces = hidden(tiny_random, whole, before=first)
    assert pieces.num_cached_tokens == length
    assert torch.allclose(pieces.hidden_states[0], hidden(tiny_random, whole).hidden_states[0], **CLOSE)


def test_an_edit_is_read_from_where_it_is(tiny_random, pictures):
    old = Story.of("Otto met a bear.", pictures[0], "It was asleep.", pictures[1])
    new = Story.of("Otto met a bear.", pictures[0], "It was asleep.", pictures[2], "Gone.")
    kept = len(tiny_random.text.tokenize(Story(old.segments[:3])))
    found = hidden(tiny_random, new, before=hidden(tiny_random, old))
    assert found.num_cached_tokens == kept + 1  # the start-of-image token is the same, the picture is not
    assert torch.allclose(found.hidden_states[0], hidden(tiny_random, new).hidden_states[0], **CLOSE)


def test_batches_reuse_row_by_row(tiny_random, pictures):
    first = stories(pictures)[:3]
    then = [first[0].add("More."), Story.of(pictures[4]), first[2].add(pictures[5], "So.")]
    found = hidden(tiny_random, *then, before=hidden(tiny_random, *first))
    assert 0 < found.num_cached_tokens < sum(len(tiny_random.text.tokenize(s)) for s in then)
    for story, states in zip(then, found.hidden_states):
        assert torch.allclose(states, hidden(tiny_random, story).hidden_states[0], **CLOSE)


def test_a_shorter_story_reads_nothing(tiny_random, pictures, monkeypatch):
    whole = stories(pictures)[0]
    reading = hidden(tiny_random, whole)
    want = reading.hidden_states[0].clone()
    monkeypatch.setattr(tiny_random.llm, "forward", None)
    shorter = hidden(tiny_random, Story(whole.segments[:4]), before=reading)
    assert torch.equal(shorter.hidden_states[0], want[: len(shorter.input_ids[0])])


def test_pictures_reach_the_text_through_the_synchronizer_too(tiny_random, pictures):
    """With the same visual tokens but other maps the hidden states differ, from the first slot on."""
    from dataclasses import replace

    story = tiny_random.encode_images(Story.of("Look:", pictures[0], "Nice."))
    features = story.images[0].features
    other = story.with_features([replace(features, feature_maps=tuple(m.flip(-1) for m in features.feature_maps))])
    a, b = (prefill(tiny_random.llm, [tiny_random.text.tokenize(s)]).hidden_states[0] for s in (story, other))
    slot = tiny_random.text.tokenize(story).input_ids.index(tiny_random.config.llm.special_tokens.image)
    assert torch.allclose(a[:slot], b[:slot], **CLOSE)
    assert (a[slot:] - b[slot:]).abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("frequency", [1, 3])
def test_llm_in_one_go_and_token_by_token(kv_heads, frequency):
    from comfy_mminterleaved.models.llama_mmfs import KVCache

    c = LlamaMMFSConfig(
        num_img_token=2,
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=16,
        special_tokens=SpecialTokens(1, 2, 17, 18, 19),
        mmfs=MMFSConfig((4, 2), 16, 2, 2, 8, 8, cross_attention_frequency=frequency),
        max_position_embeddings=400,
    )
    torch.manual_seed(0)
    llm = LlamaMMFS(c).requires_grad_(False)
    init_weights(llm, std=0.2)
    for layer in llm.layers:
        if layer.llama_cross_attn is not None:
            torch.nn.init.ones_(layer.llama_cross_attn.gate)
    maps = [torch.randn(1, 2, 8, side, side) for side in (4, 2)]
    x = llm.embed_inputs(torch.randint(3, 17, (1, 150)))
    visible = torch.rand(1, 150, 2) < 0.5
    pictures = llm.project_images(maps)
    want = llm(x, pictures, visible)
    cache, found = KVCache(1), []
    for i in range(150):  # past the cache's first step of growth
        found.append(llm(x[:, i : i + 1], pictures, visible[:, i : i + 1], cache))
    assert torch.allclose(torch.cat(found, 1), want, **CLOSE)


def test_reading_ahead_is_reading(tiny_random, pictures):
    whole, seen = tiny_random.encode_images(stories(pictures)[0]), []
    tiny_random.clear_cache()
    tiny_random.prefill(whole, lambda *state: seen.append(state))
    length = len(tiny_random.text.tokenize(whole))
    assert [total for _, total in seen] == [length] * len(seen)
    assert len(seen) >= len(whole) and sorted({count for count, _ in seen}) == [count for count, _ in seen]
    assert seen[-1] == (length, length)
    ahead = tiny_random.context_features([whole])[0]
    assert tiny_random.text.cache.num_cached_tokens == len(ahead) - 1
    tiny_random.clear_cache()
    assert torch.allclose(ahead, tiny_random.context_features([whole])[0], **CLOSE)


def test_a_reading_that_is_stopped_keeps_what_it_has(tiny_random, pictures, monkeypatch):
    whole = tiny_random.encode_images(stories(pictures)[0])
    kept = len(tiny_random.text.tokenize(Story(whole.segments[:3])))

    def stop(count, _):
        if count == kept:
            raise InterruptedError

    tiny_random.clear_cache()
    with pytest.raises(InterruptedError):
        tiny_random.prefill(whole, stop)
    assert len(tiny_random.text.cache.input_ids[0]) == kept
    lengths, prefill = [], tiny_random.text._prefill
    monkeypatch.setattr(tiny_random.text, "_prefill", lambda batch: lengths.append(len(batch[0])) or prefill(batch))
    tiny_random.context_features([whole])
    assert lengths[0] > kept


def test_the_last_query_of_causal_attention_sees_all_keys():
    from comfy_mminterleaved.models.attention import attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator) for length in (3, 7, 7))
    found = attention(q, k, v, causal=True)
    for i in range(3):
        alone = attention(q[:, :, i : i + 1], k[:, :, : 5 + i], v[:, :, : 5 + i])
        assert torch.allclose(found[:, :, i : i + 1], alone, **CLOSE)


def test_a_compiled_token_step_is_the_same(tiny_random, pictures):
    """Captured as one graph a part; "eager" needs no compiler."""
    from comfy_mminterleaved import MMInterleavedPipeline, TextGenerationConfig

    sampling = TextGenerationConfig(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    story = stories(pictures)[0]
    wanted = tiny_random.generate_text(story, sampling)
    other = MMInterleavedPipeline.load("tiny-random", "cpu")
    other.llm.load_state_dict(tiny_random.llm.state_dict())
    other.encoder.load_state_dict(tiny_random.encoder.state_dict())
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    other.compile(backend=backend, fullgraph=True)
    assert other.generate_text(story, sampling).tokens == wanted.tokens
    assert 3 <= len(calls) <= 6  # all layers share them
