"""Triton kernels: only the result is written to memory. For CUDA, without gradients; importing this needs triton.

One program computes one head of one query. Samples of an image are read level by level, corner by corner, and the
softmax is accumulated over images (as in flash attention).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def _load_corner(value, cell, cell_stride, weight, d_index, mask, D: tl.constexpr):
    corner = tl.load(
        value + cell[:, None] * cell_stride + d_index[None, :], mask[:, None] & (d_index < D)[None, :], 0.0
    )
    return corner.to(tl.float32) * weight[:, None]


@triton.jit
def _bilinear(value, cell_stride, x, y, width, height, start, weight, d_index, mask, D: tl.constexpr):
    """Sum over samples (M,) of weight * the map's value at (x, y): (D,). Borders make four cells valid everywhere."""
    x = tl.minimum(tl.maximum(x, -1.0), width)
    y = tl.minimum(tl.maximum(y, -1.0), height)
    left = tl.minimum(tl.floor(x), width - 1)
    top = tl.minimum(tl.floor(y), height - 1)
    right, bottom = x - left, y - top
    row = width + 2
    cell = start + ((top + 1) * row + left + 1).to(tl.int32)
    row = row.to(tl.int32)
    total = _load_corner(value, cell, cell_stride, weight * (1 - right) * (1 - bottom), d_index, mask, D)
    total += _load_corner(value, cell + 1, cell_stride, weight * right * (1 - bottom), d_index, mask, D)
    total += _load_corner(value, cell + row, cell_stride, weight * (1 - right) * bottom, d_index, mask, D)
    total += _load_corner(value, cell + row + 1, cell_stride, weight * right * bottom, d_index, mask, D)
    return tl.sum(total, axis=0)


@triton.jit
def _mmfs_kernel(
    value,
    query_terms,
    relpos_table,
    image_relpos,
    reference_points,
    ignore_token,
    levels,
    out_ptr,
    Q,
    P,
    n_stride,
    p_stride,
    h_stride,
    cell_stride,
    order_n,
    order_q,
    reference_q,
    H: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % H
    query = program // H  # over all rows
    n, q = query // Q, query % Q
    d_index = tl.arange(0, BLOCK_D)
    sample = tl.arange(0, BLOCK_M)
    mask = sample < L * K
    level, point = sample // K, sample % K
    level = tl.where(mask, level, 0)
    width = tl.load(levels + level * 4)
    height = tl.load(levels + level * 4 + 1)
    start = tl.load(levels + level * 4 + 2).to(tl.int32)
    scale = tl.load(levels + level * 4 + 3)
    centre_x = tl.load(reference_points + q * reference_q) * width - 0.5
    centre_y = tl.load(reference_points + q * reference_q + 1) * height - 0.5

    E: tl.constexpr = H * K * (2 + L)
    offset_at = (head * K + point) * 2
    logit_at = H * K * 2 + head * L * K + sample
    offset_x = tl.load(query_terms + query * E + offset_at, mask, 0.0).to(tl.float32)
    offset_y = tl.load(query_terms + query * E + offset_at + 1, mask, 0.0).to(tl.float32)
    logit = tl.load(query_terms + query * E + logit_at, mask, 0.0).to(tl.float32)

    # The ignore token is the first sample, of logit 0.
    m_i = tl.full((), 0.0, tl.float32)
    total = tl.full((), 1.0, tl.float32)
    acc = tl.load(ignore_token + head * D + d_index, d_index < D, 0.0).to(tl.float32)
    for image in range(P):
        position = tl.load(image_relpos + n * order_n + q * order_q + image)
        if position > 0:
            table = relpos_table + position * E
            x = centre_x + (offset_x + tl.load(table + offset_at, mask, 0.0).to(tl.float32)) * scale
            y = centre_y + (offset_y + tl.load(table + offset_at + 1, mask, 0.0).to(tl.float32)) * scale
            scores = logit + tl.load(table + logit_at, mask, 0.0).to(tl.float32)
            scores = tl.where(mask, scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, axis=0))
            rescale = tl.exp(m_i - m_new)
            weight = tl.exp(scores - m_new)
            base = value + n * n_stride + image * p_stride + head * h_stride
            sampled = _bilinear(base, cell_stride, x, y, width, height, start, weight, d_index, mask, D)
            acc = acc * rescale + sampled
            total = total * rescale + tl.sum(weight, axis=0)
            m_i = m_new
    tl.store(out_ptr + (query * H + head) * D + d_index, (acc / total).to(out_ptr.dtype.element_ty), d_index < D)


@triton.jit
def _gather_kernel(
    value,
    sampling_locations,
    attention_weights,
    levels,
    out_ptr,
    Q,
    P,
    n_stride,
    p_stride,
    h_stride,
    cell_stride,
    H: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % H
    n = program // H // Q
    d_index = tl.arange(0, BLOCK_D)
    sample = tl.arange(0, BLOCK_M)
    mask = sample < L * K
    level = tl.where(mask, sample // K, 0)
    width = tl.load(levels + level * 4)
    height = tl.load(levels + level * 4 + 1)
    start = tl.load(levels + level * 4 + 2).to(tl.int32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for image in range(P):
        index = (program * P + image) * (L * K) + sample
        x = tl.load(sampling_locations + index * 2, mask, 0.0).to(tl.float32)
        y = tl.load(sampling_locations + index * 2 + 1, mask, 0.0).to(tl.float32)
        weight = tl.load(attention_weights + index, mask, 0.0).to(tl.float32)
        base = value + n * n_stride + image * p_stride + head * h_stride
        acc += _bilinear(base, cell_stride, x, y, width, height, start, weight, d_index, mask, D)
    tl.store(out_ptr + program * D + d_index, acc.to(out_ptr.dtype.element_ty), d_index < D)


@functools.cache
def _levels(spatial_shapes, scale_ratios, device):
    """`(L, 4)` float32: width, height, first cell and scale of each level; copied to the device once."""
    rows, start = [], 0
    for (height, width), scale in zip(spatial_shapes, scale_ratios):
        rows.append((width, height, start, scale))
        start += (height + 2) * (width + 2)
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _blocks(samples: int, head_dim: int) -> dict[str, int]:
    return {"BLOCK_M": triton.next_power_of_2(samples), "BLOCK_D": triton.next_power_of_2(head_dim)}


def ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    n, p, h, s, d = value.shape
    q, levels, k = sampling_locations.shape[1], *sampling_locations.shape[4:6]
    value = value.contiguous()
    out = value.new_empty(n, q, h * d)
    with torch.cuda.device_of(value):
        _gather_kernel[(n * q * h,)](
            value,
            sampling_locations.contiguous(),
            attention_weights.contiguous(),
            _levels(tuple(map(tuple, spatial_shapes)), (1.0,) * levels, value.device),
            out,
            q,
            p,
            *value.stride()[:4],
            H=h,
            L=levels,
            K=k,
            D=d,
            **_blocks(levels * k, d),
            num_warps=4,
        )
    return out


def mmfs_attention(
    value, spatial_shapes, scale_ratios, query_terms, relpos_table, image_relpos, reference_points, ignore_token
):
    n, p, h, s, d = value.shape
    q, levels = query_terms.shape[1], len(scale_ratios)
    k = query_terms.shape[-1] // (h * (2 + levels))
    value = value.contiguous()
    out = value.new_empty(n, q, h * d)
    image_relpos, reference_points = image_relpos.contiguous(), reference_points.float().contiguous()
    with torch.cuda.device_of(value):
        _mmfs_kernel[(n * q * h,)](
            value,
            query_terms.contiguous(),
            relpos_table.contiguous(),
            image_relpos,
            reference_points,
            ignore_token.contiguous(),
            _levels(tuple(map(tuple, spatial_shapes)), tuple(scale_ratios), value.device),
            out,
            q,
            p,
            *value.stride()[:4],
            image_relpos.stride(0),
            image_relpos.stride(1) if image_relpos.shape[1] > 1 else 0,
            2 if len(reference_points) > 1 else 0,
            H=h,
            L=levels,
            K=k,
            D=d,
            **_blocks(levels * k, d),
            num_warps=4,
        )
    return out
