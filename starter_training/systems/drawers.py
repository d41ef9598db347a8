"""One table of all that draws here, on the same texts: facts, a Frechet distance, a judge's score, seconds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from comfy_mminterleaved.generation.config import SYSTEMS
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import Story

from .. import world
from ..classifier import AttributeClassifier
from ..evaluate import frechet_distance, render_scene
from .contrastive import scenes_of
from .prior import facts_of
from .statistics import bootstrap_by_story

STEPS, NUM_DRAFTS = 20, 16
NAMES = ("Mia", "Otto")


def text_of(scene: world.Scene) -> str:
    """Who is who, and what happens: a text that every drawer here can read."""
    heroes = tuple(replace(hero, name=name) for hero, name in zip(scene.heroes, NAMES))
    named = replace(scene, heroes=heroes)
    page = world.describe(named, random.Random(0), world.TEMPLATES[0])
    return f"{world.introduction(heroes)} {page}"


def drawers(pipeline: MMInterleavedPipeline) -> dict[str, Callable[[str, int], torch.Tensor]]:
    """What draws an image `(3, H, W)` of a text, by name."""
    config = replace(pipeline.generation_config.image, num_inference_steps=STEPS, refine=False)

    def story_model(conditioner: str):
        settings = replace(config, conditioner=conditioner)
        return lambda text, seed: pipeline.generate_image(Story.of(text), replace(settings, seed=seed)).pixels

    def prior(text: str, seed: int) -> torch.Tensor:
        (image,) = pipeline.generate_from_embeds(pipeline.prior.sample(text, seed=seed), replace(config, seed=seed))
        return image.pixels

    def drafts(count: int):
        return lambda text, seed: pipeline.draft_images(Story.of(text), count, seed=1000 * seed)[0].pixels

    ways = {"MM-Interleaved": story_model("perceiver"), "dream queries": story_model("dream"), "prior": prior}
    if (pipeline.folder / SYSTEMS / "tokens.safetensors").is_file():
        ways |= {"one draft of image tokens": drafts(1), f"best of {NUM_DRAFTS} drafts": drafts(NUM_DRAFTS)}
    return ways


def table(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Held-out scenes, told; the painted images of the same scenes are the first row and the Frechet distance's."""
    scenes = scenes_of(seed, count)
    painted = [render_scene(scene) for _, scene in scenes]
    rows: dict[str, tuple[list[torch.Tensor], list[float]]] = {"painted": (painted, [0.0])}
    for name, draw in drawers(pipeline).items():
        images, seconds = [], []
        for number, scene in scenes:
            started = time.perf_counter()
            images.append(draw(text_of(scene), number))
            seconds.append(time.perf_counter() - started)
            pipeline.clear_cache()
        rows[name] = images, seconds
    result = {}
    for name, (images, seconds) in rows.items():
        facts: dict[str, list] = {}
        for (number, scene), seen in zip(scenes, judge.predict(torch.stack(images))):
            each = facts_of(seen, scene)
            look = each["species"] and each["colour"] and each["accessory"]
            for fact, is_right in (
                ("heroes", look),
                ("place and prop", each["place"] and each["prop"]),
                ("all", all(each.values())),
            ):
                facts.setdefault(fact, []).append((number, is_right))
        result[name] = {
            **{fact: bootstrap_by_story(values) for fact, values in facts.items()},
            "frechet distance": frechet_distance(judge, images, painted),
            "judge score": judge_score(judge, images),
            "seconds": statistics.median(seconds),
        }
    return result


@torch.no_grad()
def judge_score(judge: AttributeClassifier, images: list[torch.Tensor]) -> float:
    """Exp of the mean divergence of what the judge says of an image from what it says of all (as Inception Score).

    The mean over the judge's heads; high for images that are clear, each to itself, and different from each other.
    """
    parts = [judge(part) for part in torch.stack(images).split(64)]
    divergences = []
    for name in parts[0]:
        log_probs = F.log_softmax(torch.cat([part[name] for part in parts]).float(), dim=-1)
        mean = log_probs.exp().mean(0, keepdim=True).log()
        divergences.append((log_probs.exp() * (log_probs - mean)).sum(-1).mean())
    return float(torch.stack(divergences).mean().exp())
