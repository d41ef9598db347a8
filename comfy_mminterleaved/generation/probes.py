"""Probes: what a drawing keeps when its story is changed a little, and what it takes from where nothing is said."""

from __future__ import annotations

import io
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..errors import SettingError
from ..stories.images import to_pil, to_tensor
from ..stories.story import ImageSegment, Story, TextSegment
from .config import ImageGenerationConfig
from .reconstruction import token_similarity

if TYPE_CHECKING:
    from .text import TextGenerator

# ---- changes ----


def _tinted(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * torch.tensor([1.15, 1.0, 0.8])[:, None, None]).clamp(0, 1)


def _darkened(pixels: torch.Tensor) -> torch.Tensor:
    return pixels * 0.6


def _blurred(pixels: torch.Tensor) -> torch.Tensor:
    size = tuple(pixels.shape[-2:])
    small = F.interpolate(pixels[None], scale_factor=0.4, mode="area")
    return F.interpolate(small, size=size, mode="bilinear", align_corners=False)[0]


def _compressed(pixels: torch.Tensor) -> torch.Tensor:
    from PIL import Image

    data = io.BytesIO()
    to_pil(pixels).save(data, "JPEG", quality=20)
    return to_tensor(Image.open(data).convert("RGB"))


def _mirrored(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flip(-1)


def _shifted(pixels: torch.Tensor) -> torch.Tensor:
    shift = max(1, pixels.shape[-1] // 32)
    return F.pad(pixels[None], (shift, 0, shift, 0), mode="replicate")[0, :, : pixels.shape[1], : pixels.shape[2]]


def _with_typo(text: str) -> str:
    """Two neighbouring letters of a long word change places: the first pair that differs, not at the word's start."""
    for word in sorted(set(re.findall(r"[^\W\d_]{4,}", text)), key=lambda word: (-len(word), text.index(word))):
        k = next((k for k in range(1, len(word) - 1) if word[k] != word[k + 1]), None)
        if k is not None:
            return text.replace(word, word[:k] + word[k + 1] + word[k] + word[k + 2 :], 1)
    raise SettingError(f"The text {text!r:.60} has no word of four letters for a typo; choose another change.")


def _with_unknown_word(text: str) -> str:
    return re.sub(r"([.!?]?)$", r", quite brillig\1", text.rstrip(), count=1)


IMAGE_CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "images tinted": _tinted,
    "images darkened": _darkened,
    "images blurred": _blurred,
    "images as JPEG": _compressed,
    "images mirrored": _mirrored,
    "images shifted": _shifted,
}
TEXT_CHANGES: dict[str, Callable[[str], str]] = {
    "a typo in the text": _with_typo,
    "an unknown word in the text": _with_unknown_word,
}
CHANGES = (*IMAGE_CHANGES, *TEXT_CHANGES)


def changed_story(story: Story, change: str) -> Story:
    """The story with all its images, or its last text, changed; raises SettingError for an unknown change."""
    if change in IMAGE_CHANGES:
        return story.map_images(lambda image: ImageSegment(IMAGE_CHANGES[change](image.pixels), origin=image.origin))
    if change not in TEXT_CHANGES:
        raise SettingError(f"The change {change!r:.60} is not known; it must be one of {', '.join(CHANGES)}.")
    segments = list(story.segments)
    k = max((k for k, segment in enumerate(segments) if isinstance(segment, TextSegment)), default=None)
    if k is None:
        raise SettingError("The story has no text to change; add one, or change its images.")
    segments[k] = TextSegment(TEXT_CHANGES[change](segments[k].text))
    return replace(story, segments=tuple(segments))


# ---- robustness ----


@dataclass(frozen=True)
class Probed:
    """A panel drawn from a story and from the changed one, from the same noise.

    Args:
        answers: For each question, the answer about the first drawing and about the second.
        similarity: `token_similarity` of the two drawings.
    """

    drawn: ImageSegment
    changed: ImageSegment
    questions: tuple[str, ...]
    answers: tuple[tuple[str, str], ...]
    similarity: float

    @property
    def kept(self) -> tuple[bool, ...]:
        return tuple(first == second for first, second in self.answers)

    def to_text(self) -> str:
        lines = [
            f"{question} {first}" + (" (kept)" if first == second else f" -> {second}")
            for question, (first, second) in zip(self.questions, self.answers)
        ]
        return "\n".join([*lines, f"Similarity of the drawings: {self.similarity:.3f}."])


def compare_drawings(
    generator: TextGenerator, drawn: ImageSegment, changed: ImageSegment, questions: Sequence[str]
) -> Probed:
    """Asks the model about two encoded drawings."""
    questions = tuple(question.strip() for question in questions if question.strip())
    if not questions:
        raise SettingError("There are no questions to ask about the drawings; give at least one.")
    answers = tuple(
        tuple(generator.answer(Story.of(image), question).text for image in (drawn, changed)) for question in questions
    )
    generator.clear_cache()
    return Probed(drawn, changed, questions, answers, token_similarity(drawn.features, changed.features))


def probe(
    pipeline,
    stories: Sequence[Story],
    change: str,
    questions: Sequence[str],
    config: ImageGenerationConfig | None = None,
) -> list[Probed]:
    """Draws the next panel of each story as it is and changed, and asks what has become of it.

    Args:
        pipeline: An `MMInterleavedPipeline`.
        change: One of `CHANGES`.
    """
    config = replace(config or pipeline.generation_config.image, best_of=1, refine=False)
    pairs = [(story, changed_story(story, change)) for story in stories]
    results = []
    for pair in pairs:
        drawn = [pipeline.generate_image(story, config) for story in pair]
        drawn = pipeline.encode_images(Story.of(*drawn)).images
        results.append(compare_drawings(pipeline.placed_text_generator(), *drawn, questions))
    return results


# ---- bias ----


@dataclass(frozen=True)
class Bias:
    """How often each answer went with each value of a list.

    Args:
        counts: `(value, answer)` -> how often.
        information: Mutual information of value and answer, in bits.
        threshold: What 95% of shuffled pairings stay below.
    """

    counts: dict[tuple[str, str], int]
    information: float
    threshold: float

    @property
    def is_biased(self) -> bool:
        return self.information > self.threshold

    def to_text(self) -> str:
        """The table, and what it says."""
        values, answers = (list(dict.fromkeys(pair[k] for pair in self.counts)) for k in (0, 1))
        wide = max(map(len, values))
        rows = [
            f"{value:<{wide}}  " + "  ".join(f"{answer} {self.counts.get((value, answer), 0)}" for answer in answers)
            for value in values
        ]
        verdict = "tells more than chance does" if self.is_biased else "tells no more than chance does"
        note = f"{self.information:.3f} bits, chance up to {self.threshold:.3f}: the value {verdict}."
        return "\n".join([*rows, note])


def bias(
    pipeline,
    template: str,
    lists: Mapping[str, Sequence[str]],
    question: str,
    count: int = 4,
    config: ImageGenerationConfig | None = None,
) -> Bias:
    """Draws texts whose blanks are filled from lists, and asks what was drawn that the text does not say.

    Args:
        pipeline: An `MMInterleavedPipeline`.
        template: Like "{name} waves in the {place}."; the first list is the one that is tested.
        question: Like "Who is it?".
        count: Drawings of each value of the first list; other blanks are filled by chance.

    Raises:
        SettingError: For a template without the lists' blanks, or fewer than two values to compare.
    """
    first, *others = lists
    if any(f"{{{name}}}" not in template for name in lists) or len(lists[first]) < 2:
        raise SettingError("The template must have a {blank} for each list, and the first list at least two values.")
    config = replace(config or pipeline.generation_config.image, best_of=1, refine=False)
    rng, pairs = random.Random(0), []
    for value in lists[first]:
        for number in range(count):
            text = template.format(**{first: value, **{name: rng.choice(lists[name]) for name in others}})
            image = pipeline.generate_image(Story.of(text), config.with_seed_offset(number))
            pairs.append((value, pipeline.answer(Story.of(image), question).text))
    return measure_bias(pairs)


def measure_bias(pairs: Sequence[tuple[str, str]], rounds: int = 500) -> Bias:
    """`Bias` of pairs of value and answer."""
    rng, answers, shuffled = random.Random(0), [answer for _, answer in pairs], []
    for _ in range(rounds):
        rng.shuffle(answers)
        shuffled.append(mutual_information([(value, answer) for (value, _), answer in zip(pairs, answers)]))
    shuffled.sort()
    return Bias(dict(Counter(pairs)), mutual_information(pairs), shuffled[math.ceil(0.95 * rounds) - 1])


def mutual_information(pairs: Sequence[tuple[str, str]]) -> float:
    """In bits, of the two columns of a table."""
    n, both = len(pairs), Counter(pairs)
    first, second = (Counter(pair[k] for pair in pairs) for k in (0, 1))
    return sum(c / n * math.log2(c * n / (first[a] * second[b])) for (a, b), c in both.items())
