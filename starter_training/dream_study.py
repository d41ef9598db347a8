"""DreamLLM's study (2309.11499, section 4.3) at small width: does drawing help reading, and reading drawing?

    python -m starter_training.dream_study joint --out runs/starter
    python -m starter_training.dream_study creation --out runs/starter
    python -m starter_training.dream_study comprehension --out runs/starter

Each trains a fresh LLM with fresh queries for the same steps on the same batches, half of the images in stories and
half with captions and questions; the encoder is the run's, frozen. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.generation.config import TextGenerationConfig
from comfy_mminterleaved.models.build import init_modules
from comfy_mminterleaved.models.dream import DreamConfig, DreamQueries, continue_rows
from comfy_mminterleaved.models.llama_mmfs import KVCache, LlamaMMFS
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment

from . import world
from .batches import StoryBatch, StoryBatches
from .dataset import StoryDataset
from .evaluate import render_scene
from .run_dir import cached_latents, latest_slim_vae, load_run, run_tokenizer
from .stages import HELD_OUT_STORIES
from .story_features import StoryFeatures
from .systems.contrastive import scenes_of
from .systems.statistics import bootstrap_by_story
from .targets import IGNORE_INDEX, ConditioningTargets
from .trainer import StageConfig, train

ARMS = {"joint": (1.0, 1.0), "creation": (0.0, 1.0), "comprehension": (1.0, 0.0)}  # weights of text and images
STEPS, IMAGES = 900, 24
FIRST_SEED = 20  # of what is evaluated
NUM_CASES = 300
GREEDY = TextGenerationConfig(max_new_tokens=60, min_new_tokens=1, do_sample=False, repetition_penalty=1.0)


@dataclass(frozen=True)
class Encoded:
    """A batch of stories, or of single images with texts, with the encoder's features."""

    batch: StoryBatch
    visual_tokens: torch.Tensor
    feature_maps: tuple[torch.Tensor, ...]


class StudyObjective(nn.Module):
    """Next-token loss of all texts, and the queries' loss of the images of stories."""

    def __init__(self, llm: LlamaMMFS, queries: DreamQueries, targets: ConditioningTargets, arm: str):
        super().__init__()
        self.llm, self.queries, self.targets, self.weights = llm, queries, targets, ARMS[arm]

    def forward(self, story: Encoded, single: Encoded) -> dict[str, torch.Tensor]:
        text_weight, image_weight = self.weights
        losses: dict[str, torch.Tensor] = {}
        errors, images = [], None
        for part in (story, single):
            if part is single and not text_weight:
                continue
            batch, count = part.batch, len(part.batch.input_ids)
            cache, image_values = KVCache(count), self.llm.project_images(part.feature_maps)
            x = self.llm.embed_inputs(batch.input_ids, part.visual_tokens.flatten(0, -2))
            hidden = self.llm(x, image_values, batch.image_mask, cache)
            if text_weight:
                logits = self.llm.logits(hidden).float()
                error = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX)
                errors.append(error)
            if part is story and image_weight:
                images = self.image_losses(part, cache, image_values)
        if errors:
            losses["text"] = sum(errors) / len(errors)
        if images is not None:
            losses |= images
        loss = text_weight * losses.get("text", 0.0) + image_weight * (
            losses.get("squares", 0.0) + 0.1 * losses.get("attributes", 0.0)
        )
        return {"loss": loss, **losses}

    def image_losses(self, story: Encoded, cache: KVCache, image_values) -> dict[str, torch.Tensor]:
        n, p = story.batch.soi_positions.shape
        rows, lengths = torch.arange(n).repeat_interleave(p), story.batch.soi_positions.flatten()
        visible = torch.ones(p, p, dtype=torch.bool).tril(-1).repeat(n, 1)
        rest = continue_rows(cache, image_values, rows.tolist(), lengths.tolist())
        prompt_embeds = self.queries(self.llm, *rest, visible)
        labels = story.batch.inferable_labels.flatten(0, 1)
        squares, attributes = self.targets.losses(prompt_embeds, labels)
        right = self.targets.share_right(prompt_embeds, labels)
        return {"squares": squares, "attributes": attributes, "right": right}


def study(
    arm: str, run_dir: Path, num_stories: int, steps: int, seed: int, precision: str = "no", count: int = NUM_CASES
) -> dict:
    """Trains one arm and returns how often captions, and codes of images to draw, are all right on held-out stories."""
    config, blocks = load_run(run_dir, ("vae", "encoder"))
    tokenizer, c = run_tokenizer(run_dir), config.synchronizer.perceiver
    encoder = blocks["encoder"].eval().to(memory_format=torch.channels_last)
    vae = latest_slim_vae(run_dir, config).eval().requires_grad_(False)
    llm = init_modules(config, seed)["llm"]
    torch.manual_seed(seed)
    queries = DreamQueries(DreamConfig(c.num_queries, config.llm.hidden_size, c.hidden_size))
    targets = ConditioningTargets(c.num_queries, c.hidden_size)
    objective = StudyObjective(llm, queries, targets, arm)
    batches, features = {}, {}
    for held_out in (False, True):
        data = StoryDataset(run_dir, min(num_stories, HELD_OUT_STORIES) if held_out else num_stories, held_out)
        features[held_out] = StoryFeatures(run_dir, data, encoder, vae, cached_latents(run_dir, data, config), llm)
        batches[held_out] = StoryBatches(data, config, tokenizer, IMAGES // 2)

    def encoded(batch: StoryBatch, held_out: bool) -> Encoded:
        tokens, maps = features[held_out](batch.image_indices)
        return Encoded(batch, tokens, tuple(maps))

    def get_batch(number: int, held_out: bool = False) -> tuple:
        parts, k = {}, 0
        while len(parts) < 2:  # the first batch of either kind
            batch = batches[held_out].build(1000 * number + k)
            is_story = batch.has_image_loss
            if not is_story or (batch.inferable_labels != IGNORE_INDEX).any():
                parts.setdefault(is_story, encoded(batch, held_out))
            k += 1
        return parts[True], parts[False]

    stage = StageConfig(
        f"study-{arm}-{seed}", (), (), steps, IMAGES, 1e-3, warmup=100, ema=0.99, seed=1_000_000 * seed, save_every=100
    )
    validation = [get_batch(number, True) for number in range(8)]
    folder = run_dir / stage.name
    train(stage, objective, {"llm": llm, "queries": queries}, folder, get_batch, validation, precision)
    with torch.no_grad():
        llm.load_state_dict(read_tensors(folder / "llm.safetensors"))
        queries.load_state_dict(read_tensors(folder / "queries.safetensors"))
        objective.eval()
        rows = []
        for number in range(8, 8 + count // (IMAGES // 2) + 1):
            story, _ = get_batch(number, True)
            cache, image_values = KVCache(len(story.batch.input_ids)), llm.project_images(story.feature_maps)
            x = llm.embed_inputs(story.batch.input_ids, story.visual_tokens.flatten(0, -2))
            llm(x, image_values, story.batch.image_mask, cache)
            rows.append((number, float(objective.image_losses(story, cache, image_values)["right"])))
    pipeline = MMInterleavedPipeline(config, {**blocks, "llm": llm.eval()}, tokenizer)
    captions = []
    for number, scene in scenes_of(FIRST_SEED, count):
        seen = world.parse(pipeline.caption(ImageSegment(render_scene(scene)), GREEDY)[0].text)
        expected = world.expected_facts(scene)
        is_right = seen is not None and (seen.heroes, seen.action, seen.place, seen.prop, seen.sky, seen.far) == (
            expected.heroes,
            expected.action,
            expected.place,
            expected.prop,
            expected.sky,
            expected.far,
        )
        captions.append((number, is_right))
        pipeline.clear_cache()
    return {"arm": arm, "seed": seed, "captions": bootstrap_by_story(captions), "codes": bootstrap_by_story(rows)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.dream_study", description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/starter"), help="the run folder (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=12000)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    args = parser.parse_args(argv)
    result = study(args.arm, args.out, args.stories, args.steps, args.seed, args.precision)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
