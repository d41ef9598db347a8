"""What the synchronizer's MMFS blocks attend to: plain attention weights, and gradients of what the blocks add.

Weights say where a block samples, not what it takes: with deep feature maps every cell knows what its image shows. What
an image causes is measured by leaving it out (`insight`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..models.mmfs import MMFS
from ..models.unet_synchronizer import MMFSNet

SIDE = 64  # cells of the maps


@dataclass
class AttentionMaps:
    """Weights summed over heads, queries, blocks and steps.

    Args:
        maps: `(P, SIDE, SIDE)`, where in each image the samples lie.
        levels: `(L, P)`, the weight on each level of each image.
        outside: Weight on points outside the images.
        ignored: Weight on the ignore token.
    """

    maps: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    outside: float = 0.0
    ignored: float = 0.0

    @property
    def shares(self) -> list[float]:
        """The share of all weight that each image has."""
        total = float(self.levels.sum()) + self.ignored
        return (self.levels.sum(0) / total).tolist()

    def add(self, locations: torch.Tensor, weights: torch.Tensor, ignored: torch.Tensor, spatial_shapes) -> None:
        """Adds one call of MMFS: locations `(N, Q, H, P, L, K, 2)` in cells, weights `(N, Q, H, P, L, K)`."""
        count, num_levels = weights.shape[3], weights.shape[4]
        if self.maps is None:
            self.maps, self.levels = torch.zeros(count, SIDE, SIDE), torch.zeros(num_levels, count)
        weights, locations = weights.float().cpu(), locations.float().cpu()
        self.levels += weights.sum((0, 1, 2, 5)).T
        self.ignored += float(ignored.float().sum())
        for level, (height, width) in enumerate(spatial_shapes):
            x, y = ((locations[..., level, :, axis] + 0.5) / side for axis, side in ((0, width), (1, height)))
            inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
            weight = weights[..., level, :]
            self.outside += float((weight * ~inside).sum())
            cells = (y.clamp(0, 1 - 1e-6) * SIDE).long() * SIDE + (x.clamp(0, 1 - 1e-6) * SIDE).long()
            for image in range(count):
                values = (weight * inside)[:, :, :, image].flatten()
                self.maps[image].view(-1).index_add_(0, cells[:, :, :, image].flatten(), values)


@contextlib.contextmanager
def record_attention(mmfs_net: MMFSNet) -> Iterator[AttentionMaps]:
    """Context in which the MMFS blocks' locations and weights are added up."""
    record = AttentionMaps()

    def before(mmfs: MMFS, args) -> None:
        values = args[1]
        if values.num_images:
            record.add(*mmfs.locations_and_weights(*args), values.spatial_shapes)

    handles = [block.mmfs.register_forward_pre_hook(before) for block in mmfs_net.blocks]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class RecordedCalls:
    """The last call of each block."""

    calls: dict[int, tuple] = field(default_factory=dict)


@contextlib.contextmanager
def record_calls(mmfs_net: MMFSNet) -> Iterator[RecordedCalls]:
    """Context in which the arguments of each MMFS block's last call are kept."""
    record = RecordedCalls()
    handles = [
        block.register_forward_pre_hook(lambda _, args, index=index: record.calls.__setitem__(index, args))
        for index, block in enumerate(mmfs_net.blocks)
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.enable_grad()
def gradient_maps(mmfs_net: MMFSNet, record: RecordedCalls, maps: Sequence[torch.Tensor], image_mask) -> torch.Tensor:
    """Where the images' features matter for what the blocks add: `(P, SIDE, SIDE)`.

    The gradient, times the features, of what each block adds in the direction in which it adds more with the images
    than without.

    Args:
        record: Of a drawing with these images.
        maps: The encoder's feature maps, each `(1, P, C, h, w)`.
        image_mask: bool `(1, P)`.
    """
    maps = [m.detach().float().requires_grad_() for m in maps]
    values = mmfs_net.project_images(maps, image_mask)
    total = maps[0].new_zeros(())
    for index, (x, _, _, positions, reference_points) in record.calls.items():
        block, x = mmfs_net.blocks[index], x.detach()
        with torch.no_grad():
            hidden = torch.zeros_like(image_mask)
            direction = block(x, values.blocks[index], image_mask, positions, reference_points)
            direction = direction - block(x, values.blocks[index], hidden, positions, reference_points)
        added = block(x, values.blocks[index], image_mask, positions, reference_points)
        total = total + (added * F.normalize(direction.flatten(), dim=0).view_as(direction)).sum()
    used = [m for m in maps if m.shape[-1] in mmfs_net.spatial_shapes]
    gradients = torch.autograd.grad(total, used)
    out = maps[0].new_zeros(maps[0].shape[1], SIDE, SIDE)
    for gradient, level in zip(gradients, used):
        strength = (gradient * level.detach()).sum(2)[0].abs()[:, None]
        out += F.interpolate(strength, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    return out.detach()
