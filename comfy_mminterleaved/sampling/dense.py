"""The same as one matrix of queries over cells: the cheapest to differentiate, for maps of few cells."""

from .corners import corners


def gather(values, sizes, points, weights):
    n, p, h, s, d = values.shape
    q = points.shape[1]
    cells, shares = corners(sizes, points, weights)
    matrix = shares.new_zeros(n, q, h, p, s).scatter_add(4, cells.flatten(4), shares.flatten(4))
    found = matrix.transpose(1, 2).flatten(3).to(values.dtype) @ values.transpose(1, 2).flatten(2, 3)
    return found.transpose(1, 2).flatten(2)  # (N, H, Q, D) -> (N, Q, H * D)
