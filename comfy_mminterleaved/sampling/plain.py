"""The definition: index, weigh, add up. Any device, differentiable; memory grows with the number of points."""

import torch

from .corners import corners

AT_ONCE = 2**26  # sampled values held at a time


def gather(values, sizes, points, weights):
    n, _, _, h, d = values.shape
    one = n * h * d * 4 * weights[0, 0, 0].numel()  # of one query: four corners of all its points
    step = max(1, AT_ONCE // max(1, one))
    parts = zip(points.split(step, dim=1), weights.split(step, dim=1))
    return torch.cat([_gather(values, sizes, *part) for part in parts], dim=1)


def _gather(values, sizes, points, weights):
    n, p, s, h, d = values.shape
    cells, shares = corners(sizes, points, weights)  # (N, Q, H, P, L, K, 4)
    cells = cells + torch.arange(p, device=cells.device).view(p, 1, 1, 1) * s
    cells, shares = cells.flatten(3), shares.flatten(3)  # (N, Q, H, M)
    table = values.reshape(n, p * s, h, d)
    batch = torch.arange(n, device=cells.device).view(n, 1, 1, 1)
    head = torch.arange(h, device=cells.device).view(1, 1, h, 1)
    samples = table[batch, cells, head]  # (N, Q, H, M, D)
    return (samples * shares.unsqueeze(-1)).sum(3).flatten(2).to(values.dtype)
