"""Fine-tuning with reconstruction against the same steps without: facts of descriptions and of drawings."""

from __future__ import annotations

import contextlib
from pathlib import Path

from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.reconstruction import GREEDY
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment

from ..classifier import AttributeClassifier
from ..evaluate import classify, generate_from_gold_text, held_out_stories
from .reconstruction import evaluation_images, is_right
from .statistics import bootstrap_by_story, paired_difference


@contextlib.contextmanager
def with_lora(pipeline: MMInterleavedPipeline, file: Path | None):
    """Context in which a LoRA is added to the model."""
    if file is not None:
        pipeline.load_lora(file)
    try:
        yield
    finally:
        pipeline.unload_lora()


def descriptions(pipeline, judge: AttributeClassifier, seed: int, count: int, cache: Path, files: dict) -> dict:
    """The share of likeliest captions with all facts right and no other, by LoRA and kind of image."""
    images, values = evaluation_images(pipeline, judge, seed, count, cache), {}
    for name, file in files.items():
        with with_lora(pipeline, file):
            for kind, rows in images.items():
                cases = values.setdefault(name, {}).setdefault(kind, [])
                for number, scene, image in rows:
                    (caption,) = pipeline.caption(ImageSegment(image), GREEDY)
                    cases.append((number, is_right(caption.text, scene)))
                    pipeline.clear_cache()
    return _compared(values)


def drawings(pipeline, judge: AttributeClassifier, seeds: range, count: int, files: dict) -> dict:
    """Facts of panels that are drawn from the true text and read back, by LoRA: the heroes, the place and the prop."""
    values: dict = {}
    for name, file in files.items():
        with with_lora(pipeline, file):
            for seed in seeds:
                stories = held_out_stories(seed, count)
                config = ImageGenerationConfig(num_inference_steps=20, scheduler="dpm++", guidance_scale=3.0, seed=seed)
                generated = generate_from_gold_text(pipeline, stories, config)
                for number, (panels, row) in enumerate(zip(stories, classify(judge, generated))):
                    for panel, seen in zip(panels[1:], row):
                        scene = panel.scene
                        facts = {
                            "heroes": seen.looks == tuple(hero.look for hero in scene.heroes),
                            "place and prop": (seen.place, seen.prop) == (scene.place, scene.prop),
                        }
                        facts["all"] = all(facts.values()) and seen.action == scene.action
                        for fact, is_drawn in facts.items():
                            values.setdefault(name, {}).setdefault(fact, []).append((100_000 * seed + number, is_drawn))
    return _compared(values)


def _compared(values: dict[str, dict[str, list]]) -> dict:
    """Shares by name and kind, each against the first name and against the one before."""
    names = list(values)
    return {
        name: {
            kind: {
                **bootstrap_by_story(cases),
                **{
                    f"against {other}": paired_difference(cases, values[other][kind])
                    for other in dict.fromkeys((names[0], names[max(0, i - 1)]))
                    if other != name
                },
            }
            for kind, cases in values[name].items()
        }
        for i, name in enumerate(names)
    }
