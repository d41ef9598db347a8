"""The stage `codes`: images as two grids of codes, by a VQ-VAE-2 of the VAE's latents (1906.00446)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.models.vqvae import VQVAE, VectorQuantizer

from .pretraining import FOREGROUND_WEIGHT, relative_mse

COMMITMENT = 0.25  # section 2.1
DECAY = 0.99  # of the codebooks' moving means (appendix of the paper)
RESTART_BELOW = 0.05  # uses a step, of an entry that is replaced with something that was just encoded
NUM_PERCEPTUAL = 6  # of a batch's images that are decoded
PERCEPTUAL_FROM = 0.6  # of the steps: from then on some images are decoded to pixels
PERCEPTUAL_WEIGHT = 0.3


class CodebookTrainer:
    """Moves the entries of a codebook to the mean of what they stand for, and restarts entries that nothing uses."""

    def __init__(self, quantizer: VectorQuantizer):
        self.quantizer = quantizer
        self.sizes = torch.ones(len(quantizer.codebook))
        self.sums = quantizer.codebook.clone()

    @torch.no_grad()
    def update(self, x: torch.Tensor, codes: torch.Tensor) -> None:
        """`x` `(N, code_dim, h, w)` and its codes `(N, h, w)`."""
        rows, flat = x.movedim(1, -1).flatten(0, -2).float(), codes.flatten()
        counts = torch.bincount(flat, minlength=len(self.sizes)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, flat, rows)
        self.sizes.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        dead = (self.sizes < RESTART_BELOW).nonzero()[:, 0]
        if len(dead):
            fresh = rows[torch.randint(len(rows), (len(dead),))]
            self.sums[dead], self.sizes[dead] = fresh, 1.0
        self.quantizer.codebook.copy_(self.sums / self.sizes.clamp(min=1e-3)[:, None])


class CodesObjective(nn.Module):
    """Squared error of latents through the codes, heroes and prop counting more, and in the end what the encoder sees.

    Args:
        vae, encoder: Frozen.
    """

    def __init__(self, model: VQVAE, vae, encoder):
        super().__init__()
        self.model, self.frozen = model, [vae, encoder]
        self.trainers = [CodebookTrainer(model.quantize_top), CodebookTrainer(model.quantize_bottom)]

    def quantize(self, x: torch.Tensor, trainer: CodebookTrainer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Entries with the gradients of `x` (straight through), the commitment loss, and codes."""
        x = x.float()
        codes = trainer.quantizer(x)
        entries = trainer.quantizer.embed(codes)
        if self.training:
            trainer.update(x.detach(), codes)
        return x + (entries - x).detach(), F.mse_loss(x, entries.detach()), codes

    def forward(self, latents, foreground_mask, images, progress) -> dict[str, torch.Tensor]:
        """Scaled latents `(N, C, h, w)`, mask `(N, 1, h, w)` and images `(N, 3, side, side)` of some of them.

        Args:
            progress: The share of the stage that is done.
        """
        model = self.model
        features, top = model.encode_top(latents)
        top, top_error, top_codes = self.quantize(top, self.trainers[0])
        upsampled = model.upsample_top(top)
        bottom, bottom_error, bottom_codes = self.quantize(model.encode_bottom(features, upsampled), self.trainers[1])
        pred = model.decode_embedded(upsampled, bottom).float()
        weight = 1 + (FOREGROUND_WEIGHT - 1) * foreground_mask
        squares = ((pred - latents).square() * weight).mean() / weight.mean()
        losses = {
            "squares": squares,
            "commitment": top_error + bottom_error,
            "used_top": used(top_codes, model.config.num_codes),
            "used_bottom": used(bottom_codes, model.config.num_codes),
        }
        loss = squares + COMMITMENT * losses["commitment"]
        if progress >= PERCEPTUAL_FROM or not self.training:
            losses["perceptual"] = self.perceptual_loss(pred[: len(images)], images)
            loss = loss + PERCEPTUAL_WEIGHT * losses["perceptual"]
        return {"loss": loss, **losses}

    def perceptual_loss(self, latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Pixels, and the encoder's features of them."""
        vae, encoder = (module.to(latents.device) for module in self.frozen)
        pixels = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
        with torch.no_grad():
            target = encoder(images)
        features = encoder(pixels.contiguous(memory_format=torch.channels_last))
        pairs = zip((features.visual_tokens, *features.feature_maps), (target.visual_tokens, *target.feature_maps))
        errors = [relative_mse(a, b) for a, b in pairs]
        return sum(errors) / len(errors) + (pixels.float() - images).abs().mean()


def used(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """The share of a codebook that is in use."""
    return (torch.bincount(codes.flatten(), minlength=num_codes) > 0).float().mean()
