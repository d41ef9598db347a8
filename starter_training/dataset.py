"""Stories of the picture-book world with their rendered images: the same seed gives the same story on every machine."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.latents import decode_latents

from . import renderer, world
from .targets import attribute_labels

FOREGROUND_CROP_PROB = 0.6  # of the VAE's crops: centred near a hero or the prop
CROP_JITTER = 0.19  # their largest offset from its centre, as a share of the image's side
SMALL_AREA, MAX_SMALL_WEIGHT = 3400, 3.0  # px^2 below which a hero's loss weight grows, and its largest weight


def _render_story(job: tuple[int, bool | None, int]) -> np.ndarray:
    seed, held_out, side = job
    return np.stack([renderer.paint(panel.scene, side) for panel in world.make_story(seed, held_out)])


class StoryDataset:
    """Stories whose images are rendered once and kept in a memory-mapped file.

    Args:
        folder: of the file, which is written unless it exists.
        num_stories: how many.
        held_out: as in `world.make_story`: True for combinations that training never sees, None for all.
        first_seed: seed of the first story; the others follow.
    """

    SPLITS = {False: "pictures", True: "held-out", None: "any"}  # names of the files

    def __init__(
        self,
        folder: str | Path,
        num_stories: int,
        held_out: bool | None = False,
        side: int = renderer.SIDE,
        workers: int = 2,
        first_seed: int = 0,
    ):
        seeds = range(first_seed, first_seed + num_stories)
        self.stories = [world.make_story(seed, held_out) for seed in seeds]
        self.offsets = np.cumsum([0, *map(len, self.stories)])  # index of each story's first image
        suffix = f"-from-{first_seed}" if first_seed else ""
        path = Path(folder) / f"{self.SPLITS[held_out]}-{side}-{num_stories}{suffix}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            jobs = [(seed, held_out, side) for seed in seeds]
            with atomic_path(path) as temp_path, ProcessPoolExecutor(workers) as pool:
                pixels = np.lib.format.open_memmap(temp_path, "w+", np.uint8, (int(self.offsets[-1]), side, side, 3))
                for number, images in enumerate(pool.map(_render_story, jobs, chunksize=16)):
                    pixels[self.offsets[number] : self.offsets[number + 1]] = images
                pixels.flush()
                del pixels
        self.name, self.pixels = path.stem, np.load(path, mmap_mode="r")
        scenes = [panel.scene for story in self.stories for panel in story]
        self.labels = torch.tensor([list(attribute_labels(scene).values()) for scene in scenes])  # (images, attributes)
        self.two_character_indices = [index for index, scene in enumerate(scenes) if len(scene.heroes) > 1]
        self.cum_difficulty = list(accumulate(map(difficulty, scenes)))
        self.by_length: dict[int, list[int]] = {}  # number of panels -> stories
        self.two_character_by_length: dict[int, list[int]] = {}  # the same, of stories with two heroes
        for number, story in enumerate(self.stories):
            self.by_length.setdefault(len(story), []).append(number)
            if len(story[0].scene.heroes) > 1:
                self.two_character_by_length.setdefault(len(story), []).append(number)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def panel(self, index: int) -> world.ScenePanel:
        """Returns the panel of an image."""
        story = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return self.stories[story][index - int(self.offsets[story])]

    def images(self, indices) -> torch.Tensor:
        """Returns images, float (N, 3, side, side) in [0, 1]."""
        return torch.from_numpy(self.pixels[np.asarray(indices)]).permute(0, 3, 1, 2).float() / 255

    def random_crops(self, indices, rng: random.Random) -> torch.Tensor:
        """Crops a quarter of each image, most around a hero or the prop: float (N, 3, side / 2, side / 2).

        An autoencoder is convolutional, so a crop teaches it as much as an image at a quarter of the cost; and most of
        an image is sky and grass, which are learned at once.
        """
        side = self.pixels.shape[1]
        half, unit, crops = side // 2, side / renderer.SIDE, []
        for index in indices:
            corner = [rng.uniform(0, half) for _ in range(2)]
            if rng.random() < FOREGROUND_CROP_PROB:
                box = rng.choice(renderer.bounding_boxes(self.panel(index).scene))
                centre = [
                    (box[i] + box[i + 2]) / 2 + rng.uniform(-CROP_JITTER, CROP_JITTER) * renderer.SIDE for i in (0, 1)
                ]
                corner = [min(max(c * unit - half / 2, 0), half) for c in centre]
            x, y = map(int, corner)
            crops.append(self.pixels[index, y : y + half, x : x + half])
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255

    def foreground_mask(self, indices, side: int) -> torch.Tensor:
        """Returns how much of each grid cell heroes and prop cover: float (N, 1, side, side).

        A covered cell is 1. For a hero smaller than SMALL_AREA it is proportionally more, up to MAX_SMALL_WEIGHT: an
        error there is as wrong but has fewer cells.
        """
        masks = torch.zeros(len(indices), 1, side, side)
        for mask, index in zip(masks[:, 0], indices):
            for number, (left, top, right, bottom) in enumerate(renderer.bounding_boxes(self.panel(index).scene)):
                columns, rows = _overlap(left, right, side), _overlap(top, bottom, side)
                weight = SMALL_AREA / ((right - left) * (bottom - top)) if number else 1.0  # box 0 is the prop's
                torch.maximum(mask, rows[:, None] * columns * min(max(weight, 1.0), MAX_SMALL_WEIGHT), out=mask)
        return masks

    def evenly_spaced(self, count: int) -> list[int]:
        """Returns evenly spaced indices."""
        return [i * len(self) // count for i in range(count)]

    def random_indices(self, count: int, rng: random.Random, two_character_prob: float = 0.0) -> list[int]:
        """Draws indices, a share of them only from images with two heroes."""
        pairs = self.two_character_indices
        pools = (pairs if pairs and rng.random() < two_character_prob else range(len(self)) for _ in range(count))
        return sorted(rng.choice(pool) for pool in pools)

    def weighted_indices(self, count: int, rng: random.Random) -> list[int]:
        """Draws indices with probabilities proportional to `difficulty`."""
        return sorted(rng.choices(range(len(self)), cum_weights=self.cum_difficulty, k=count))


def difficulty(scene: world.Scene) -> int:
    """Sampling weight of an image, doubled for each of: a sleeping hero, a distant hero, two heroes (small faces)."""
    return (2 if scene.action == "sleep" else 1) * (2 if scene.far else 1) * len(scene.heroes)


@torch.no_grad()
def error_weights(vae, dataset: StoryDataset, latents: np.ndarray, count: int = 256) -> list[float]:
    """Returns cumulative sampling weights of the images: higher for what the VAE decodes badly.

    The weight is the squared error in the prop's box, averaged by kind of prop, relative to the mean of all kinds; two
    heroes, whose faces are the smallest, double it.
    """
    errors: dict[str, list[float]] = {}
    for index in dataset.evenly_spaced(count):
        pred = decode_latents(vae, torch.from_numpy(latents[[index]]).float().to(next(vae.parameters()).device)).cpu()
        scene, unit = dataset.panel(index).scene, pred.shape[-1] / renderer.SIDE
        prop_box = renderer.bounding_boxes(scene)[0]
        left, top, right, bottom = (max(0, int(edge * unit)) for edge in prop_box)
        error = (pred - dataset.images([index]))[..., top : bottom + 1, left : right + 1].abs().mean()
        errors.setdefault(scene.prop, []).append(float(error))
    by_prop = {prop: sum(values) / len(values) for prop, values in errors.items()}
    mean = sum(by_prop.values()) / len(by_prop)
    scenes = (panel.scene for story in dataset.stories for panel in story)
    return list(accumulate((by_prop.get(scene.prop, mean) / mean) ** 2 * len(scene.heroes) for scene in scenes))


def _overlap(low: float, high: float, cells: int) -> torch.Tensor:
    """Returns how much of each of `cells` equal parts of the image's side the interval [low, high] px covers."""
    edges = torch.linspace(0, renderer.SIDE, cells + 1).clamp(low, high)
    return edges.diff() * cells / renderer.SIDE
