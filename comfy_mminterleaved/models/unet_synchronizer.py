"""From the LLM's hidden states to a diffusion U-Net: conditioning, and the synchronizer at its sites.

There is no U-Net in here: whoever runs one reads `condition` and `negative` and calls the sites (`ImageDecoder`,
`MMFSNet`). A site is a skip of the U-Net, numbered in the order the skips are made, or, last, its mid output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..config import DecoderConfig
from .attention import attention as default_attention
from .mmfs import PreparedPictures, Synchronizer
from .perceiver import Resampler
from .pos_embed import resize_positions, sincos_1d
from .visual_tokenizer import cell_centres


@dataclass(frozen=True)
class PreparedSites:
    """Pictures as every site reads them, for all steps of a drawing, and which of them each drawing looks at.

    visible: bool (N, P), or (R, N, P) for R drawings of each row that look at different ones. maps: for each site and
    size of its skip, positions and reference points, made when first met.
    """

    sites: tuple[PreparedPictures, ...]
    visible: torch.Tensor
    maps: dict = field(default_factory=dict)


class Site(nn.Module):
    """x -> Conv1x1(MMFS(LayerNorm(x) + positions, LayerNorm(features))) (`MMFSBlock`)."""

    def __init__(self, c: DecoderConfig, width: int, base: int, operations):
        super().__init__()
        self.query_norm = operations.LayerNorm(width, eps=1e-6)
        self.feature_norm = operations.LayerNorm(c.feature_width, eps=1e-6)
        self.positions = nn.Parameter(torch.zeros(c.position_grid**2, width), requires_grad=False)  # sine-cosine
        self.mmfs = Synchronizer(
            width,
            c.feature_width,
            c.sync_width,
            width,
            c.levels,
            base,
            c.sync_heads,
            c.sync_points,
            c.max_pictures,
            operations,
        )
        self.conv = operations.Conv2d(width, width, 1)

    def fold(self) -> None:
        """Takes the form for running: the convolution becomes part of the synchronizer's last projection."""
        if not self.mmfs.folded:
            self.mmfs.fold(self.conv)
            self.conv = nn.Identity()

    def forward(self, x, pictures: PreparedPictures, visible, positions, reference):
        """x (R * N, C, h, w), R drawings (or halves of guidance) for each of N rows of pictures -> the same shape."""
        n = visible.shape[-2]
        rows, c, h, w = x.shape
        groups = rows // n
        query = self.query_norm(x.flatten(2).transpose(1, 2)) + positions
        # All groups' queries against one copy of the values.
        query = query.view(groups, n, h * w, c).transpose(0, 1).flatten(1, 2)
        if visible.ndim == 3:
            visible = visible.transpose(0, 1).repeat_interleave(h * w, dim=1)  # (N, R * h * w, P)
        found = self.mmfs(query, pictures, visible, reference.repeat(groups, 1))
        found = found.view(n, groups, h * w, c).transpose(0, 1).reshape(rows, h * w, c)
        return self.conv(found.transpose(1, 2).reshape(rows, c, h, w))


class Decoder(nn.Module):
    """The trained parts between LLM and U-Net; `sites` has one synchronizer a skip, and last the mid output's."""

    def __init__(self, c: DecoderConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.config = c
        self.context_proj = operations.Linear(c.llm_width, c.llm_width)
        self.resampler = Resampler(c.resampler, operations, attention)
        self.negative = nn.Parameter(torch.zeros(1, c.resampler.queries, c.resampler.width))
        *skips, mid = (Site(c, width, grid, operations) for width, grid in zip(c.site_widths, c.site_grids))
        self.skip_sites, self.mid_site = nn.ModuleList(skips), mid

    @property
    def sites(self) -> list[Site]:
        return [*self.skip_sites, self.mid_site]

    def context(self, contexts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the Perceiver reads: newest token first, projected, with positions.

        Args:
            contexts: for each picture to draw, hidden states (L, llm_width) up to its start-of-image token.

        Returns:
            (N, longest L, llm_width), and its mask: bool (N, longest L).
        """
        longest = max(len(c) for c in contexts)
        x = contexts[0].new_zeros(len(contexts), longest, contexts[0].shape[-1])
        mask = torch.zeros(len(contexts), longest, dtype=torch.bool, device=x.device)
        for i, c in enumerate(contexts):
            x[i, : len(c)] = c.flip(0)
            mask[i, : len(c)] = True
        return self.context_proj(x) + sincos_1d(x.shape[-1], range(longest)).to(x), mask

    def condition(self, contexts: list[torch.Tensor]) -> torch.Tensor:
        """Cross-attention states (N, queries, width) for pictures to draw after `contexts` (see `context`)."""
        return self.resampler(*self.context(contexts))

    def prepare(self, maps, visible) -> PreparedSites:
        """Pictures for all sites, once for all steps.

        Args:
            maps: the encoder's maps, each (N, P, C, h, w), oldest picture first; P may be 0. Those of the sites' levels
                are read.
            visible: bool (N, P), or (R, N, P).
        """
        maps = [m for m in maps if m.shape[-1] in self.config.levels]
        sizes = [tuple(m.shape[-2:]) for m in maps]
        features = torch.cat([m.flatten(3).transpose(2, 3) for m in maps], dim=2).to(self.negative.dtype)
        return PreparedSites(
            tuple(site.mmfs.prepare(site.feature_norm(features), sizes) for site in self.sites), visible
        )

    def site(self, index: int, x, prepared: PreparedSites, strength: float = 1.0):
        """x + strength * what site `index` finds, for a skip or mid output x (R * N, C, h, w)."""
        size = tuple(x.shape[-2:])
        if (index, size) not in prepared.maps:
            positions = resize_positions(self.sites[index].positions, size).to(x)
            prepared.maps[index, size] = positions, cell_centres(size).to(x.device)
        site = self.sites[index]
        return x + strength * site(x, prepared.sites[index], prepared.visible, *prepared.maps[index, size])
