"""VQ-VAE-2 (1906.00446) of the VAE's latents: an image as two grids of codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..config import SystemConfig

FACTOR = 2  # between the sides of the two levels


@dataclass(frozen=True)
class VQVAEConfig(SystemConfig):
    """Sizes of a VQVAE.

    Args:
        latent_channels: Of the VAE's latents.
        scaling_factor: That the VAE's latents are multiplied by before they are encoded.
        hidden_size: Channels of the convolutions.
        num_blocks: Residual blocks of each of its three nets.
        num_codes, code_dim: Entries of each level's codebook, and their width.
    """

    latent_channels: int = 16
    scaling_factor: float = 1.0
    hidden_size: int = 80
    num_blocks: int = 2
    num_codes: int = 1024
    code_dim: int = 16


class ImageCodes(NamedTuple):
    """Codes of N images: `top` `(N, h / 2, w / 2)` and `bottom` `(N, h, w)`, of latents `(h, w)`."""

    top: torch.Tensor
    bottom: torch.Tensor


class VectorQuantizer(nn.Module):
    """The nearest entry of a codebook; `codebook` is a buffer, for its entries are means of what they stand for."""

    def __init__(self, num_codes: int, code_dim: int):
        super().__init__()
        self.register_buffer("codebook", torch.randn(num_codes, code_dim) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, code_dim, h, w)` -> codes `(N, h, w)`."""
        rows = x.movedim(1, -1)
        codebook = self.codebook.to(rows)
        return (codebook.square().sum(-1) - 2 * rows @ codebook.T).argmin(-1)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(N, h, w)` -> `(N, code_dim, h, w)`."""
        return F.embedding(codes, self.codebook.to(codes.device)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, operations):
        super().__init__()
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class VQVAE(nn.Module):
    """Two levels of codes: the top ones say what is where, the bottom ones, given those, how it looks (section 3.1)."""

    def __init__(self, c: VQVAEConfig, operations=nn):
        super().__init__()
        self.config, width = c, c.hidden_size

        def blocks(count: int = c.num_blocks) -> nn.Sequential:
            return nn.Sequential(*(ResidualBlock(width, operations) for _ in range(count)))

        self.conv_in = operations.Conv2d(c.latent_channels, width, 3, padding=1)
        self.bottom_blocks = blocks()
        self.down = operations.Conv2d(width, width, 4, FACTOR, 1)
        self.top_blocks = blocks()
        self.to_top = operations.Conv2d(width, c.code_dim, 1)
        self.quantize_top = VectorQuantizer(c.num_codes, c.code_dim)
        self.from_top = operations.Conv2d(c.code_dim, width, 3, padding=1)
        self.to_bottom = operations.Conv2d(2 * width, c.code_dim, 1)
        self.quantize_bottom = VectorQuantizer(c.num_codes, c.code_dim)
        self.from_bottom = operations.Conv2d(c.code_dim, width, 1)
        self.decoder_blocks = blocks(2 * c.num_blocks)
        self.conv_out = operations.Conv2d(width, c.latent_channels, 3, padding=1)

    def encode_top(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bottom level's features `(N, hidden_size, h, w)`, and what the top codes stand for, `(N, code_dim, h / 2,
        w / 2)`."""
        features = self.bottom_blocks(self.conv_in(latents))
        return features, self.to_top(self.top_blocks(self.down(features)))

    def upsample_top(self, top: torch.Tensor) -> torch.Tensor:
        """`(N, code_dim, h / 2, w / 2)` -> `(N, hidden_size, h, w)`."""
        return F.interpolate(self.from_top(top), scale_factor=FACTOR, mode="nearest")

    def encode_bottom(self, features: torch.Tensor, upsampled: torch.Tensor) -> torch.Tensor:
        """What the bottom codes stand for, `(N, code_dim, h, w)`."""
        return self.to_bottom(torch.cat([F.silu(features), upsampled], dim=1))

    def decode_embedded(self, upsampled: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
        """Latents from the upsampled top level and the bottom level's entries `(N, code_dim, h, w)`."""
        return self.conv_out(F.silu(self.decoder_blocks(upsampled + self.from_bottom(bottom))))

    @torch.no_grad()
    def encode(self, latents: torch.Tensor) -> ImageCodes:
        """Scaled latents `(N, C, h, w)`, of even sides, to codes."""
        features, top = self.encode_top(latents)
        top_codes = self.quantize_top(top)
        upsampled = self.upsample_top(self.quantize_top.embed(top_codes))
        return ImageCodes(top_codes, self.quantize_bottom(self.encode_bottom(features, upsampled)))

    @torch.no_grad()
    def decode(self, codes: ImageCodes) -> torch.Tensor:
        """Codes to scaled latents `(N, C, h, w)`."""
        upsampled = self.upsample_top(self.quantize_top.embed(codes.top))
        return self.decode_embedded(upsampled, self.quantize_bottom.embed(codes.bottom))
