"""Ranks candidate images for a story: re-ranking by a contrastive model (DALL-E, 2102.12092, section 2.6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import SettingError, StoryError
from ..models.contrastive import ContrastiveModel, pad_ids
from ..models.visual_tokenizer import ImageFeatures
from ..stories.story import ImageSegment, Story, TextSegment
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class RankedImage:
    """A candidate, its place among the candidates, and its score, the higher the better."""

    image: ImageSegment
    index: int
    score: float


class ImageScorer(Protocol):
    """Rates how well images fit a text."""

    def score_images(self, text: str, images: Sequence[ImageSegment]) -> list[float]: ...


class ContrastiveScorer:
    """An `ImageScorer` that compares the embeddings of a ContrastiveModel.

    Args:
        encode: Gives images features of the encoder that the model was trained with.
    """

    def __init__(
        self,
        model: ContrastiveModel,
        tokenizer: Tokenizer,
        encode: Callable[[Sequence[ImageSegment]], Sequence[ImageSegment]],
    ):
        self.model, self.tokenizer, self.encode = model, tokenizer, encode

    @torch.no_grad()
    def image_embeds(self, images: Sequence[ImageSegment]) -> torch.Tensor:
        """`(N, projection_dim)`, of unit length; raises StoryError for features of another width."""
        features = [image.features for image in self.encode(images)]
        c = self.model.config
        for each in features:
            width = each.visual_tokens.shape[-1]
            if width != c.llm_hidden_size:
                raise StoryError(
                    f"The images have features of width {width}, but the contrastive model takes {c.llm_hidden_size}; "
                    "use the encoder that it was trained with."
                )
        dtype, device = self.model.logit_scale.dtype, self.model.logit_scale.device
        batch = ImageFeatures(
            torch.stack([each.visual_tokens for each in features]).to(device, dtype),
            tuple(torch.stack(maps).to(device, dtype) for maps in zip(*(each.feature_maps for each in features))),
        )
        return self.model.encode_image(batch)

    @torch.no_grad()
    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """`(N, projection_dim)`, of unit length."""
        ids, mask = pad_ids([self.tokenizer.encode(text) for text in texts], self.model.config.max_position_embeddings)
        device = self.model.logit_scale.device
        return self.model.encode_text(ids.to(device), mask.to(device))

    def score_images(self, text: str, images: Sequence[ImageSegment]) -> list[float]:
        """The cosine of each image with a text."""
        return (self.image_embeds(images) @ self.text_embeds([text])[0]).tolist()


def rank_images(scorer: ImageScorer, story: Story, images: Sequence[ImageSegment]) -> list[RankedImage]:
    """Candidates for the panel whose text a story ends with, the best first.

    Raises:
        StoryError: For a story that does not end with a text.
        SettingError: For no candidates.
    """
    if not images:
        raise SettingError("There are no images to rank; give at least one.")
    scores = scorer.score_images(ranking_text(story), images)
    order = sorted(range(len(images)), key=lambda i: -scores[i])
    return [RankedImage(images[i], i, scores[i]) for i in order]


def ranking_text(story: Story) -> str:
    """The text of a story's last panel, after the sentences that say who those are whom it names.

    Raises:
        StoryError: For a story that does not end with a text.
    """
    texts: list[str] = []
    for segment in reversed(story.segments):
        if not isinstance(segment, TextSegment):
            break
        texts.insert(0, segment.text.strip())
    panel = " ".join(texts)
    if not panel:
        raise StoryError("The story does not end with a text; add the text of the panel that the images are for.")
    earlier = " ".join(s.text for s in story.segments[: len(story) - len(texts)] if isinstance(s, TextSegment))
    names = dict.fromkeys(re.findall(r"\b[^\W\d_a-z]\w+", panel))
    sentences = re.split(r"(?<=[.!?])\s+", earlier)
    introductions = [s for name in names for s in sentences if s.startswith(f"{name} is ")][: len(names)]
    return " ".join([*(s for s in introductions if s not in panel), panel])
