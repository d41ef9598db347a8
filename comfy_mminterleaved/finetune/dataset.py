"""Stories as training panels, and batches of them as the LLM and the U-Net take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import StoryError
from ..generation.tokens import StoryTokens
from ..models.llama_mmfs import LlamaMMFS
from ..models.visual_tokenizer import ImageFeatures
from ..stories.page import load_story
from ..stories.story import ImageSegment, Story
from ..stories.storyboard import load_storyboard

IGNORE_INDEX = -100  # in targets: a token without a loss


@dataclass(frozen=True, eq=False)
class Panel:
    """One image to learn, and what comes before it.

    Args:
        story: Everything before the image, its own text included.
        caption: What the image shows, in words that need no story: its `alt`, else its panel's text.
    """

    story: Story
    image: ImageSegment
    caption: str


def story_panels(stories: Sequence[Story]) -> list[Panel]:
    """Every image of the stories that has something before it and a caption.

    Raises:
        StoryError: If there is none.
    """
    panels = []
    for story in stories:
        captions = iter([panel.alt for panel in story.panels() if panel.image is not None])
        for i, segment in enumerate(story.segments):
            if isinstance(segment, ImageSegment):
                caption = next(captions).strip()
                if i and caption:
                    panels.append(Panel(replace(story, segments=story.segments[:i]), segment, caption))
    if not panels:
        raise StoryError("The stories have no image with a text before it, so there is nothing to learn.")
    return panels


def load_stories(path: str | Path) -> list[Story]:
    """The stories of a saved story's folder or story.json, of a folder of such folders, or of a storyboard's openings.

    Raises:
        StoryError: If there are none, or one cannot be read.
        ImageError: For an image that cannot be read.
    """
    path = Path(path)
    if path.name == "story.json" or (path / "story.json").is_file():
        return [load_story(path)]
    if not path.is_dir():
        return [plan.opening for plan in load_storyboard(path)]
    folders = sorted(file.parent for file in path.glob("[!.]*/story.json"))  # those with a dot are unfinished
    if not folders:
        raise StoryError(f"The folder {str(path)!r} holds no stories; give a folder that `tell` or Save Story wrote.")
    return [load_story(folder) for folder in folders]


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens with their images, padded.

    Args:
        input_ids, targets: int64 `(N, L)`; a target is the next token, or IGNORE_INDEX.
        lengths: Of each row.
        visual_tokens: `(images, num_img_token, hidden_size)` of all rows in order; None without images.
        feature_maps: Each `(N, P, C, h, w)`.
        image_mask: bool `(N, L, P)`, the images that each token may attend to.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]
    visual_tokens: torch.Tensor | None
    feature_maps: list[torch.Tensor]
    image_mask: torch.Tensor


def collate(
    rows: Sequence[StoryTokens],
    firsts: Sequence[int | None],
    features: Sequence[list[ImageFeatures]],
    llm: LlamaMMFS,
) -> TokenBatch:
    """Pads rows, with the `features` of their images.

    Args:
        firsts: Of each row, the index of the first token with a loss; None for no loss at all.
    """
    c, device = llm.config, llm.device
    longest, num_images = max(map(len, rows)), max(map(len, features))
    input_ids = torch.full((len(rows), longest), c.special_tokens.pad)
    targets = torch.full((len(rows), longest), IGNORE_INDEX)
    image_mask = torch.zeros(len(rows), longest, num_images, dtype=torch.bool)
    for i, (tokens, first) in enumerate(zip(rows, firsts)):
        ids = torch.tensor(tokens.input_ids)
        input_ids[i, : len(ids)] = ids
        image_mask[i, : len(ids), : len(tokens.images)] = tokens.image_mask(c)
        if first is not None:
            following = ids[first:].masked_fill(ids[first:] == c.special_tokens.image, IGNORE_INDEX)
            targets[i, first - 1 : len(ids) - 1] = following
    every = [each for row in features for each in row]
    maps = []
    if every:
        for level, like in enumerate(every[0].feature_maps):
            blank = torch.zeros_like(like)
            rows_of_maps = [[each.feature_maps[level] for each in row] for row in features]
            maps.append(torch.stack([torch.stack(row + [blank] * (num_images - len(row))) for row in rows_of_maps]))
    return TokenBatch(
        input_ids.to(device),
        targets.to(device),
        tuple(map(len, rows)),
        torch.stack([each.visual_tokens for each in every]) if every else None,
        maps,
        image_mask.to(device),
    )
