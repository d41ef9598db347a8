"""MMFS as one xFormers call: every bilinear sample is a value, its logit a bias, the ignore token one value more.

The operator does softmax and weighted sum in one kernel; the price is that all samples are in memory at once. Its speed
has not been measured on a card.
"""

import torch

from .bilinear import bilinear_corners
from .locations import locations_and_logits

MAX_ROWS = 2**16 - 1  # the operator's grid has 65,535 rows at most


def mmfs_attention(
    value, spatial_shapes, scale_ratios, query_terms, relpos_table, image_relpos, reference_points, ignore_token
):
    n, _, h, _, d = value.shape
    q = query_terms.shape[1]
    locations, logits = locations_and_logits(
        spatial_shapes, scale_ratios, query_terms, relpos_table, image_relpos, reference_points, h
    )
    samples = _samples(value, spatial_shapes, locations)  # (N, Q, H, M, D)
    ignored = ignore_token.view(1, 1, h, 1, d).expand(n, q, h, 1, d)
    samples = torch.cat([samples, ignored.to(samples)], dim=3).flatten(0, 2)
    bias = _aligned(logits.to(samples.dtype).flatten(0, 2))
    chunks = [_attend(*parts) for parts in zip(samples.split(MAX_ROWS), bias.split(MAX_ROWS))]
    return torch.cat(chunks).view(n, q, h * d)


def _aligned(logits):
    """`(R, M)` -> `(R, 1, 1, M)`, with strides that are multiples of 8, as the operator wants a bias."""
    rows, count = logits.shape
    buffer = logits.new_zeros(rows, 1, 1, -(-count // 8) * 8)
    buffer[:, 0, 0, :count] = logits
    return buffer[..., :count]


def _attend(samples, bias):
    """Softmax of `bias` `(R, 1, 1, M)` over `samples` `(R, M, D)`: the attention of a query of zeros."""
    rows, _, d = samples.shape
    query = samples.new_zeros(rows, 1, 1, d)
    value = samples.unsqueeze(2)  # (R, M, 1, D), the operator's order
    return _memory_efficient_attention()(query, torch.zeros_like(value), value, attn_bias=bias)


def _memory_efficient_attention():
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def _samples(value, spatial_shapes, locations):
    """Bilinear samples `(N, Q, H, P * L * K, D)`."""
    n, p, h = value.shape[:3]
    index, weight = bilinear_corners(spatial_shapes, locations, torch.ones_like(locations[..., 0]))
    weight = weight.to(value.dtype).unsqueeze(-1)
    batch = torch.arange(n, device=index.device).view(n, 1, 1, 1, 1, 1)
    head = torch.arange(h, device=index.device).view(h, 1, 1, 1)
    image = torch.arange(p, device=index.device).view(p, 1, 1)
    return sum(value[batch, image, head, index[..., i]] * weight[..., i, :] for i in range(4)).flatten(3, 5)
