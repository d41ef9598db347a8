"""`ms_deform_attn` as one `embedding_bag` over the rows of the values; samples are never stored."""

import torch
import torch.nn.functional as F

from .bilinear import bilinear_corners, level_geometry
from .locations import offsets_and_logits, reference_centers


def mmfs_attention(
    value, spatial_shapes, scale_ratios, query_terms, relpos_table, image_relpos, reference_points, ignore_token
):
    """`mmfs_attention` without gradients; x and y are separate tensors, because strided pairs are slow to read."""
    h = len(ignore_token)
    offsets, logits = offsets_and_logits(scale_ratios, query_terms, relpos_table, image_relpos, h)
    center, scale = reference_centers(spatial_shapes, scale_ratios, reference_points, offsets)
    x, y = (
        torch.addcmul(center[..., i].contiguous(), offsets[..., i].contiguous(), scale[..., i].contiguous())
        for i in (0, 1)
    )
    attention_weights = logits.to(x.dtype).softmax(-1).to(value.dtype)
    attention_weights, ignore_weight = attention_weights[..., :-1].view(x.shape), attention_weights[..., -1:]
    out = _weighted_sum(
        value, *_fused_corners(spatial_shapes, x, y, attention_weights, value.shape, _index_dtype(value))
    )
    return torch.addcmul(out.view(*ignore_weight.shape[:3], -1), ignore_weight, ignore_token).flatten(2)


def ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    attention_weights, integers = attention_weights.to(value.dtype), _index_dtype(value)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (value, sampling_locations, attention_weights)):
        return _weighted_sum(
            value, *_corners_with_grad(spatial_shapes, sampling_locations, attention_weights, value.shape, integers)
        )
    x, y = (sampling_locations[..., i].clone(memory_format=torch.contiguous_format) for i in (0, 1))
    return _weighted_sum(value, *_fused_corners(spatial_shapes, x, y, attention_weights, value.shape, integers))


def _index_dtype(value):
    return torch.int32 if value.numel() // value.shape[-1] < 2**31 else torch.int64


def _weighted_sum(value, rows, corner_weight):
    """The table's rows (N, H, Q, ...) times their shares: (N, Q, H * D)."""
    n, h, q, d = *rows.shape[:3], value.shape[-1]
    # Bags of one head after the other: the part of the table that they read is small enough to stay in the cache.
    out = F.embedding_bag(
        rows.view(n * h * q, -1),
        value.reshape(-1, d),
        per_sample_weights=corner_weight.view(n * h * q, -1),
        mode="sum",
    )
    return out.view(n, h, q, d).transpose(1, 2).flatten(2)


def _first_rows(shape, device, dtype):
    """The table's row of each map's first cell (N, 1, H, P, 1, 1): a row is ((n * P + p) * H + h) * S' + cell."""
    n, p, h, s, _ = shape
    first = torch.arange(n * p * h, device=device, dtype=dtype) * s
    return first.view(n, 1, p, h, 1, 1).transpose(2, 3)


def _corners_with_grad(spatial_shapes, sampling_locations, attention_weights, shape, dtype):
    corner_index, corner_weight = bilinear_corners(spatial_shapes, sampling_locations, attention_weights, dtype)
    rows = corner_index + _first_rows(shape, sampling_locations.device, dtype).unsqueeze(-1)
    return rows.transpose(1, 2).contiguous(), corner_weight.transpose(1, 2).contiguous()


def _fused_corners(spatial_shapes, x, y, attention_weights, shape, dtype):
    """The corners that `bilinear_corners` gives, in another order, written in place to save memory traffic.

    Args:
        x, y: (N, Q, H, P, L, K), in cells; overwritten.
        shape: of the values.
    """
    n, q, h, p, levels, k = x.shape
    device = x.device
    # Constants of a level are repeated for each point, so that the arithmetic below is vectorized.
    last, row, first, largest = level_geometry(spatial_shapes, x)
    last, row = last.repeat_interleave(k, dim=1), row.repeat_interleave(k, dim=1)
    left, x = _cell_and_fraction(x, last[..., 0].contiguous())
    top, y = _cell_and_fraction(y, last[..., 1].contiguous())
    cell = torch.addcmul(left, top, row).to(dtype)
    cell.add_(_first_rows(shape, device, dtype) + first.to(dtype).repeat_interleave(k, dim=1))
    cell.clamp_(0, shape[0] * shape[1] * shape[2] * shape[3] - shape[3] + largest)  # a NaN has a place too
    row = row.to(dtype)

    rows = torch.empty(n, h, q, 4, p, levels, k, dtype=dtype, device=device)
    a, b, c, d = rows.transpose(1, 2).unbind(3)  # top left, top right, bottom left, bottom right
    a.copy_(cell)
    torch.add(cell, 1, out=b)
    cell.add_(row)
    c.copy_(cell)
    torch.add(cell, 1, out=d)

    corner_weight = torch.empty(n, h, q, 4, p, levels, k, dtype=attention_weights.dtype, device=device)
    a, b, c, d = corner_weight.transpose(1, 2).unbind(3)
    x, y = x.to(attention_weights.dtype), y.to(attention_weights.dtype)
    right = attention_weights * x
    torch.mul(right, y, out=d)
    torch.sub(right, d, out=b)
    left = torch.sub(attention_weights, right, out=right)
    torch.mul(left, y, out=c)
    torch.sub(left, c, out=a)
    return rows, corner_weight


def _cell_and_fraction(position, last):
    """Cell index and fraction of a coordinate, which is moved onto the border if it is outside; in place."""
    position.clamp_(-torch.ones_like(last), last)
    cell_index = position.floor()
    torch.minimum(cell_index, last - 1, out=cell_index)
    return cell_index, position.sub_(cell_index)
