"""A guided U-Net step of SD 2.1's size with and without the synchronizer, and how it grows with pictures."""

from __future__ import annotations

import torch

from comfy_mminterleaved.generation.unet_hooks import attach_mmfs

from .models import random_blocks, random_maps, released_13b
from .timing import interleaved


@torch.no_grad()
def measure(pictures=(1, 3), rounds: int = 3, device="cpu", dtype=torch.float32, size: int = 512) -> dict:
    """Seconds of a step, and its ratios to the plain U-Net's in the same rounds."""
    config = released_13b()
    blocks = random_blocks(config, ("unet", "synchronizer"), device, dtype)
    unet, mmfs = blocks["unet"], blocks["synchronizer"].mmfs_module
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, size // 8, size // 8, generator=generator).to(device, dtype)
    states = torch.randn(2, 77, 1024, generator=generator).to(device, dtype)

    def step():
        return unet(torch.cat([latents, latents]), 500, encoder_hidden_states=states, return_dict=False)[0]

    def with_pictures(prepared):
        with attach_mmfs(unet, mmfs, prepared):
            return step()

    cases = {"plain": step}
    for count in pictures:
        shown = torch.ones(1, count, dtype=torch.bool, device=device)
        prepared = mmfs.project_images(random_maps(config, count, device, dtype), shown)
        cases[f"{count} pictures"] = lambda p=prepared: with_pictures(p)
    if torch.equal(cases["plain"](), cases[f"{pictures[0]} pictures"]()):
        raise AssertionError("The synchronizer changes nothing: this would measure nothing.")
    seconds = interleaved(cases, rounds, warm_up=0)
    ratios = {name: s / seconds["plain"] for name, s in seconds.items() if name != "plain"}
    return {"seconds": seconds, "ratios": ratios, "rounds": rounds, "picture size": size}


def sizes(found=(256, 384), rounds: int = 3) -> dict:
    """Ratios with one picture, for smaller pictures than 512 px."""
    return {f"{size} px": measure((1,), rounds, size=size)["ratios"]["1 pictures"] for size in found}
