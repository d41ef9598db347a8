"""Word masks: where in an image a word of its caption is, by occlusion (Zeiler and Fergus, 1311.2901, section 4.2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from ..errors import SettingError
from ..stories.story import ImageSegment
from .embedders import Embedder, cosines
from .ranking import embed_images

WINDOW, STRIDE = 1 / 4, 1 / 8  # of the image's sides
MAX_SIDE = 512  # px of the image that is looked at; a larger one is reduced
MAX_RIVALS = 400


def rival_texts(text: str, word: str, rivals: Iterable[str] = ()) -> list[str]:
    """The text with each rival in the place of a word; without rivals, with the word left out.

    Raises:
        SettingError: For a word that the text does not have.
    """
    pattern = re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)
    if not word.strip() or not pattern.search(text):
        raise SettingError(f"The word {word!r:.60} is not in the text {text!r:.120}; give one that it has.")
    others = [rival for rival in rivals if rival.lower() != word.strip().lower()]
    texts = [pattern.sub(lambda _, rival=rival: rival, text) for rival in others]
    return texts[:MAX_RIVALS] or [re.sub(r"\s+", " ", pattern.sub("", text)).strip() or "something"]


@torch.no_grad()
def window_embeds(
    embedder: Embedder, image: ImageSegment, on_progress: Callable[[int, int], object] | None = None
) -> torch.Tensor:
    """Embeddings `(1 + windows, D)` of an image, first as it is, then with each window covered by its mean.

    It is what an `occlusion_map` costs, and the same for every word. The image is padded to a square with its mean, for
    embedders see the middle square of an image only.

    Args:
        on_progress: Called with the number of windows done, and of all.
    """
    pixels = image.pixels
    if max(pixels.shape[-2:]) > MAX_SIDE:
        scale = MAX_SIDE / max(pixels.shape[-2:])
        size = tuple(max(1, round(side * scale)) for side in pixels.shape[-2:])
        pixels = F.interpolate(pixels[None], size=size, mode="area")[0]
    mean, side = pixels.mean((1, 2), keepdim=True), max(pixels.shape[-2:])
    square = mean.expand(-1, side, side).clone()
    top, left = ((side - n) // 2 for n in pixels.shape[-2:])
    square[:, top : top + pixels.shape[-2], left : left + pixels.shape[-1]] = pixels
    window, covered = round(side * WINDOW), [ImageSegment(square)]
    for y in _starts(side):
        for x in _starts(side):
            copy = square.clone()
            copy[:, y : y + window, x : x + window] = mean
            covered.append(ImageSegment(copy))
    return embed_images(embedder, covered, on_progress)


@torch.no_grad()
def occlusion_map(
    embedder: Embedder,
    image: ImageSegment,
    text: str,
    word: str,
    rivals: Iterable[str] = (),
    on_progress: Callable[[int, int], object] | None = None,
    embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much less the image says a word while a window of it is covered, `(rows, columns)`, one value a window.

    What a window says is the similarity to the text, less that to the rival that is nearest to the whole image. It
    takes about fifty encodings and works with any `Embedder`.

    Args:
        rivals: Words of the same kind, like other animals; without any, the word is left out.
        embeds: From `window_embeds`, for several words of one image.
    """
    texts = rival_texts(text, word, rivals)
    target, others = embedder.text_embeds([text]), embedder.text_embeds(texts)
    embeds = window_embeds(embedder, image, on_progress) if embeds is None else embeds
    rival = others[cosines(embeds[:1], others)[0].argmax()][None]
    says = (cosines(embeds, target) - cosines(embeds, rival))[:, 0]
    return (says[0] - says[1:]).view(round((1 - WINDOW) / STRIDE) + 1, -1).cpu()


def _starts(side: int) -> list[int]:
    count = round((1 - WINDOW) / STRIDE) + 1
    return [round(side * STRIDE * k) for k in range(count)]


def pixel_map(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`(height, width)` of an occlusion map: at each pixel the sum of the windows that cover it, from 0 to 1.

    A mean would favour the edges of the image, which few windows cover.

    Args:
        size: `(width, height)` of the image.
    """
    grid, cells = round(1 / STRIDE), round(WINDOW / STRIDE)
    total = torch.zeros(grid, grid)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            total[row : row + cells, column : column + cells] += value
    side = max(size)  # the map is of the square around the image
    out = F.interpolate(total[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    out = out[top : top + size[1], left : left + size[0]]
    return (out / out.max()).clamp(min=0) if out.max() > 0 else torch.zeros_like(out)


def word_mask(
    embedder: Embedder,
    image: ImageSegment,
    text: str,
    word: str,
    rivals: Iterable[str] = (),
    threshold: float = 0.5,
    grow: int = 0,
    on_progress: Callable[[int, int], object] | None = None,
) -> torch.Tensor:
    """1 where a word of the text is in the image, else 0: float32 `(height, width)`.

    Args:
        threshold: Share of the highest value of the map from which a pixel counts.
        grow: By how many px the mask grows on all sides, or shrinks below 0.

    Raises:
        SettingError: For a word that the text does not have, where no window of the image says it, or if nothing is
            left of the mask.
    """
    values = occlusion_map(embedder, image, text, word, rivals, on_progress)
    mask = (pixel_map(values, image.size) >= threshold).float()
    if not mask.any() or mask.all():
        raise SettingError(f"No part of the image shows {word!r:.60} more than the rest does; draw the mask by hand.")
    mask = grow_mask(mask, grow)
    if not mask.any():
        raise SettingError(
            f"Nothing is left of the mask of {word!r:.60} when it shrinks by {-grow} px; shrink it less."
        )
    return mask


def grow_mask(mask: torch.Tensor, grow: int) -> torch.Tensor:
    """A mask `(height, width)` with its edge moved out by `grow` px, or in below 0."""
    if not grow:
        return mask
    inside = mask if grow > 0 else 1 - mask
    side = 2 * abs(grow) + 1
    wider = F.max_pool2d(inside[None, None], side, stride=1, padding=abs(grow))[0, 0]
    return wider if grow > 0 else 1 - wider
