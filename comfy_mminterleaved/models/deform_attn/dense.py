"""`ms_deform_attn` as a product with a dense matrix, queries x cells: fastest to differentiate on small maps."""

import torch

from .bilinear import bilinear_corners


def ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    n, p, h, s, d = value.shape
    q = sampling_locations.shape[1]
    corner_index, corner_weight = bilinear_corners(spatial_shapes, sampling_locations, attention_weights)
    corner_index, corner_weight = (
        t.flatten(4).transpose(1, 2) for t in (corner_index, corner_weight)
    )  # (N, H, Q, P, L * K * 4)
    matrix = corner_weight.new_zeros(n, h, q, p, s).scatter_add_(4, corner_index, corner_weight)
    value = value.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    out = _Products.apply(matrix.flatten(3).flatten(0, 1).to(value.dtype), value)
    return out.unflatten(0, (n, h)).transpose(1, 2).flatten(2)  # (N, H, Q, D) -> (N, Q, H * D)


class _Products(torch.autograd.Function):
    """`torch.bmm`, but the gradient of its first factor one product after the other: several times faster on CPUs."""

    @staticmethod
    def forward(context, first, second):
        context.save_for_backward(first, second)
        return torch.bmm(first, second)

    @staticmethod
    def backward(context, gradient):
        first, second = context.saved_tensors
        of_first = torch.empty_like(first)
        for out, outer, inner in zip(of_first, gradient.contiguous(), second):
            torch.mm(outer, inner.T, out=out)
        return of_first, torch.bmm(first.transpose(1, 2), gradient)
