"""The stage `refine`: from the model's 128 px to the world's own 256 px drawings."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from comfy_mminterleaved.models.contrastive import GAMMA3, ContrastiveModel, match_words, pad_ids
from comfy_mminterleaved.models.refiner import SCALE, Refiner
from comfy_mminterleaved.models.visual_tokenizer import VisualTokenizer

from .contrastive_training import texts_of
from .dataset import StoryDataset
from .targets import ConditioningTargets

NUM_DRAWN = 2  # drawings of a batch, beside its pairs
WEIGHTS = {
    "pixels": 1.0,
    "squares": 5.0,
    "edges": 1.0,
    "kept": 1.0,
    "words": 0.01,
    "adversarial": 0.003,
    "discriminator": 1.0,
}
TEXT_DROPOUT = PROMPT_DROPOUT = 0.3
PROMPT_NOISE = 0.1  # standard deviation, of the prompt embeddings' own


class Discriminator(nn.Module):
    """Scores patches of images `(N, 3, H, W)`: true drawings above 1, others below -1 (hinge loss)."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = (3, width, 2 * width, 3 * width)
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:]):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(sizes[-1], 1, 3, 1, 1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images * 2 - 1)


@dataclass(frozen=True)
class RefinerBatch:
    """What a step sees.

    Args:
        small, large: `(N, 3, side, side)` and twice that: images through the VAE, and the true drawings.
        drawn: `(M, 3, side, side)`, images that the model drew again.
        input_ids, attention_mask: `(N + M, L)`, texts of all of them.
        prompt_embeds: `(N + M, T, C)`.
    """

    small: torch.Tensor
    large: torch.Tensor
    drawn: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_embeds: torch.Tensor

    def to(self, device) -> RefinerBatch:
        return RefinerBatch(**{name: x.to(device) for name, x in vars(self).items()})


class RefinerObjective(nn.Module):
    """Pixels and edges of pairs; of what the model drew, what it shows, its text and how true its edges look.

    Drawings have no true image: shrunk again they must be what they were, their words must match their regions
    (AttnGAN's DAMSM, by the frozen contrastive model), and a discriminator of patches must take them for true ones.
    """

    def __init__(self, refiner: Refiner, contrastive: ContrastiveModel, encoder: VisualTokenizer):
        super().__init__()
        self.refiner, self.discriminator = refiner, Discriminator()
        # In a list: they are frozen, and no part of what is trained.
        self.frozen = [contrastive.eval().requires_grad_(False), encoder.eval().requires_grad_(False)]

    def forward(self, batch: RefinerBatch) -> dict[str, torch.Tensor]:
        for module in self.frozen:
            module.to(batch.small.device)
        contrastive, _ = self.frozen
        count = len(batch.small)
        with torch.no_grad():
            words = contrastive.text_hidden_states(batch.input_ids, batch.attention_mask)
        word_mask, prompt_mask = batch.attention_mask, torch.ones(len(words), dtype=torch.bool, device=words.device)
        if self.training:
            word_mask = word_mask & (torch.rand(len(words), 1, device=words.device) >= TEXT_DROPOUT)
            prompt_mask = torch.rand(len(words), device=words.device) >= PROMPT_DROPOUT
        rows = slice(None, count), slice(count, None)
        refined, drawn = (
            self.refiner(images, words[r], word_mask[r], batch.prompt_embeds[r], prompt_mask[r])
            for images, r in zip((batch.small, batch.drawn), rows)
        )
        losses = {
            "pixels": (refined - batch.large).abs().mean(),
            "squares": F.mse_loss(refined.float(), batch.large),
            "edges": edge_distance(refined, batch.large),
            "kept": (F.avg_pool2d(drawn, SCALE) - batch.drawn).abs().mean(),
            "words": self.word_loss(drawn, words, batch.attention_mask, count),
        }
        losses["adversarial"], losses["discriminator"] = self.adversarial_losses(batch.large, refined, drawn)
        return {"loss": sum(WEIGHTS[name] * loss for name, loss in losses.items()), **losses}

    def word_loss(self, drawn, words, attention_mask, first: int) -> torch.Tensor:
        """Cross-entropy of each drawing's text among all of the batch, by words and regions, and as a whole."""
        contrastive, encoder = self.frozen
        features = encoder(F.avg_pool2d(drawn, SCALE).clamp(0, 1))
        side = contrastive.config.grid_size
        regions = contrastive.encode_regions(next(m for m in features.feature_maps if m.shape[-1] == side))
        target = torch.arange(first, first + len(drawn), device=drawn.device)
        matches = GAMMA3 * match_words(contrastive.encode_words(words), regions, attention_mask)
        texts = contrastive.pool(words, attention_mask)
        logits = contrastive.logits(contrastive.encode_image(features), texts)
        return F.cross_entropy(matches, target) + F.cross_entropy(logits, target)

    def adversarial_losses(self, true, *made) -> tuple[torch.Tensor, torch.Tensor]:
        """The refiner's loss through a discriminator that learns nothing from it, and the discriminator's (hinge)."""
        parameters = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        adversarial = -sum(functional_call(self.discriminator, parameters, each).mean() for each in made) / len(made)
        loss = F.relu(1 - self.discriminator(true)).mean()
        loss = loss + sum(F.relu(1 + self.discriminator(each.detach())).mean() for each in made) / len(made)
        return adversarial, loss


def edge_distance(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the images' differences of neighbouring pixels."""
    return sum((images.diff(dim=dim) - others.diff(dim=dim)).abs().mean() for dim in (-1, -2))


class RefinerBatches:
    """Batches by seed, from images at `indices` of a dataset: through the VAE, drawn again, and painted large."""

    def __init__(
        self,
        dataset: StoryDataset,
        indices: list[int],
        decoded: np.ndarray,
        drawn: np.ndarray,
        large: np.ndarray,
        tokenizer,
        targets: ConditioningTargets,
        batch_size: int,
        limit: int,
    ):
        self.dataset, self.indices = dataset, indices
        self.decoded, self.drawn, self.large = decoded, drawn, large
        self.tokenizer, self.targets, self.batch_size, self.limit = tokenizer, targets, batch_size, limit

    def build(self, seed: int) -> RefinerBatch:
        rng = random.Random(f"refine {seed}")
        rows = [rng.randrange(len(self.indices)) for _ in range(self.batch_size + NUM_DRAWN)]
        small, large = ([images[k] for k in rows[: self.batch_size]] for images in (self.decoded, self.large))
        drawn = [self.drawn[k] for k in rows[self.batch_size :]]
        scenes = [self.dataset.panel(self.indices[k]).scene for k in rows]
        texts = [texts_of(scene, rng)[0] for scene in scenes]
        ids, mask = pad_ids([self.tokenizer.encode(text) for text in texts], self.limit)
        prompt_embeds = self.targets(self.dataset.labels[torch.tensor([self.indices[k] for k in rows])])
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(prompt_embeds.shape, generator=generator) * PROMPT_NOISE * prompt_embeds.std()
        return RefinerBatch(*map(_floats, (small, large, drawn)), ids, mask, prompt_embeds + noise)


def _floats(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
