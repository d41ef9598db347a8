"""Reconstruction: whether the caption that redraws an image best is right more often than the likeliest one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from comfy_mminterleaved.generation.reconstruction import describe
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment

from .. import world
from ..augmentation import random_blur
from ..classifier import AttributeClassifier
from ..evaluate import render_scene
from .contrastive import best_of_cases, drawn_candidates, scenes_of
from .statistics import bootstrap_by_story, paired_difference


def evaluation_images(
    pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int, cache: Path
) -> dict[str, list[tuple[int, world.Scene, torch.Tensor]]]:
    """(story, scene, image) of held-out stories: painted, softened, and drawn by the model.

    Of the drawn ones only those count that show what they should, by the classifier: of the others nobody knows what a
    right description is.
    """
    scenes = scenes_of(seed, count)
    painted = torch.stack([render_scene(scene) for _, scene in scenes])
    softened = random_blur(painted, random.Random(seed), 1.0)
    cases = best_of_cases(seed, count, None)
    drawn = []
    for pixels, (number, panels, k) in zip(drawn_candidates(pipeline, seed, count, None, 4, cache), cases):
        image, scene = torch.from_numpy(pixels[0]).movedim(-1, 0) / 255, panels[k].scene
        (seen,) = judge.predict(image[None])
        looks = tuple(hero.look for hero in scene.heroes)
        if (seen.looks, seen.action, seen.place, seen.prop) == (looks, scene.action, scene.place, scene.prop):
            drawn.append((number, scene, image))
    both = {"painted": painted, "softened": softened}
    result = {name: [(n, scene, image) for (n, scene), image in zip(scenes, images)] for name, images in both.items()}
    return {**result, "drawn": drawn}


def is_right(caption: str, scene: world.Scene) -> bool:
    """Whether a caption has all facts of a scene and no other."""
    facts = world.parse(caption)
    return facts is not None and replace(facts, names=()) == replace(world.expected_facts(scene), names=())


def descriptions(
    pipeline: MMInterleavedPipeline,
    judge: AttributeClassifier,
    seed: int,
    count: int,
    cache: Path,
    num_captions: int = 7,
) -> dict:
    """The share of images whose description is right: the likeliest, the one that redraws best, any of them."""
    result = {}
    for kind, images in evaluation_images(pipeline, judge, seed, count, cache).items():
        ways: dict[str, list] = {"likeliest": [], "chosen": [], "any": []}
        differing: dict[str, list] = {"likeliest": [], "chosen": []}
        for number, scene, image in images:
            ranked = describe(pipeline, ImageSegment(image), num_captions)
            likeliest = max(ranked, key=lambda each: each.log_prob)
            hits = {"likeliest": is_right(likeliest.text, scene), "chosen": is_right(ranked[0].text, scene)}
            hits["any"] = any(is_right(each.text, scene) for each in ranked)
            for way, cases in ways.items():
                cases.append((number, hits[way]))
            if len(ranked) > 1:
                for way, cases in differing.items():
                    cases.append((number, hits[way]))
            pipeline.clear_cache()
        figures: dict = {way: bootstrap_by_story(cases) for way, cases in ways.items()}
        figures["differing"] = {way: bootstrap_by_story(cases) for way, cases in differing.items() if cases}
        gap = figures["any"]["mean"] - figures["likeliest"]["mean"]
        closed = figures["chosen"]["mean"] - figures["likeliest"]["mean"]
        figures["gap closed"] = closed / gap if gap else None
        figures["chosen against likeliest"] = paired_difference(ways["chosen"], ways["likeliest"])
        result[kind] = figures
    return result
