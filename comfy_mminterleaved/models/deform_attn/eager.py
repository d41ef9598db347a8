"""Reference `ms_deform_attn`: index, weight, sum. Any device, differentiable; memory grows with the points."""

import torch

from .bilinear import bilinear_corners

CHUNK_SIZE = 2**26  # sampled values held at a time


def ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    n, _, h, _, d = value.shape
    one = n * h * d * 4 * attention_weights[0, 0, 0].numel()  # of one query: four corners of all its points
    step = max(1, CHUNK_SIZE // max(1, one))
    parts = zip(sampling_locations.split(step, dim=1), attention_weights.split(step, dim=1))
    return torch.cat([_gather(value, spatial_shapes, *part) for part in parts], dim=1)


def _gather(value, spatial_shapes, sampling_locations, attention_weights):
    n, p, h, s, d = value.shape
    # Both (N, Q, H, P, L, K, 4).
    corner_index, corner_weight = bilinear_corners(spatial_shapes, sampling_locations, attention_weights)
    batch = torch.arange(n, device=corner_index.device).view(n, 1, 1, 1, 1)
    head = torch.arange(h, device=corner_index.device).view(h, 1, 1)
    image = torch.arange(p, device=corner_index.device).view(p, 1)
    samples = value[batch, image, head, corner_index.flatten(4)]  # (N, Q, H, P, L * K * 4, D)
    return (samples * corner_weight.flatten(4).unsqueeze(-1)).sum((3, 4)).flatten(2).to(value.dtype)
