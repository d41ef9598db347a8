"""The same as one `embedding_bag` over the values' rows: nothing is sampled before it is summed."""

import torch
import torch.nn.functional as F

from .corners import corners


def gather(values, sizes, points, weights):
    n, p, s, h, d = values.shape
    q = points.shape[1]
    cells, shares = corners(sizes, points, weights)
    # A row of the table is one head of one cell: ((n * P + p) * S + cell) * H + h.
    batch = torch.arange(n, device=cells.device).view(n, 1, 1, 1, 1, 1, 1)
    picture = torch.arange(p, device=cells.device).view(p, 1, 1, 1)
    head = torch.arange(h, device=cells.device).view(h, 1, 1, 1, 1)
    rows = ((batch * p + picture) * s + cells) * h + head
    table = values.reshape(n * p * s * h, d)
    out = F.embedding_bag(
        rows.view(n * q * h, -1), table, per_sample_weights=shares.reshape(n * q * h, -1).to(table.dtype), mode="sum"
    )
    return out.view(n, q, h * d)
