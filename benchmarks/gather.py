"""Which backend of MMFS is fastest where: one MMFS block of SD 2.1's size."""

from __future__ import annotations

import torch

from comfy_mminterleaved.models import deform_attn

from .timing import interleaved

SIZES = ((64, 64), (32, 32), (16, 16), (8, 8))
HEADS, POINTS, DEPTH = 16, 8, 64


@torch.no_grad()
def measure(
    rounds: int = 3, device="cpu", dtypes=(torch.float32,), queries=(1, 64, 1024, 4096), pictures=(1, 3)
) -> dict:
    """Seconds of one call of `deform_attn.mmfs_attention` by backend, queries, pictures and dtype."""
    generator = torch.Generator().manual_seed(0)
    cells, e = sum(h * w for h, w in SIZES), HEADS * POINTS * (2 + len(SIZES))
    found = {}
    for dtype in dtypes:
        for count in pictures:
            values = deform_attn.pad_levels(torch.randn(1, count, cells, HEADS, DEPTH, generator=generator), SIZES)
            values = values.to(device, dtype)
            tables = torch.randn(10, e, generator=generator).to(device, dtype)
            sink = torch.zeros(HEADS, DEPTH, device=device, dtype=dtype)
            order = torch.arange(count, 0, -1, device=device).view(1, 1, count)
            for q in queries:
                said = (torch.randn(1, q, e, generator=generator) * 2).to(device, dtype)
                reference = torch.rand(q, 2, generator=generator).to(device)
                ways = ["eager", "embedding_bag", "dense"] if device == "cpu" else ["eager", "xformers", "triton"]
                if q > 1024 and device == "cpu":
                    ways = ["eager", "embedding_bag"]  # the others hold all samples, or a matrix of all cells
                arguments = values, SIZES, [1.0, 0.5, 0.25, 0.125], said, tables, order, reference, sink
                cases = {way: lambda a=arguments, w=way: deform_attn.mmfs_attention(*a, backend=w) for way in ways}
                seconds = interleaved(cases, rounds)
                found[f"{str(dtype)[6:]}, {count} pictures, {q} queries"] = seconds
    return found
