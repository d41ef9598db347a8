"""Random weights at real widths: what a benchmark needs of a model, made in seconds."""

from __future__ import annotations

from dataclasses import replace

import torch

from comfy_mminterleaved.checkpoints.reference import from_reference
from comfy_mminterleaved.config import Config
from comfy_mminterleaved.models.build import build
from comfy_mminterleaved.models.mmfs import fuse_mmfs


def released_13b(layers: int | None = None) -> Config:
    """The released 13B model's config; `layers` of its LLM."""
    config = from_reference({})
    return config if layers is None else replace(config, llm=replace(config.llm, num_hidden_layers=layers))


@torch.no_grad()
def random_blocks(config: Config, blocks, device="cpu", dtype=torch.float32) -> dict[str, torch.nn.Module]:
    """Blocks of a config with small random weights: no gate closed, nothing zero, no care for what comes out."""
    made = build(config, blocks)
    for name, block in made.items():
        torch.nn.Module.to(block, dtype).to_empty(device=device)
        generator = torch.Generator(device).manual_seed(0)
        for part in block.modules():
            for parameter in part.parameters(recurse=False):
                if isinstance(part, (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm)):
                    parameter.fill_(1.0)
                elif parameter.ndim > 1:
                    width = max(1, parameter[0].numel())
                    parameter.normal_(std=min(0.5, width**-0.5), generator=generator)
                else:
                    parameter.uniform_(-0.1, 0.1, generator=generator)
        for buffer in block.buffers():
            buffer.zero_()
        made[name] = fuse_mmfs(block)
    return made


def random_maps(config: Config, pictures: int, device="cpu", dtype=torch.float32) -> list[torch.Tensor]:
    """The encoder's four maps of `pictures` pictures: (1, P, C, side, side)."""
    generator = torch.Generator().manual_seed(1)
    width = config.synchronizer.mmfs.d_value
    return [
        torch.randn(1, pictures, width, side, side, generator=generator).to(device, dtype)
        for side in config.synchronizer.mmfs.spatial_shapes
    ]
