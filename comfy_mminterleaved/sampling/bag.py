"""The same as one `embedding_bag` over the values' rows: nothing is sampled before it is summed."""

import torch
import torch.nn.functional as F

from .corners import corners


def gather(values, sizes, points, weights):
    n, p, s, h, d = values.shape
    q = points.shape[1]
    cells, shares = corners(sizes, points, weights, torch.int32 if values.numel() // d < 2**31 else torch.int64)
    # A row of the table is one head of one cell: ((n * P + p) * S' + cell) * H + h.
    device = cells.device
    map_of = torch.arange(n * p, device=device, dtype=cells.dtype).view(n, 1, 1, p, 1, 1, 1)
    head = torch.arange(h, device=device, dtype=cells.dtype).view(h, 1, 1, 1, 1)
    rows = cells.mul_(h).add_(map_of * (s * h) + head)
    out = F.embedding_bag(
        rows.view(n * q * h, -1), values.reshape(n * p * s * h, d),
        per_sample_weights=shares.reshape(n * q * h, -1).to(values.dtype), mode="sum",
    )  # fmt: skip
    return out.view(n, q, h * d)
