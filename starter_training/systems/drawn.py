"""Drawn images as a modality: what the model reads wrong in its own drawings, with the adapter and without."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.reconstruction import GREEDY
from comfy_mminterleaved.models.lora import LoRA
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment

from .. import world
from ..classifier import AttributeClassifier
from ..evaluate import classify, generate_from_gold_text, held_out_stories, render_scene
from .contrastive import best_of_cases, drawn_candidates
from .statistics import bootstrap_by_story, paired_difference


@contextlib.contextmanager
def adapter_of(pipeline: MMInterleavedPipeline, lora: LoRA | None, on_all: bool = False):
    """Context in which drawn images, or all, go through the encoder with a LoRA."""
    old = pipeline.drawn_adapter
    pipeline.drawn_adapter = None if on_all else lora
    pipeline.clear_cache()
    try:
        with lora.attached(pipeline.encoder) if on_all and lora is not None else contextlib.nullcontext():
            yield
    finally:
        pipeline.drawn_adapter = old
        pipeline.clear_cache()


def wrong_facts(
    pipeline: MMInterleavedPipeline,
    judge: AttributeClassifier,
    seed: int,
    count: int,
    cache: Path,
    adapters: dict[str, tuple[LoRA | None, bool]],
) -> dict:
    """How often captions of drawn panels disagree with the classifier, by adapter; and of painted ones.

    Args:
        adapters: Name -> a LoRA, and whether it is on for all images.
    """
    cases, values = best_of_cases(seed, count, None), {}
    drawn = drawn_candidates(pipeline, seed, count, None, 4, cache)
    for name, (lora, on_all) in adapters.items():
        with adapter_of(pipeline, lora, on_all):
            rows = values.setdefault(name, {})
            for pixels, (number, panels, k) in zip(drawn, cases):
                images = {
                    "drawn": torch.from_numpy(pixels[0]).movedim(-1, 0) / 255,
                    "painted": render_scene(panels[k].scene),
                }
                for kind, image in images.items():
                    segment = ImageSegment(image, origin="drawn" if kind == "drawn" else "own")
                    facts = world.parse(pipeline.caption(segment, GREEDY)[0].text)
                    (seen,) = judge.predict(image[None])
                    setting = None if facts is None else (facts.place, facts.prop)
                    wrong = {
                        "heroes": facts is None or facts.heroes != seen.looks,
                        "place and prop": setting != (seen.place, seen.prop),
                    }
                    for fact, is_wrong in wrong.items():
                        rows.setdefault(f"{fact}, {kind}", []).append((number, is_wrong))
                    pipeline.clear_cache()
    first = next(iter(values))
    return {
        name: {
            fact: {**bootstrap_by_story(rows[fact]), "against none": paired_difference(rows[fact], values[first][fact])}
            for fact in rows
        }
        for name, rows in values.items()
    }


def told_heroes(
    pipeline: MMInterleavedPipeline,
    judge: AttributeClassifier,
    seeds: range,
    count: int,
    adapters: dict[str, tuple[LoRA | None, bool]],
) -> dict:
    """Heroes of panels that are drawn from the true text and read back, by adapter and seed."""
    result: dict = {}
    all_values: dict[str, list] = {}
    for seed in seeds:
        stories = held_out_stories(seed, count)
        config = ImageGenerationConfig(num_inference_steps=20, scheduler="dpm++", guidance_scale=3.0, seed=seed)
        for name, (lora, on_all) in adapters.items():
            with adapter_of(pipeline, lora, on_all):
                generated = generate_from_gold_text(pipeline, stories, config)
            hits = [
                (100_000 * seed + number, seen.looks == tuple(hero.look for hero in panel.scene.heroes))
                for number, (panels, row) in enumerate(zip(stories, classify(judge, generated)))
                for panel, seen in zip(panels[1:], row)
            ]
            result.setdefault(name, {})[f"seed {seed}"] = bootstrap_by_story(hits)
            all_values.setdefault(name, []).extend(hits)
    first = next(iter(all_values))
    for name, hits in all_values.items():
        result[name]["all"] = bootstrap_by_story(hits)
        result[name]["against none"] = paired_difference(hits, all_values[first])
    return result
