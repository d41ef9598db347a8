"""Llama with gated MMFS between self-attention and feed-forward (`modeling_llama_mmfs`, `TextDecoder`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn

from ..config import LlamaMMFSConfig
from .attention import attention as default_attention
from .attention import shared_prefix_attention
from .mmfs import MMFS, MMFSValues
from .quantization import quantized_linears

CACHE_STEP = 128  # tokens by which the cache grows, so that it is rarely copied


class KVCache:
    """Keys and values of a batch of token sequences, each with its own length.

    `lengths` has the number of valid tokens of each row; what is stored beyond them gets overwritten.

    Args:
        prefix: A cache of one row that all rows continue. It is shared, not copied, and must not change meanwhile.
        dtype: That keys and values are stored in, like float8_e4m3fn; None for the one they are computed in.
    """

    def __init__(self, rows: int, prefix: KVCache | None = None, dtype: torch.dtype | None = None):
        self.prefix, self.lengths, self.dtype = prefix, [0] * rows, dtype
        self._reserved = 0
        self.keys: list[torch.Tensor | None] = []
        self.values: list[torch.Tensor | None] = []

    def reserve(self, num_tokens: int) -> None:
        """Has the next growth make room for this many more tokens, so that writing them copies nothing."""
        self._reserved = max(self.lengths) + num_tokens

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
                length = -(-max(end, self._reserved) // CACHE_STEP) * CACHE_STEP
                grown = new.new_zeros(n, h, length, d, dtype=self.dtype or new.dtype)
                if room:
                    grown[:, :, :room] = store[layer]
                store[layer] = grown
            for row, start in self._runs():
                store[layer][row, :, start : start + new.shape[2]] = new[row].to(store[layer].dtype)
        return self.keys[layer][:, :, :end].to(k.dtype), self.values[layer][:, :, :end].to(v.dtype)

    @property
    def prefix_length(self) -> int:
        return self.prefix.lengths[0] if self.prefix is not None else 0

    def prefix_layer(self, layer: int, dtype: torch.dtype):
        """Keys and values `(H, P, D)` of the shared prefix."""
        stores = self.prefix.keys, self.prefix.values
        return tuple(store[layer][0, :, : self.prefix_length].to(dtype) for store in stores)

    def fork(self, rows: int) -> KVCache:
        """A cache of several rows that continue this one's only row."""
        return KVCache(rows, self, self.dtype) if self.prefix is None else self.select_rows([0] * rows)

    @property
    def nbytes(self) -> int:
        """Size in bytes, without a shared prefix."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def _runs(self):
        """Pairs of rows and the position to write to; a single pair if all lengths are equal."""
        if len(set(self.lengths)) == 1:
            return [(slice(None), self.lengths[0])]
        return list(enumerate(self.lengths))

    def select_rows(self, index: list[int]) -> KVCache:
        """A cache whose row i is this one's row index[i]."""
        other = KVCache(len(index), self.prefix, self.dtype)
        other.lengths = [self.lengths[i] for i in index]
        other.keys = [k[index] for k in self.keys]
        other.values = [v[index] for v in self.values]
        return other


@dataclass(frozen=True)
class LlamaImageValues:
    """Images of a batch of stories, projected for every MMFS layer and padded to the same number."""

    layers: tuple[MMFSValues, ...]

    @property
    def num_images(self) -> int:
        return self.layers[0].num_images if self.layers else 0

    @property
    def nbytes(self) -> int:
        return sum(layer.value.nbytes for layer in self.layers)

    def select_rows(self, index: list[int]) -> LlamaImageValues:
        return LlamaImageValues(tuple(replace(layer, value=layer.value[index]) for layer in self.layers))


class LlamaAttention(nn.Module):
    def __init__(self, c: LlamaMMFSConfig, operations, attention):
        super().__init__()
        head = c.hidden_size // c.num_attention_heads
        self.num_heads, self.num_key_value_heads = c.num_attention_heads, c.num_key_value_heads
        self.attention_fn = attention
        self.q_proj = operations.Linear(c.hidden_size, c.num_attention_heads * head, bias=False)
        self.k_proj = operations.Linear(c.hidden_size, c.num_key_value_heads * head, bias=False)
        self.v_proj = operations.Linear(c.hidden_size, c.num_key_value_heads * head, bias=False)
        self.o_proj = operations.Linear(c.num_attention_heads * head, c.hidden_size, bias=False)

    def project_qkv(self, x, cos, sin):
        """Queries, keys and values `(N, heads, L, D)` with rotary positions."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        return apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin), v


def apply_rotary_emb(x, cos, sin):
    """Applies rotary positions to `(N, H, L, D)`, halves paired as in Llama."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class LlamaMLP(nn.Module):
    def __init__(self, c: LlamaMMFSConfig, operations):
        super().__init__()
        self.gate_proj = operations.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = operations.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = operations.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaMMFSAttention(nn.Module):
    """h -> tanh(gate) * MMFS(norm1(h), norm2(features)), reference point at the center (`LlamaMMFSAttention`)."""

    def __init__(self, c: LlamaMMFSConfig, operations):
        super().__init__()
        m = c.mmfs
        self.gate = nn.Parameter(torch.zeros(1))
        self.norm1 = operations.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.norm2 = operations.RMSNorm(m.d_value, eps=c.rms_norm_eps)
        self.attn = MMFS(
            c.hidden_size,
            m.d_value,
            m.d_model,
            c.hidden_size,
            m.spatial_shapes,
            m.base_spatial_shape,
            m.n_heads,
            m.n_points,
            m.max_num_image_per_seq,
            operations,
            m.is_fused,
        )

    def project_images(self, features, spatial_shapes) -> MMFSValues:
        return self.attn.project_images(self.norm2(features), spatial_shapes)

    def forward(self, x, image_values: MMFSValues, image_mask):
        center = x.new_full((1, 2), 0.5, dtype=torch.float32)
        return self.gate.to(x).tanh() * self.attn(self.norm1(x), image_values, image_mask, center)


class LlamaDecoderLayer(nn.Module):
    def __init__(self, c: LlamaMMFSConfig, has_cross_attention: bool, operations, attention, linears):
        super().__init__()
        self.input_layernorm = operations.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = LlamaAttention(c, linears, attention)
        self.llama_cross_attn = LlamaMMFSAttention(c, operations) if has_cross_attention else None
        self.post_attention_layernorm = operations.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = LlamaMLP(c, linears)

    def project_qkv(self, x, cos, sin):
        """See `LlamaAttention.project_qkv`."""
        return self.self_attn.project_qkv(self.input_layernorm(x), cos, sin)

    def add_attention(self, x, out):
        """Adds the output of attention, `(N, heads, L, D)`, to the residual stream."""
        return x + self.self_attn.o_proj(out.transpose(1, 2).flatten(2))

    def feed_forward(self, x):
        """Applies the feed-forward sublayer with its residual."""
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaMMFSDecoder(nn.Module):
    """The decoder layers and the final norm: embeddings in, hidden states out.

    Args:
        linears: The `operations` of attention and MLP, if not those of the other layers; None for those of the config's
            quantization.
    """

    def __init__(self, c: LlamaMMFSConfig, operations=nn, attention=default_attention, linears=None):
        super().__init__()
        if linears is None:
            linears = quantized_linears(c.quantization) if c.quantization else operations
        self.config, self._device, self._compiled = c, None, ()
        self.cache_dtype: torch.dtype | None = None  # of `KVCache`s made for it
        self._add_embeddings(operations)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(c, i % c.mmfs.cross_attention_frequency == 0, operations, attention, linears)
            for i in range(c.num_hidden_layers)
        )
        self.norm = operations.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def _add_embeddings(self, operations) -> None:
        """What a subclass has before the layers; tensors keep the order of the reference's."""

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes; a host that keeps part of the weights elsewhere sets it."""
        return self._device or self.norm.weight.device

    @device.setter
    def device(self, device) -> None:
        self._device = device

    def compile_decode_step(self, **options) -> None:
        """Compiles the parts around attention and MMFS in the single-token step; all layers share the compiled code.

        Longer inputs run uncompiled, because every length would be compiled anew.

        Args:
            options: `torch.compile`'s.
        """
        self._compiled = tuple(
            SimpleNamespace(
                **{
                    name: torch.compile(getattr(layer, name), **options)
                    for name in ("project_qkv", "add_attention", "feed_forward")
                }
            )
            for layer in self.layers
        )

    def select_levels(self, maps) -> list[torch.Tensor]:
        """The feature maps that the MMFS layers attend to."""
        return [m for m in maps if m.shape[-1] in self.config.mmfs.spatial_shapes]

    def project_images(self, maps) -> LlamaImageValues:
        """Projects images for all MMFS layers.

        Args:
            maps: The encoder's feature maps, each `(N, P, C, h, w)`.
        """
        return LlamaImageValues(tuple(self.project_images_by_layer(maps)))

    def project_images_by_layer(self, maps) -> Iterator[MMFSValues]:
        """`project_images`, one MMFS layer after the other, so that a caller can let each go."""
        maps = self.select_levels(maps)
        sizes = [tuple(m.shape[-2:]) for m in maps]
        features = torch.cat([m.flatten(3).transpose(2, 3) for m in maps], dim=2)  # (N, P, S, C)
        features = features.to(dtype=self.dtype)
        for layer in self.layers:
            if layer.llama_cross_attn is not None:
                yield layer.llama_cross_attn.project_images(features, sizes)

    def forward(
        self,
        x,
        image_values: LlamaImageValues | None = None,
        image_mask=None,
        cache: KVCache | None = None,
        counts=None,
    ):
        """Runs the decoder on embeddings.

        Args:
            x: `(N, L, hidden_size)`; each row continues what `cache` holds of it.
            image_values: From `project_images`, of N rows, or of one that all rows share; None means no images.
            image_mask: bool `(N, L, P)`, the images that each position may attend to.
            cache: Extended in place.
            counts: How many of the L are valid in each row, from the left; None means all.

        Returns:
            `(N, L, hidden_size)`, after the final norm.
        """
        n, length, _ = x.shape
        starts = cache.lengths if cache is not None else [0] * n
        positions = torch.arange(starts[0], starts[0] + length, device=x.device).expand(n, -1)
        if len(set(starts)) > 1:
            positions = torch.tensor(starts, device=x.device)[:, None] + torch.arange(length, device=x.device)
        prefix = cache.prefix if cache is not None else None
        rotary = self.rotary_emb(positions + (cache.prefix_length if prefix else 0), x.dtype)
        is_even = len(set(starts)) == 1  # else rows have keys beyond their end, which a mask must hide
        causal, mask = is_even and length > 1, None
        if not is_even or prefix:
            keys = torch.arange(max(starts) + length, device=x.device)
            mask = (keys <= positions[:, :, None])[:, None]  # (N, 1, L, K)
        if image_values is None:
            image_values = self.no_images(n)
            image_mask = torch.ones(n, length, 0, dtype=torch.bool, device=x.device)

        values = iter(image_values.layers)
        parts = self._compiled if length == 1 and self._compiled else self.layers
        for i, (layer, part) in enumerate(zip(self.layers, parts)):
            q, k, v = part.project_qkv(x, *rotary)
            if cache is not None:
                k, v = cache.update(i, k, v)
            if prefix:
                out = shared_prefix_attention(q, *cache.prefix_layer(i, q.dtype), k, v, mask)
            else:
                out = layer.self_attn.attention_fn(q, k, v, mask=mask, causal=causal)
            x = part.add_attention(x, out)
            if layer.llama_cross_attn is not None:
                x = x + layer.llama_cross_attn(x, next(values), image_mask)
            x = part.feed_forward(x)
        if cache is not None:
            cache.lengths = [start + count for start, count in zip(starts, counts or [length] * n)]
        return self.norm(x)

    def rotary_emb(self, positions, dtype):
        head = self.config.hidden_size // self.config.num_attention_heads
        frequency = 1.0 / self.config.rope_theta ** (torch.arange(0, head, 2, device=positions.device).float() / head)
        angle = (positions[..., None] * frequency).repeat(1, 1, 2).unsqueeze(1)  # (N, 1, L, D)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def no_images(self, n: int) -> LlamaImageValues:
        """`project_images` for n stories without images."""
        return self.project_images(
            [
                torch.zeros(n, 0, self.config.mmfs.d_value, side, side, device=self.device, dtype=self.dtype)
                for side in self.config.mmfs.spatial_shapes
            ]
        )


class LlamaMMFS(LlamaMMFSDecoder):
    """The multi-modal language model: embeddings in, hidden states and next-token logits out."""

    def __init__(self, c: LlamaMMFSConfig, operations=nn, attention=default_attention, linears=None):
        super().__init__(c, operations, attention, linears)
        self.head = operations.Linear(c.hidden_size, c.vocab_size)
        self.head_new = operations.Linear(c.hidden_size, c.num_added_tokens)

    def _add_embeddings(self, operations) -> None:
        self.embed_tokens = operations.Embedding(self.config.vocab_size, self.config.hidden_size)
        self.soi_token = nn.Parameter(torch.zeros(1, self.config.hidden_size))

    @property
    def device(self) -> torch.device:
        return self._device or self.soi_token.device

    @device.setter
    def device(self, device) -> None:
        self._device = device

    @property
    def dtype(self) -> torch.dtype:
        return self.soi_token.dtype

    def embed_inputs(self, ids, tokens=None) -> torch.Tensor:
        """Embeds token ids, with visual tokens at the image tokens.

        Args:
            ids: int64 `(N, L)`.
            tokens: `(images * num_img_token, hidden_size)`, in the order of the image tokens in `ids`; None if there
                are none.
        """
        special = self.config.special_tokens
        x = self.embed_tokens(ids)
        x = x + (ids == special.soi).unsqueeze(-1) * self.soi_token.to(x)
        if tokens is not None:
            x = x.masked_scatter((ids == special.image).unsqueeze(-1), tokens.to(x))
        return x

    def logits(self, hidden) -> torch.Tensor:
        """Next-token logits (..., vocab_size)."""
        old, new = self.head(hidden), self.head_new(hidden)
        split = self.config.vocab_size - self.config.num_added_tokens
        return torch.cat([old[..., :split], old[..., split:] + new], dim=-1)
