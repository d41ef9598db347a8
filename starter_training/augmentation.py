"""Image augmentations of the encoder, the LLM and the classifier."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from comfy_mminterleaved.generation.latents import decode_latents

# `augment`: pixels, relative change of a colour channel, share of the images that are blurred.
MAX_TRANSLATE, MAX_TINT, BLUR_PROB = 4, 0.08, 0.4
# `reconstruct_some`: share of the images, and the largest standard deviation of the noise on their latents.
RECONSTRUCT_PROB, RECONSTRUCT_NOISE = 0.2, 0.4


def random_blur(images: torch.Tensor, rng: random.Random, prob: float) -> torch.Tensor:
    """Downsamples some of the images (N, 3, side, side), to half at the least, and upsamples them again."""
    side, out = images.shape[-1], []
    for image in images.split(1):
        if rng.random() < prob:
            small = F.interpolate(image, size=rng.randint(side // 2, side - 1), mode="area")
            image = F.interpolate(small, size=side, mode="bicubic", align_corners=False).clamp(0, 1)
        out.append(image)
    return torch.cat(out)


def augment(images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Translates and tints images (N, 3, side, side) in [0, 1] and blurs some of them.

    Without it the encoder recognizes a hero by a few pixels, which other things can cover.
    """
    side, padded, out = images.shape[-1], F.pad(images, (MAX_TRANSLATE,) * 4, mode="replicate"), []
    for image in padded:
        x, y = (rng.randint(0, 2 * MAX_TRANSLATE) for _ in range(2))
        gains = torch.tensor([1 + rng.uniform(-MAX_TINT, MAX_TINT) for _ in range(3)]).to(image)
        out.append((image[:, y : y + side, x : x + side] * gains[:, None, None]).clamp(0, 1))
    return random_blur(torch.stack(out), rng, BLUR_PROB)


@torch.no_grad()
def reconstruct_some(vae, images: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Replaces some of the images (N, 3, side, side) with the VAE's reconstructions from noised latents.

    At inference the model encodes its own images, so it trains on similar ones.
    """
    mask = torch.rand(len(images), device=images.device) < RECONSTRUCT_PROB
    noise = torch.randn_like(latents) * torch.rand_like(latents[:, :1, :1, :1]) * RECONSTRUCT_NOISE
    out = images.clone()
    out[mask] = decode_latents(vae, (latents + noise)[mask])
    return out
