"""The same as one `embedding_bag` over the values' rows: nothing is sampled before it is summed."""

import torch
import torch.nn.functional as F

from .bilinear import corners, grid
from .locations import centres, offsets_and_logits


def attend(values, sizes, scales, said, tables, order, reference, sink):
    """`sampling.attend` without gradients: x and y are kept apart, for halves of pairs are slow to read."""
    h = len(sink)
    offsets, logits = offsets_and_logits(scales, said, tables, order, h)
    centre, scale = centres(sizes, scales, reference, offsets)
    x, y = (
        torch.addcmul(centre[..., i].contiguous(), offsets[..., i].contiguous(), scale[..., i].contiguous())
        for i in (0, 1)
    )
    weights = logits.to(x.dtype).softmax(-1).to(values.dtype)
    weights, left = weights[..., :-1].view(x.shape), weights[..., -1:]
    found = _sum(values, *_in_few_passes(sizes, x, y, weights, values.shape, _integers(values)))
    return torch.addcmul(found.view(*left.shape[:3], -1), left, sink).flatten(2)


def gather(values, sizes, points, weights):
    weights, integers = weights.to(values.dtype), _integers(values)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (values, points, weights)):
        return _sum(values, *_differentiable(sizes, points, weights, values.shape, integers))
    x, y = (points[..., i].clone(memory_format=torch.contiguous_format) for i in (0, 1))
    return _sum(values, *_in_few_passes(sizes, x, y, weights, values.shape, integers))


def _integers(values):
    return torch.int32 if values.numel() // values.shape[-1] < 2**31 else torch.int64


def _sum(values, rows, shares):
    """The table's rows (N, H, Q, ...) times their shares: (N, Q, H * D)."""
    n, h, q, d = *rows.shape[:3], values.shape[-1]
    # Bags of one head after the other: the part of the table that they read is small enough to stay in the cache.
    out = F.embedding_bag(
        rows.view(n * h * q, -1),
        values.reshape(-1, d),
        per_sample_weights=shares.view(n * h * q, -1),
        mode="sum",
    )
    return out.view(n, h, q, d).transpose(1, 2).flatten(2)


def _row_of_map(shape, device, dtype):
    """The table's row of each map's first cell (N, 1, H, P, 1, 1): a row is ((n * P + p) * H + h) * S' + cell."""
    n, p, h, s, _ = shape
    first = torch.arange(n * p * h, device=device, dtype=dtype) * s
    return first.view(n, 1, p, h, 1, 1).transpose(2, 3)


def _differentiable(sizes, points, weights, shape, dtype):
    cells, shares = corners(sizes, points, weights, dtype)
    rows = cells + _row_of_map(shape, points.device, dtype).unsqueeze(-1)
    return rows.transpose(1, 2).contiguous(), shares.transpose(1, 2).contiguous()


def _in_few_passes(sizes, x, y, weights, shape, dtype):
    """What `_differentiable` gives, its corners in another order; its time goes to memory, so nothing is moved.

    Args:
        x, y: (N, Q, H, P, L, K), in cells; overwritten.
        shape: of the values.
    """
    n, q, h, p, levels, k = x.shape
    device = x.device
    # What is the same for all points of a level is repeated for each: the arithmetic below is then vectorized.
    last, row, first, largest = grid(sizes, x)
    last, row = last.repeat_interleave(k, dim=1), row.repeat_interleave(k, dim=1)
    left, x = _whole_and_rest(x, last[..., 0].contiguous())
    top, y = _whole_and_rest(y, last[..., 1].contiguous())
    cell = torch.addcmul(left, top, row).to(dtype)
    cell.add_(_row_of_map(shape, device, dtype) + first.to(dtype).repeat_interleave(k, dim=1))
    cell.clamp_(0, shape[0] * shape[1] * shape[2] * shape[3] - shape[3] + largest)  # a NaN has a place too
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
    at.clamp_(-torch.ones_like(last), last)
    whole = at.floor()
    torch.minimum(whole, last - 1, out=whole)
    return whole, at.sub_(whole)
