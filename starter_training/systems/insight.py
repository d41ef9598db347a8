"""Look inside: whether it names the image that a drawing took its hero from, and the fact that goes with it."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from dataclasses import replace

import torch

from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.insight import attended, inspect
from comfy_mminterleaved.generation.probes import CHANGES, changed_story, measure_bias
from comfy_mminterleaved.models.visual_tokenizer import ImageFeatures
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from .. import renderer, world
from ..classifier import AttributeClassifier, Prediction
from ..evaluate import render_scene
from .statistics import bootstrap_by_story, paired_difference

LOOKS = {"species": "Who is it?", "coat": "Which colour is the coat?", "accessory": "What is worn?"}
CONFIG = ImageGenerationConfig(num_inference_steps=8, scheduler="dpm++", guidance_scale=3.0)


def stories_of_one_hero(seed: int, count: int, panels: int = 4) -> list[tuple[int, list[world.ScenePanel]]]:
    """Held-out stories of one hero, whose looks are in the images only."""
    stories, number = [], seed * 100_000 + 70_000
    while len(stories) < count:
        story = world.make_story(number, held_out=True, panels=panels, heroes=1)
        if not world.parse(story[0].text).heroes:
            stories.append((number, story))
        number += 1
    return stories


def in_three_coats(number: int, panels: list[world.ScenePanel]) -> tuple[Story, list[str]]:
    """The story up to its fourth text, its hero in another coat in each image; and the coats."""
    coats = random.Random(number).sample(world.COLOURS, 3)
    story = Story()
    for panel, coat in zip(panels[:3], coats):
        (hero,) = panel.scene.heroes
        scene = replace(panel.scene, heroes=(replace(hero, colour=coat),))
        story = story.add(panel.text, ImageSegment(render_scene(scene)))
    return story.add(panels[3].text), coats


def facts_of(seen: Prediction) -> dict[str, str]:
    look = seen.looks[0] if seen.looks else ("", "", "")
    return dict(zip((*LOOKS, "place", "prop", "action"), (*look, seen.place, seen.prop, seen.action)))


def sources(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Of panels after three images in three coats: whether the image that is named is the one whose coat was drawn.

    And whether the fact that is named as changed without it has changed by the classifier. Drawings in a coat of none
    of the three are left out, and their number is given. Baselines: always the first image, the largest attention
    weight, the largest gradient.
    """
    values: dict[str, list] = {
        name: [] for name in ("image", "fact", "always the first", "attention weights", "gradient")
    }
    num_other = 0
    for number, panels in stories_of_one_hero(seed, count):
        story, coats = in_three_coats(number, panels)
        config = CONFIG.with_seed_offset(number)
        inspection = inspect(pipeline, story, list(LOOKS.values()), config)
        (seen,) = judge.predict(inspection.drawn.pixels[None])
        drawn_facts = facts_of(seen)
        if drawn_facts["coat"] not in coats:
            num_other += 1
            continue
        right, source = coats.index(drawn_facts["coat"]), inspection.source
        (without,) = judge.predict(source.without.pixels[None])
        changed = {name for name, value in facts_of(without).items() if name in LOOKS and value != drawn_facts[name]}
        named = [list(LOOKS)[k] for k in source.changed][:1]
        _, attention, gradients = attended(pipeline, story, config)
        values["image"].append((number, source.index == right))
        values["fact"].append((number, set(named) <= changed if named else not changed))
        values["always the first"].append((number, right == 0))
        values["attention weights"].append((number, int(attention.levels.sum(0).argmax()) == right))
        values["gradient"].append((number, int(gradients.sum((1, 2)).argmax()) == right))
        pipeline.clear_cache()
    return {name: bootstrap_by_story(cases) for name, cases in values.items()} | {"another coat": num_other}


def spread(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """How often the coat comes back from one earlier image whose feature maps are blanked in part; no bar."""
    values: dict[str, list] = {}
    for number, panels in stories_of_one_hero(seed, count, panels=3):
        scene = panels[0].scene
        story = pipeline.encode_images(Story.of(panels[0].text, ImageSegment(render_scene(scene)), panels[1].text))
        config = CONFIG.with_seed_offset(number)
        num_levels = len(story.images[0].features.feature_maps)
        ways = {"whole": None, "hero's cells": "hero", "all other cells": "others", "all cells": "all"}
        ways |= {f"level {n + 1}": n for n in range(num_levels)}
        for name, part in ways.items():
            image = story.images[0]
            features = replace(image.features, feature_maps=blanked(image.features, scene, part))
            with maps_replaced(pipeline, features):
                drawn = pipeline.generate_image(story, config)
            (seen,) = judge.predict(drawn.pixels[None])
            coat = facts_of(seen)["coat"]
            values.setdefault(name, []).append((number, coat == scene.heroes[0].colour))
        pipeline.clear_cache()
    return {name: bootstrap_by_story(cases) for name, cases in values.items()}


def blanked(features: ImageFeatures, scene: world.Scene, part) -> tuple[torch.Tensor, ...]:
    """Feature maps with some cells or one level at zero."""
    maps = []
    for number, level in enumerate(features.feature_maps):
        if part is None or (isinstance(part, int) and part != number):
            maps.append(level)
            continue
        if part == "all" or isinstance(part, int):
            maps.append(torch.zeros_like(level))
            continue
        left, top, right, bottom = (edge / renderer.SIDE for edge in renderer.bounding_boxes(scene)[1])
        side = level.shape[-1]
        centre = (torch.arange(side) + 0.5) / side
        is_hero = ((centre >= top) & (centre < bottom))[:, None] & ((centre >= left) & (centre < right))[None]
        maps.append(level * (~is_hero if part == "hero" else is_hero))
    return tuple(maps)


@contextlib.contextmanager
def maps_replaced(pipeline: MMInterleavedPipeline, features: ImageFeatures):
    """Context in which the U-Net attends to these feature maps; what the LLM reads stays."""
    image, original = pipeline.image, pipeline.image.context_feature_maps

    def replaced(stories, count):
        maps, mask = original(stories, count)
        return [level[None, None].expand_as(m) for m, level in zip(maps, features.feature_maps)], mask

    image.context_feature_maps = replaced
    try:
        yield
    finally:
        del image.context_feature_maps


def robustness(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """How often hero, and place and prop, are right in a panel after one changed image, or from a changed text."""
    values: dict[str, dict[str, list]] = {}
    for number, panels in stories_of_one_hero(seed, count, panels=3):
        story = Story.of(panels[0].text, ImageSegment(render_scene(panels[0].scene)), panels[1].text)
        scene, config = panels[1].scene, CONFIG.with_seed_offset(number)
        for change in ("nothing", *CHANGES):
            changed = story if change == "nothing" else changed_story(story, change)
            (seen,) = judge.predict(pipeline.generate_image(changed, config).pixels[None])
            row = values.setdefault(change, {"hero": [], "place and prop": []})
            row["hero"].append((number, seen.looks == (scene.heroes[0].look,)))
            row["place and prop"].append((number, (seen.place, seen.prop) == (scene.place, scene.prop)))
        pipeline.clear_cache()
    return {
        change: {
            fact: {
                **bootstrap_by_story(cases),
                "against nothing": paired_difference(cases, values["nothing"][fact]),
            }
            for fact, cases in row.items()
        }
        for change, row in values.items()
    }


def name_bias(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Whether a name alone, with looks unsaid and no image, goes with a species, a coat or an accessory."""
    pairs: dict[str, list[tuple[str, str]]] = {"species": [], "coat": [], "accessory": []}
    rng = random.Random(seed)
    for number, name in enumerate(world.NAMES):
        for k in range(count):
            scene = world.make_scene(rng, (world.Hero("fox", "red", "hat", name),), True)
            text = world.describe(scene, rng)
            image = pipeline.generate_image(Story.of(text), CONFIG.with_seed_offset(1000 * number + k))
            facts = facts_of(judge.predict(image.pixels[None])[0])
            for part, row in pairs.items():
                row.append((name, facts[part]))
            pipeline.clear_cache()
    result = {}
    for part, row in pairs.items():
        measured = measure_bias(row)
        counts = Counter(answer for _, answer in row)
        result[part] = {
            "bits": measured.information,
            "95% of shuffles below": measured.threshold,
            "drawn": dict(counts.most_common()),
        }
    return result
