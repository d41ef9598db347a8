"""From the LLM's hidden states to a diffusion U-Net: conditioning, and MMFS at its skips (`ImageDecoder`, `MMFSNet`).

This module contains no U-Net. The code that runs one takes `prompt_embeds` and `neg_prompt_embeds` as conditioning and
adds the MMFS blocks' residuals. Blocks are numbered as the U-Net makes its skips; the last one is for its middle block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..config import SynchronizerConfig
from .attention import attention as default_attention
from .mmfs import MMFS, MMFSValues
from .perceiver import PerceiverResampler
from .pos_embed import get_1d_sincos_pos_embed, interpolate_pos_embed
from .vit_adapter import get_reference_points


@dataclass(frozen=True)
class UNetImageValues:
    """Context images, projected for every MMFS block; computed once for all steps of an image.

    Args:
        blocks: Of each MMFS block.
        image_mask: bool `(N, P)`, or `(R, N, P)` for R copies of each row that attend to different images.
        pos_cache: Positions and reference points by block and size of its skip, filled on first use.
    """

    blocks: tuple[MMFSValues, ...]
    image_mask: torch.Tensor
    pos_cache: dict = field(default_factory=dict)


class MMFSBlock(nn.Module):
    """x -> Conv1x1(MMFS(LayerNorm(x) + positions, LayerNorm(features))) (`MMFSBlock`)."""

    def __init__(self, c: SynchronizerConfig, channels: int, base_shape: int, operations):
        super().__init__()
        m = c.mmfs
        self.query_norm = operations.LayerNorm(channels, eps=1e-6)
        self.feat_norm = operations.LayerNorm(m.d_value, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(c.pos_embed_grid**2, channels), requires_grad=False)  # sine-cosine
        self.mmfs = MMFS(
            channels,
            m.d_value,
            m.d_model,
            channels,
            m.spatial_shapes,
            base_shape,
            m.n_heads,
            m.n_points,
            m.max_num_image_per_seq,
            operations,
            m.is_fused,
        )
        self.conv = nn.Identity() if m.is_fused else operations.Conv2d(channels, channels, 1)

    def fuse_projections(self) -> None:
        """Fuses the convolution into the output projection of MMFS, in place."""
        if not self.mmfs.is_fused:
            self.mmfs.fuse_projections(self.conv)
            self.conv = nn.Identity()

    def forward(self, x, values: MMFSValues, image_mask, positions, reference_points):
        """x `(R * N, C, h, w)`, R copies (as for guidance) of each of N rows of images -> the same shape."""
        n = image_mask.shape[-2]
        rows, c, h, w = x.shape
        groups = rows // n
        query = self.query_norm(x.flatten(2).transpose(1, 2)) + positions
        # All groups' queries against one copy of the values.
        query = query.view(groups, n, h * w, c).transpose(0, 1).flatten(1, 2)
        if image_mask.ndim == 3:
            image_mask = image_mask.transpose(0, 1).repeat_interleave(h * w, dim=1)  # (N, R * h * w, P)
        out = self.mmfs(query, values, image_mask, reference_points.repeat(groups, 1))
        out = out.view(n, groups, h * w, c).transpose(0, 1).reshape(rows, h * w, c)
        return self.conv(out.transpose(1, 2).reshape(rows, c, h, w))


class ContextConditioner(nn.Module):
    """LLM hidden states -> cross-attention inputs of the U-Net."""

    def __init__(self, c: SynchronizerConfig, operations, attention):
        super().__init__()
        self.context_feat_proj = operations.Linear(c.llm_hidden_size, c.llm_hidden_size)
        self.perceiver_resampler = PerceiverResampler(c.perceiver, operations, attention)
        self.neg_prompt_embeds = nn.Parameter(torch.zeros(1, c.perceiver.num_queries, c.perceiver.hidden_size))

    def pack_context(self, contexts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Newest token first, projected, with positions.

        Args:
            contexts: For each image to draw, hidden states `(L, llm_hidden_size)` up to its start-of-image token.

        Returns:
            `(N, longest L, llm_hidden_size)`, and its mask: bool `(N, longest L)`.
        """
        longest = max(len(c) for c in contexts)
        x = contexts[0].new_zeros(len(contexts), longest, contexts[0].shape[-1])
        mask = torch.zeros(len(contexts), longest, dtype=torch.bool, device=x.device)
        for i, c in enumerate(contexts):
            x[i, : len(c)] = c.flip(0)
            mask[i, : len(c)] = True
        return self.context_feat_proj(x) + get_1d_sincos_pos_embed(x.shape[-1], range(longest)).to(x), mask

    def prompt_embeds(self, contexts: list[torch.Tensor]) -> torch.Tensor:
        """`(N, num_queries, cross_attention_dim)` for images to draw after `contexts` (see `pack_context`)."""
        return self.perceiver_resampler(*self.pack_context(contexts))


class MMFSNet(nn.Module):
    """One MMFS block per skip of the U-Net, and one for its middle block."""

    def __init__(self, c: SynchronizerConfig, operations):
        super().__init__()
        self.spatial_shapes = c.mmfs.spatial_shapes
        *skips, mid = (MMFSBlock(c, n, base, operations) for n, base in zip(c.block_channels, c.block_base_shapes))
        self.mmfs_down_blocks, self.mmfs_mid_block = nn.ModuleList(skips), mid

    @property
    def blocks(self) -> list[MMFSBlock]:
        return [*self.mmfs_down_blocks, self.mmfs_mid_block]

    def project_images(self, maps, image_mask, dtype: torch.dtype | None = None) -> UNetImageValues:
        """Projects context images for all blocks, once for all steps.

        Args:
            maps: The encoder's feature maps, each `(N, P, C, h, w)`, oldest image first; P may be 0.
            image_mask: bool `(N, P)`, or `(R, N, P)`.
            dtype: dtype of the features, for a host that casts weights to it; None for the weights' own.
        """
        maps = [m for m in maps if m.shape[-1] in self.spatial_shapes]
        shapes = [tuple(m.shape[-2:]) for m in maps]
        features = torch.cat([m.flatten(3).transpose(2, 3) for m in maps], dim=2)
        features = features.to(dtype or self.mmfs_mid_block.pos_embed.dtype)
        return UNetImageValues(
            tuple(block.mmfs.project_images(block.feat_norm(features), shapes) for block in self.blocks), image_mask
        )

    def add_residual(self, index: int, x, values: UNetImageValues, scale: float = 1.0):
        """x + scale * MMFS of block `index`, for a skip or the middle block's output x `(R * N, C, h, w)`."""
        size = tuple(x.shape[-2:])
        block = self.blocks[index]
        if (index, size) not in values.pos_cache:
            positions = interpolate_pos_embed(block.pos_embed, size).to(x)
            values.pos_cache[index, size] = positions, get_reference_points(size).to(x.device)
        return x + scale * block(x, values.blocks[index], values.image_mask, *values.pos_cache[index, size])


class UNetSynchronizer(nn.Module):
    """The trained parts between LLM and U-Net."""

    def __init__(self, c: SynchronizerConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.config = c
        self.conditioner = ContextConditioner(c, operations, attention)
        self.mmfs_module = MMFSNet(c, operations)
