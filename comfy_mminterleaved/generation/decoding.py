"""Next-token loops on the LLM: sampling, beam search, and scores of given options."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import SettingError
from ..models.llama_mmfs import LlamaMMFS
from .config import GeneratedText, OnToken, TextGenerationConfig
from .prefix_cache import PrefixCache

# Of a batch of options to score: bounds memory, and how long Cancel takes.
MAX_OPTIONS, MAX_OPTION_TOKENS = 16, 256


def _stop_tokens(llm: LlamaMMFS) -> dict[int, str]:
    tokens = llm.config.special_tokens
    return {tokens.eos: "eos", tokens.soi: "image", **({} if tokens.dream is None else {tokens.dream: "image"})}


def _logits_processors(llm: LlamaMMFS, s: TextGenerationConfig, warp: bool):
    """transformers' processors of logits or log-probabilities, in its order.

    They are called with ids `(N, 1 + new)`, bos and the new tokens, and scores `(N, vocabulary)`.
    """
    from transformers.generation import logits_process as lp

    tokens = llm.config.special_tokens
    processors = lp.LogitsProcessorList()
    if s.repetition_penalty != 1:
        processors.append(lp.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty)))
    if s.min_new_tokens > 1:  # the bos counts, as in the version that recorded the golden data
        processors.append(lp.MinLengthLogitsProcessor(s.min_new_tokens, list(_stop_tokens(llm))))
    if s.suppress_special_tokens:
        processors.append(lp.SuppressTokensLogitsProcessor([tokens.bos, tokens.pad, tokens.image]))
    if warp and s.temperature != 1:
        processors.append(lp.TemperatureLogitsWarper(float(s.temperature)))
    if warp and s.top_k:
        processors.append(lp.TopKLogitsWarper(min(s.top_k, llm.config.vocab_size)))
    if warp and s.top_p < 1:
        processors.append(lp.TopPLogitsWarper(float(s.top_p)))
    return processors


def generate(
    llm: LlamaMMFS,
    prefix: PrefixCache,
    config: TextGenerationConfig,
    num_outputs: int = 1,
    on_token: OnToken | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[GeneratedText]]:
    """Continues stories with text: `num_outputs` texts for each story of `prefix`.

    With one text per story `prefix` is extended by it; else it stays unchanged.

    Args:
        on_token: Called with the number of the text (num_outputs * story + k) and its token ids so far; a true result
            ends that text.
        seeds: Of each story's first text, instead of `config.seed` for all.
    """
    if num_outputs < 1:
        raise SettingError(f"The number of texts must be at least 1, not {num_outputs}.")
    if config.num_beams > 1:
        return [
            _beam_search(llm, prefix.fork([i]), config, num_outputs, i, on_token) for i in range(len(prefix.input_ids))
        ]
    rows = [i for i in range(len(prefix.input_ids)) for _ in range(num_outputs)]
    seeds = [config.seed] * len(prefix.input_ids) if seeds is None else seeds
    row_seeds = [seed + k for seed in seeds for k in range(num_outputs)]
    texts = _sample(llm, prefix if num_outputs == 1 else prefix.fork(rows), config, row_seeds, on_token)
    return [texts[i : i + num_outputs] for i in range(0, len(texts), num_outputs)]


@torch.no_grad()
def _sample(
    llm: LlamaMMFS, prefix: PrefixCache, s: TextGenerationConfig, seeds: list[int], on_token
) -> list[GeneratedText]:
    stops, process = _stop_tokens(llm), _logits_processors(llm, s, warp=s.do_sample)
    n = len(prefix.input_ids)
    generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
    texts: list[list[int]] = [[] for _ in range(n)]
    ends: list[str | None] = [None] * n
    generated_ids = torch.full((n, 1), llm.config.special_tokens.bos)
    hidden = prefix.last_hidden_state()
    prefix.kv_cache.reserve(s.max_new_tokens)
    for step in range(s.max_new_tokens):
        scores = process(generated_ids, llm.logits(hidden).float().cpu())
        if s.do_sample:
            chosen = [torch.multinomial(row.softmax(-1), 1, generator=g).item() for row, g in zip(scores, generators)]
        else:
            chosen = scores.argmax(-1).tolist()
        generated_ids = torch.cat([generated_ids, torch.tensor(chosen)[:, None]], dim=1)
        for i, token in enumerate(chosen):
            if ends[i] is None and token in stops:
                ends[i] = stops[token]
            elif ends[i] is None:
                texts[i].append(token)
                if on_token is not None and on_token(i, texts[i]):
                    ends[i] = "cancelled"
        if all(ends) or step == s.max_new_tokens - 1:
            break
        new_states = prefix.extend(llm, [[token] if end is None else [] for token, end in zip(chosen, ends)])
        hidden = torch.stack([new[-1] if len(new) else old for new, old in zip(new_states, hidden)])
    return [GeneratedText(tuple(t), end or "length") for t, end in zip(texts, ends)]


@torch.no_grad()
def _beam_search(
    llm: LlamaMMFS, prefix: PrefixCache, s: TextGenerationConfig, num_outputs: int, story: int, on_token
) -> list[GeneratedText]:
    """Beam search as transformers 4.31 does it, which recorded the golden data; `prefix` holds one story."""
    if num_outputs > s.num_beams:
        raise SettingError(f"With {s.num_beams} beams at most {s.num_beams} texts can be returned, not {num_outputs}.")
    stops, process = _stop_tokens(llm), _logits_processors(llm, s, warp=False)
    device = llm.device
    prefix = prefix.fork([0] * s.num_beams)
    ids = torch.full((s.num_beams, 1), llm.config.special_tokens.bos)
    beam_scores = torch.full((s.num_beams,), -1e9)
    beam_scores[0] = 0.0  # all beams are the same at first: only one may branch
    finished: list[tuple[float, tuple[int, ...], str]] = []

    def keep(tokens, total: float, end: str):
        # Lengths count the bos, as in the version that recorded the golden data.
        finished.append((total / (len(tokens) + 1) ** s.length_penalty, tuple(tokens), end))
        finished.sort(key=lambda hypothesis: hypothesis[0])
        del finished[: -s.num_beams]

    hidden, done = prefix.last_hidden_state(), False
    for step in range(s.max_new_tokens):
        scores = process(ids, llm.logits(hidden).float().cpu().log_softmax(-1)) + beam_scores[:, None]
        best, index = scores.flatten().topk(min((1 + len(stops)) * s.num_beams, scores.numel()))
        beams: list[tuple[float, int, int]] = []
        for rank, (total, flat_index) in enumerate(zip(best.tolist(), index.tolist())):
            origin, token = divmod(flat_index, scores.shape[1])
            if token in stops:
                if rank < s.num_beams:
                    keep(ids[origin, 1:].tolist(), total, stops[token])
            else:
                beams.append((total, origin, token))
            if len(beams) == s.num_beams:
                break
        attainable = best[0].item() / (step + 2) ** s.length_penalty  # bos, and the token being added
        origins = [origin for _, origin, _ in beams]
        beam_scores = torch.tensor([total for total, _, _ in beams])
        ids = torch.cat([ids[origins], torch.tensor([[token] for *_, token in beams])], dim=1)
        if len(finished) == s.num_beams and finished[0][0] >= attainable:
            done = True
        if on_token is not None and on_token(story * num_outputs, ids[0, 1:].tolist()):
            finished = [(float("-inf"), tuple(ids[0, 1:].tolist()), "cancelled")]
            done = True
        if done or step == s.max_new_tokens - 1:
            break
        prefix = prefix.fork(origins)
        hidden = torch.cat(prefix.extend(llm, [[token] for *_, token in beams])).to(device)
    if not done:
        for total, row in zip(beam_scores.tolist(), ids):
            keep(row[1:].tolist(), total, "length")
    best_first = reversed(finished[-num_outputs:])
    return [GeneratedText(tokens, end, score=score) for score, tokens, end in best_first]


@torch.no_grad()
def score_options(
    llm: LlamaMMFS,
    prefix: PrefixCache,
    options: list[list[int]],
    on_progress: Callable[[int, int], object] | None = None,
) -> list[float]:
    """Summed log-probability of each option's tokens after the one story of `prefix`, which stays unchanged.

    Args:
        on_progress: Called with the number of scored options and the number of all.
    """
    if any(not option for option in options):
        raise SettingError("An option to score must not be empty.")
    first = llm.logits(prefix.last_hidden_state()).float().log_softmax(-1)[0]
    scores: list[float] = []
    while len(scores) < len(options):
        batch = options[len(scores) : len(scores) + MAX_OPTIONS]
        while len(batch) > 1 and len(batch) * max(map(len, batch)) > MAX_OPTION_TOKENS:
            batch.pop()
        hidden = prefix.fork([0] * len(batch)).extend(llm, batch)
        scores += [_log_prob(llm, first, states, option) for states, option in zip(hidden, batch)]
        if on_progress is not None:
            on_progress(len(scores), len(options))
    return scores


@torch.no_grad()
def score_after_each(llm: LlamaMMFS, prefix: PrefixCache, option: list[int]) -> list[float]:
    """Summed log-probability of one option's tokens after each of the stories of `prefix`, which is extended."""
    firsts = llm.logits(prefix.last_hidden_state()).float().log_softmax(-1)
    hidden = prefix.extend(llm, [option] * len(firsts))
    return [_log_prob(llm, first, states, option) for first, states in zip(firsts, hidden)]


def _log_prob(llm: LlamaMMFS, first: torch.Tensor, hidden: torch.Tensor, option: list[int]) -> float:
    """Summed log-probability of tokens.

    Args:
        first: Log-probabilities `(vocabulary,)` of the first.
        hidden: Hidden states of all of them, `(tokens, hidden_size)`.
    """
    log_probs = llm.logits(hidden[:-1]).float().log_softmax(-1)
    tokens = torch.tensor(option, device=first.device)
    return (first[tokens[0]] + log_probs.gather(1, tokens[1:, None]).sum()).item()
