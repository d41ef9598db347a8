"""Images of the dataset drawn again by the model: what is in them stays known, how it is drawn becomes the model's."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.config import Config
from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.latents import decode_latents, encode_latents
from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.generation.unet_hooks import attach_mmfs

from . import renderer, world
from .dataset import StoryDataset
from .pretraining import OracleMMFS
from .story_training import MMFS_TARGET_SCALE
from .targets import ConditioningTargets, attribute_labels

NUM_STEPS = 12
DENOISE = 0.4, 0.9  # shares of the steps that are drawn; with less the layout of the image stays
CHUNK, BATCH = 256, 16  # images in a file, and in a pass of the U-Net


def drawn_images(
    run_dir: Path, dataset: StoryDataset, latents, blocks, vae, config: Config, indices: list[int]
) -> np.ndarray:
    """uint8 `(N, side, side, 3)` of the dataset's images at `indices`, drawn once and kept; a killed run goes on."""

    def draw(part: list[int]) -> np.ndarray:
        x = torch.from_numpy(np.array(latents[part])).float()
        return _pixels(draw_again(blocks, vae, config, x, dataset.labels[part], part[0]))

    return _in_chunks(run_dir, f"drawn-{dataset.name}", indices, draw)


def decoded_images(run_dir: Path, dataset: StoryDataset, latents, vae, indices: list[int]) -> np.ndarray:
    """uint8 `(N, side, side, 3)` of the dataset's images through the VAE; made once and kept."""

    @torch.no_grad()
    def make(part: list[int]) -> np.ndarray:
        return _pixels(decode_latents(vae, torch.from_numpy(np.array(latents[part])).float()))

    return _in_chunks(run_dir, f"decoded-{dataset.name}", indices, make)


def large_images(run_dir: Path, dataset: StoryDataset, indices: list[int]) -> np.ndarray:
    """uint8 `(N, 2 side, 2 side, 3)` of the dataset's images, painted at twice the size; made once and kept."""
    side = 2 * dataset.pixels.shape[1]

    def make(part: list[int]) -> np.ndarray:
        return np.stack([renderer.paint(dataset.panel(index).scene, side) for index in part])

    return _in_chunks(run_dir, f"large-{dataset.name}", indices, make)


def neighbour_images(
    run_dir: Path, dataset: StoryDataset, blocks, vae, config: Config, indices: list[int], is_drawn: bool
) -> np.ndarray:
    """uint8 `(N, side, side, 3)` of the `neighbour_of` each image, painted or drawn; made once and kept."""

    def make(part: list[int]) -> np.ndarray:
        scenes = [neighbour_of(dataset, index) for index in part]
        painted = np.stack([renderer.paint(scene, dataset.pixels.shape[1]) for scene in scenes])
        if not is_drawn:
            return painted
        x = encode_latents(vae, torch.from_numpy(painted).permute(0, 3, 1, 2).float() / 255)
        labels = torch.tensor([list(attribute_labels(scene).values()) for scene in scenes])
        return _pixels(draw_again(blocks, vae, config, x, labels, part[0]))

    return _in_chunks(run_dir, f"neighbours-{dataset.name}{'-drawn' * is_drawn}", indices, make)


def neighbour_of(dataset: StoryDataset, index: int) -> world.Scene:
    """The scene of an image with one other fact, the same each time."""
    return neighbour(dataset.panel(index).scene, random.Random(f"neighbour {index}"), True)


def neighbour(scene: world.Scene, rng: random.Random, has_looks: bool) -> world.Scene:
    """A scene with one other fact, or with the looks of its two heroes swapped.

    Args:
        has_looks: Whether that may be a look, which a text may not tell; then it mostly is.
    """

    def other(values, value):
        return rng.choice([each for each in values if each != value])

    fact = rng.choice(("looks", "looks", "looks", "scene") if has_looks else ("scene",))
    if fact == "scene":
        field, values = rng.choice((("action", world.ACTIONS), ("place", world.PLACES), ("prop", world.PROPS)))
        return replace(scene, **{field: other(values, getattr(scene, field))})
    heroes = list(scene.heroes)
    if len(heroes) == 2 and rng.random() < 0.3:
        parts = rng.choice((("species",), ("colour",), ("accessory",), ("species", "colour", "accessory")))
        first, second = heroes
        swapped = [
            replace(a, **{part: getattr(b, part) for part in parts}) for a, b in ((first, second), (second, first))
        ]
        if [hero.look for hero in swapped] != [hero.look for hero in heroes]:
            return replace(scene, heroes=tuple(swapped))
    k = rng.randrange(len(heroes))
    part, values = rng.choice((("species", world.SPECIES), ("colour", world.COLOURS), ("accessory", world.ACCESSORIES)))
    heroes[k] = replace(heroes[k], **{part: other(values, getattr(heroes[k], part))})
    return replace(scene, heroes=tuple(heroes))


def _in_chunks(run_dir: Path, name: str, indices: list[int], make: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    chunks = []
    for start in range(0, len(indices), CHUNK):
        path, part = run_dir / f"{name}-{start}.npy", indices[start : start + CHUNK]
        if not path.exists():
            pixels = np.concatenate([make(part[i : i + BATCH]) for i in range(0, len(part), BATCH)])
            with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
                np.save(file, pixels)
        chunks.append(np.load(path, mmap_mode="r"))
    return np.concatenate(chunks)


def _pixels(images: torch.Tensor) -> np.ndarray:
    return (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()


@torch.no_grad()
def draw_again(blocks, vae, config: Config, x: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Images `(N, 3, side, side)`, from noised latents `(N, C, h, w)`, conditioned on labels as in pretraining."""
    rng, synchronizer, unet = random.Random(f"drawn {seed}"), blocks["synchronizer"], blocks["unet"]
    scheduler = make_scheduler("dpm++", config.scheduler)
    scheduler.set_timesteps(NUM_STEPS)
    first = NUM_STEPS - max(1, round(NUM_STEPS * rng.uniform(*DENOISE)))
    scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
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
