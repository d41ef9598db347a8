"""The same as one matrix of queries over cells: the cheapest to differentiate, for maps of few cells."""

from .corners import corners


def gather(values, sizes, points, weights):
    n, p, h, s, d = values.shape
    q = points.shape[1]
    cells, shares = corners(sizes, points, weights)
    cells, shares = (t.flatten(4).transpose(1, 2) for t in (cells, shares))  # (N, H, Q, P, L * K * 4)
    matrix = shares.new_zeros(n, h, q, p, s).scatter_add_(4, cells, shares)
    found = matrix.flatten(3).to(values.dtype) @ values.transpose(1, 2).flatten(2, 3)
    return found.transpose(1, 2).flatten(2)  # (N, H, Q, D) -> (N, Q, H * D)
