"""DALL-E 2: what an image embedding keeps, what the prior adds to a text, and changes by text differences."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import torch

from comfy_mminterleaved.generation.prior import TEXT_STRENGTH, move
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from .. import world
from ..classifier import AttributeClassifier, Prediction
from ..evaluate import render_scene
from .contrastive import scenes_of
from .statistics import bootstrap_by_story, paired_difference

STEPS = 12
OMITTED_PROB = 0.3
NUM_SAMPLES, NUM_UNIFORM = 24, 2000  # drawings of a text whose coat is not told, and of a fair die
CHANGES = ("sky", "place", "prop", "coat")


def draw(
    pipeline: MMInterleavedPipeline,
    judge: AttributeClassifier,
    embeds: torch.Tensor,
    seed: int,
    denoise: float = 1.0,
    **options,
) -> list[Prediction]:
    """What the judge reads from drawings of image embeddings."""
    config = replace(
        pipeline.generation_config.image, num_inference_steps=STEPS, seed=seed, denoise=denoise, refine=False
    )
    images = pipeline.generate_from_embeds(embeds, config, **options)
    return judge.predict(torch.stack([image.pixels for image in images]))


def facts_of(seen: Prediction, scene: world.Scene) -> dict[str, bool]:
    """Which facts of a scene are seen; a look is right if all heroes have it."""
    looks = list(zip(*(hero.look for hero in scene.heroes)))
    parts = list(zip(*seen.looks)) if len(seen.looks) == len(scene.heroes) else [None] * 3
    return {
        **{name: part == look for name, part, look in zip(("species", "colour", "accessory"), parts, looks)},
        **{name: getattr(seen, name) == getattr(scene, name) for name in ("action", "place", "prop", "sky", "far")},
    }


def from_embeddings(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Held-out images drawn again from their embedding alone, and from their caption's in its place."""
    scenes, values = scenes_of(seed, count), {}
    for start in range(0, count, 64):
        part = scenes[start : start + 64]
        ways = {
            "image embedding": pipeline.embedder.image_embeds([ImageSegment(render_scene(scene)) for _, scene in part]),
            "text embedding": pipeline.embedder.text_embeds([world.caption(scene) for _, scene in part]),
        }
        for way, embeds in ways.items():
            for (number, scene), seen in zip(part, draw(pipeline, judge, embeds, seed + start)):
                facts = {
                    "lone heroes" if len(scene.heroes) == 1 else "pairs": seen.looks
                    == tuple(hero.look for hero in scene.heroes),
                    "place and prop": (seen.place, seen.prop) == (scene.place, scene.prop),
                    "action": seen.action == scene.action,
                }
                for fact, is_right in facts.items():
                    values.setdefault(fact, {}).setdefault(way, []).append((number, is_right))
    return {fact: {way: bootstrap_by_story(rows) for way, rows in ways.items()} for fact, ways in values.items()}


def from_texts(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Captions that leave things out, by the prior and as text embeddings: facts that they tell, coats they do not."""
    rng, told = random.Random(f"partial {seed}"), {}
    for number, scene in scenes_of(seed, count):
        omitted = frozenset(name for name in world.OMISSIBLE if rng.random() < OMITTED_PROB)
        text = world.partial_caption(scene, omitted)
        embeds = torch.cat([pipeline.prior.sample(text, seed=seed), pipeline.embedder.text_embeds([text])])
        seen = draw(pipeline, judge, embeds, seed, seeds=[number, number])
        for way, each in zip(("prior", "text embedding"), seen):
            # Plain day and nearness are not said.
            facts = {
                fact: is_right
                for fact, is_right in facts_of(each, scene).items()
                if fact not in omitted and not (fact == "sky" and scene.sky == "day") and (fact != "far" or scene.far)
            }
            kind = "told, lone heroes" if len(scene.heroes) == 1 else "told, pairs"
            for group in (kind, "told"):
                told.setdefault(group, {}).setdefault(way, []).extend((number, right) for right in facts.values())
            told.setdefault("all told", {}).setdefault(way, []).append((number, all(facts.values())))
    result = {}
    for group, ways in told.items():
        result[group] = {
            way: {
                **bootstrap_by_story(rows),
                "against the text embedding": paired_difference(rows, ways["text embedding"]),
            }
            for way, rows in ways.items()
        }
    return result | {"untold coats": coat_entropy(pipeline, judge, seed, max(2, count // 15))}


def coat_entropy(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Entropy of the coats drawn for one text that does not tell it, against that of a fair die thrown as often."""
    lone = [(number, scene) for number, scene in scenes_of(seed, 6 * count) if len(scene.heroes) == 1][:count]
    rows: dict[str, list[tuple[int, float]]] = {"prior": [], "text embedding": []}
    rng = random.Random(seed)
    throws = [rng.choices(world.COLOURS, k=NUM_SAMPLES) for _ in range(NUM_UNIFORM)]
    uniform = sum(map(entropy, throws)) / NUM_UNIFORM
    for number, scene in lone:
        text = world.partial_caption(scene, frozenset({"colour"}))
        ways = {
            "prior": pipeline.prior.sample(text, NUM_SAMPLES, seed=number),
            "text embedding": pipeline.embedder.text_embeds([text]).expand(NUM_SAMPLES, -1),
        }
        for way, embeds in ways.items():
            seen = draw(pipeline, judge, embeds, number)
            rows[way].append((number, entropy([each.looks[0][1] for each in seen if each.looks]) / uniform))
    return {way: bootstrap_by_story(values) for way, values in rows.items()}


def entropy(values: list[str]) -> float:
    counts = Counter(values)
    return -sum(n / len(values) * math.log(n / len(values)) for n in counts.values())


def changed_scene(scene: world.Scene, fact: str, rng: random.Random) -> world.Scene:
    """A scene with one of `CHANGES` changed, for the first hero."""

    def other(values, value):
        return rng.choice([each for each in values if each != value])

    if fact == "coat":
        hero, *others = scene.heroes
        return replace(scene, heroes=(replace(hero, colour=other(world.COLOURS, hero.colour)), *others))
    if fact == "sky":
        skies = ("day", "night", "snowfall" if scene.place == "snow" else "rain")
        return replace(scene, sky=other(skies, scene.sky))
    if fact == "place":
        places = [place for place in world.PLACES if scene.sky not in ("rain", "snowfall") or place != "snow"]
        return replace(scene, place=other(places, scene.place))
    return replace(scene, prop=other(world.PROPS, scene.prop))


def differences(
    pipeline: MMInterleavedPipeline,
    judge: AttributeClassifier,
    seed: int,
    count: int,
    amount: float = TEXT_STRENGTH,
    strength: float = 1.0,
) -> dict:
    """Held-out images with one hero, moved by one fact: whether it changed, and whether all others are as they were.

    Args:
        strength: How much the image itself is attended to; a coat is changed without it.
    """
    rng, rows = random.Random(f"difference {seed}"), {"changed": [], "kept": []}
    by_fact: dict[str, dict[str, list]] = {}
    lone = [(number, scene) for number, scene in scenes_of(seed, 3 * count) if len(scene.heroes) == 1][:count]
    for k, (number, scene) in enumerate(lone):
        fact = CHANGES[k % len(CHANGES)]
        target = changed_scene(scene, fact, rng)
        image = ImageSegment(render_scene(scene))
        embed = pipeline.embedder.image_embeds([image])
        texts = pipeline.embedder.text_embeds([world.caption(target), world.caption(scene)])
        moved = move(embed, *texts, amount)
        story = Story.of(image) if strength and fact != "coat" else Story()
        (seen,) = draw(pipeline, judge, moved, number, story=story)
        facts = facts_of(seen, target)
        name = "colour" if fact == "coat" else fact
        row = {"changed": facts.pop(name), "kept": all(facts.values())}
        for group, is_right in row.items():
            rows[group].append((number, is_right))
            by_fact.setdefault(fact, {}).setdefault(group, []).append((number, is_right))
    return {
        **{group: bootstrap_by_story(values) for group, values in rows.items()},
        **{fact: {g: bootstrap_by_story(v) for g, v in groups.items()} for fact, groups in by_fact.items()},
    }
