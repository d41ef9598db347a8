"""Evaluates the systems beside the story model, on stories that chose nothing: seeds from 20 on.

    python -m starter_training.evaluate_systems --contrastive runs/contrastive/contrastive/contrastive.safetensors

The classifier of the world counts (`classifier.py`); it chooses nothing. Intervals are over stories, not over panels.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.errors import MMInterleavedError
from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.latents import decode_latents, encode_latents
from comfy_mminterleaved.generation.ranking import ContrastiveScorer, rank_images, ranking_text
from comfy_mminterleaved.models.contrastive import ContrastiveConfig, ContrastiveModel
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from . import world
from .augmentation import random_blur
from .classifier import SHIPPED, AttributeClassifier, load
from .evaluate import render_scene

FIRST_SEED = 20  # of stories; those before chose weights and settings
REDRAW_NOISE = 0.4


def bootstrap_by_story(cases: list[tuple[int, float]], seed: int = 0, rounds: int = 1000) -> dict:
    """The mean of values, the number of cases, and a 95% interval that resamples stories.

    Args:
        cases: The story and the value of each.
    """
    by_story: dict[int, list[float]] = {}
    for story, value in cases:
        by_story.setdefault(story, []).append(float(value))
    groups, rng, means = list(by_story.values()), random.Random(seed), []
    for _ in range(rounds):
        sample = [value for group in rng.choices(groups, k=len(groups)) for value in group]
        means.append(sum(sample) / len(sample))
    means.sort()
    mean = sum(value for _, value in cases) / len(cases)
    return {
        "mean": mean,
        "cases": len(cases),
        "low": means[int(rounds * 0.025)],
        "high": means[int(rounds * 0.975) - 1],
    }


def scenes_of(seed: int, count: int) -> list[tuple[int, world.Scene]]:
    """Scenes of held-out stories, each with the number of its story."""
    scenes, number = [], seed * 100_000
    while len(scenes) < count:
        scenes += [(number, panel.scene) for panel in world.make_story(number, held_out=True)]
        number += 1
    return scenes[:count]


def changed_captions(scene: world.Scene, rng: random.Random) -> dict[str, str]:
    """The caption of a scene with one fact changed, by fact."""

    def other(values, value):
        return rng.choice([each for each in values if each != value])

    hero, *others = scene.heroes
    looks = {
        "species": replace(hero, species=other(world.SPECIES, hero.species)),
        "coat": replace(hero, colour=other(world.COLOURS, hero.colour)),
        "accessory": replace(hero, accessory=other(world.ACCESSORIES, hero.accessory)),
    }
    scenes = {name: replace(scene, heroes=(changed, *others)) for name, changed in looks.items()}
    scenes |= {
        "action": replace(scene, action=other(world.ACTIONS, scene.action)),
        "place": replace(scene, place=other(world.PLACES, scene.place)),
        "prop": replace(scene, prop=other(world.PROPS, scene.prop)),
    }
    return {name: world.caption(changed) for name, changed in scenes.items()}


@torch.no_grad()
def retrieval(pipeline: MMInterleavedPipeline, scorer: ContrastiveScorer, seed: int, count: int = 1000) -> dict:
    """Text to image among `count` held-out images, and captions with one fact changed; on clean and changed images."""
    scenes = scenes_of(seed, count)
    clean = torch.stack([render_scene(scene) for _, scene in scenes])
    torch.manual_seed(seed)
    latents = torch.cat([encode_latents(pipeline.image.vae, part) for part in clean.split(64)])
    noisy = latents + REDRAW_NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
    kinds = {
        "painted": clean,
        "softened": random_blur(clean, random.Random(seed), 1.0),
        "redrawn": torch.cat([decode_latents(pipeline.image.vae, part) for part in noisy.split(64)]),
    }
    texts = scorer.text_embeds([world.caption(scene) for _, scene in scenes])
    rng, result = random.Random(seed), {}
    changed = [changed_captions(scene, rng) for _, scene in scenes]
    for kind, images in kinds.items():
        segments = [ImageSegment(image) for image in images]
        embeds = torch.cat([scorer.image_embeds(segments[i : i + 64]) for i in range(0, count, 64)])
        first = (texts @ embeds.T).argmax(1) == torch.arange(count)
        figures = {"R@1": bootstrap_by_story([(n, hit) for (n, _), hit in zip(scenes, first.tolist())])}
        own = (texts * embeds).sum(1)
        for fact in changed[0]:
            others = scorer.text_embeds([captions[fact] for captions in changed])
            right = own > (others * embeds).sum(1)
            figures[fact] = bootstrap_by_story([(n, hit) for (n, _), hit in zip(scenes, right.tolist())])
        result[kind] = figures
    return result


def best_of_cases(seed: int, count: int, heroes: int | None) -> list[tuple[int, list[world.ScenePanel], int]]:
    """(story, its panels, a panel to draw) of held-out stories that do not introduce their heroes."""
    cases, number = [], seed * 100_000 + 50_000
    while len(cases) < count:
        story = world.make_story(number, held_out=True, heroes=heroes)
        if not world.parse(story[0].text).heroes:
            panels = [k for k in range(1, len(story)) if heroes is None or len(story[k].scene.heroes) == heroes]
            cases += [(number, story, k) for k in panels]
        number += 1
    return cases[:count]


def best_of(
    pipeline: MMInterleavedPipeline,
    scorer: ContrastiveScorer,
    judge: AttributeClassifier,
    seed: int,
    count: int,
    heroes: int | None = None,
    num_candidates: int = 4,
) -> dict:
    """Candidates for panels after a true first panel: the first, the one ranked best, any; and a ranking by the LLM.

    The heroes' looks are read from the first panel alone, by the model's own introduction.
    """
    config = ImageGenerationConfig(num_inference_steps=20, scheduler="dpm++", guidance_scale=3.0, seed=seed)
    ways = ("first", "ranked", "by the LLM", "any")
    values: dict[str, dict[str, list]] = {name: {way: [] for way in ways} for name in ("heroes", "place and prop")}
    for case, (number, panels, k) in enumerate(best_of_cases(seed, count, heroes)):
        opening = Story.of(panels[0].text, ImageSegment(render_scene(panels[0].scene)))
        story = pipeline.encode_images(opening).add(panels[k].text)
        seeds = [1_000_000 * seed + 1000 * case]
        (candidates,) = pipeline.generate_images([story], config, num_candidates, seeds=seeds)
        told = pipeline.introduce(opening).add(panels[k].text)
        best = rank_images(scorer, told, candidates)[0].index
        text = ranking_text(told)
        likelihoods = [pipeline.score(pipeline.encode_images(Story.of(image)), [text])[0] for image in candidates]
        likeliest = max(range(num_candidates), key=lambda i: likelihoods[i])
        predictions = judge.predict(torch.stack([image.pixels for image in candidates]))
        scene = panels[k].scene
        hits = {
            "heroes": [p.looks == tuple(hero.look for hero in scene.heroes) for p in predictions],
            "place and prop": [(p.place, p.prop) == (scene.place, scene.prop) for p in predictions],
        }
        for name, row in hits.items():
            chosen = {"first": row[0], "ranked": row[best], "by the LLM": row[likeliest], "any": any(row)}
            for way, hit in chosen.items():
                values[name][way].append((number, hit))
        pipeline.clear_cache()
    result: dict = {
        name: {way: bootstrap_by_story(cases) for way, cases in by_way.items()} for name, by_way in values.items()
    }
    for name, figures in result.items():
        gap = figures["any"]["mean"] - figures["first"]["mean"]
        closed = figures["ranked"]["mean"] - figures["first"]["mean"]
        result[name] = {**figures, "gap closed": closed / gap if gap else None}
    return result


def load_contrastive(path: Path) -> ContrastiveModel:
    model = ContrastiveModel(ContrastiveConfig())
    model.load_state_dict(read_tensors(path))
    return model.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.evaluate_systems", description=__doc__.splitlines()[0])
    parser.add_argument("--contrastive", metavar="FILE", type=Path, required=True)
    parser.add_argument("--only", choices=("retrieval", "best-of", "pairs"), action="append")
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--cases", type=int, default=300, help="panels of best-of; of pairs, two thirds")
    args = parser.parse_args(argv)
    try:
        pipeline, judge = MMInterleavedPipeline.load("starter"), load(SHIPPED)
        scorer = ContrastiveScorer(
            load_contrastive(args.contrastive),
            pipeline.tokenizer,
            lambda images: pipeline.encode_images(Story.of(*images)).images,
        )
        result: dict = {"seed": args.seed}
        only = args.only or ("retrieval", "best-of", "pairs")
        if "retrieval" in only:
            result["retrieval"] = retrieval(pipeline, scorer, args.seed)
        if "best-of" in only:
            result["best of four"] = best_of(pipeline, scorer, judge, args.seed, args.cases)
        if "pairs" in only:
            result["best of four, pairs"] = best_of(pipeline, scorer, judge, args.seed + 1, args.cases * 2 // 3, 2)
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
