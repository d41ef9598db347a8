"""The stage `prior`: image embeddings from texts (DALL-E 2's prior), and prompt embeddings from image embeddings."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.generation.prior import encode_texts, make_prior_scheduler
from comfy_mminterleaved.models.contrastive import ContrastiveModel, pad_ids
from comfy_mminterleaved.models.prior import DiffusionPrior

from . import world
from .contrastive_training import texts_of
from .dataset import StoryDataset
from .targets import ConditioningTargets

TEXT_DROPOUT = 0.1  # section 2.2 of the paper
PARTIAL_PROB = 0.6  # of the texts: captions that leave things out
OMITTED_PROB = 0.3  # of each thing in them
TWO_CHARACTER_PROB = 0.4  # of the images: drawn only from those with two heroes
DRAWN_PROB = 0.3  # of the conditioner's images: drawn by the model
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
    """Embeddings of a dataset's images and token ids of texts about them, by seed.

    Args:
        embeds: `(images, D)`, of all images.
        drawn: `(len(indices), D)`, of those at `indices` as the model draws them.
        length: Of the texts, in tokens.
    """

    def __init__(
        self,
        dataset: StoryDataset,
        embeds: torch.Tensor,
        indices: list[int],
        drawn: torch.Tensor,
        tokenizer,
        batch_size: int,
        length: int,
    ):
        self.dataset, self.embeds, self.tokenizer = dataset, embeds, tokenizer
        self.drawn = {index: embed for index, embed in zip(indices, drawn)}
        self.batch_size, self.length = batch_size, length

    def build(self, seed: int) -> PriorBatch:
        rng, generator = random.Random(f"prior {seed}"), torch.Generator().manual_seed(seed)
        indices = self.dataset.random_indices(self.batch_size, rng, TWO_CHARACTER_PROB)
        texts, seen = [], []
        for index in indices:
            scene = self.dataset.panel(index).scene
            omitted = frozenset(name for name in world.OMISSIBLE if rng.random() < OMITTED_PROB)
            is_partial = rng.random() < PARTIAL_PROB
            text = world.partial_caption(scene, omitted) if is_partial else texts_of(scene, rng)[0]
            texts.append("" if rng.random() < TEXT_DROPOUT else text)
            is_drawn = index in self.drawn and rng.random() < DRAWN_PROB
            seen.append(self.drawn[index] if is_drawn else self.embeds[index])
        ids, mask = pad_ids([self.tokenizer.encode(text) for text in texts], self.length, pad_to_limit=True)
        embeds = torch.stack(seen)
        noise = torch.randn(embeds.shape, generator=generator) * torch.rand(len(embeds), 1, generator=generator) * NOISE
        rows = torch.tensor(indices)
        return PriorBatch(self.embeds[rows], F.normalize(embeds + noise, dim=-1), self.dataset.labels[rows], ids, mask)


@torch.no_grad()
def embeds_of(model: ContrastiveModel, visual_tokens: np.ndarray, feature_maps: np.ndarray) -> torch.Tensor:
    """Image embeddings `(images, D)` of a dataset's features."""
    parts = []
    for start in range(0, len(visual_tokens), 512):
        rows = (torch.from_numpy(np.array(x[start : start + 512])).float() for x in (visual_tokens, feature_maps))
        parts.append(model.embed_features(*rows))
    return torch.cat(parts)
