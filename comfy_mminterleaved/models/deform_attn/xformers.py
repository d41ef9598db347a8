"""MMFS as attention over samples: every bilinear sample is a value, its logit a bias, the sink one value more.

One call of the attention kernel does softmax and weighted sum; what is saved is the weights, what is paid are all
samples in memory at once.
"""

import torch

from ..attention import attention
from .bilinear import corners
from .locations import points_and_logits


def attend(values, sizes, scales, said, tables, order, reference, sink):
    n, p, h, s, d = values.shape
    q = said.shape[1]
    points, logits = points_and_logits(sizes, scales, said, tables, order, reference, h)
    found = _samples(values, sizes, points)  # (N, Q, H, M, D)
    found = torch.cat([found, sink.view(1, 1, h, 1, d).expand(n, q, h, 1, d).to(found)], dim=3)
    rows = n * q * h
    nothing = found.new_zeros(1, 1, 1, d).expand(rows, 1, 1, d)
    keys = found.new_zeros(1, 1, 1, d).expand(rows, 1, found.shape[3], d)
    out = attention(nothing, keys, found.view(rows, 1, -1, d), mask=logits.to(found.dtype).view(rows, 1, 1, -1))
    return out.view(n, q, h * d)


def _samples(values, sizes, points):
    """Bilinear samples (N, Q, H, P * L * K, D)."""
    n, p, h = values.shape[:3]
    cells, shares = corners(sizes, points, torch.ones_like(points[..., 0]))
    shares = shares.to(values.dtype).unsqueeze(-1)
    batch = torch.arange(n, device=cells.device).view(n, 1, 1, 1, 1, 1)
    head = torch.arange(h, device=cells.device).view(h, 1, 1, 1)
    picture = torch.arange(p, device=cells.device).view(p, 1, 1)
    return sum(values[batch, picture, head, cells[..., i]] * shares[..., i, :] for i in range(4)).flatten(3, 5)
