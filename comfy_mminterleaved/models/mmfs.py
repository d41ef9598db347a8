"""MMFS, the Multi-image Multi-scale Feature Synchronizer (paper, section 3.2; the reference's `MMFS`).

Deformable attention from a query to the feature maps of several images. Whatever depends on the images alone is
computed once by `project_images`; a call then costs only what depends on the query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .deform_attn import mmfs_attention, pad_levels
from .deform_attn.locations import locations_and_weights


@dataclass(frozen=True)
class MMFSValues:
    """Projected feature maps of several images.

    Args:
        value: `(N, P, H, S', D)`, from `pad_levels`.
        spatial_shapes: `(h, w)` of each level, without borders.
    """

    value: torch.Tensor
    spatial_shapes: tuple[tuple[int, int], ...]

    @property
    def num_images(self) -> int:
        return self.value.shape[1]


class MMFS(nn.Module):
    """Deformable attention over several images, with relative image positions and an ignore token.

    As in checkpoints, the query is projected, a relative position is added, and offsets and logits are linear in the
    sum. `fuse_projections` replaces all of it by one matrix and a table, which compute the same.

    Args:
        d_query, d_value, d_out: Channels of the query, the feature maps and the output.
        d_model: Channels of the values, all heads together.
        spatial_shapes: Nominal side of each level's map; divided by `base_spatial_shape` it scales the level's offsets.
        max_num_image_per_seq: Rows of the table of relative positions; row 0 stands for 'not visible'.
        is_fused: Whether the projections are fused from the start.
    """

    def __init__(
        self,
        d_query,
        d_value,
        d_model,
        d_out,
        spatial_shapes,
        base_spatial_shape,
        n_heads=16,
        n_points=8,
        max_num_image_per_seq=50,
        operations=nn,
        is_fused=False,
    ):
        super().__init__()
        self.n_heads, self.n_points, self.operations = n_heads, n_points, operations
        self.scale_ratios = tuple(level / base_spatial_shape for level in spatial_shapes)
        if is_fused:
            num_terms = n_heads * n_points * (2 + len(spatial_shapes))
            self.fused_query_proj = operations.Linear(d_query, num_terms)
            self.relpos_table = nn.Parameter(torch.zeros(max_num_image_per_seq, num_terms), requires_grad=False)
        else:
            self.dynamic_offset_mask = operations.Linear(d_query, d_query)
            self.query_relpos = operations.Embedding(max_num_image_per_seq, d_query)
            self.sampling_offsets = operations.Linear(d_query, n_heads * n_points * 2)
            # The reference has one more logit per level, for the ignore token, and never uses its value.
            self.attention_weights = operations.Linear(d_query, n_heads * len(spatial_shapes) * (n_points + 1))
        self.ignore_token = nn.Parameter(torch.zeros(1, 1, 1, d_model))
        self.value_proj = operations.Linear(d_value, d_model)
        self.output_proj = operations.Linear(d_model, d_out)

    def reset_parameters(self, offset_range: float = 3.0):
        """Initializes offsets to within +-`offset_range` cells whatever the query (`_reset_parameters`)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.uniform_(self.sampling_offsets.bias, -offset_range, offset_range)
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.zeros_(self.dynamic_offset_mask.bias)
        nn.init.zeros_(self.ignore_token)
        nn.init.trunc_normal_(self.query_relpos.weight, std=0.02)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    @torch.no_grad()
    def fuse_projections(self, following: nn.Conv2d | None = None) -> None:
        """Fuses the projections for inference, in place; a 1 x 1 convolution that follows is fused into the output."""
        if self.is_fused:
            return
        weight, bias, relpos_table = self._fused_weights()
        self.fused_query_proj = _linear(self.operations, weight, bias)
        self.relpos_table = nn.Parameter(relpos_table, requires_grad=False)
        del self.dynamic_offset_mask, self.query_relpos, self.sampling_offsets, self.attention_weights
        if following is not None:
            compute_dtype = torch.promote_types(following.weight.dtype, torch.float32)
            last = following.weight.to(compute_dtype).flatten(1)  # (C, C)
            bias = last @ self.output_proj.bias.to(compute_dtype) + following.bias.to(compute_dtype)
            weight = last @ self.output_proj.weight.to(compute_dtype)
            self.output_proj = _linear(self.operations, weight.to(following.weight), bias.to(following.weight))

    @property
    def is_fused(self) -> bool:
        return hasattr(self, "fused_query_proj")

    def _fused_weights(self):
        """Weight `(E, d_query)`, bias `(E,)` and relative position table `(max_num_image_per_seq, E)` of the query."""
        dtype = self.sampling_offsets.weight.dtype
        compute_dtype = torch.promote_types(dtype, torch.float32)
        logits = (self.attention_weights.weight, self.attention_weights.bias)
        kept = [t.unflatten(0, (-1, self.n_points + 1))[:, :-1].flatten(0, 1) for t in logits]
        terms = torch.cat([self.sampling_offsets.weight, kept[0]]).to(compute_dtype)
        bias = torch.cat([self.sampling_offsets.bias, kept[1]]).to(compute_dtype)
        bias = bias + terms @ self.dynamic_offset_mask.bias.to(compute_dtype)
        relpos_table = self.query_relpos.weight.to(compute_dtype) @ terms.T
        return (
            (terms @ self.dynamic_offset_mask.weight.to(compute_dtype)).to(dtype),
            bias.to(dtype),
            relpos_table.to(dtype),
        )

    def project_images(self, features: torch.Tensor, spatial_shapes) -> MMFSValues:
        """Projects feature maps to values. Independent of the query, so call it once per story.

        Args:
            features: `(N, P, S, d_value)`, normed; the cells of all levels, one level after the other.
            spatial_shapes: `(h, w)` of each level.
        """
        value = self.value_proj(features).unflatten(-1, (self.n_heads, -1))
        return MMFSValues(pad_levels(value, spatial_shapes), tuple(map(tuple, spatial_shapes)))

    def forward(self, query, values: MMFSValues, image_mask, reference_points) -> torch.Tensor:
        """Attends from each query to the images that it may see.

        Args:
            query: `(N, Q, d_query)`, normed.
            values: From `project_images`, oldest image first; N rows, or one that all rows share.
            image_mask: bool `(N, P)` or `(N, Q, P)`.
            reference_points: `(Q, 2)` or `(1, 2)`, x and y in [0, 1].

        Returns:
            `(N, Q, d_out)`.
        """
        n, q, _ = query.shape
        ignore_token = self.ignore_token.to(query).view(self.n_heads, -1)
        if not values.num_images:  # the ignore token has all the weight
            return self.output_proj(ignore_token.flatten()).expand(n, q, -1)
        geometry = self._sampling(query, values, image_mask, reference_points)
        return self.output_proj(mmfs_attention(values.value, *geometry, ignore_token)).view(n, q, -1)

    def locations_and_weights(self, query, values: MMFSValues, image_mask, reference_points):
        """Where `forward` samples and with which weights (`deform_attn.locations`)."""
        return locations_and_weights(*self._sampling(query, values, image_mask, reference_points), self.n_heads)

    def _sampling(self, query, values: MMFSValues, image_mask, reference_points) -> tuple:
        """The arguments of `mmfs_attention` between the values and the ignore token."""
        n, q, _ = query.shape
        if self.is_fused:
            query_terms, relpos_table = self.fused_query_proj(query), self.relpos_table.to(query)
        else:
            weight, bias, relpos_table = self._fused_weights()
            query_terms = nn.functional.linear(query, weight, bias)
        image_mask = image_mask.unsqueeze(1) if image_mask.ndim == 2 else image_mask  # (N, 1 or Q, P)
        if values.value.shape[0] < n:  # rows that share their images are queries of one row
            query_terms = query_terms.flatten(0, 1).unsqueeze(0)
            image_mask = image_mask.expand(n, q, -1).flatten(0, 1).unsqueeze(0)
            reference_points = reference_points.expand(q, -1).repeat(n, 1)
        mask = image_mask.long()
        image_relpos = (mask.sum(-1, keepdim=True) + 1 - mask.cumsum(-1)) * mask  # 1 is the newest, 0 not visible
        return (
            values.spatial_shapes,
            self.scale_ratios,
            query_terms,
            relpos_table,
            image_relpos,
            reference_points,
        )


def fuse_mmfs(block: nn.Module) -> nn.Module:
    """Fuses the projections of every MMFS in a block, in place; returns the block."""
    for part in list(block.modules()):  # diffusers' attention has a method of that name too, hence the check
        if isinstance(part, MMFS) or isinstance(getattr(part, "mmfs", None), MMFS):
            part.fuse_projections()
    return block


def _linear(operations, weight, bias) -> nn.Linear:
    layer = operations.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
