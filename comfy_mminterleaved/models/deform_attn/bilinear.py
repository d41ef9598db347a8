"""What every gather starts from: maps with a border of zeros, the four cells around each point, and their weights."""

import torch


def bordered(values, sizes):
    """Maps with a border of zeros one cell wide, in which every point has its four cells.

    Args:
        values: (N, P, S, H, D), for each of P pictures its levels' cells one after the other, S = sum of h * w.
        sizes: the levels' (h, w).

    Returns:
        (N, P, H, S', D), S' = sum of (h + 2) * (w + 2): what one head reads lies together.
    """
    levels = []
    for level, (h, w) in zip(values.split([h * w for h, w in sizes], dim=2), sizes):
        level = level.transpose(2, 3).unflatten(3, (h, w))  # (N, P, H, h, w, D)
        levels.append(torch.nn.functional.pad(level, (0, 0, 1, 1, 1, 1)).flatten(3, 4))
    return torch.cat(levels, dim=3)


def corners(sizes, points, weights, dtype=torch.int64):
    """Cells and weights of the four corners of every point.

    Args:
        sizes: the levels' (h, w), without borders.
        points: (..., P, L, K, 2), weights: (..., P, L, K), as in `gather`.

    Returns:
        cells: integers of `dtype` (..., P, L, K, 4), within one picture's bordered cells.
        weights: (..., P, L, K, 4), of the dtype of `weights`.
    """
    last, row, first, largest = grid(sizes, points)
    # A point outside is moved onto the border, where everything is zero.
    points = torch.minimum(points.clamp(min=-1), last)
    low = torch.minimum(points.detach().floor(), last - 1)
    share = (points - low).to(weights.dtype)
    cell = (low[..., 1] * row + low[..., 0] + first).to(dtype)  # whole numbers below 2^24, so exact
    cell = cell.clamp_(0, largest)  # a NaN has a place too
    row = row.to(dtype)
    cells = torch.stack([cell, cell + 1, cell + row, cell + row + 1], -1)
    right = weights * share[..., 0]
    left = weights - right
    bottom_left, bottom_right = left * share[..., 1], right * share[..., 1]
    return cells, torch.stack([left - bottom_left, right - bottom_right, bottom_left, bottom_right], -1)


def grid(sizes, points):
    """Numbers of each level's bordered map, as tensors like `points`.

    Returns:
        last (L, 1, 2): the largest x and y that a point can have. row (L, 1): cells in a row. first (L, 1): the cell of
        the point (0, 0). largest: the last cell that can be a top left corner.
    """
    options = {"device": points.device, "dtype": points.dtype}
    rows = [w + 2 for _, w in sizes]
    starts = [0]
    for (h, _), row in zip(sizes, rows):
        starts.append(starts[-1] + (h + 2) * row)
    last = torch.tensor([(w, h) for h, w in sizes], **options).view(-1, 1, 2)
    row = torch.tensor(rows, **options).view(-1, 1)
    first = torch.tensor([start + width + 1 for start, width in zip(starts, rows)], **options).view(-1, 1)
    return last, row, first, starts[-1] - rows[-1] - 2
