"""MMFS as attention over samples: every bilinear sample is a value, its logit a bias, the sink one value more.

One call of the attention kernel does softmax and weighted sum; what is saved is the weights, what is paid are all samples
in memory at once.
"""

import torch

from ..attention import attention
from .corners import corners
from .weigh import points_and_logits


def attend(values, sizes, scales, said, tables, order, reference, sink):
    n, p, s, h, d = values.shape
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
    n, p, s, h, d = values.shape
    cells, shares = corners(sizes, points, torch.ones_like(points[..., 0]))
    cells = cells + torch.arange(p, device=cells.device).view(p, 1, 1, 1) * s
    cells, shares = cells.flatten(3, 5), shares.flatten(3, 5).to(values.dtype)  # (N, Q, H, M, 4)
    table = values.reshape(n, p * s, h, d)
    batch = torch.arange(n, device=cells.device).view(n, 1, 1, 1)
    head = torch.arange(h, device=cells.device).view(1, 1, h, 1)
    return sum(table[batch, cells[..., i], head] * shares[..., i, None] for i in range(4))
