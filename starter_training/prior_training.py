"""The stage `prior`: image embeddings from texts (DALL-E 2's prior), and prompt embeddings from image embeddings."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.prior import encode_texts, make_prior_scheduler
from comfy_mminterleaved.models.contrastive import ContrastiveModel, pad_ids
from comfy_mminterleaved.models.prior import DiffusionPrior

from . import renderer, world
from .contrastive_training import texts_of
from .targets import ConditioningTargets, attribute_labels

TEXT_DROPOUT = 0.1  # section 2.2 of the paper
PARTIAL_PROB = 0.6  # of the texts: captions that leave things out
OMITTED_PROB = 0.3  # of each thing in them
TWO_CHARACTER_PROB = 0.4  # of the images: drawn only from those with two heroes
DRAWN_PROB = 0.3  # of the conditioner's images: drawn by the model
NUM_VARIANTS = 3  # of each image, with other looks
NOISE = 0.02  # largest standard deviation of what is added to the conditioner's embeddings, of unit length


@dataclass(frozen=True)
class PriorBatch:
    """Image embeddings `(N, D)` for the prior and for the conditioner, labels `(N, attributes)`, and texts `(N, L)`."""

    image_embeds: torch.Tensor
    seen_embeds: torch.Tensor
    labels: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def to(self, device) -> PriorBatch:
        return PriorBatch(**{name: x.to(device) for name, x in vars(self).items()})


class PriorObjective(nn.Module):
    """The squared error of the embedding that the prior denoises, and the losses of the conditioner's targets."""

    def __init__(self, model: DiffusionPrior, contrastive: ContrastiveModel, targets: ConditioningTargets):
        super().__init__()
        self.model, self.targets = model, targets
        self.frozen = [contrastive.eval().requires_grad_(False)]
        self.scheduler = make_prior_scheduler()

    def forward(self, batch: PriorBatch) -> dict[str, torch.Tensor]:
        (contrastive,) = self.frozen
        contrastive.to(batch.image_embeds.device)
        with torch.no_grad():
            states = encode_texts(contrastive, batch.input_ids, batch.attention_mask)
        prior = self.model.prior
        clean = (batch.image_embeds - prior.clip_mean) / prior.clip_std
        steps = torch.randint(len(self.scheduler.alphas_cumprod), (len(clean),), device=clean.device)
        noisy = self.scheduler.add_noise(clean, torch.randn_like(clean), steps)
        predicted = prior(noisy, steps, *states, return_dict=False)[0]
        losses = {"prior": F.mse_loss(predicted.float(), clean)}
        prompt_embeds = self.model.conditioner(batch.seen_embeds)
        losses["squares"], losses["attributes"] = self.targets.losses(prompt_embeds, batch.labels)
        return {"loss": losses["prior"] + losses["squares"] + 0.1 * losses["attributes"], **losses}


class PriorBatches:
    """Embeddings of images and token ids of texts about them, by seed.

    Args:
        scenes, embeds: Of all images, `embeds` `(images, D)`.
        drawn: `(len(indices), D)`, of those at `indices` as the model draws them.
        length: Of the texts, in tokens.
    """

    def __init__(
        self,
        scenes: list[world.Scene],
        embeds: torch.Tensor,
        indices: list[int],
        drawn: torch.Tensor,
        tokenizer,
        batch_size: int,
        length: int,
    ):
        self.scenes, self.embeds, self.tokenizer = scenes, embeds, tokenizer
        self.labels = torch.tensor([list(attribute_labels(scene).values()) for scene in scenes])
        self.pairs = [index for index, scene in enumerate(scenes) if len(scene.heroes) > 1]
        self.drawn = {index: embed for index, embed in zip(indices, drawn)}
        self.batch_size, self.length = batch_size, length

    def build(self, seed: int) -> PriorBatch:
        rng, generator = random.Random(f"prior {seed}"), torch.Generator().manual_seed(seed)
        indices, texts, seen = [], [], []
        for _ in range(self.batch_size):
            is_pair = self.pairs and rng.random() < TWO_CHARACTER_PROB
            index = rng.choice(self.pairs) if is_pair else rng.randrange(len(self.scenes))
            omitted = frozenset(name for name in world.OMISSIBLE if rng.random() < OMITTED_PROB)
            scene, is_partial = self.scenes[index], rng.random() < PARTIAL_PROB
            text = world.partial_caption(scene, omitted) if is_partial else texts_of(scene, rng)[0]
            indices.append(index)
            texts.append("" if rng.random() < TEXT_DROPOUT else text)
            is_drawn = index in self.drawn and rng.random() < DRAWN_PROB
            seen.append(self.drawn[index] if is_drawn else self.embeds[index])
        ids, mask = pad_ids([self.tokenizer.encode(text) for text in texts], self.length, pad_to_limit=True)
        embeds, rows = torch.stack(seen), torch.tensor(indices)
        noise = torch.randn(embeds.shape, generator=generator) * torch.rand(len(embeds), 1, generator=generator) * NOISE
        return PriorBatch(self.embeds[rows], F.normalize(embeds + noise, dim=-1), self.labels[rows], ids, mask)


def look_variants(scenes: list[world.Scene]) -> list[world.Scene]:
    """Each scene a few times with other looks, so that a text that does not tell them leaves them open."""
    rng = random.Random("look variants")
    return [world.swap_appearance(scene, rng) for scene in scenes for _ in range(NUM_VARIANTS)]


@torch.no_grad()
def scene_embeds(path: Path, scenes: list[world.Scene], encoder, model: ContrastiveModel) -> torch.Tensor:
    """Image embeddings `(scenes, D)` of scenes, painted and encoded once and kept at `path`."""
    if not path.exists():
        parts, side = [], model.config.grid_size
        for start in range(0, len(scenes), 64):
            images = torch.from_numpy(np.stack([renderer.paint(scene) for scene in scenes[start : start + 64]]))
            images = (images.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)
            features = encoder(images)
            feature_map = next(m for m in features.feature_maps if m.shape[-1] == side)
            parts.append(model.embed_features(features.visual_tokens, feature_map).half())
        with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
            np.save(file, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(path)).float()


@torch.no_grad()
def embeds_of(model: ContrastiveModel, visual_tokens: np.ndarray, feature_maps: np.ndarray) -> torch.Tensor:
    """Image embeddings `(images, D)` of a dataset's features."""
    parts = []
    for start in range(0, len(visual_tokens), 512):
        rows = (torch.from_numpy(np.array(x[start : start + 512])).float() for x in (visual_tokens, feature_maps))
        parts.append(model.embed_features(*rows))
    return torch.cat(parts)
