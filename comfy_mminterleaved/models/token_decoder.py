"""An image as tokens (DALL-E, 2102.12092): codes of a VQ-VAE, cell by cell, in view of earlier images.

The decoder is a Llama with MMFS, as the story's LLM is. It reads what the U-Net is conditioned on, the prompt
embeddings of the Perceiver or of dream queries, and then its own codes; its synchronizer looks at earlier images.
The codes of a cell, one of the top level and four of the bottom one, are read and predicted together, by a small
transformer over them ("depth", as in 2203.01941), so an image takes as many steps as it has top codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..config import LlamaMMFSConfig, SystemConfig
from .attention import attention as default_attention
from .llama_mmfs import KVCache, LlamaDecoderLayer, LlamaImageValues, LlamaMMFSDecoder
from .vqvae import FACTOR, ImageCodes

CELL_CODES = 1 + FACTOR * FACTOR  # of a cell: one of the top level, and those of the bottom one below it


@dataclass(frozen=True)
class TokenDecoderConfig(SystemConfig):
    """Sizes of a TokenDecoder, beside those of the LLM whose layers it has.

    Args:
        num_queries, prompt_dim: Of the prompt embeddings, their number and width.
        num_codes: Entries of each codebook.
        grid_size: Cells a side.
        num_hidden_layers: Of the trunk.
        depth_layers, depth_intermediate_size: Of the transformer over the codes of a cell.
        guidance_scale: That it samples with by default.
    """

    num_queries: int = 16
    prompt_dim: int = 192
    num_codes: int = 1024
    grid_size: int = 8
    num_hidden_layers: int = 5
    depth_layers: int = 1
    depth_intermediate_size: int = 384
    guidance_scale: float = 3.0


class TokenDecoder(nn.Module):
    """Predicts the codes of an image from prompt embeddings and earlier images, in reading order."""

    def __init__(self, c: TokenDecoderConfig, llm: LlamaMMFSConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.config, width = c, llm.hidden_size
        # Of a quantized LLM, whose MMFS may be fused in its file; the decoder's is not.
        plain = replace(llm, quantization=None, mmfs=replace(llm.mmfs, is_fused=False))
        trunk = replace(plain, num_hidden_layers=c.num_hidden_layers)
        self.trunk = LlamaMMFSDecoder(trunk, operations, attention)
        self.prompt_proj = operations.Linear(c.prompt_dim, width)
        self.no_prompt = nn.Parameter(torch.randn(1, c.num_queries, width) * 0.02)
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.cell_embed = nn.Parameter(torch.randn(c.grid_size**2, width) * 0.02)
        self.embed_top = operations.Embedding(c.num_codes, width)
        self.embed_bottom = operations.Embedding(c.num_codes, width)
        self.place_embed = nn.Parameter(torch.randn(CELL_CODES, width) * 0.02)  # of a code in its cell
        depth = replace(plain, intermediate_size=c.depth_intermediate_size)
        self.depth = nn.ModuleList(
            LlamaDecoderLayer(depth, False, operations, attention, operations) for _ in range(c.depth_layers)
        )
        self.depth_norm = operations.RMSNorm(width, eps=llm.rms_norm_eps)

    @property
    def num_cells(self) -> int:
        return self.config.grid_size**2

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(..., k)` of the first k in a cell -> `(..., k, hidden_size)`."""
        parts = [self.embed_top(codes[..., :1]), self.embed_bottom(codes[..., 1:])]
        return torch.cat(parts, dim=-2) + self.place_embed[: codes.shape[-1]].to(parts[0])

    def inputs(self, cells: torch.Tensor, first: int = 0) -> torch.Tensor:
        """What the trunk reads at the cells from `first` on: each knows its place and the codes of the one before.

        Args:
            cells: `(N, k, CELL_CODES)`, of the k cells from `first - 1` on; for `first` 0 from the start.
        """
        x = self.embed_codes(cells).sum(-2)
        if first == 0:
            x = torch.cat([self.start.to(x).expand(len(x), -1, -1), x], dim=1)[:, : self.num_cells]
        return x + self.cell_embed[first : first + x.shape[1]].to(x)

    def embed_prompt(self, prompt_embeds: torch.Tensor, is_dropped: torch.Tensor | None = None) -> torch.Tensor:
        """Prompt embeddings `(N, num_queries, prompt_dim)` -> what is read first, `(N, num_queries, hidden_size)`.

        Args:
            is_dropped: bool `(N,)`, rows that have no prompt, for guidance.
        """
        x = self.prompt_proj(prompt_embeds.to(self.start.dtype))
        return x if is_dropped is None else torch.where(is_dropped[:, None, None], self.no_prompt.to(x), x)

    def forward(
        self,
        cells: torch.Tensor,
        prompt: torch.Tensor,
        image_values: LlamaImageValues | None = None,
        image_mask: torch.Tensor | None = None,
        given: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `(N, cells, CELL_CODES, num_codes)` of whole images, each code in view of all before it.

        Args:
            cells: `(N, cells, CELL_CODES)`.
            prompt: From `embed_prompt`.
            image_values: From `trunk.project_images`.
            image_mask: bool `(N, P)`, the earlier images.
            given: The cells that are read, if others than those that are predicted.
        """
        x = torch.cat([prompt, self.inputs(cells if given is None else given)], dim=1)
        hidden = self.hidden_states(x, None, image_values, image_mask)[:, prompt.shape[1] :]
        return self.code_logits(hidden, cells[..., :-1])

    def hidden_states(self, x, cache: KVCache | None = None, image_values=None, image_mask=None) -> torch.Tensor:
        if image_mask is not None:
            image_mask = image_mask[:, None].expand(-1, x.shape[1], -1)
        return self.trunk(x, image_values, image_mask, cache)

    def code_logits(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Logits of the first codes of cells, in view of the codes before them.

        Args:
            hidden: The trunk's states `(..., hidden_size)`.
            codes: `(..., k)`, the first k.

        Returns:
            `(..., k + 1, num_codes)`.
        """
        x = torch.cat([hidden.unsqueeze(-2), self.embed_codes(codes)], dim=-2)
        x = self._code_states(x.flatten(0, -3))
        top = F.linear(x[:, 0], self.embed_top.weight.to(x)).unsqueeze(1)
        bottom = F.linear(x[:, 1:].flatten(0, 1), self.embed_bottom.weight.to(x)).unflatten(0, (len(x), x.shape[1] - 1))
        return torch.cat([top, bottom], dim=1).unflatten(0, hidden.shape[:-1])

    def next_code_logits(self, hidden: torch.Tensor, codes: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits of the code that comes next in cells, `(N, num_codes)`.

        Args:
            hidden: The trunk's states `(N, hidden_size)`.
            codes: `(N, k)`, the cells' first k.
            cache: Of N rows; has read all but the last of them, and is emptied where a cell begins.
        """
        k = codes.shape[-1]
        if k == 0:
            cache.lengths = [0] * len(hidden)
        x = self._code_states(self.embed_codes(codes)[:, -1:] if k else hidden.unsqueeze(1), cache)[:, 0]
        return F.linear(x, (self.embed_bottom if k else self.embed_top).weight.to(x))

    def _code_states(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """What codes are predicted from, `(N, k, hidden_size)`.

        Args:
            x: Of the same shape: of each cell the trunk's state, then its codes; those that `cache` has not read.
        """
        start, length = 0 if cache is None else cache.lengths[0], x.shape[1]
        rotary = self.trunk.rotary_emb(torch.arange(start, start + length, device=x.device).expand(1, -1), x.dtype)
        for i, layer in enumerate(self.depth):
            q, k, v = layer.project_qkv(x, *rotary)
            if cache is not None:
                k, v = cache.update(i, k, v)
            x = layer.feed_forward(layer.add_attention(x, layer.self_attn.attention_fn(q, k, v, causal=length > 1)))
        if cache is not None:
            cache.lengths = [start + length] * len(x)
        return self.depth_norm(x)


def to_cells(codes: ImageCodes) -> torch.Tensor:
    """Codes of N images -> `(N, cells, CELL_CODES)`, in reading order."""
    n, h, w = codes.top.shape
    bottom = codes.bottom.view(n, h, FACTOR, w, FACTOR).permute(0, 1, 3, 2, 4).reshape(n, h * w, -1)
    return torch.cat([codes.top.view(n, h * w, 1), bottom], dim=-1)


def from_cells(cells: torch.Tensor) -> ImageCodes:
    """The inverse of `to_cells`, of square images."""
    n, side = len(cells), round(cells.shape[1] ** 0.5)
    bottom = cells[..., 1:].view(n, side, side, FACTOR, FACTOR).permute(0, 1, 3, 2, 4)
    return ImageCodes(cells[..., 0].view(n, side, side), bottom.reshape(n, side * FACTOR, side * FACTOR))
