"""The attention function of all blocks; a host may pass its own instead."""

import importlib.util

import torch
import torch.nn.functional as F

_XFORMERS = importlib.util.find_spec("xformers") is not None


def attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(d)) v.

    Args:
        q: (N, H, Q, D).
        k, v: (N, H or a divisor of H, K, D); fewer heads are shared by groups of queries' heads.
        mask: bool, broadcastable to (N, H, Q, K); True where a query may attend.
        causal: query i sees keys up to i + K - Q, so that the last sees all; with no mask.

    Returns:
        (N, H, Q, D).
    """
    if mask is None and supports_varlen(q):
        return _xformers_attention(q, k, v, causal)
    if causal and k.shape[2] != q.shape[2]:  # PyTorch's own flag counts from the first key
        mask, causal = causal_lower_right(q, k), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
    )


def shared_prefix_attention(q, prefix_k, prefix_v, k, v, mask):
    """Attention of several rows to keys that all share, followed by keys of their own.

    The shared part is one matrix product, so its keys are stored once, however many rows there are.

    Args:
        q: (N, H, Q, D).
        prefix_k, prefix_v: (H or a divisor of H, P, D).
        k, v: (N, H or a divisor of H, K, D).
        mask: bool, broadcastable to (N, 1, Q, K), over the keys of a row's own.

    Returns:
        (N, H, Q, D).
    """
    q = q.unflatten(1, (k.shape[1], -1))  # (N, key heads, query heads of each, Q, D)
    logits = torch.cat(
        [
            torch.einsum("nhgqd,hpd->nhgqp", q, prefix_k),
            torch.einsum("nhgqd,nhkd->nhgqk", q, k).masked_fill(~mask.unsqueeze(1), float("-inf")),
        ],
        dim=-1,
    )
    weights = (logits.float() * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
    shared, own = weights.split([prefix_k.shape[1], k.shape[2]], dim=-1)
    out = torch.einsum("nhgqp,hpd->nhgqd", shared, prefix_v) + torch.einsum("nhgqk,nhkd->nhgqd", own, v)
    return out.flatten(1, 2)


def causal_lower_right(q, k):
    """The mask of `causal`: bool (Q, K)."""
    queries, keys = q.shape[2], k.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


def supports_varlen(x) -> bool:
    """Whether xFormers supports the device and dtype of `x`; rows of several lengths are then packed, not padded."""
    return _XFORMERS and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def varlen_attention(q, k, v, lengths: list[int]):
    """`attention` of rows whose keys have several lengths, one after the other, with no padding between.

    Args:
        q: (N, H, Q, D).
        k, v: (sum of lengths, H, D).

    Returns:
        (N, H, Q, D).
    """
    n, h, queries, d = q.shape
    if not supports_varlen(q):
        keys, values = (t.transpose(0, 1).split(lengths, dim=1) for t in (k, v))
        return torch.cat([attention(q[i : i + 1], keys[i][None], values[i][None]) for i in range(n)])
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens([queries] * n, lengths)
    packed = q.transpose(1, 2).reshape(1, n * queries, h, d)
    out = memory_efficient_attention(packed, k.unsqueeze(0), v.unsqueeze(0), attn_bias=bias)
    return out.view(n, queries, h, d).transpose(1, 2)


def _xformers_attention(q, k, v, causal):
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask, LowerTriangularMask

    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    bias = None
    if causal:
        bias = LowerTriangularMask() if k.shape[1] == q.shape[1] else LowerTriangularFromBottomRightMask()
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
