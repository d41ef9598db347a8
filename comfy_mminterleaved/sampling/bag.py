"""The same as one `embedding_bag` over the values' rows: nothing is sampled before it is summed."""

import torch
import torch.nn.functional as F

from .corners import corners, grid


def gather(values, sizes, points, weights):
    n, p, h, s, d = values.shape
    q = points.shape[1]
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in (values, points, weights))
    find = _differentiable if learning else _in_few_passes
    dtype = torch.int32 if values.numel() // d < 2**31 else torch.int64
    rows, shares = find(sizes, points, weights.to(values.dtype), s, dtype)
    # Bags of one head after the other: the part of the table that they read is small enough to stay in the cache.
    out = F.embedding_bag(
        rows.view(n * h * q, -1), values.reshape(-1, d), per_sample_weights=shares.view(n * h * q, -1),
        mode="sum",
    )  # fmt: skip
    return out.view(n, h, q, d).transpose(1, 2).flatten(2)


def _row_of_map(n: int, p: int, s: int, h: int, device, dtype):
    """The table's row of each map's first cell (N, 1, H, P, 1, 1): a row is ((n * P + p) * H + h) * S' + cell."""
    first = torch.arange(n * p * h, device=device, dtype=dtype) * s
    return first.view(n, 1, p, h, 1, 1).transpose(2, 3)


def _differentiable(sizes, points, weights, s: int, dtype):
    n, _, h, p = points.shape[:4]
    cells, shares = corners(sizes, points, weights, dtype)
    rows = cells + _row_of_map(n, p, s, h, points.device, dtype).unsqueeze(-1)
    return rows.transpose(1, 2).contiguous(), shares.transpose(1, 2).contiguous()


def _in_few_passes(sizes, points, weights, s: int, dtype):
    """What `_differentiable` gives, its corners in another order; its time goes to memory, so nothing is moved."""
    n, q, h, p, levels, k, _ = points.shape
    device = points.device
    # What is the same for all points of a level is repeated for each: the arithmetic below is then vectorized.
    *each, largest = grid(sizes, points)
    last, row, first = (t.repeat_interleave(k, dim=1) for t in each)
    (left, x), (top, y) = (_whole_and_rest(points[..., i], last[..., i]) for i in (0, 1))
    cell = torch.addcmul(left, top, row).add_(first).to(dtype).clamp_(0, largest)
    cell.add_(_row_of_map(n, p, s, h, device, dtype))
    row = row.to(dtype)

    rows = torch.empty(n, h, q, 4, p, levels, k, dtype=dtype, device=device)
    a, b, c, d = rows.transpose(1, 2).unbind(3)  # top left, top right, bottom left, bottom right
    a.copy_(cell)
    torch.add(cell, 1, out=b)
    cell.add_(row)
    c.copy_(cell)
    torch.add(cell, 1, out=d)

    shares = torch.empty(n, h, q, 4, p, levels, k, dtype=weights.dtype, device=device)
    a, b, c, d = shares.transpose(1, 2).unbind(3)
    x, y = x.to(weights.dtype), y.to(weights.dtype)
    right = weights * x
    torch.mul(right, y, out=d)
    torch.sub(right, d, out=b)
    left = torch.sub(weights, right, out=right)
    torch.mul(left, y, out=c)
    torch.sub(left, c, out=a)
    return rows, shares


def _whole_and_rest(at, last):
    """Of a coordinate, moved onto the border where it is outside: the cell before, and how far behind that it is."""
    at = torch.clamp(at, min=-1)
    torch.minimum(at, last, out=at)
    whole = at.floor()
    torch.minimum(whole, last - 1, out=whole)
    return whole, at.sub_(whole)
