"""The next-token loop: sampling, beams, and how likely given options are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..errors import SettingError
from ..models.llama_mmfs import StoryLLM
from .prefix_cache import Reading

OnToken = Callable[[int, list[int]], object]


@dataclass(frozen=True)
class Sampling:
    """How text is chosen; the defaults are those of the reference's inference.

    max_new_tokens, min_new_tokens: bounds of a text in tokens, the one that stops it counted in.
    sample: draw at random; False takes the likeliest token.
    temperature, top_k (0 for all), top_p: of the distribution drawn from.
    repetition_penalty: over 1 makes what the new text has already less likely.
    beams: over 1 searches with that many beams instead, without chance; length_penalty over 0 favours long texts.
    only_text: never choose a token that has no text (bos, pad, image); the reference leaves them in.
    seed: of the first text; a story's k-th text has seed + k.
    """

    max_new_tokens: int = 90
    min_new_tokens: int = 8
    sample: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.3
    beams: int = 1
    length_penalty: float = 1.0
    only_text: bool = True
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("min_new_tokens", 0, None),
            ("temperature", 1e-3, None),
            ("top_k", 0, None),
            ("top_p", 1e-6, 1.0),
            ("repetition_penalty", 1e-3, None),
            ("beams", 1, 64),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= (high if high is not None else 1e9):
                top = f" and at most {high}" if high is not None else ""
                raise SettingError(f"{name} must be at least {low}{top}, not {value}.")

    def plus(self, seed: int) -> Sampling:
        """The same settings with `seed` added to their own."""
        return replace(self, seed=self.seed + seed)


@dataclass(frozen=True)
class Written:
    """A text as it was written.

    stopped_by: 'end', 'picture' (the model asks for one), 'length', or 'callback'.
    score: summed log-probability, by length to the length penalty; of beam search only.
    """

    tokens: tuple[int, ...]
    stopped_by: str
    text: str = ""
    score: float | None = None

    @property
    def wants_picture(self) -> bool:
        return self.stopped_by == "picture"


def _stops(llm: StoryLLM) -> dict[int, str]:
    return {llm.config.tokens.eos: "end", llm.config.tokens.soi: "picture"}


def _processors(llm: StoryLLM, s: Sampling, warp: bool):
    """What is done to logits (or log-probabilities) before choosing, as transformers orders it."""
    from transformers.generation import logits_process as lp

    tokens = llm.config.tokens
    stops = list(_stops(llm))
    without_text = [tokens.bos, tokens.pad, tokens.image]
    chain = [lp.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty))] if s.repetition_penalty != 1 else []
    warpers = []
    if warp and s.temperature != 1:
        warpers.append(lp.TemperatureLogitsWarper(float(s.temperature)))
    if warp and s.top_k:
        warpers.append(lp.TopKLogitsWarper(min(s.top_k, llm.config.vocab_size)))
    if warp and s.top_p < 1:
        warpers.append(lp.TopPLogitsWarper(float(s.top_p)))

    def process(ids, scores):
        """ids (N, 1 + new): bos, then what is new; scores (N, vocabulary)."""
        for step in chain:
            scores = step(ids, scores)
        banned = without_text if s.only_text else []
        if ids.shape[1] < s.min_new_tokens:
            banned = banned + stops
        if banned:
            scores = scores.clone()
            scores[:, banned] = float("-inf")
        for step in warpers:
            scores = step(ids, scores)
        return scores

    return process


def write(
    llm: StoryLLM, reading: Reading, sampling: Sampling, count: int = 1, on_token: OnToken | None = None
) -> list[list[Written]]:
    """Continues stories with text: `count` texts for each story of `reading`.

    With one text a story `reading` is extended by what was written; else it stays as it was.

    Args:
        on_token: called with the number of the text (count * story + k) and its tokens so far; returning a true value
            ends that text.
    """
    if count < 1:
        raise SettingError(f"The number of texts must be at least 1, not {count}.")
    if sampling.beams > 1:
        return [_beam_search(llm, reading.fork([i]), sampling, count, i, on_token) for i in range(len(reading.ids))]
    rows = [i for i in range(len(reading.ids)) for _ in range(count)]
    texts = _choose_tokens(llm, reading if count == 1 else reading.fork(rows), sampling, count, on_token)
    return [texts[i : i + count] for i in range(0, len(texts), count)]


@torch.no_grad()
def _choose_tokens(llm: StoryLLM, reading: Reading, s: Sampling, count: int, on_token) -> list[Written]:
    stops, process = _stops(llm), _processors(llm, s, warp=s.sample)
    n = len(reading.ids)
    generators = [torch.Generator().manual_seed((s.seed + i % count) % 2**63) for i in range(n)]
    texts: list[list[int]] = [[] for _ in range(n)]
    ends: list[str | None] = [None] * n
    history = torch.full((n, 1), llm.config.tokens.bos)
    hidden = reading.last_hidden()
    for step in range(s.max_new_tokens):
        scores = process(history, llm.logits(hidden).float().cpu())
        if s.sample:
            chosen = [torch.multinomial(row.softmax(-1), 1, generator=g).item() for row, g in zip(scores, generators)]
        else:
            chosen = scores.argmax(-1).tolist()
        history = torch.cat([history, torch.tensor(chosen)[:, None]], dim=1)
        for i, token in enumerate(chosen):
            if ends[i] is None and token in stops:
                ends[i] = stops[token]
            elif ends[i] is None:
                texts[i].append(token)
                if on_token is not None and on_token(i, texts[i]):
                    ends[i] = "callback"
        if all(ends) or step == s.max_new_tokens - 1:
            break
        found = reading.feed(llm, [[token] if end is None else [] for token, end in zip(chosen, ends)])
        hidden = torch.stack([new[-1] if len(new) else old for new, old in zip(found, hidden)])
    return [Written(tuple(t), end or "length") for t, end in zip(texts, ends)]


@torch.no_grad()
def _beam_search(llm: StoryLLM, reading: Reading, s: Sampling, count: int, story: int, on_token) -> list[Written]:
    """Beam search as transformers 4.31 does it, which recorded the golden data; `reading` holds one story."""
    if count > s.beams:
        raise SettingError(f"With {s.beams} beams at most {s.beams} texts can be returned, not {count}.")
    stops, process = _stops(llm), _processors(llm, s, warp=False)
    device = llm.device
    reading = reading.fork([0] * s.beams)
    ids = torch.full((s.beams, 1), llm.config.tokens.bos)
    totals = torch.full((s.beams,), -1e9)
    totals[0] = 0.0  # all beams are the same at first: only one may branch
    finished: list[tuple[float, tuple[int, ...], str]] = []

    def keep(tokens, total: float, end: str):
        # Lengths count the bos, as in the version that recorded the golden data.
        finished.append((total / (len(tokens) + 1) ** s.length_penalty, tuple(tokens), end))
        finished.sort(key=lambda hypothesis: hypothesis[0])
        del finished[: -s.beams]

    hidden, done = reading.last_hidden(), False
    for step in range(s.max_new_tokens):
        scores = process(ids, llm.logits(hidden).float().cpu().log_softmax(-1)) + totals[:, None]
        best, index = scores.flatten().topk(min((1 + len(stops)) * s.beams, scores.numel()))
        beams: list[tuple[float, int, int]] = []
        for rank, (total, at) in enumerate(zip(best.tolist(), index.tolist())):
            origin, token = divmod(at, scores.shape[1])
            if token in stops:
                if rank < s.beams:
                    keep(ids[origin, 1:].tolist(), total, stops[token])
            else:
                beams.append((total, origin, token))
            if len(beams) == s.beams:
                break
        attainable = best[0].item() / (step + 2) ** s.length_penalty  # bos, and the token being added
        origins = [origin for _, origin, _ in beams]
        totals = torch.tensor([total for total, _, _ in beams])
        ids = torch.cat([ids[origins], torch.tensor([[token] for *_, token in beams])], dim=1)
        if len(finished) == s.beams and finished[0][0] >= attainable:
            done = True
        if on_token is not None and on_token(story * count, ids[0, 1:].tolist()):
            finished = [(float("-inf"), tuple(ids[0, 1:].tolist()), "callback")]
            done = True
        if done or step == s.max_new_tokens - 1:
            break
        reading = reading.fork(origins)
        hidden = torch.cat(reading.feed(llm, [[token] for *_, token in beams])).to(device)
    if not done:
        for total, row in zip(totals.tolist(), ids):
            keep(row[1:].tolist(), total, "length")
    best_first = reversed(finished[-count:])
    return [Written(tokens, end, score=score) for score, tokens, end in best_first]


@torch.no_grad()
def score(llm: StoryLLM, reading: Reading, options: list[list[int]], rows_at_once: int = 16) -> list[float]:
    """Summed log-probability of each option's tokens behind the one story of `reading`, which stays as it was."""
    if any(not option for option in options):
        raise SettingError("An option to score must not be empty.")
    first = llm.logits(reading.last_hidden()).float().log_softmax(-1)[0]
    scores = []
    for start in range(0, len(options), rows_at_once):
        batch = options[start : start + rows_at_once]
        fork = reading.fork([0] * len(batch))
        for option, hidden in zip(batch, fork.feed(llm, batch)):
            rest = llm.logits(hidden[:-1]).float().log_softmax(-1)
            tokens = torch.tensor(option, device=first.device)
            scores.append((first[tokens[0]] + rest.gather(1, tokens[1:, None]).sum()).item())
    return scores
