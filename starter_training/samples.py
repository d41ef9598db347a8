"""Sample images of a training run: sheets of reconstructions, drawings and stories."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from comfy_mminterleaved.config import Config
from comfy_mminterleaved.files import atomic_write
from comfy_mminterleaved.generation.config import ImageGenerationConfig, TextGenerationConfig
from comfy_mminterleaved.generation.image import denoise
from comfy_mminterleaved.generation.latents import decode_latents, encode_latents
from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.models.unet_synchronizer import UNetImageValues
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.images import encode_png
from comfy_mminterleaved.stories.story import ImageSegment, Story

from . import world
from .dataset import StoryDataset
from .pretraining import UNetObjective
from .refiner_training import RefinerBatches, RefinerObjective
from .trainer import device_of


def save_grid(rows: list[torch.Tensor], path: Path) -> None:
    """Writes rows of images (N, 3, h, w) as one PNG."""
    widest = max(len(row) for row in rows)
    padded = [torch.cat([row, row.new_ones(widest - len(row), *row.shape[1:])]) for row in rows]
    grid = torch.cat([torch.cat(list(row), dim=2) for row in padded], dim=1)
    atomic_write(path, encode_png(grid))


@torch.no_grad()
def vae_sheet(vae, dataset: StoryDataset, path: Path, count: int = 16) -> None:
    """Writes images above their reconstructions."""
    vae = vae.eval()
    images = dataset.images(dataset.evenly_spaced(count)).to(device_of(vae))
    save_grid([row.cpu() for row in (images, decode_latents(vae, encode_latents(vae, images)))], path)


@torch.no_grad()
def refiner_sheet(objective: RefinerObjective, batches: RefinerBatches, path: Path, count: int = 6) -> None:
    """Writes images through the VAE and drawn again, above what they become, above the true drawings."""
    refiner, rows = objective.refiner.eval(), batches.dataset.evenly_spaced(count)
    rows = [row % len(batches.indices) for row in rows]
    images = [
        torch.from_numpy(source[rows]).permute(0, 3, 1, 2).float() / 255
        for source in (batches.decoded, batches.drawn, batches.large)
    ]
    small = torch.cat(images[:2]).to(device_of(refiner))
    large = refiner(small).clamp(0, 1).cpu()
    save_grid([F.interpolate(small.cpu(), scale_factor=2), large, torch.cat([images[2], images[2]])], path)


def target_sheet(
    objective: UNetObjective, blocks, config: Config, dataset: StoryDataset, path: Path, count: int = 12
) -> None:
    """Writes images above the U-Net's drawings from their `ConditioningTargets`, without MMFS."""
    indices = dataset.evenly_spaced(count)
    labels = dataset.labels[indices].to(device_of(objective))
    images = denoise(
        objective.unet,
        blocks["vae"],
        make_scheduler("ddim", config.scheduler),
        blocks["synchronizer"],
        objective.cond_targets(labels),
        UNetImageValues((), labels.new_zeros(count, 0, dtype=torch.bool)),
        ImageGenerationConfig(num_inference_steps=20, guidance_scale=3.0, mmfs_scale=0.0),
        list(range(count)),
        (config.synchronizer.image_size,) * 2,
    )
    save_grid([dataset.images(indices), images.cpu()], path)


@torch.no_grad()
def story_sheet(model: MMInterleavedPipeline, dataset: StoryDataset, path: Path, num_stories: int = 4) -> None:
    """Writes stories: the true images above the model's, of which the first is given."""
    rows = []
    for number in range(min(num_stories, len(dataset.stories))):
        rows += redraw_story(model, dataset, number)
    model.clear_cache()
    save_grid(rows, path)


def redraw_story(model: MMInterleavedPipeline, dataset: StoryDataset, number: int) -> list[torch.Tensor]:
    """Returns a story's true images, and the model's: the first is given, the others follow the true text."""
    panels, offset = dataset.stories[number], int(dataset.offsets[number])
    true_images = dataset.images(range(offset, offset + len(panels)))
    story, images = Story.of(panels[0].text, ImageSegment(true_images[0])), [true_images[0]]
    for panel in panels[1:]:
        story = model.encode_images(story.add(panel.text))
        image = model.generate_image(
            story, ImageGenerationConfig(num_inference_steps=20, scheduler="dpm++", guidance_scale=3.0, seed=number)
        )
        images.append(image.pixels)
        story = story.add(image)
    return [true_images, torch.stack(images)]


def story_contact_sheet(run_dir: Path, num_stories: int = 20) -> Path:
    """Writes sheet.png: held-out stories with the true images on the left and the exported model's on the right."""
    model = MMInterleavedPipeline.load(run_dir / "model", "cpu")
    dataset = StoryDataset(run_dir, num_stories, held_out=True)
    longest = max(len(story) for story in dataset.stories)
    rows = []
    for number in range(num_stories):
        true_images, images = redraw_story(model, dataset, number)
        space = true_images.new_ones(longest - len(true_images) + 1, *true_images.shape[1:])
        rows.append(torch.cat([true_images, space, images]))
    save_grid(rows, run_dir / "sheet.png")
    return run_dir / "sheet.png"


@torch.no_grad()
def captions(model: MMInterleavedPipeline, dataset: StoryDataset, count: int = 12) -> str:
    """Returns true captions, each followed by the model's."""
    greedy = TextGenerationConfig(max_new_tokens=40, min_new_tokens=1, do_sample=False, repetition_penalty=1.0)
    lines: list[str] = []
    for number in range(min(count, len(dataset.stories))):
        image = ImageSegment(dataset.images([int(dataset.offsets[number])])[0])
        lines += [world.caption(dataset.stories[number][0].scene), model.caption(image, greedy)[0].text, ""]
    model.clear_cache()
    return "\n".join(lines)
