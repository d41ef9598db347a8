"""DreamLLM (2309.11499): dream queries, which the LLM reads in the place of an image that is still to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..config import SystemConfig
from .llama_mmfs import KVCache, LlamaImageValues, LlamaMMFS


@dataclass(frozen=True)
class DreamConfig(SystemConfig):
    """Sizes of DreamQueries.

    Args:
        num_queries: 16 of the starter, 64 of DreamLLM.
        llm_hidden_size: Of the LLM.
        cross_attention_dim: Of the prompt embeddings that the U-Net takes.
        lora_rank: Of what is added to the LLM's layers while it reads the queries; 0 for nothing.
        has_own_negative: Whether guidance leads away from the queries behind nothing, as in DreamLLM; else from what
            the U-Net was trained with.
        is_normalized: Whether each prompt embedding has mean 0 and variance 1, as a Perceiver's has. What is uncertain
            is else drawn as a blend.
    """

    num_queries: int = 16
    llm_hidden_size: int = 192
    cross_attention_dim: int = 192
    lora_rank: int = 0
    has_own_negative: bool = False
    is_normalized: bool = False


class DreamQueries(nn.Module):
    """Learned queries, and the projector from the LLM's states at them to prompt embeddings (section 3.2)."""

    def __init__(self, c: DreamConfig, operations=nn):
        super().__init__()
        self.config = c
        self.dream_queries = nn.Parameter(torch.randn(1, c.num_queries, c.llm_hidden_size) * 0.02)
        self.projector = operations.Linear(c.llm_hidden_size, c.cross_attention_dim, bias=False)

    def forward(
        self,
        llm: LlamaMMFS,
        cache: KVCache,
        image_values: LlamaImageValues | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Prompt embeddings `(N, num_queries, cross_attention_dim)` of what comes next.

        Args:
            cache: Of N sequences; the token that asks for an image and the queries are written behind each.
            image_values: As of `LlamaMMFS`.
            image_mask: bool `(N, P)`, the images before.
        """
        special = llm.config.special_tokens
        first = special.soi if special.dream is None else special.dream
        ids = torch.full((len(cache.lengths), 1), first, device=llm.device)
        start = llm.embed_inputs(ids)
        x = torch.cat([start, self.dream_queries.to(start).expand(len(start), -1, -1)], dim=1)
        if image_mask is not None:
            image_mask = image_mask[:, None].expand(-1, x.shape[1], -1)
        out = self.projector(llm(x, image_values, image_mask, cache)[:, 1:])
        return F.layer_norm(out, out.shape[-1:]) if self.config.is_normalized else out


class ContinuedRows(KVCache):
    """Rows that go on from anywhere in those of another cache, once, with gradients and without writing to it."""

    def __init__(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int]):
        super().__init__(len(rows))
        longest = max(lengths)
        self.lengths = list(lengths)
        self.keys = [k[list(rows), :, :longest] for k in cache.keys]
        self.values = [v[list(rows), :, :longest] for v in cache.values]

    def update(self, layer: int, k, v):
        starts, longest, count = torch.tensor(self.lengths, device=k.device), max(self.lengths), k.shape[2]
        # Of each row what it had, then what is new; what follows is masked.
        places = torch.arange(longest + count, device=k.device).expand(len(starts), -1)
        index = torch.where(places < starts[:, None], places, places - starts[:, None] + longest)
        index = index.clamp(max=longest + count - 1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return tuple(
            torch.cat([store[layer].to(new.dtype), new], dim=2).gather(2, index)
            for store, new in ((self.keys, k), (self.values, v))
        )


def continue_rows(
    cache: KVCache, image_values: LlamaImageValues | None, rows: Sequence[int], lengths: Sequence[int]
) -> tuple[KVCache, LlamaImageValues | None]:
    """A cache whose row i continues the first `lengths[i]` tokens of row `rows[i]`, and the images of those rows."""
    other = ContinuedRows(cache, rows, lengths)
    if image_values is not None:
        layers = tuple(replace(layer, value=layer.value[list(rows)]) for layer in image_values.layers)
        image_values = LlamaImageValues(layers)
    return other, image_values
