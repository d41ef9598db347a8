"""The weighted bilinear gather behind deformable attention, one file a backend; `gather` chooses."""

from . import bag, plain

BACKENDS = {"plain": plain.gather, "bag": bag.gather}


def gather(values, sizes, points, weights, backend: str | None = None):
    """Sums bilinear samples of feature maps: sum over p, l, k of weights * values[p, l] at points.

    Args:
        values: (N, P, S, H, D), for each of P pictures its levels' cells one after the other, S = sum of h * w.
        sizes: the levels' (h, w).
        points: (N, Q, H, P, L, K, 2), x then y, in cells of the level; cell centres are whole numbers.
        weights: (N, Q, H, P, L, K).
        backend: a name in BACKENDS; None takes `bag` on the CPU and `plain` elsewhere.

    Returns:
        (N, Q, H * D); what lies outside a map counts as zero (`MSDeformAttnFunction`).
    """
    if backend is None:
        backend = "bag" if values.device.type == "cpu" else "plain"
    return BACKENDS[backend](values, sizes, points, weights)
