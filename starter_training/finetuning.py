"""Fine-tunes the starter on its own world, with reconstruction or without: what a user's `finetune` does, measurable.

    python -m starter_training.finetuning runs/systems/reconstruction.safetensors --out runs/systems
    python -m starter_training.finetuning runs/systems/plain.safetensors --out runs/systems --reconstruction 0

The stories are those of training. A run that is stopped goes on from its state.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from comfy_mminterleaved.errors import MMInterleavedError
from comfy_mminterleaved.finetune import FinetuneConfig, finetune
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from . import world
from .dataset import StoryDataset


def world_stories(dataset: StoryDataset, count: int) -> list[Story]:
    """The first stories of a dataset; their images are described as the world describes a scene."""
    stories, index = [], 0
    for panels in dataset.stories[:count]:
        story = Story(image_first=False)
        for panel in panels:
            pixels = torch.from_numpy(dataset.pixels[index].copy()).movedim(-1, 0).float() / 255
            story, index = story.add(panel.text, ImageSegment(pixels, alt=world.caption(panel.scene))), index + 1
        stories.append(story)
    return stories


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.finetuning", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the LoRA to write")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/starter"), help="the run folder with the rendered images"
    )
    parser.add_argument("--model", default="starter")
    parser.add_argument("--stories", type=int, default=2500, help="of the dataset in --out (default: %(default)s)")
    parser.add_argument("--used", type=int, default=600, help="of them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--reconstruction", type=float, default=1.0, help="its weight; 0 trains without")
    args = parser.parse_args(argv)
    log = args.file.with_suffix(".jsonl")

    def on_step(step: int, total: int, losses: dict[str, float]) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **losses}) + "\n")

    try:
        config = FinetuneConfig(args.steps, args.batch, args.learning_rate, reconstruction_weight=args.reconstruction)
        stories = world_stories(StoryDataset(args.out, args.stories), args.used)
        finetune(MMInterleavedPipeline.load(args.model), stories, args.file, config, on_step)
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
