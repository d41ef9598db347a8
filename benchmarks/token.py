"""A decoded token of four 13B-wide layers with and without the synchronizer."""

from __future__ import annotations

import copy

import torch

from comfy_mminterleaved.models.llama_mmfs import KVCache

from .models import random_blocks, random_maps, released_13b
from .timing import interleaved


@torch.no_grad()
def measure(pictures=(1, 4, 8), rounds: int = 15, layers: int = 4, device="cpu", dtype=torch.float32) -> dict:
    """Seconds a token behind 64 others, and its ratios to the plain Llama's in the same rounds."""
    config = released_13b(layers)
    llm = random_blocks(config, ("llm",), device, dtype)["llm"]
    plain = copy.copy(llm)  # the same weights, without the synchronizers
    plain._modules = dict(llm._modules)
    plain.layers = torch.nn.ModuleList(map(_without_synchronizer, llm.layers))

    def decode(model, read):
        cache = KVCache(1)
        x = torch.randn(1, 1, config.llm.hidden_size, device=device).to(dtype)
        prefix = x.expand(-1, 64, -1)
        shown = torch.ones(1, 64, read.num_images if read else 0, dtype=torch.bool, device=device)
        model(prefix, read, shown if read else None, cache)
        kept = list(cache.lengths)
        seen = shown[:, :1] if read else None

        def token():
            cache.lengths = list(kept)
            return model(x, read, seen, cache)

        return token

    cases = {"plain": decode(plain, None)}
    for count in pictures:
        cases[f"{count} pictures"] = decode(llm, llm.project_images(random_maps(config, count, device, dtype)))
    seconds = interleaved(cases, rounds)
    ratios = {name: s / seconds["plain"] for name, s in seconds.items() if name != "plain"}
    return {"seconds": seconds, "ratios": ratios, "rounds": rounds, "layers": layers}


def _without_synchronizer(layer):
    other = copy.copy(layer)
    other._modules = {**layer._modules, "llama_cross_attn": None}
    return other
