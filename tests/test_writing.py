import pytest
import torch

from comfy_mminterleaved import Story, TextGenerationConfig
from comfy_mminterleaved.errors import SettingError
from comfy_mminterleaved.generation.decoding import generate


@pytest.fixture
def story(pictures):
    return Story.of("Otto met a bear.", pictures[0], "It was")


def bias(model, token, by):
    """Makes a token likelier for the length of a test."""
    model.llm.head.bias[token] += by


@pytest.fixture
def eager(tiny_random):
    """The model, its head restored afterwards."""
    kept = tiny_random.llm.head.bias.clone()
    tiny_random.clear_cache()
    yield tiny_random
    tiny_random.llm.head.bias.copy_(kept)
    tiny_random.clear_cache()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": False},
        {"top_k": 0, "top_p": 1.0},
        {"temperature": 0.2, "repetition_penalty": 1.0},
        {"num_beams": 3},
    ],
)
def test_the_same_alone_and_in_a_batch_and_again(tiny_random, pictures, story, settings):
    sampling = TextGenerationConfig(max_new_tokens=12, seed=5, **settings)
    others = [Story.of(pictures[3]), Story.of("A much longer story without any picture, to pad the others.")]
    alone = tiny_random.generate_text(story, sampling)
    together = tiny_random.generate_texts([others[0], story, others[1]], sampling)
    assert together[1][0].tokens == alone.tokens == tiny_random.generate_text(story, sampling).tokens
    assert len(alone.tokens) == 12 and alone.finish_reason == "length"


def test_several_texts_have_seeds_of_their_own(tiny_random, story):
    texts = tiny_random.generate_texts([story], TextGenerationConfig(max_new_tokens=6, seed=3), num_outputs=3)[0]
    again = [tiny_random.generate_text(story, TextGenerationConfig(max_new_tokens=6, seed=seed)) for seed in (3, 4, 5)]
    assert [t.tokens for t in texts] == [t.tokens for t in again]
    assert len({t.tokens for t in texts}) == 3


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("least", [1, 5])
@pytest.mark.parametrize("stop, name", [("eos", "eos"), ("soi", "image")])
def test_stops_when_told_to_but_not_too_early(eager, story, beams, least, stop, name):
    bias(eager, getattr(eager.config.llm.special_tokens, stop), 1e4)
    written = eager.generate_text(story, TextGenerationConfig(max_new_tokens=9, min_new_tokens=least, num_beams=beams))
    assert written.finish_reason == name and written.requests_image == (stop == "soi")
    assert len(written.tokens) == least - 1  # the one that stops it is counted in


def test_only_text_is_written(eager, story):
    tokens = eager.config.llm.special_tokens
    for token in (tokens.image, tokens.pad, tokens.bos):
        bias(eager, token, 1e4)
    written = eager.generate_text(story, TextGenerationConfig(max_new_tokens=5))
    assert not set(written.tokens) & tokens.all()
    assert (
        tokens.image
        in eager.generate_text(
            story, TextGenerationConfig(max_new_tokens=5, suppress_special_tokens=False, top_k=3, top_p=1.0)
        ).tokens
    )


def test_repetition_penalty(eager, story):
    favourite = eager.generate_text(
        story, TextGenerationConfig(max_new_tokens=1, min_new_tokens=0, do_sample=False)
    ).tokens[0]
    bias(eager, favourite, 3.0)
    plain = eager.generate_text(
        story, TextGenerationConfig(max_new_tokens=8, do_sample=False, repetition_penalty=1.0)
    ).tokens
    penal = eager.generate_text(
        story, TextGenerationConfig(max_new_tokens=8, do_sample=False, repetition_penalty=1e3)
    ).tokens
    assert plain.count(favourite) > penal.count(favourite) == 1


def test_callback_sees_the_text_and_may_stop(tiny_random, story):
    seen = []
    written = tiny_random.generate_text(
        story, TextGenerationConfig(max_new_tokens=20), lambda text: seen.append(text) or len(seen) == 4
    )
    assert written.finish_reason == "cancelled" and len(written.tokens) == 4
    assert len(seen) == 4 and seen[-1] == written.text


def test_a_callback_stops_its_own_text_only(tiny_random, story):
    texts = tiny_random.generate_texts(
        [story] * 2, TextGenerationConfig(max_new_tokens=7), on_token=lambda i, text: i == 0
    )
    assert [len(row[0].tokens) for row in texts] == [1, 7]


def test_beams_find_what_is_likelier_than_greedy(tiny_random, story):
    tiny_random.clear_cache()
    length = 4
    sampling = TextGenerationConfig(max_new_tokens=length, min_new_tokens=length, repetition_penalty=1.0, num_beams=16)
    found = tiny_random.generate_texts([story], sampling, num_outputs=3)[0]
    assert found[0].score >= found[1].score >= found[2].score
    greedy = tiny_random.generate_text(
        story,
        TextGenerationConfig(max_new_tokens=length, min_new_tokens=length, do_sample=False, repetition_penalty=1.0),
    )
    scores = tiny_random.score(story, [list(t.tokens) for t in (*found, greedy)])
    assert scores[0] == max(scores)
    assert found[0].score == pytest.approx(scores[0] / (length + 1), abs=0.3)  # but for the tokens that are ruled out


def test_scores_are_those_of_the_tokens_one_by_one(tiny_random, story):
    options = [[5, 6, 7], [9], [200, 3]]
    found = tiny_random.score(story, options)
    for option, total in zip(options, found):
        want, state = 0.0, story
        for token in option:
            from comfy_mminterleaved import TextSegment

            hidden = tiny_random.text._prefill(
                [tiny_random.text.tokenize(tiny_random.encode_images(state))]
            ).hidden_states[0][-1]
            want += tiny_random.llm.logits(hidden).log_softmax(-1)[token].item()
            state = state.add(TextSegment("", (token,)))
        assert total == pytest.approx(want, abs=1e-3)
    many = tiny_random.score(story, options * 9)  # more than are read at once
    assert many == pytest.approx(found * 9, abs=1e-3)


def test_writing_one_text_leaves_it_read(tiny_random, pictures):
    story = Story.of("Otto met a bear.", pictures[0])
    tiny_random.clear_cache()
    written = tiny_random.generate_text(story, TextGenerationConfig(max_new_tokens=6))
    from comfy_mminterleaved import TextSegment

    longer = tiny_random.text.tokenize(tiny_random.encode_images(story.add(TextSegment(written.text, written.tokens))))
    assert tiny_random.text._prefill([longer]).num_cached_tokens == len(longer) - 1  # the last token was never fed


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("temperature", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("num_beams", 0),
        ("seed", -1),
        ("repetition_penalty", 0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"{name} must be at least .*, not {value}"):
        TextGenerationConfig(**{name: value})


def test_more_texts_than_beams_or_none(tiny_random, story):
    with pytest.raises(SettingError, match="With 2 beams at most 2 texts"):
        tiny_random.generate_texts([story], TextGenerationConfig(num_beams=2), num_outputs=3)
    with pytest.raises(SettingError, match="must be at least 1, not 0"):
        tiny_random.generate_texts([story], num_outputs=0)


def test_an_interrupt_leaves_the_model_usable(tiny_random, story):
    def stop(text):
        raise KeyboardInterrupt

    want = tiny_random.generate_text(story, TextGenerationConfig(max_new_tokens=5)).tokens
    with pytest.raises(KeyboardInterrupt):
        tiny_random.generate_text(story, TextGenerationConfig(max_new_tokens=5), stop)
    assert tiny_random.generate_text(story, TextGenerationConfig(max_new_tokens=5)).tokens == want


def test_forked_readings_do_not_touch_each_other(tiny_random, pictures):
    layout = tiny_random.text.tokenize(tiny_random.encode_images(Story.of(pictures[0], "Hello")))
    from comfy_mminterleaved.generation.prefix_cache import prefill

    reading = prefill(tiny_random.llm, [layout])
    length = len(reading.input_ids[0])
    generate(tiny_random.llm, reading, TextGenerationConfig(max_new_tokens=4), num_outputs=2)
    assert len(reading.input_ids[0]) == length and reading.kv_cache.lengths == [length]
    assert torch.isfinite(reading.hidden_states[0]).all()


def test_forks_share_what_was_prefilled(tiny_random, pictures):
    """Sixty-four beams hold their own tokens, not sixty-four copies of the story; what they compute is the same."""
    from comfy_mminterleaved.generation.prefix_cache import prefill

    layout = tiny_random.text.tokenize(tiny_random.encode_images(Story.of(pictures[0], "Hello " * 40, pictures[1])))
    whole = prefill(tiny_random.llm, [layout])
    fork = whole.fork([0] * 64)
    fork.extend(tiny_random.llm, [[5 + i % 7] for i in range(64)])
    states = fork.extend(tiny_random.llm, [[9, 8, 7][: 1 + i % 3] for i in range(64)])
    cells = 64 * 128 * len(tiny_random.llm.layers) * tiny_random.config.llm.hidden_size * 2 * 4
    assert fork.kv_cache.nbytes <= cells and fork.image_values is whole.image_values
    for i in (0, 1, 2, 63):
        alone = prefill(tiny_random.llm, [layout])
        alone.extend(tiny_random.llm, [[5 + i % 7]])
        expected = alone.extend(tiny_random.llm, [[9, 8, 7][: 1 + i % 3]])[0]
        assert torch.allclose(states[i], expected, atol=2e-5, rtol=1e-4)


def test_beams_go_on_while_a_longer_text_may_still_be_better(tiny_random, story, monkeypatch):
    """The bound on what may still come counts bos and the token being added, as in the reference's beam search.

    Two first tokens, each likelier to stop next than to go on: both texts are finished at once, but not the best.
    """
    tokens = tiny_random.config.llm.special_tokens
    a, b, c, d = 10, 11, 12, 13

    def scripted(hidden):
        """Log-probabilities by how much was written: the stop is likely second, c is all but certain later."""
        step = len(calls)
        calls.append(step)
        table = {0: {a: 0.501, b: 0.499}, 1: {tokens.eos: 0.55, c: 0.45}, 2: {c: 0.501, d: 0.499}}.get(
            step, {c: 0.999, tokens.eos: 0.001}
        )
        logits = torch.full((len(hidden), tiny_random.config.llm.vocab_size), -1e4)
        for token, share in table.items():
            logits[:, token] = torch.tensor(share).log()
        return logits

    calls: list[int] = []
    monkeypatch.setattr(tiny_random.llm, "logits", scripted)
    sampling = TextGenerationConfig(max_new_tokens=8, min_new_tokens=1, num_beams=2, repetition_penalty=1.0)
    written = tiny_random.generate_text(story, sampling)
    # Finished with one token: ln(0.5 * 0.55) / 2 = -0.65. The best going on has, after c, ln(0.5 * 0.45 * 0.5) = -2.18:
    # over 3 that would be worse and the search over, over 4 it may become better, and with more c it does.
    assert written.tokens == (a, *[c] * 7) and len(calls) == 8
    best = (torch.tensor(0.501 * 0.45 * 0.501).log() + 5 * torch.tensor(0.999).log()).item() / 9
    assert written.score == pytest.approx(best, abs=1e-4)


def test_the_llm_reads_nothing_back_from_the_card(tiny_random):
    """On a device without content, where that raises: a token waits for the card once, when its logits are copied."""
    from comfy_mminterleaved.generation.prefix_cache import PrefixCache
    from comfy_mminterleaved.models.build import build
    from comfy_mminterleaved.models.llama_mmfs import KVCache
    from comfy_mminterleaved.models.mmfs import fuse_mmfs

    c = tiny_random.config.llm
    llm, kv_cache = fuse_mmfs(build(tiny_random.config, ("llm",))["llm"]), KVCache(1)
    maps = [torch.empty(1, 2, c.mmfs.d_value, side, side, device="meta") for side in c.mmfs.spatial_shapes]
    values, mask = llm.project_images(maps), torch.ones(1, 3, 2, dtype=torch.bool, device="meta")
    llm(torch.empty(1, 3, c.hidden_size, device="meta"), values, mask, kv_cache)
    states = [torch.empty(3, c.hidden_size, device="meta")]
    cache = PrefixCache([[1, 5, 6]], [["a", "b"]], [[True, True]], states, kv_cache, values)
    for _ in range(4):
        hidden = cache.extend(llm, [[7]])[0]
        logits = llm.logits(hidden).float()
    assert kv_cache.lengths == [7]
    with pytest.raises((NotImplementedError, RuntimeError)):
        logits.argmax().item()


def test_reserved_tokens_are_written_without_a_copy(tiny_random):
    from comfy_mminterleaved.models.llama_mmfs import KVCache

    cache = KVCache(1)
    cache.reserve(300)
    cache.update(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    first = cache.keys[0].data_ptr()
    for length in range(1, 300):
        cache.lengths = [length]
        cache.update(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert cache.keys[0].data_ptr() == first
