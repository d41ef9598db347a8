"""Scores, finds and ranks images by an `Embedder`: CLIP score, retrieval, DALL-E's re-ranking (2102.12092)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import SettingError, StoryError
from ..stories.story import ImageSegment, Story, TextSegment
from .embedders import Embedder, cosines

CAPTION_WEIGHT = 2.0  # of a log-probability in nats beside a standardized cosine
NAME = r"\b(?!(?:It|He|She|This|That|There|Here)\b)[^\W\d_a-z]\w+"  # a capitalized word that is no pronoun
BATCH = 8  # images that are embedded between two calls of on_progress


@dataclass(frozen=True)
class RankedImage:
    """A candidate, its place among the candidates, and its score, the higher the better."""

    image: ImageSegment
    index: int
    score: float


def score_images(
    embedder: Embedder,
    query: str | ImageSegment,
    images: Sequence[ImageSegment],
    on_progress: Callable[[int, int], object] | None = None,
) -> list[float]:
    """The cosine of each image with a text or with another image, in [-1, 1].

    Args:
        on_progress: Called with the number of images that are embedded, and of all.

    Raises:
        SettingError: For no images, an empty text, and embeddings that are not numbers.
    """
    if not images:
        raise SettingError("There are no images to rank; give at least one.")
    if isinstance(query, str) and not query.strip():
        raise SettingError("The text to compare images with is empty; write one.")
    target = embedder.text_embeds([query]) if isinstance(query, str) else embedder.image_embeds([query])
    return cosines(embed_images(embedder, images, on_progress), target)[:, 0].tolist()


def embed_images(
    embedder: Embedder, images: Sequence[ImageSegment], on_progress: Callable[[int, int], object] | None = None
) -> torch.Tensor:
    """`(N, D)`, a few images at a time, so that a caller can show progress and stop."""
    if not images:
        raise SettingError("There are no images to embed; give at least one.")
    parts = []
    for start in range(0, len(images), BATCH):
        parts.append(embedder.image_embeds(images[start : start + BATCH]))
        if on_progress is not None:
            on_progress(min(start + BATCH, len(images)), len(images))
    return torch.cat(parts)


def find_images(
    embedder: Embedder,
    query: str | ImageSegment,
    images: Sequence[ImageSegment],
    on_progress: Callable[[int, int], object] | None = None,
) -> list[RankedImage]:
    """Images by how well they fit a text or another image, the best first (`score_images`)."""
    return _sorted(images, score_images(embedder, query, images, on_progress))


def rank_images(
    embedder: Embedder,
    story: Story,
    images: Sequence[ImageSegment],
    reference_weight: float = 0.0,
    log_probs: Sequence[float] | None = None,
) -> list[RankedImage]:
    """Candidates for the panel whose text a story ends with, the best first.

    Where the next image has no text yet, because the story ends with an image or has images first, likeness to the
    earlier images decides.

    Args:
        reference_weight: How much the likeness to the story's earlier images counts beside the text's: for models that
            do not know from an introduction how the heroes look. Both are standardized over the candidates.
        log_probs: Of the story's `looks` as the caption of each image, in nats (`TextGenerator.caption_scores`): for
            candidates that often show the wrong characters (CogView's self-reranking, 2105.13290, section 3.2). Not
            standardized, so that an unlikely one falls behind; not used where the next image has no text.

    Raises:
        StoryError: For a story without text and images.
        SettingError: For no candidates.
    """
    check_rankable(story)
    if not images:
        raise SettingError("There are no images to rank; give at least one.")
    if not has_panel_text(story):
        return _sorted(images, _likeness(embedder, story, images))
    scores = score_images(embedder, ranking_text(story, embedder.truncates_end), images)
    total = _standardized(scores)
    if reference_weight and story.images:
        references = _standardized(_likeness(embedder, story, images))
        total = [a + reference_weight * b for a, b in zip(total, references)]
    if log_probs is not None:
        total = [a + CAPTION_WEIGHT * b for a, b in zip(total, log_probs)]
    order = sorted(range(len(images)), key=lambda i: -total[i])
    return [RankedImage(images[i], i, scores[i]) for i in order]


def _likeness(embedder: Embedder, story: Story, images: Sequence[ImageSegment]) -> list[float]:
    """The mean cosine of each image with a story's."""
    return cosines(embedder.image_embeds(images), embedder.image_embeds(story.images)).mean(1).tolist()


def has_panel_text(story: Story) -> bool:
    """Whether a story ends with a text of the image that comes next."""
    is_answered = story.image_first and story.images  # a text at its end belongs to the image before
    return bool(story.segments) and isinstance(story.segments[-1], TextSegment) and not is_answered


def panel_text(story: Story) -> str:
    """`ranking_text` of the image that comes next, or nothing if it has no text yet."""
    if not has_panel_text(story) or not story.panels()[-1].text.strip():
        return ""
    return ranking_text(story)


def check_rankable(story: Story) -> None:
    """Raises StoryError for a story that says nothing of its next image."""
    if not story.segments:
        raise StoryError("The story is empty, so there is nothing to choose an image by; add the panel's text.")


def _sorted(images: Sequence[ImageSegment], scores: list[float]) -> list[RankedImage]:
    return [RankedImage(images[i], i, scores[i]) for i in sorted(range(len(images)), key=lambda i: -scores[i])]


def _standardized(values: list[float]) -> list[float]:
    deviation = max(statistics.pstdev(values), 1e-6)
    return [(value - statistics.fmean(values)) / deviation for value in values]


def look_of(name: str, text: str) -> str | None:
    """How a text describes a character, if it does: "a fox in a red coat" for "Mia is a fox in a red coat."."""
    matches = (re.fullmatch(rf"{re.escape(name)} is (an? .+?)[.!?]*", sentence) for sentence in _sentences(text))
    return next((match[1] for match in matches if match), None)


def looks(story: Story) -> str:
    """The characters whom a story's last text names, described as in a caption: "A fox in a red coat and a bear".

    Empty if the story describes none of them.
    """
    earlier, panel = _split(story)
    descriptions = (look_of(name, earlier) or look_of(name, panel) for name in _names(panel))
    text = " and ".join(each for each in descriptions if each is not None)
    return text[:1].upper() + text[1:]


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(NAME, text)))


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def _split(story: Story) -> tuple[str, str]:
    """The texts before a story's last image, and those behind it."""
    texts: list[str] = []
    for segment in reversed(story.segments):
        if not isinstance(segment, TextSegment):
            break
        texts.insert(0, segment.text.strip())
    earlier = (s.text.strip() for s in story.segments[: len(story) - len(texts)] if isinstance(s, TextSegment))
    return " ".join(earlier), " ".join(texts)


def ranking_text(story: Story, panel_first: bool = False) -> str:
    """The text of a story's last panel, and the sentences that say who those are whom it names.

    Args:
        panel_first: Whether the panel's own text comes first, for models that cut a long text at its end.

    Raises:
        StoryError: For a story that does not end with a text.
    """
    earlier, panel = _split(story)
    if not panel:
        raise StoryError("The story does not end with a text; add the text of the panel that the images are for.")
    sentences = _sentences(earlier)
    introductions = (next((s for s in sentences if s.startswith(f"{name} is ")), None) for name in _names(panel))
    introductions = [s for s in introductions if s is not None and s not in panel]
    return " ".join([panel, *introductions] if panel_first else [*introductions, panel])
