"""Images of the dataset drawn again by the model: what is in them stays known, how it is drawn becomes the model's."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.config import Config
from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.latents import decode_latents
from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.generation.unet_hooks import attach_mmfs

from .dataset import StoryDataset
from .pretraining import OracleMMFS
from .story_training import MMFS_TARGET_SCALE
from .targets import ConditioningTargets

NUM_STEPS = 12
DENOISE = 0.4, 0.9  # shares of the steps that are drawn; with less the layout of the image stays
CHUNK, BATCH = 256, 16  # images in a file, and in a pass of the U-Net


def drawn_images(
    run_dir: Path, dataset: StoryDataset, latents, blocks, vae, config: Config, indices: list[int]
) -> np.ndarray:
    """uint8 `(N, side, side, 3)` of the dataset's images at `indices`, drawn once and kept; a killed run goes on."""
    chunks = []
    for start in range(0, len(indices), CHUNK):
        path = run_dir / f"drawn-{dataset.name}-{start}.npy"
        if not path.exists():
            part = indices[start : start + CHUNK]
            images = [
                draw_again(blocks, vae, config, dataset, latents, part[i : i + BATCH])
                for i in range(0, len(part), BATCH)
            ]
            pixels = (torch.cat(images).permute(0, 2, 3, 1) * 255).round().byte().numpy()
            with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
                np.save(file, pixels)
        chunks.append(np.load(path, mmap_mode="r"))
    return np.concatenate(chunks)


@torch.no_grad()
def draw_again(blocks, vae, config: Config, dataset: StoryDataset, latents, indices: list[int]) -> torch.Tensor:
    """Images `(N, 3, side, side)`, from their noised latents, conditioned on their own labels as in pretraining."""
    seed = indices[0]
    rng, synchronizer, unet = random.Random(f"drawn {seed}"), blocks["synchronizer"], blocks["unet"]
    scheduler = make_scheduler("dpm++", config.scheduler)
    scheduler.set_timesteps(NUM_STEPS)
    first = NUM_STEPS - max(1, round(NUM_STEPS * rng.uniform(*DENOISE)))
    scheduler.set_begin_index(first)
    timesteps, labels = scheduler.timesteps[first:], dataset.labels[indices]
    x = torch.from_numpy(np.array(latents[indices])).float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    x = scheduler.add_noise(x, noise, timesteps[:1].repeat(len(x)))
    c = synchronizer.config
    prompt_embeds = ConditioningTargets(c.perceiver.num_queries, c.perceiver.hidden_size)(labels)
    oracle = OracleMMFS(c.block_channels)
    with attach_mmfs(unet, oracle, oracle.residuals(labels, scale_range=(MMFS_TARGET_SCALE,) * 2)):
        for t in timesteps:
            pred = unet(scheduler.scale_model_input(x, t), t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
            x = scheduler.step(pred, t, x).prev_sample
    return decode_latents(vae, x)
