"""The Perceiver that encoder and decoder share: learned queries read a sequence (`PerceiverResampler`)."""

import torch
from torch import nn

from ..config import ResamplerConfig
from .attention import attention as default_attention
from .attention import packed_attention, packs


class Attention(nn.Module):
    """Attention with a post-norm residual, as BERT's; optionally LayerNorm on each head's q and k."""

    def __init__(self, c: ResamplerConfig, key_width: int, operations, attention):
        super().__init__()
        self.heads, self.attend = c.heads, attention
        self.q = operations.Linear(c.width, c.width)
        self.k = operations.Linear(key_width, c.width)
        self.v = operations.Linear(key_width, c.width)
        if c.qk_norm:
            self.q_norm = operations.LayerNorm(c.width // c.heads, eps=c.eps)
            self.k_norm = operations.LayerNorm(c.width // c.heads, eps=c.eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.out = operations.Linear(c.width, c.width)
        self.norm = operations.LayerNorm(c.width, eps=c.eps)

    def forward(self, x, context, mask=None, lengths=None):
        """`context`: (N, L, key_width), or with `lengths` packed, (sum of lengths, key_width)."""
        q, k, v = (
            proj(source).unflatten(-1, (self.heads, -1))
            for proj, source in ((self.q, x), (self.k, context), (self.v, context))
        )
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k)
        if lengths is not None:
            found = packed_attention(q, k, v, lengths)
        else:
            found = self.attend(q, k.transpose(1, 2), v.transpose(1, 2), mask=mask)
        return self.norm(x + self.out(found.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, c: ResamplerConfig, operations):
        super().__init__()
        self.fc1 = operations.Linear(c.width, c.ffn_width)
        self.fc2 = operations.Linear(c.ffn_width, c.width)
        self.norm = operations.LayerNorm(c.width, eps=c.eps)

    def forward(self, x):
        return self.norm(x + self.fc2(nn.functional.gelu(self.fc1(x))))


class Layer(nn.Module):
    def __init__(self, c: ResamplerConfig, crosses: bool, operations, attention):
        super().__init__()
        self.attention = Attention(c, c.width, operations, attention)
        self.cross_attention = Attention(c, c.encoder_width, operations, attention) if crosses else None
        self.ffn = FeedForward(c, operations)

    def forward(self, x, context, mask, lengths):
        x = self.attention(x, x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context, mask, lengths)
        return self.ffn(x)


class Resampler(nn.Module):
    """(N, L, encoder_width) -> (N, queries, width)."""

    def __init__(self, c: ResamplerConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.attend = attention
        self.queries = nn.Parameter(torch.zeros(1, c.queries, c.width))
        self.norm = operations.LayerNorm(c.width, eps=c.eps)
        self.layers = nn.ModuleList(
            Layer(c, i % c.cross_attention_every == 0, operations, attention) for i in range(c.layers)
        )

    def forward(self, context, mask=None):
        """`mask`: bool (N, L), True where the context is to be read; None reads all."""
        x = self.norm(self.queries.to(context)).expand(context.shape[0], -1, -1)
        lengths = None
        if mask is not None and self.attend is default_attention and packs(context):
            lengths = mask.sum(-1).tolist()
            context, mask = context[mask], None
        mask = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, context, mask, lengths)
        return x
