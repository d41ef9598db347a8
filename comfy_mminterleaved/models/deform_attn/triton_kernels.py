"""Triton kernels of `fused`; importing this needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _corner(values, cell, cell_stride, weight, depth, shown, D: tl.constexpr):
    found = tl.load(values + cell[:, None] * cell_stride + depth[None, :], shown[:, None] & (depth < D)[None, :], 0.0)
    return found.to(tl.float32) * weight[:, None]


@triton.jit
def _bilinear(values, cell_stride, x, y, width, height, start, weight, depth, shown, D: tl.constexpr):
    """Sum over samples (M,) of weight * the map's value at (x, y): (D,). Borders make four cells valid everywhere."""
    x = tl.minimum(tl.maximum(x, -1.0), width)
    y = tl.minimum(tl.maximum(y, -1.0), height)
    left = tl.minimum(tl.floor(x), width - 1)
    top = tl.minimum(tl.floor(y), height - 1)
    right, bottom = x - left, y - top
    row = width + 2
    cell = start + ((top + 1) * row + left + 1).to(tl.int32)
    row = row.to(tl.int32)
    found = _corner(values, cell, cell_stride, weight * (1 - right) * (1 - bottom), depth, shown, D)
    found += _corner(values, cell + 1, cell_stride, weight * right * (1 - bottom), depth, shown, D)
    found += _corner(values, cell + row, cell_stride, weight * (1 - right) * bottom, depth, shown, D)
    found += _corner(values, cell + row + 1, cell_stride, weight * right * bottom, depth, shown, D)
    return tl.sum(found, axis=0)


@triton.jit
def _attend(
    values,
    said,
    tables,
    order,
    reference,
    sink,
    levels,
    found,
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
    depth = tl.arange(0, BLOCK_D)
    sample = tl.arange(0, BLOCK_M)
    shown = sample < L * K
    level, point = sample // K, sample % K
    level = tl.where(shown, level, 0)
    width = tl.load(levels + level * 4)
    height = tl.load(levels + level * 4 + 1)
    start = tl.load(levels + level * 4 + 2).to(tl.int32)
    scale = tl.load(levels + level * 4 + 3)
    centre_x = tl.load(reference + q * reference_q) * width - 0.5
    centre_y = tl.load(reference + q * reference_q + 1) * height - 0.5

    E: tl.constexpr = H * K * (2 + L)
    offset_at = (head * K + point) * 2
    logit_at = H * K * 2 + head * L * K + sample
    offset_x = tl.load(said + query * E + offset_at, shown, 0.0).to(tl.float32)
    offset_y = tl.load(said + query * E + offset_at + 1, shown, 0.0).to(tl.float32)
    logit = tl.load(said + query * E + logit_at, shown, 0.0).to(tl.float32)

    # The sink is the first sample, of logit 0.
    most = tl.full((), 0.0, tl.float32)
    total = tl.full((), 1.0, tl.float32)
    sums = tl.load(sink + head * D + depth, depth < D, 0.0).to(tl.float32)
    for picture in range(P):
        position = tl.load(order + n * order_n + q * order_q + picture)
        if position > 0:
            table = tables + position * E
            x = centre_x + (offset_x + tl.load(table + offset_at, shown, 0.0).to(tl.float32)) * scale
            y = centre_y + (offset_y + tl.load(table + offset_at + 1, shown, 0.0).to(tl.float32)) * scale
            here = logit + tl.load(table + logit_at, shown, 0.0).to(tl.float32)
            here = tl.where(shown, here, float("-inf"))
            larger = tl.maximum(most, tl.max(here, axis=0))
            rescale = tl.exp(most - larger)
            weight = tl.exp(here - larger)
            base = values + n * n_stride + picture * p_stride + head * h_stride
            sampled = _bilinear(base, cell_stride, x, y, width, height, start, weight, depth, shown, D)
            sums = sums * rescale + sampled
            total = total * rescale + tl.sum(weight, axis=0)
            most = larger
    tl.store(found + (query * H + head) * D + depth, (sums / total).to(found.dtype.element_ty), depth < D)


@triton.jit
def _gather(
    values,
    points,
    weights,
    levels,
    found,
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
    depth = tl.arange(0, BLOCK_D)
    sample = tl.arange(0, BLOCK_M)
    shown = sample < L * K
    level = tl.where(shown, sample // K, 0)
    width = tl.load(levels + level * 4)
    height = tl.load(levels + level * 4 + 1)
    start = tl.load(levels + level * 4 + 2).to(tl.int32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for picture in range(P):
        at = (program * P + picture) * (L * K) + sample
        x = tl.load(points + at * 2, shown, 0.0).to(tl.float32)
        y = tl.load(points + at * 2 + 1, shown, 0.0).to(tl.float32)
        weight = tl.load(weights + at, shown, 0.0).to(tl.float32)
        base = values + n * n_stride + picture * p_stride + head * h_stride
        sums += _bilinear(base, cell_stride, x, y, width, height, start, weight, depth, shown, D)
    tl.store(found + program * D + depth, sums.to(found.dtype.element_ty), depth < D)


def _levels(sizes, scales, device):
    """(L, 4) float32: width, height, first cell and scale of each level."""
    rows, start = [], 0
    for (height, width), scale in zip(sizes, scales):
        rows.append((width, height, start, scale))
        start += (height + 2) * (width + 2)
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _blocks(samples: int, depth: int) -> dict[str, int]:
    return {"BLOCK_M": triton.next_power_of_2(samples), "BLOCK_D": triton.next_power_of_2(depth)}


def gather(values, sizes, points, weights):
    n, p, h, s, d = values.shape
    q, levels, k = points.shape[1], *points.shape[4:6]
    values = values.contiguous()
    found = values.new_empty(n, q, h * d)
    _gather[(n * q * h,)](
        values,
        points.contiguous(),
        weights.contiguous(),
        _levels(sizes, [1.0] * levels, values.device),
        found,
        q,
        p,
        *values.stride()[:4],
        H=h,
        L=levels,
        K=k,
        D=d,
        **_blocks(levels * k, d),
        num_warps=4,
    )
    return found


def attend(values, sizes, scales, said, tables, order, reference, sink):
    n, p, h, s, d = values.shape
    q, levels = said.shape[1], len(scales)
    k = said.shape[-1] // (h * (2 + levels))
    values = values.contiguous()
    found = values.new_empty(n, q, h * d)
    order, reference = order.contiguous(), reference.float().contiguous()
    _attend[(n * q * h,)](
        values,
        said.contiguous(),
        tables.contiguous(),
        order,
        reference,
        sink.contiguous(),
        _levels(sizes, scales, values.device),
        found,
        q,
        p,
        *values.stride()[:4],
        order.stride(0),
        order.stride(1) if order.shape[1] > 1 else 0,
        2 if len(reference) > 1 else 0,
        H=h,
        L=levels,
        K=k,
        D=d,
        **_blocks(levels * k, d),
        num_warps=4,
    )
    return found
