"""The contrastive stage: images of the world and texts about them, on features that are computed once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.latents import decode_latents
from comfy_mminterleaved.models.contrastive import GAMMA3, ContrastiveModel, match_words, pad_ids

from . import world
from .augmentation import augment
from .dataset import StoryDataset
from .drawn_images import neighbour, neighbour_of

# Shares of the texts: a caption with looks, a page's own text, the page's with who is who before it.
CAPTION_PROB, PAGE_PROB = 0.35, 0.25
CHANGED_PROB = 0.4  # of the images: tinted and blurred, redrawn by the VAE, or both
DRAWN_PROB = 0.6  # of the images beside their neighbours: both drawn by the model
NEIGHBOUR_PROB = 0.5  # of the other texts: a second text differs in one fact
TWO_CHARACTER_PROB = 0.5  # of the images: drawn only from those with two heroes
NUM_WORD_ROWS = 24  # of a batch: those whose words are matched with the regions of all of them
REDRAW_NOISE = 0.5  # largest standard deviation of the noise on the latents of redrawn ones


class ContrastiveObjective(nn.Module):
    """Cross-entropy over the batch, of images among texts and of texts among images (CLIP, section 2.3).

    Neighbours are wrong texts that differ in one fact; they stand beside the batch's own. Words and regions have
    AttnGAN's loss on the first rows (1711.10485, section 3.2).
    """

    def __init__(self, model: ContrastiveModel):
        super().__init__()
        self.model = model

    def forward(self, visual_tokens, feature_map, input_ids, attention_mask) -> dict[str, torch.Tensor]:
        """Rows of texts after the images' own are neighbours."""
        count = len(visual_tokens)
        images = self.model.embed_features(visual_tokens, feature_map)
        hidden_states = self.model.text_hidden_states(input_ids, attention_mask)
        texts = self.model.pool(hidden_states, attention_mask)
        logits, target = self.model.logits(images, texts), torch.arange(count, device=images.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2
        rows = slice(0, min(NUM_WORD_ROWS, count))
        words, regions = self.model.encode_words(hidden_states[rows]), self.model.encode_regions(feature_map[rows])
        matches = GAMMA3 * match_words(words, regions, attention_mask[rows])
        word_loss = (F.cross_entropy(matches, target[rows]) + F.cross_entropy(matches.T, target[rows])) / 2
        return {
            "loss": loss + 0.1 * word_loss,
            "words": word_loss,
            "r1": (logits[:, :count].T.argmax(1) == target).float().mean(),
            "hardest": (logits.argmax(1) == target).float().mean(),
        }


def texts_of(scene: world.Scene, rng: random.Random, other: world.Scene | None = None) -> tuple[str, str]:
    """One of the texts that an image has, and the same one of a neighbour, which is wrong in one thing.

    The text is a caption, a page's, or a page's with who is who before it.

    Args:
        other: The neighbour, whose looks may be other ones; None takes one that the text can tell apart.
    """
    kind, template = rng.random(), rng.choice(world.TEMPLATES)
    has_looks = not CAPTION_PROB <= kind < CAPTION_PROB + PAGE_PROB
    if other is not None and not has_looks:
        kind, has_looks = 1.0, True

    def text(scene: world.Scene) -> str:
        if kind < CAPTION_PROB:
            return world.caption(scene, template)
        page = world.describe(scene, rng, template)
        return f"{world.introduction(scene.heroes)} {page}" if has_looks else page

    return text(scene), text(other or neighbour(scene, rng, has_looks))


@torch.no_grad()
def cached_features(
    run_dir: Path, dataset: StoryDataset, encoder, vae, latents, grid_size: int, is_changed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Visual tokens and the map of `grid_size` of every image, float16; once as they are, once changed."""
    paths = [run_dir / f"{part}-{dataset.name}{'-changed' * is_changed}.npy" for part in ("tokens", "maps")]
    if not all(path.exists() for path in paths):
        rng, tokens, maps = random.Random("changed"), [], []
        for start in range(0, len(dataset), 64):
            indices = range(start, min(start + 64, len(dataset)))
            images = dataset.images(indices)
            if is_changed:
                torch.manual_seed(start)
                x = torch.from_numpy(np.array(latents[start : start + 64])).float()
                noise = torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) * REDRAW_NOISE
                redrawn = torch.rand(len(x)) < 0.7
                images = torch.where(redrawn[:, None, None, None], decode_latents(vae, x + noise), images)
                images = augment(images, rng)
            features = encoder(images.contiguous(memory_format=torch.channels_last))
            feature_map = next(m for m in features.feature_maps if m.shape[-1] == grid_size)
            tokens.append(features.visual_tokens.half().numpy())
            maps.append(feature_map.half().contiguous().numpy())
        for path, parts in zip(paths, (tokens, maps)):
            with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
                np.save(file, np.concatenate(parts))
    return tuple(np.load(path, mmap_mode="r") for path in paths)


@torch.no_grad()
def features_of(path: Path, pixels: np.ndarray, encoder, grid_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Visual tokens and the map of `grid_size`, float16, of uint8 images `(N, side, side, 3)`; computed once.

    Args:
        path: Of the two files, without what tells them apart.
    """
    paths = [path.with_name(f"{part}-{path.name}.npy") for part in ("tokens", "maps")]
    if not all(each.exists() for each in paths):
        tokens, maps = [], []
        for start in range(0, len(pixels), 64):
            images = torch.from_numpy(pixels[start : start + 64]).permute(0, 3, 1, 2).float() / 255
            features = encoder(images.contiguous(memory_format=torch.channels_last))
            tokens.append(features.visual_tokens.half().numpy())
            feature_map = next(m for m in features.feature_maps if m.shape[-1] == grid_size)
            maps.append(feature_map.half().contiguous().numpy())
        for each, parts in zip(paths, (tokens, maps)):
            with atomic_path(each) as temp_path, open(temp_path, "wb") as file:
                np.save(file, np.concatenate(parts))
    return tuple(np.load(each, mmap_mode="r") for each in paths)


@dataclass(frozen=True)
class ContrastiveSources:
    """Features of a dataset's images in several forms, each visual tokens and maps.

    Args:
        painted, changed: Of all images.
        drawn: Of the images at `indices`.
        neighbours: Of the neighbours of the first of them, painted and drawn.
    """

    painted: tuple[np.ndarray, np.ndarray]
    changed: tuple[np.ndarray, np.ndarray]
    indices: list[int]
    drawn: tuple[np.ndarray, np.ndarray]
    neighbours: dict[bool, tuple[np.ndarray, np.ndarray]]


class ContrastiveBatches:
    """Features of images and token ids of texts about them, by seed.

    Half of the rows are images beside their neighbours, which differ in one fact, half are any images; some of their
    texts have a neighbour that is no image's.
    """

    def __init__(self, dataset: StoryDataset, sources: ContrastiveSources, tokenizer, batch_size: int, limit: int):
        self.dataset, self.sources = dataset, sources
        self.tokenizer, self.batch_size, self.limit = tokenizer, batch_size, limit

    def build(self, seed: int) -> tuple[torch.Tensor, ...]:
        rng, s = random.Random(f"contrastive {seed}"), self.sources
        rows: list[tuple[tuple[np.ndarray, np.ndarray], int]] = []
        texts: list[str] = []
        num_pairs = min(self.batch_size // 4, len(s.neighbours[True][0]))
        for k in rng.sample(range(len(s.neighbours[True][0])), num_pairs):
            index = s.indices[k]
            is_drawn = rng.random() < DRAWN_PROB
            rows += [(s.drawn, k) if is_drawn else (s.painted, index), (s.neighbours[is_drawn], k)]
            texts += texts_of(self.dataset.panel(index).scene, rng, neighbour_of(self.dataset, index))
        wrong = []
        indices = self.dataset.random_indices(self.batch_size - len(rows), rng, TWO_CHARACTER_PROB)
        for index in indices:
            rows.append((s.changed if rng.random() < CHANGED_PROB else s.painted, index))
            text, other = texts_of(self.dataset.panel(index).scene, rng)
            texts.append(text)
            wrong.append(other)
        rng.shuffle(wrong)
        order = rng.sample(range(len(rows)), len(rows))
        rows, texts = [rows[i] for i in order], [texts[i] for i in order]
        texts += wrong[: round(NEIGHBOUR_PROB * len(wrong))]
        tokens, maps = (torch.from_numpy(np.stack([source[part][i] for source, i in rows])).float() for part in (0, 1))
        ids, mask = pad_ids([self.tokenizer.encode(text) for text in texts], self.limit)
        return tokens, maps, ids, mask
