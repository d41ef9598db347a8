"""Perceiver resampler (BLIP-2's Q-Former without text): learned queries attend to a sequence (`PerceiverResampler`)."""

import torch
from torch import nn

from ..config import PerceiverConfig
from .attention import attention as default_attention
from .attention import supports_varlen, varlen_attention


class PerceiverSelfAttention(nn.Module):
    """Query, key and value projections, as BERT names them; optionally LayerNorm on each head's query and key."""

    def __init__(self, c: PerceiverConfig, key_dim: int, operations):
        super().__init__()
        head_dim = c.hidden_size // c.num_attention_heads
        self.query = operations.Linear(c.hidden_size, c.hidden_size)
        self.key = operations.Linear(key_dim, c.hidden_size)
        self.value = operations.Linear(key_dim, c.hidden_size)
        if c.qk_normalization:
            self.q_norm = operations.LayerNorm(head_dim, eps=c.layer_norm_eps)
            self.k_norm = operations.LayerNorm(head_dim, eps=c.layer_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()


class PerceiverAttention(nn.Module):
    """Multi-head attention with a post-norm residual."""

    def __init__(self, c: PerceiverConfig, key_dim: int, operations, attention):
        super().__init__()
        self.num_heads, self.attention_fn = c.num_attention_heads, attention
        self.attention = PerceiverSelfAttention(c, key_dim, operations)
        self.output = nn.ModuleDict(
            {
                "dense": operations.Linear(c.hidden_size, c.hidden_size),
                "LayerNorm": operations.LayerNorm(c.hidden_size, eps=c.layer_norm_eps),
            }
        )

    def forward(self, x, context, mask=None, lengths=None):
        """`context`: `(N, L, key_dim)`, or with `lengths` packed, `(sum of lengths, key_dim)`."""
        inner = self.attention
        q, k, v = (
            proj(source).unflatten(-1, (self.num_heads, -1))
            for proj, source in ((inner.query, x), (inner.key, context), (inner.value, context))
        )
        q, k = inner.q_norm(q).transpose(1, 2), inner.k_norm(k)
        if lengths is not None:
            out = varlen_attention(q, k, v, lengths)
        else:
            out = self.attention_fn(q, k.transpose(1, 2), v.transpose(1, 2), mask=mask)
        return self.output["LayerNorm"](x + self.output["dense"](out.transpose(1, 2).flatten(2)))


class PerceiverMLP(nn.Module):
    """Feed-forward sublayer with a post-norm residual."""

    def __init__(self, c: PerceiverConfig, operations):
        super().__init__()
        self.fc1 = operations.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = operations.Linear(c.intermediate_size, c.hidden_size)
        self.norm = operations.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x):
        return self.norm(x + self.fc2(nn.functional.gelu(self.fc1(x))))


class PerceiverLayer(nn.Module):
    """Self-attention, cross-attention in some layers, feed-forward."""

    def __init__(self, c: PerceiverConfig, has_cross_attention: bool, operations, attention):
        super().__init__()
        self.attention = PerceiverAttention(c, c.hidden_size, operations, attention)
        self.crossattention = (
            PerceiverAttention(c, c.encoder_hidden_size, operations, attention) if has_cross_attention else None
        )
        self.mlp = PerceiverMLP(c, operations)

    def forward(self, x, context, mask, lengths):
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, context, mask, lengths)
        return self.mlp(x)


class PerceiverResampler(nn.Module):
    """`(N, L, encoder_hidden_size)` -> `(N, num_queries, hidden_size)`."""

    def __init__(self, c: PerceiverConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.attention_fn = attention
        self.queries = nn.Parameter(torch.zeros(1, c.num_queries, c.hidden_size))
        self.layernorm = operations.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.layers = nn.ModuleList(
            PerceiverLayer(c, i % c.cross_attention_frequency == 0, operations, attention)
            for i in range(c.num_hidden_layers)
        )

    def forward(self, context, mask=None):
        """`mask`: bool `(N, L)`, True where the context is valid; None means everywhere."""
        x = self.layernorm(self.queries.to(context)).expand(context.shape[0], -1, -1)
        lengths = None
        if mask is not None and self.attention_fn is default_attention and supports_varlen(context):
            lengths = mask.sum(-1).tolist()
            context, mask = context[mask], None
        mask = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, context, mask, lengths)
        return x
