"""A decoded token of 13B-wide layers: with and without the synchronizer, and by how the weights are stored."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from comfy_mminterleaved.models.build import build
from comfy_mminterleaved.models.llama_mmfs import KVCache
from comfy_mminterleaved.models.mmfs import fuse_mmfs
from comfy_mminterleaved.models.quantization import FORMATS

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


FORMS = ("float32", "bfloat16", *FORMATS)


@torch.no_grad()
def forms(layers: int = 2, rounds: int = 7, device="cpu", names=FORMS, read: int = 256) -> dict:
    """Seconds of a token and of reading `read` tokens at 13B width, for each way that the weights are stored.

    Quantized weights are computed in bfloat16 on the CPU and in float16 on a card.
    """
    config = released_13b(layers)
    cases, sizes = {}, {}
    compute = torch.bfloat16 if device == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, read, config.llm.hidden_size, generator=generator).to(device)
    for name in names:
        dtype = compute if name in FORMATS else getattr(torch, name)
        llm = _stored(config, name, dtype, device)
        sizes[name] = sum(t.nbytes for t in llm.layers.parameters())

        def token(llm=llm, dtype=dtype):
            cache = KVCache(1)
            llm(x[:, :64].to(dtype), cache=cache)

            def run():
                cache.lengths = [64]
                return llm(x[:, :1].to(dtype), cache=cache)

            return run

        cases[f"{name}, token"] = token()
        cases[f"{name}, read"] = lambda llm=llm, dtype=dtype: llm(x.to(dtype), cache=KVCache(1))
    seconds = interleaved(cases, rounds)
    base = names[0]
    return {
        name: {
            "bytes": sizes[name],
            "token seconds": seconds[f"{name}, token"],
            "read seconds": seconds[f"{name}, read"],
            "token ratio": seconds[f"{name}, token"] / seconds[f"{base}, token"],
            "read ratio": seconds[f"{name}, read"] / seconds[f"{base}, read"],
        }
        for name in names
    }


def _stored(config, name: str, dtype: torch.dtype, device):
    """An LLM with random weights in a form; layers of the same shape have the same ones."""
    if name not in FORMATS:
        return random_blocks(config, ("llm",), device, dtype)["llm"]
    plain = random_blocks(replace(config, llm=replace(config.llm, num_hidden_layers=1)), ("llm",), "cpu")["llm"]
    config = replace(config, llm=replace(config.llm, quantization=name))
    llm = build(config, ("llm",))["llm"]
    made: dict[tuple, tuple] = {}
    for part in llm.modules():
        if hasattr(part, "weight_scale"):
            shape = part.out_features, part.in_features
            if shape not in made:
                weights = (m.weight for m in plain.modules() if isinstance(m, torch.nn.Linear))
                made[shape] = FORMATS[name].quantize(next(w for w in weights if w.shape == shape))
            weight, scale = made[shape]
            part.weight = torch.nn.Parameter(weight.to(device, copy=True), requires_grad=False)
            if scale is not None:
                part.weight_scale = torch.nn.Parameter(scale.to(device, copy=True), requires_grad=False)
    for part in llm.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = torch.full(parameter.shape, 0.5, dtype=dtype, device=device)
                setattr(part, key, torch.nn.Parameter(filled, requires_grad=False))
    return fuse_mmfs(llm)
