"""Word masks: where in an image a word of its caption is, by occlusion (Zeiler and Fergus, 1311.2901, section 4.2)."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..errors import SettingError
from ..stories.story import ImageSegment
from .embedders import Embedder, cosines

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
def occlusion_map(
    embedder: Embedder, image: ImageSegment, text: str, word: str, rivals: Iterable[str] = ()
) -> torch.Tensor:
    """How much less the image says a word while a window of it is covered, `(rows, columns)`, one value a window.

    What a window says is the similarity to the text, less that to the rival that is nearest to the whole image. It
    takes about fifty encodings and works with any `Embedder`.

    Args:
        rivals: Words of the same kind, like other animals; without any, the word is left out.
    """
    pixels = image.pixels
    height, width = pixels.shape[-2:]
    if max(height, width) > MAX_SIDE:
        scale = MAX_SIDE / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = F.interpolate(pixels[None], size=size, mode="area")[0]
        height, width = size
    texts = rival_texts(text, word, rivals)
    own, others = embedder.text_embeds([text]), embedder.text_embeds(texts)
    whole = embedder.image_embeds([ImageSegment(pixels)])
    rival = others[cosines(whole, others)[0].argmax()][None]
    mean = pixels.mean((1, 2), keepdim=True)
    boxes = [(top, left) for top in _starts(height) for left in _starts(width)]
    covered = []
    for top, left in boxes:
        x = pixels.clone()
        x[:, top : top + round(height * WINDOW), left : left + round(width * WINDOW)] = mean
        covered.append(ImageSegment(x))
    embeds = torch.cat([whole, embedder.image_embeds(covered)])
    says = (cosines(embeds, own) - cosines(embeds, rival))[:, 0]
    return (says[0] - says[1:]).view(len(_starts(height)), -1).cpu()


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
    out = F.interpolate(total[None, None], size=(size[1], size[0]), mode="bilinear", align_corners=False)[0, 0]
    return (out / out.max()).clamp(min=0) if out.max() > 0 else torch.zeros_like(out)


def word_mask(
    embedder: Embedder,
    image: ImageSegment,
    text: str,
    word: str,
    rivals: Iterable[str] = (),
    threshold: float = 0.5,
    grow: int = 0,
) -> torch.Tensor:
    """1 where a word of the text is in the image, else 0: float32 `(height, width)`.

    Args:
        threshold: Share of the highest value of the map from which a pixel counts.
        grow: By how many px the mask grows on all sides, or shrinks below 0.

    Raises:
        SettingError: For a word that the text does not have, or where no window of the image says it.
    """
    mask = (pixel_map(occlusion_map(embedder, image, text, word, rivals), image.size) >= threshold).float()
    if not mask.any() or mask.all():
        raise SettingError(f"No part of the image shows {word!r:.60} more than the rest does; draw the mask by hand.")
    return grow_mask(mask, grow)


def grow_mask(mask: torch.Tensor, grow: int) -> torch.Tensor:
    """A mask `(height, width)` with its edge moved out by `grow` px, or in below 0."""
    if not grow:
        return mask
    inside = mask if grow > 0 else 1 - mask
    side = 2 * abs(grow) + 1
    wider = F.max_pool2d(inside[None, None], side, stride=1, padding=abs(grow))[0, 0]
    return wider if grow > 0 else 1 - wider
