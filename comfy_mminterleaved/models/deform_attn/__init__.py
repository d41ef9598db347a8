"""Sampled attention over feature maps, one file a backend.

`gather` sums bilinear samples whose points and weights are given. `attend` is all of MMFS between its projections:
from what a query says to points and weights, a softmax with the sinks, and the gather.
"""

import torch

from . import dense, fused
from . import eager as plain
from . import embedding_bag as bag
from . import xformers as samples
from .bilinear import bordered
from .locations import weigh

__all__ = ["BACKENDS", "attend", "bordered", "choose", "gather"]

BACKENDS = {"plain": plain.gather, "bag": bag.gather, "dense": dense.gather, "triton": fused.gather}
ATTENDING = (*BACKENDS, "xformers")

# Points that are worked on at a time on the CPU: what is made of them stays in its cache.
AT_ONCE = 2**18


def gather(values, sizes, points, weights, backend: str | None = None):
    """Sums bilinear samples of feature maps: sum over p, l, k of weights * values[p, l] at points.

    Args:
        values: (N, P, H, S', D), from `bordered`.
        sizes: the levels' (h, w), without borders.
        points: (N, Q, H, P, L, K, 2), x then y, in cells of the level; cell centres are whole numbers.
        weights: (N, Q, H, P, L, K).
        backend: a name in BACKENDS; None takes the fastest.

    Returns:
        (N, Q, H * D); what lies outside a map counts as zero (`MSDeformAttnFunction`).
    """
    return BACKENDS[backend or choose(values, points)](values, sizes, points, weights)


def attend(values, sizes, scales, said, tables, order, reference, sink, backend: str | None = None):
    """MMFS between its projections: where to look in each picture, how much it weighs, and what is found.

    Args:
        values: (N, P, H, S', D), from `bordered`.
        sizes: the levels' (h, w), without borders.
        scales: cells of each level that an offset of 1 is.
        said: (N, Q, E), linear in the queries: H * K offsets (x, y), then H * L * K logits.
        tables: (positions, E), what each relative position adds to `said`.
        order: int64 (N, 1 or Q, P), the position of each picture: 1 the newest visible, 0 not visible.
        reference: (1 or Q, 2), x and y in [0, 1], where the offsets start.
        sink: (H, D), what is found where nothing is looked at; it weighs like one sample of logit 0.
        backend: a name in ATTENDING; None takes the fastest.

    Returns:
        (N, Q, H * D).
    """
    backend = backend or choose(values, said)
    arguments = values, sizes, scales, said, tables, order, reference, sink
    if backend == "triton":
        return fused.attend(*arguments)
    whole = {"xformers": samples.attend} if torch.is_grad_enabled() else {"xformers": samples.attend, "bag": bag.attend}
    find = whole.get(backend) or _through(BACKENDS[backend])
    step = _queries_at_once(values, sizes, scales, said)
    if torch.is_grad_enabled() or step >= said.shape[1]:
        return find(*arguments)
    found = []
    for start in range(0, said.shape[1], step):
        part = slice(start, start + step)
        some = order[:, part] if order.shape[1] > 1 else order
        places = reference[part] if len(reference) > 1 else reference
        found.append(find(values, sizes, scales, said[:, part], tables, some, places, sink))
    return torch.cat(found, dim=1)


def choose(values, queries) -> str:
    """The fastest backend for these tensors (`python -m benchmarks.gather` measures them)."""
    learning = torch.is_grad_enabled() and (values.requires_grad or queries.requires_grad)
    if values.device.type == "cpu":
        return "dense" if learning else "bag"
    return "triton" if fused.available(values) and not learning else "plain"


def _through(gathered):
    def find(values, sizes, scales, said, tables, order, reference, sink):
        points, weights, left = weigh(sizes, scales, said, tables, order, reference, len(sink))
        found = gathered(values, sizes, points, weights)
        return torch.addcmul(found.view(*left.shape[:3], -1), left, sink).flatten(2)

    return find


def _queries_at_once(values, sizes, scales, said) -> int:
    n, p, heads = values.shape[:3]
    points = said.shape[-1] // (2 + len(scales)) * len(scales)  # of one query in one picture, all heads
    if values.device.type == "cpu":
        return max(1, AT_ONCE // max(1, n * p * points))
    return max(1, plain.AT_ONCE // max(1, n * p * points * 4 * values.shape[-1]))
