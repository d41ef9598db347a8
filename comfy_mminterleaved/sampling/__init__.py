"""The weighted bilinear gather behind deformable attention, one file a backend; `gather` chooses."""

import torch

from . import bag, dense, plain
from .corners import bordered

__all__ = ["BACKENDS", "bordered", "gather"]

BACKENDS = {"plain": plain.gather, "bag": bag.gather, "dense": dense.gather}


def gather(values, sizes, points, weights, backend: str | None = None):
    """Sums bilinear samples of feature maps: sum over p, l, k of weights * values[p, l] at points.

    Args:
        values: (N, P, S', H, D), from `bordered`.
        sizes: the levels' (h, w), without borders.
        points: (N, Q, H, P, L, K, 2), x then y, in cells of the level; cell centres are whole numbers.
        weights: (N, Q, H, P, L, K).
        backend: a name in BACKENDS; None takes the fastest.

    Returns:
        (N, Q, H * D); what lies outside a map counts as zero (`MSDeformAttnFunction`).
    """
    return BACKENDS[backend or choose(values, points)](values, sizes, points, weights)


def choose(values, points) -> str:
    """The fastest backend for these tensors."""
    if values.device.type != "cpu":
        return "plain"
    learning = torch.is_grad_enabled() and (values.requires_grad or points.requires_grad)
    return "dense" if learning else "bag"
