"""What every gather starts from: the four cells around each point, and their bilinear weights."""

import torch


def corners(sizes, points, weights):
    """Cells and weights of the four corners of every point.

    Args:
        sizes: the levels' (h, w).
        points: (..., P, L, K, 2), weights: (..., P, L, K), as in `gather`.

    Returns:
        cells: int64 (..., P, L, K, 4), within one picture's S cells, clamped into the map.
        weights: (..., P, L, K, 4), zero where the corner lies outside.
    """
    device = points.device
    width = torch.tensor([w for _, w in sizes], device=device).view(-1, 1)  # (L, 1)
    height = torch.tensor([h for h, _ in sizes], device=device).view(-1, 1)
    start = torch.tensor([0, *(h * w for h, w in sizes[:-1])], device=device).cumsum(0).view(-1, 1)
    x, y = points.unbind(-1)
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    # Far outside is outside all the same; clamping first keeps the integers in range.
    left = torch.minimum(left.clamp(min=-2), width.to(left.dtype)).long()
    top = torch.minimum(top.clamp(min=-2), height.to(top.dtype)).long()

    cells, shares = [], []
    for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            cell = torch.minimum(row.clamp(min=0), height - 1) * width + torch.minimum(column.clamp(min=0), width - 1)
            cells.append(cell + start)
            shares.append(row_share * column_share * inside)
    return torch.stack(cells, -1), torch.stack(shares, -1) * weights.unsqueeze(-1)
