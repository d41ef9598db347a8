"""DALL-E 2 (2204.06125): image embeddings from texts by a diffusion prior, and images from embeddings (unCLIP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import SystemConfig


@dataclass(frozen=True)
class PriorConfig(SystemConfig):
    """Sizes of a DiffusionPrior.

    Args:
        embedding_dim: Of images and texts: `ContrastiveConfig.projection_dim`.
        num_embeddings: Tokens of a text that the prior reads.
        num_attention_heads, attention_head_dim, num_layers: Of diffusers' `PriorTransformer`.
        num_queries, cross_attention_dim: Of the prompt embeddings that the U-Net takes.
        conditioner_hidden_size: Of what makes them.
        guidance_scale: That the prior is sampled with by default. More makes what a text leaves open less diverse.
    """

    embedding_dim: int = 256
    num_embeddings: int = 64
    num_attention_heads: int = 4
    attention_head_dim: int = 48
    num_layers: int = 4
    num_queries: int = 16
    cross_attention_dim: int = 192
    conditioner_hidden_size: int = 384
    guidance_scale: float = 1.0


class DiffusionPrior(nn.Module):
    """What a model's file of this system holds: the prior, and the conditioner that has the U-Net draw embeddings."""

    def __init__(self, c: PriorConfig, operations=nn):
        from diffusers import PriorTransformer

        super().__init__()
        self.config = c
        self.prior = PriorTransformer(
            num_attention_heads=c.num_attention_heads,
            attention_head_dim=c.attention_head_dim,
            num_layers=c.num_layers,
            embedding_dim=c.embedding_dim,
            num_embeddings=c.num_embeddings,
        )
        for statistic in (self.prior.clip_mean, self.prior.clip_std):
            statistic.requires_grad_(False)
        self.conditioner = EmbeddingConditioner(c, operations)

    @torch.no_grad()
    def set_statistics(self, image_embeds: torch.Tensor) -> None:
        """Sets the mean and the standard deviation that the prior's embeddings are normalized by."""
        self.prior.clip_mean.copy_(image_embeds.mean(0))
        self.prior.clip_std.copy_(image_embeds.std(0))


class EmbeddingConditioner(nn.Module):
    """Prompt embeddings from an image embedding (section 2.1: "extra tokens of context")."""

    def __init__(self, c: PriorConfig, operations=nn):
        super().__init__()
        width = c.conditioner_hidden_size
        self.proj = operations.Linear(c.embedding_dim, width)
        self.queries = nn.Parameter(torch.randn(2, c.num_queries, width) * 0.1)  # scales and shifts
        self.norm = operations.LayerNorm(width)
        self.fc1 = operations.Linear(width, width)
        self.fc2 = operations.Linear(width, c.cross_attention_dim)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Unit image embeddings `(N, embedding_dim)` -> prompt embeddings `(N, num_queries, cross_attention_dim)`."""
        x = self.proj(image_embeds * image_embeds.shape[-1] ** 0.5)[:, None]
        scale, shift = self.queries.to(x)
        x = F.gelu(self.norm(x * (1 + scale) + shift))
        return self.fc2(F.gelu(self.fc1(x)) + x)
