"""Llama with gated synchronizers between self-attention and feed-forward (`modeling_llama_mmfs`, `TextDecoder`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn

from ..config import LLMConfig
from .attention import attention as default_attention
from .mmfs import PreparedPictures, Synchronizer

_STEP = 128  # the cache grows by whole steps, so that a token rarely moves it


class KVCache:
    """Keys and values of a batch of token sequences, each with its own length.

    lengths: how many tokens of each row are valid; what lies behind is to be overwritten.
    """

    def __init__(self, rows: int):
        self.lengths = [0] * rows
        self.keys: list[torch.Tensor | None] = []
        self.values: list[torch.Tensor | None] = []

    def update(self, layer: int, k, v):
        """Writes (N, H, Q, D) behind each row's length; returns all keys and values up to the longest row's new end."""
        end = max(self.lengths) + k.shape[2]
        while layer >= len(self.keys):
            self.keys.append(None)
            self.values.append(None)
        for store, new in ((self.keys, k), (self.values, v)):
            room = 0 if store[layer] is None else store[layer].shape[2]
            if room < end:
                n, h, _, d = new.shape
                grown = new.new_zeros(n, h, -(-end // _STEP) * _STEP, d)
                if room:
                    grown[:, :, :room] = store[layer]
                store[layer] = grown
            for row, start in self._runs():
                store[layer][row, :, start : start + new.shape[2]] = new[row]
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def _runs(self):
        """Rows to write to and where: all at once when their lengths agree."""
        if len(set(self.lengths)) == 1:
            return [(slice(None), self.lengths[0])]
        return list(enumerate(self.lengths))

    def rows(self, index: list[int]) -> KVCache:
        """A cache whose row i is this one's row index[i]."""
        other = KVCache(len(index))
        other.lengths = [self.lengths[i] for i in index]
        other.keys = [k[index] for k in self.keys]
        other.values = [v[index] for v in self.values]
        return other


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch of stories as the synchronizer layers read them; padded to the same number."""

    layers: tuple[PreparedPictures, ...]

    @property
    def count(self) -> int:
        return self.layers[0].count if self.layers else 0

    def rows(self, index: list[int]) -> Pictures:
        return Pictures(tuple(replace(layer, values=layer.values[index]) for layer in self.layers))


class Attention(nn.Module):
    def __init__(self, c: LLMConfig, operations, attention):
        super().__init__()
        head = c.width // c.heads
        self.heads, self.kv_heads, self.attend = c.heads, c.kv_heads, attention
        self.q_proj = operations.Linear(c.width, c.heads * head, bias=False)
        self.k_proj = operations.Linear(c.width, c.kv_heads * head, bias=False)
        self.v_proj = operations.Linear(c.width, c.kv_heads * head, bias=False)
        self.o_proj = operations.Linear(c.heads * head, c.width, bias=False)

    def project(self, x, cos, sin):
        """Queries, keys and values (N, heads, L, D), turned to their positions."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x, cos, sin):
    """Rotary positions on (N, H, L, D), halves paired as in Llama."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class MLP(nn.Module):
    def __init__(self, c: LLMConfig, operations):
        super().__init__()
        self.gate_proj = operations.Linear(c.width, c.ffn_width, bias=False)
        self.up_proj = operations.Linear(c.width, c.ffn_width, bias=False)
        self.down_proj = operations.Linear(c.ffn_width, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class GatedSynchronizer(nn.Module):
    """h -> tanh(gate) * MMFS(norm(h), norm(features)), reference point at the centre (`LlamaMMFSAttention`)."""

    def __init__(self, c: LLMConfig, operations):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.norm = operations.RMSNorm(c.width, eps=c.eps)
        self.feature_norm = operations.RMSNorm(c.feature_width, eps=c.eps)
        self.mmfs = Synchronizer(
            c.width,
            c.feature_width,
            c.sync_width,
            c.width,
            c.sync_levels,
            c.sync_base,
            c.sync_heads,
            c.sync_points,
            c.max_pictures,
            operations,
        )

    def prepare(self, features, sizes) -> PreparedPictures:
        return self.mmfs.prepare(self.feature_norm(features), sizes)

    def forward(self, x, pictures: PreparedPictures, visible):
        centre = x.new_full((1, 2), 0.5, dtype=torch.float32)
        return self.gate.to(x).tanh() * self.mmfs(self.norm(x), pictures, visible, centre)


class Layer(nn.Module):
    def __init__(self, c: LLMConfig, synchronized: bool, operations, attention):
        super().__init__()
        self.input_layernorm = operations.RMSNorm(c.width, eps=c.eps)
        self.self_attn = Attention(c, operations, attention)
        self.synchronizer = GatedSynchronizer(c, operations) if synchronized else None
        self.post_attention_layernorm = operations.RMSNorm(c.width, eps=c.eps)
        self.mlp = MLP(c, operations)

    def project(self, x, cos, sin):
        """What attention compares: see `Attention.project`."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def attended(self, x, found):
        """x, with what attention found (N, heads, L, D)."""
        return x + self.self_attn.o_proj(found.transpose(1, 2).flatten(2))

    def think(self, x):
        """x, with what the feed-forward net makes of it."""
        return x + self.mlp(self.post_attention_layernorm(x))


class StoryLLM(nn.Module):
    """The multi-modal language model: embeddings in, hidden states and next-token logits out."""

    def __init__(self, c: LLMConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.config, self._device, self._compiled = c, None, ()
        self.embed_tokens = operations.Embedding(c.vocab_size, c.width)
        self.soi = nn.Parameter(torch.zeros(1, c.width))
        self.layers = nn.ModuleList(Layer(c, i % c.sync_every == 0, operations, attention) for i in range(c.layers))
        self.norm = operations.RMSNorm(c.width, eps=c.eps)
        self.head = operations.Linear(c.width, c.vocab_size)
        self.head_new = operations.Linear(c.width, c.new_tokens)

    @property
    def device(self) -> torch.device:
        """Where it computes; a host that keeps part of the weights elsewhere says so by setting it."""
        return self._device or self.soi.device

    @device.setter
    def device(self, device) -> None:
        self._device = device

    def compile_step(self, **options) -> None:
        """Has `torch.compile` fuse what lies around attention and synchronizers when one token is read at a time.

        All layers share what is compiled. Longer pieces are read as before, for each length would be compiled anew.

        Args:
            options: `torch.compile`'s.
        """
        self._compiled = tuple(
            SimpleNamespace(
                **{name: torch.compile(getattr(layer, name), **options) for name in ("project", "attended", "think")}
            )
            for layer in self.layers
        )

    def embed(self, ids, tokens=None) -> torch.Tensor:
        """Embeds token ids, with visual tokens in the picture slots.

        Args:
            ids: int64 (N, L).
            tokens: (pictures * slots, width), in the order of the slots in `ids`; None when there are none.
        """
        special = self.config.tokens
        x = self.embed_tokens(ids)
        x = x + (ids == special.soi).unsqueeze(-1) * self.soi.to(x)
        if tokens is not None:
            x = x.masked_scatter((ids == special.image).unsqueeze(-1), tokens.to(x))
        return x

    def select_maps(self, maps) -> list[torch.Tensor]:
        """Of the encoder's maps, those that the synchronizer layers read."""
        return [m for m in maps if m.shape[-1] in self.config.sync_levels]

    def prepare(self, maps) -> Pictures:
        """Pictures for all synchronizer layers.

        Args:
            maps: the encoder's maps, each (N, P, C, h, w).
        """
        maps = self.select_maps(maps)
        sizes = [tuple(m.shape[-2:]) for m in maps]
        features = torch.cat([m.flatten(3).transpose(2, 3) for m in maps], dim=2)  # (N, P, S, C)
        layers = [layer.synchronizer for layer in self.layers if layer.synchronizer is not None]
        return Pictures(tuple(s.prepare(features.to(dtype=self.soi.dtype), sizes) for s in layers))

    def forward(self, x, pictures: Pictures | None = None, visible=None, cache: KVCache | None = None, counts=None):
        """Reads embeddings.

        Args:
            x: (N, L, width), each row behind what `cache` holds of it.
            pictures: from `prepare`; None reads as if none was visible.
            visible: bool (N, L, P), which pictures a position sees.
            cache: extended in place.
            counts: how many of the L are valid in each row, from the left; None means all.

        Returns:
            (N, L, width), after the final norm.
        """
        n, length, _ = x.shape
        starts = cache.lengths if cache is not None else [0] * n
        positions = torch.tensor(starts, device=x.device)[:, None] + torch.arange(length, device=x.device)
        rotary = self._rotary(positions, x.dtype)
        level = len(set(starts)) == 1  # else rows have keys behind their end, which a mask must hide
        causal, mask = level and length > 1, None
        if not level:
            keys = torch.arange(max(starts) + length, device=x.device)
            mask = (keys <= positions[:, :, None])[:, None]  # (N, 1, L, K)
        if pictures is None:
            pictures = self.prepare_none(n)
            visible = torch.ones(n, length, 0, dtype=torch.bool, device=x.device)

        prepared = iter(pictures.layers)
        parts = self._compiled if length == 1 and self._compiled else self.layers
        for i, (layer, part) in enumerate(zip(self.layers, parts)):
            q, k, v = part.project(x, *rotary)
            if cache is not None:
                k, v = cache.update(i, k, v)
            x = part.attended(x, layer.self_attn.attend(q, k, v, mask=mask, causal=causal))
            if layer.synchronizer is not None:
                x = x + layer.synchronizer(x, next(prepared), visible)
            x = part.think(x)
        if cache is not None:
            cache.lengths = [start + count for start, count in zip(starts, counts or [length] * n)]
        return self.norm(x)

    def logits(self, hidden) -> torch.Tensor:
        """Next-token logits (..., vocab_size)."""
        old, new = self.head(hidden), self.head_new(hidden)
        split = self.config.vocab_size - self.config.new_tokens
        return torch.cat([old[..., :split], old[..., split:] + new], dim=-1)

    def _rotary(self, positions, dtype):
        head = self.config.width // self.config.heads
        frequency = 1.0 / self.config.rope_theta ** (torch.arange(0, head, 2, device=positions.device).float() / head)
        angle = (positions[..., None] * frequency).repeat(1, 1, 2).unsqueeze(1)  # (N, 1, L, D)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def prepare_none(self, n: int) -> Pictures:
        """`prepare` for n stories without any picture."""
        return self.prepare(
            [
                torch.zeros(n, 0, self.config.feature_width, side, side, device=self.device, dtype=self.soi.dtype)
                for side in self.config.sync_levels
            ]
        )
