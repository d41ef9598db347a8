"""The one attention call of all blocks; a host may hand the blocks its own instead."""

import importlib.util

import torch
import torch.nn.functional as F

_XFORMERS = importlib.util.find_spec("xformers") is not None


def attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(d)) v.

    Args:
        q: (N, H, Q, D).
        k, v: (N, H or a divisor of H, K, D); fewer heads are shared by groups of queries' heads.
        mask: bool, broadcastable to (N, H, Q, K); True may be looked at.
        causal: query i sees keys up to i; needs Q = K and no mask.

    Returns:
        (N, H, Q, D).
    """
    if _XFORMERS and q.is_cuda and mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return _xformers(q, k, v, causal)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
    )


def _xformers(q, k, v, causal):
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    bias = LowerTriangularMask() if causal else None
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
