"""The stage `thumbnails`: small images of a text at once (StackGAN's Stage-I, 1612.03242), in the VAE's latents."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.latents import encode_latents
from comfy_mminterleaved.models.contrastive import ContrastiveModel, pad_ids

from . import world
from .dataset import StoryDataset
from .prior_training import OMITTED_PROB
from .targets import ATTRIBUTES, IGNORE_INDEX, NUM_CLASSES, attribute_loss

GRID, CHANNELS, EMBED_DIM = (
    8,
    16,
    256,
)  # cells a side and channels of a thumbnail's latents; width of a text's embedding
CONDITION_DIM, NOISE_DIM, WIDTH, BLOCKS = 96, 32, 64, 4
NUM_IMAGES = 24000  # of the dataset, whose thumbnails are encoded
PARTIAL_PROB = 0.3  # of the texts: captions that leave things out
LATENT_NOISE = 0.1  # on what the classifier sees
R1_PROB, R1_WEIGHT = 0.25, 0.2  # of the discriminator's gradient penalty (1801.04406)
WEIGHTS = {"adversarial": 1.0, "attributes": 0.2, "kl": 1.0, "discriminator": 1.0, "classifier": 0.2, "r1": R1_WEIGHT}


class ConditioningAugmentation(nn.Module):
    """A Gaussian around what a text's embedding says, from which the condition is sampled (section 3.2)."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(EMBED_DIM, 2 * CONDITION_DIM)

    def forward(self, text_embeds: torch.Tensor, variety: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """`(N, EMBED_DIM)`, of unit length, -> conditions `(N, CONDITION_DIM)` and the KL divergence from N(0, 1).

        Args:
            variety: Scales the standard deviation; 0 takes the mean.
        """
        mean, log_variance = self.proj(text_embeds * EMBED_DIM**0.5).chunk(2, dim=-1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return mean + variety * (log_variance / 2).exp() * torch.randn_like(mean), kl


class ConditionedBlock(nn.Module):
    """A residual convolution whose norm is scaled and shifted by the condition."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(8, WIDTH, affine=False)
        self.modulation = nn.Linear(CONDITION_DIM + NOISE_DIM, 2 * WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.02)

    def forward(self, x, condition):
        scale, shift = self.modulation(condition)[..., None, None].chunk(2, dim=1)
        return x + self.conv(F.silu(self.norm(x) * (1 + scale) + shift))


class ThumbnailGenerator(nn.Module):
    """Latents `(N, CHANNELS, GRID, GRID)` of texts."""

    def __init__(self):
        super().__init__()
        self.augmentation = ConditioningAugmentation()
        self.fc = nn.Linear(CONDITION_DIM + NOISE_DIM, WIDTH * (GRID // 2) ** 2)
        self.pos_embed = nn.Parameter(torch.randn(1, WIDTH, GRID, GRID) * 0.5)
        self.first = ConditionedBlock()
        self.blocks = nn.ModuleList(ConditionedBlock() for _ in range(BLOCKS))
        self.conv_out = nn.Conv2d(WIDTH, CHANNELS, 1)

    def forward(
        self, text_embeds: torch.Tensor, noise: torch.Tensor, variety: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, and the divergence of `ConditioningAugmentation`.

        Args:
            noise: `(N, NOISE_DIM)`.
        """
        condition, kl = self.augmentation(text_embeds, variety)
        condition = torch.cat([condition, noise], dim=1)
        x = self.first(self.fc(condition).unflatten(1, (WIDTH, GRID // 2, GRID // 2)), condition)
        x = F.interpolate(x, scale_factor=2.0) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        return self.conv_out(F.silu(x)), kl


def _convolutions(num_out: int) -> nn.Sequential:
    sizes = ((CHANNELS, 64, 3, 1), (64, 64, 3, 1), (64, 128, 4, 2), (128, 128, 3, 1))
    layers: list[nn.Module] = []
    for before, after, kernel, stride in sizes:
        layers += [nn.Conv2d(before, after, kernel, stride, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (GRID // 2) ** 2, num_out))


class LatentDiscriminator(nn.Module):
    """Whether latents are those of an image, and of this text (projection, 1802.05637)."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.layers, self.score = _convolutions(width), nn.Linear(width, 1)
        self.proj = nn.Linear(EMBED_DIM, width, bias=False)

    def forward(self, latents: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        hidden = F.leaky_relu(self.layers(latents), 0.2)
        return self.score(hidden)[:, 0] + (hidden * self.proj(text_embeds)).sum(1)


@dataclass(frozen=True)
class ThumbnailBatch:
    """Latents `(N, CHANNELS, GRID, GRID)`, labels `(N, attributes)` and texts `(N, L)` about them."""

    latents: torch.Tensor
    labels: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def to(self, device) -> ThumbnailBatch:
        return ThumbnailBatch(**{name: x.to(device) for name, x in vars(self).items()})


class ThumbnailObjective(nn.Module):
    """Adversarial losses, matching by a classifier of true latents, and the divergence of the augmentation.

    The discriminator learns to tell true latents with their text from generated ones, and from true ones with another
    text (section 3.2).
    """

    def __init__(self, generator: ThumbnailGenerator, contrastive: ContrastiveModel):
        super().__init__()
        self.generator, self.discriminator = generator, LatentDiscriminator()
        self.classifier = _convolutions(sum(NUM_CLASSES))
        self.frozen = [contrastive.eval().requires_grad_(False)]

    def forward(self, batch: ThumbnailBatch) -> dict[str, torch.Tensor]:
        (contrastive,) = self.frozen
        true, device = batch.latents, batch.latents.device
        with torch.no_grad():
            texts = contrastive.to(device).encode_text(batch.input_ids, batch.attention_mask)
        made, kl = self.generator(texts, torch.randn(len(true), NOISE_DIM, device=device))
        losses = {"kl": kl, "classifier": attribute_loss(self.classifier(self.noisy(true)), batch.labels)}
        # Through nets that learn nothing from it.
        seen = functional_call(self.classifier, self.detached(self.classifier), self.noisy(made))
        losses["attributes"] = attribute_loss(seen, batch.labels)
        score = functional_call(self.discriminator, self.detached(self.discriminator), (made, texts))
        losses["adversarial"] = F.softplus(-score).mean()
        losses |= self.discriminator_losses(true, made.detach(), texts)
        return {"loss": sum(WEIGHTS[name] * loss for name, loss in losses.items()), **losses}

    def discriminator_losses(self, true, made, texts) -> dict[str, torch.Tensor]:
        is_penalized = self.training and torch.rand(()) < R1_PROB
        true = true.clone().requires_grad_(bool(is_penalized))
        right = self.discriminator(true, texts)
        wrong = F.softplus(self.discriminator(made, texts)).mean()
        wrong = wrong + F.softplus(self.discriminator(true.detach(), texts.roll(1, 0))).mean()
        penalty = right.new_zeros(())
        if is_penalized:
            (gradient,) = torch.autograd.grad(right.sum(), true, create_graph=True)
            penalty = gradient.square().sum((1, 2, 3)).mean()
        return {"discriminator": F.softplus(-right).mean() + 0.5 * wrong, "r1": penalty}

    def noisy(self, latents: torch.Tensor) -> torch.Tensor:
        return latents + LATENT_NOISE * torch.randn_like(latents) if self.training else latents

    @staticmethod
    def detached(module: nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in module.named_parameters()}


@torch.no_grad()
def thumbnail_latents(path: Path, dataset: StoryDataset, vae, count: int = NUM_IMAGES) -> np.ndarray:
    """Scaled latents of the first images at half their size; computed once and kept at `path`."""
    if not path.exists():
        parts, count = [], min(count, len(dataset))
        for start in range(0, count, 64):
            images = F.avg_pool2d(dataset.images(range(start, min(start + 64, count))), 2)
            parts.append(encode_latents(vae, images).half().numpy())
        with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
            np.save(file, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


class ThumbnailBatches:
    """Latents with texts about them, by seed."""

    def __init__(self, dataset: StoryDataset, latents: np.ndarray, tokenizer, batch_size: int, limit: int):
        self.dataset, self.latents, self.tokenizer = dataset, latents, tokenizer
        self.batch_size, self.limit = batch_size, limit

    def build(self, seed: int) -> ThumbnailBatch:
        rng = random.Random(f"thumbnails {seed}")
        indices = rng.sample(range(len(self.latents)), min(self.batch_size, len(self.latents)))
        labels, texts = self.dataset.labels[torch.tensor(indices)].clone(), []
        for index, row in zip(indices, labels):
            scene = self.dataset.panel(index).scene
            if rng.random() < PARTIAL_PROB:
                omitted = frozenset(name for name in world.OMISSIBLE if rng.random() < OMITTED_PROB)
                texts.append(world.partial_caption(scene, omitted))
                row[[name.rstrip("01") in omitted for name in ATTRIBUTES]] = IGNORE_INDEX
            else:
                texts.append(world.caption(scene, rng.choice(world.TEMPLATES)))
        ids, mask = pad_ids([self.tokenizer.encode(text) for text in texts], self.limit)
        return ThumbnailBatch(torch.from_numpy(self.latents[indices]).float(), labels, ids, mask)
