"""From what a query says to points in maps and their weights."""

import torch


def weigh(sizes, scales, said, tables, order, reference, heads: int):
    """Points, their weights, and what weight is left for the sinks; the arguments are those of `attend`.

    Returns:
        points (N, Q, H, P, L, K, 2) in cells, float32 or finer; weights (N, Q, H, P, L, K); left (N, Q, H, 1).
    """
    points, logits = points_and_logits(sizes, scales, said, tables, order, reference, heads)
    weights = logits.to(points.dtype).softmax(-1).to(said.dtype)
    return points, weights[..., :-1].view(points.shape[:-1]), weights[..., -1:]


def points_and_logits(sizes, scales, said, tables, order, reference, heads: int):
    """The same before the softmax: points, and logits (N, Q, H, P * L * K + 1), the last the sinks'."""
    offsets, logits = offsets_and_logits(scales, said, tables, order, heads)
    centre, scale = centres(sizes, scales, reference, offsets)
    return torch.addcmul(centre, offsets, scale), logits


def offsets_and_logits(scales, said, tables, order, heads: int):
    """Offsets (N, Q, H, P, 1, K, 2), the same for all levels, float32 or finer; logits (N, Q, H, P * L * K + 1)."""
    n, q, e = said.shape
    p, levels = order.shape[-1], len(scales)
    k = e // (heads * (2 + levels))
    split = heads * k * 2
    precise = torch.promote_types(said.dtype, torch.float32)  # half precision is too coarse for positions

    added = tables[order]  # (N, 1 or Q, P, E)
    at = added.shape[1]
    offsets = said[..., :split].view(n, q, heads, 1, 1, k, 2) + added[..., :split].view(
        n, at, p, heads, 1, k, 2
    ).transpose(2, 3)
    weighs = added[..., split:].masked_fill((order == 0).unsqueeze(-1), float("-inf"))
    logits = said[..., split:].view(n, q, heads, 1, levels, k) + weighs.view(n, at, p, heads, levels, k).transpose(2, 3)
    # The sinks have the constant logit -log(P * L) each: together they weigh like one with logit 0.
    return offsets.to(precise), torch.cat([logits.flatten(3), logits.new_zeros(n, q, heads, 1)], dim=-1)


def centres(sizes, scales, reference, offsets):
    """A point is centre + offset * scale, in cells of its level: centre (1 or Q, 1, 1, L, K, 2), scale (L, K, 2)."""
    k, options = offsets.shape[-2], {"device": offsets.device, "dtype": offsets.dtype}
    side = torch.tensor([(w, h) for h, w in sizes], **options).view(-1, 1, 2)
    scale = torch.tensor(scales, **options).view(-1, 1, 1).repeat(1, k, 2)
    centre = reference.to(offsets.dtype).view(-1, 1, 1, 1, 1, 2) * side - 0.5
    return centre.repeat(1, 1, 1, 1, k, 1), scale  # in whole rows, so that the arithmetic with them is vectorized
