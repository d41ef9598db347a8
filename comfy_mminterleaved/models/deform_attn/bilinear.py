"""Bilinear sampling: maps padded with zeros, the four cells around each location, and their weights."""

import functools

import torch


def pad_levels(value, spatial_shapes):
    """Pads maps with a border of zeros one cell wide, so that every point has four valid cells.

    Args:
        value: `(N, P, S, H, D)`, the cells of all levels of each of P images, one level after the other.
        spatial_shapes: `(h, w)` of each level.

    Returns:
        (N, P, H, S', D), S' = sum of (h + 2) * (w + 2): the cells of one head are contiguous.
    """
    levels = []
    for level, (h, w) in zip(value.split([h * w for h, w in spatial_shapes], dim=2), spatial_shapes):
        level = level.transpose(2, 3).unflatten(3, (h, w))  # (N, P, H, h, w, D)
        levels.append(torch.nn.functional.pad(level, (0, 0, 1, 1, 1, 1)).flatten(3, 4))
    return torch.cat(levels, dim=3)


def bilinear_corners(spatial_shapes, sampling_locations, attention_weights, dtype=torch.int64):
    """Cells and weights of the four corners of every point.

    Args:
        spatial_shapes: `(h, w)` of each level, without borders.
        sampling_locations: `(..., P, L, K, 2)`; attention_weights: `(..., P, L, K)`, as in `ms_deform_attn`.

    Returns:
        corner_index: Integers of `dtype`, `(..., P, L, K, 4)`, within one image's padded cells.
        corner_weight: `(..., P, L, K, 4)`, of the dtype of `attention_weights`.
    """
    last, row, first, largest = level_geometry(spatial_shapes, sampling_locations)
    # A point outside is moved onto the border, where everything is zero.
    sampling_locations = torch.minimum(sampling_locations.clamp(min=-1), last)
    low = torch.minimum(sampling_locations.detach().floor(), last - 1)
    share = (sampling_locations - low).to(attention_weights.dtype)
    cell = (low[..., 1] * row + low[..., 0] + first).to(dtype)  # whole numbers below 2^24, so exact
    cell = cell.clamp_(0, largest)  # a NaN has a place too
    row = row.to(dtype)
    corner_index = torch.stack([cell, cell + 1, cell + row, cell + row + 1], -1)
    right = attention_weights * share[..., 0]
    left = attention_weights - right
    bottom_left, bottom_right = left * share[..., 1], right * share[..., 1]
    return corner_index, torch.stack([left - bottom_left, right - bottom_right, bottom_left, bottom_right], -1)


@functools.lru_cache(maxsize=256)
def constant(values: tuple, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of numbers, made once: each copy to a card waits for what it has to do."""
    with torch.inference_mode(False):  # it may be used with gradients later
        return torch.tensor(values, device=device, dtype=dtype)


def level_geometry(spatial_shapes, sampling_locations):
    """Geometry of each level's padded map, as tensors like `sampling_locations`.

    Returns:
        last (L, 1, 2): the largest x and y that a point can have. row (L, 1): cells in a row. first (L, 1): the cell of
        the point (0, 0). largest: the last cell that can be a top left corner.
    """
    options = {"device": sampling_locations.device, "dtype": sampling_locations.dtype}
    rows = [w + 2 for _, w in spatial_shapes]
    starts = [0]
    for (h, _), row in zip(spatial_shapes, rows):
        starts.append(starts[-1] + (h + 2) * row)
    last = constant(tuple((w, h) for h, w in spatial_shapes), **options).view(-1, 1, 2)
    row = constant(tuple(rows), **options).view(-1, 1)
    first = constant(tuple(start + width + 1 for start, width in zip(starts, rows)), **options).view(-1, 1)
    return last, row, first, starts[-1] - rows[-1] - 2
