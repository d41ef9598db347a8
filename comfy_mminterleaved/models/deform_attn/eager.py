"""The definition: index, weigh, add up. Any device, differentiable; memory grows with the number of points."""

import torch

from .bilinear import corners

AT_ONCE = 2**26  # sampled values held at a time


def gather(values, sizes, points, weights):
    n, _, h, _, d = values.shape
    one = n * h * d * 4 * weights[0, 0, 0].numel()  # of one query: four corners of all its points
    step = max(1, AT_ONCE // max(1, one))
    parts = zip(points.split(step, dim=1), weights.split(step, dim=1))
    return torch.cat([_gather(values, sizes, *part) for part in parts], dim=1)


def _gather(values, sizes, points, weights):
    n, p, h, s, d = values.shape
    cells, shares = corners(sizes, points, weights)  # (N, Q, H, P, L, K, 4)
    batch = torch.arange(n, device=cells.device).view(n, 1, 1, 1, 1)
    head = torch.arange(h, device=cells.device).view(h, 1, 1)
    picture = torch.arange(p, device=cells.device).view(p, 1)
    samples = values[batch, picture, head, cells.flatten(4)]  # (N, Q, H, P, L * K * 4, D)
    return (samples * shares.flatten(4).unsqueeze(-1)).sum((3, 4)).flatten(2).to(values.dtype)
