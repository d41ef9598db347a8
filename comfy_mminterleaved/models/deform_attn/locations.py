"""Query terms -> sampling locations and attention weights."""

import torch

from .bilinear import constant


def locations_and_weights(
    spatial_shapes, scale_ratios, query_terms, relpos_table, image_relpos, reference_points, heads: int
):
    """Sampling locations, attention weights and the ignore token's weight; arguments as in `mmfs_attention`.

    Returns:
        sampling_locations `(N, Q, H, P, L, K, 2)` in cells, float32 or finer; attention_weights `(N, Q, H, P, L, K)`;
        ignore_weight `(N, Q, H, 1)`.
    """
    sampling_locations, logits = locations_and_logits(
        spatial_shapes, scale_ratios, query_terms, relpos_table, image_relpos, reference_points, heads
    )
    attention_weights = logits.to(sampling_locations.dtype).softmax(-1).to(query_terms.dtype)
    return (
        sampling_locations,
        attention_weights[..., :-1].view(sampling_locations.shape[:-1]),
        attention_weights[..., -1:],
    )


def locations_and_logits(
    spatial_shapes, scale_ratios, query_terms, relpos_table, image_relpos, reference_points, heads: int
):
    """The same before the softmax: locations, and logits `(N, Q, H, P * L * K + 1)`, the ignore token's last."""
    offsets, logits = offsets_and_logits(scale_ratios, query_terms, relpos_table, image_relpos, heads)
    center, scale = reference_centers(spatial_shapes, scale_ratios, reference_points, offsets)
    return torch.addcmul(center, offsets, scale), logits


def offsets_and_logits(scale_ratios, query_terms, relpos_table, image_relpos, heads: int):
    """Offsets (N, Q, H, P, 1, K, 2), the same for all levels, float32 or finer; logits (N, Q, H, P * L * K + 1)."""
    n, q, e = query_terms.shape
    p, levels = image_relpos.shape[-1], len(scale_ratios)
    k = e // (heads * (2 + levels))
    split = heads * k * 2
    compute_dtype = torch.promote_types(query_terms.dtype, torch.float32)  # half precision is too coarse for positions

    added = relpos_table[image_relpos]  # (N, 1 or Q, P, E)
    num_queries = added.shape[1]
    offsets = query_terms[..., :split].view(n, q, heads, 1, 1, k, 2) + added[..., :split].view(
        n, num_queries, p, heads, 1, k, 2
    ).transpose(2, 3)
    added_logits = added[..., split:].masked_fill((image_relpos == 0).unsqueeze(-1), float("-inf"))
    logits = query_terms[..., split:].view(n, q, heads, 1, levels, k) + added_logits.view(
        n, num_queries, p, heads, levels, k
    ).transpose(2, 3)
    # The reference has an ignore token per image and level, each of logit -log(P * L): together they weigh like one of
    # logit 0.
    return offsets.to(compute_dtype), torch.cat([logits.flatten(3), logits.new_zeros(n, q, heads, 1)], dim=-1)


def reference_centers(spatial_shapes, scale_ratios, reference_points, offsets):
    """A point is centre + offset * scale, in cells of its level: centre (1 or Q, 1, 1, L, K, 2), scale (L, K, 2)."""
    k, options = offsets.shape[-2], {"device": offsets.device, "dtype": offsets.dtype}
    side = constant(tuple((w, h) for h, w in spatial_shapes), **options).view(-1, 1, 2)
    scale = constant(tuple(scale_ratios), **options).view(-1, 1, 1).repeat(1, k, 2)
    center = reference_points.to(offsets.dtype).view(-1, 1, 1, 1, 1, 2) * side - 0.5
    return center.repeat(1, 1, 1, 1, k, 1), scale  # in whole rows, so that the arithmetic with them is vectorized
