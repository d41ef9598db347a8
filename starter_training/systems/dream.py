"""DreamLLM: dream queries in the Perceiver's place, and drawing in context."""

from __future__ import annotations

import random
from dataclasses import replace

from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.dream import REFERENCE
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from ..classifier import AttributeClassifier, Prediction
from ..dream_training import Task, composition, edited, subject
from ..evaluate import classify, generate_from_gold_text, held_out_stories, render_scene
from .contrastive import scenes_of
from .prior import facts_of
from .statistics import bootstrap_by_story, paired_difference

CONDITIONERS = "perceiver", "dream"
STEPS = 12
EDITS = ("sky", "place", "prop", "coat")


def stories(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seeds: range, count: int) -> dict:
    """Panels drawn from the true text and read back, by conditioner, with the same noise."""
    values: dict[str, dict[str, list]] = {}
    for name in CONDITIONERS:
        for seed in seeds:
            held_out = held_out_stories(seed, count)
            config = ImageGenerationConfig(
                num_inference_steps=20, scheduler="dpm++", guidance_scale=3.0, seed=seed, conditioner=name
            )
            generated = generate_from_gold_text(pipeline, held_out, config)
            for number, (panels, row) in enumerate(zip(held_out, classify(judge, generated))):
                for panel, seen in zip(panels[1:], row):
                    scene = panel.scene
                    facts = {
                        "heroes": seen.looks == tuple(hero.look for hero in scene.heroes),
                        "place": seen.place == scene.place,
                        "prop": seen.prop == scene.prop,
                    }
                    for fact, is_drawn in facts.items():
                        values.setdefault(fact, {}).setdefault(name, []).append((100_000 * seed + number, is_drawn))
    perceiver, dream = CONDITIONERS
    return {
        fact: {
            **{name: bootstrap_by_story(rows) for name, rows in ways.items()},
            "difference": paired_difference(ways[dream], ways[perceiver]),
        }
        for fact, ways in values.items()
    }


def draw_task(pipeline: MMInterleavedPipeline, judge, task: Task, seed: int, has_images: bool = True) -> Prediction:
    """What the judge reads from the drawing that a text with images asks for, or the text alone."""
    config = replace(
        pipeline.generation_config.image, num_inference_steps=STEPS, seed=seed, refine=False, num_context_images=0
    )
    if has_images:
        images = {name: ImageSegment(render_scene(scene)) for name, scene in zip("AB", task.images)}
        image = pipeline.draw_in_context(task.text, images, config)
    else:
        text = " ".join(part.strip() for part in REFERENCE.sub(" ", task.text).split())
        image = pipeline.generate_image(Story.of(text), replace(config, conditioner="dream"))
    pipeline.clear_cache()
    return judge.predict(image.pixels[None])[0]


def in_context(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Held-out images in texts: the hero of one with a text, in the place of another, and edits of one."""
    rng = random.Random(f"in context {seed}")
    scenes = [(number, scene) for number, scene in scenes_of(seed, 4 * count) if len(scene.heroes) == 1]
    scenes = scenes[: count + 1]
    values: dict[str, dict[str, list]] = {}

    def add(name: str, way: str, number: int, is_right: bool) -> None:
        values.setdefault(name, {}).setdefault(way, []).append((number, is_right))

    for k, ((number, a), (_, b)) in enumerate(zip(scenes, scenes[1:])):
        tasks = {
            "subject": subject(rng, a, b, True),
            "composition": composition(rng, a, b, True),
            f"edit {EDITS[k % len(EDITS)]}": edited(rng, a, EDITS[k % len(EDITS)]),
        }
        for name, task in tasks.items():
            for way in ("in context", "text alone"):
                seen = draw_task(pipeline, judge, task, seed + number, way == "in context")
                facts = facts_of(seen, task.scene)
                look = facts["species"] and facts["colour"] and facts["accessory"]
                if name == "subject":
                    add("subject: look", way, number, look)
                    add("subject: place and prop", way, number, facts["place"] and facts["prop"])
                elif name == "composition":
                    add("composition: hero of A in the place of B", way, number, look and facts["place"])
                else:
                    kind = name.removeprefix("edit ")
                    changed = facts.pop("colour" if kind == "coat" else kind)
                    add("edits: changed", way, number, changed)
                    add("edits: the rest kept", way, number, all(facts.values()))
                    add("edits: changed and the rest kept", way, number, changed and all(facts.values()))
                    add(f"edit of {kind}", way, number, changed and all(facts.values()))
    return {name: {way: bootstrap_by_story(rows) for way, rows in ways.items()} for name, ways in values.items()}
