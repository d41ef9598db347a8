"""The contrastive stage: images of the world and texts about them, on features that are computed once."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.latents import decode_latents
from comfy_mminterleaved.models.contrastive import ContrastiveModel, pad_ids

from . import world
from .augmentation import augment
from .dataset import StoryDataset

# Shares of the texts: a caption with looks, a page's own text, the page's with who is who before it.
CAPTION_PROB, PAGE_PROB = 0.35, 0.25
CHANGED_PROB = 0.4  # of the images: tinted and blurred, redrawn by the VAE, or both
REDRAW_NOISE = 0.5  # largest standard deviation of the noise on the latents of redrawn ones


class ContrastiveObjective(nn.Module):
    """Cross-entropy over the batch, of images among texts and of texts among images (CLIP, section 2.3)."""

    def __init__(self, model: ContrastiveModel):
        super().__init__()
        self.model = model

    def forward(self, visual_tokens, feature_map, input_ids, attention_mask) -> dict[str, torch.Tensor]:
        images = self.model.embed_features(visual_tokens, feature_map)
        texts = self.model.encode_text(input_ids, attention_mask)
        logits, target = self.model.logits(images, texts), torch.arange(len(images), device=images.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "r1": (logits.T.argmax(1) == target).float().mean()}


def text_of(panel: world.ScenePanel, rng: random.Random) -> str:
    """One of the texts that an image has: its caption, its page's text, or that with who is who before it."""
    kind = rng.random()
    if kind < CAPTION_PROB:
        return world.caption(panel.scene, rng.choice(world.TEMPLATES))
    page = world.describe(panel.scene, rng)
    return page if kind < CAPTION_PROB + PAGE_PROB else f"{world.introduction(panel.scene.heroes)} {page}"


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


class ContrastiveBatches:
    """Features of images and token ids of texts about them, by seed."""

    def __init__(self, dataset: StoryDataset, features, changed, tokenizer, batch_size: int, limit: int):
        self.dataset, self.features, self.changed = dataset, features, changed
        self.tokenizer, self.batch_size, self.limit = tokenizer, batch_size, limit

    def build(self, seed: int) -> tuple[torch.Tensor, ...]:
        rng = random.Random(f"contrastive {seed}")
        indices = self.dataset.random_indices(self.batch_size, rng)
        sources = [self.changed if rng.random() < CHANGED_PROB else self.features for _ in indices]
        tokens, maps = (
            torch.from_numpy(np.stack([source[part][i] for source, i in zip(sources, indices)])).float()
            for part in (0, 1)
        )
        texts = [text_of(self.dataset.panel(i), rng) for i in indices]
        ids, mask = pad_ids([self.tokenizer.encode(text) for text in texts], self.limit)
        return tokens, maps, ids, mask
