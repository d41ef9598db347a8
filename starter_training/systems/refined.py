"""The refiner: how near it comes to the world's own drawings at 256 px, what it keeps, and what it costs."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from comfy_mminterleaved.generation.latents import decode_latents, encode_latents
from comfy_mminterleaved.generation.ranking import ranking_text
from comfy_mminterleaved.models.refiner import SCALE, enlarge
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from .. import renderer, world
from ..classifier import AttributeClassifier
from ..evaluate import render_scene
from ..samples import save_grid
from .contrastive import best_of_cases, drawn_candidates, scenes_of
from .statistics import bootstrap_by_story, paired_difference

NUM_BANDS = 32  # of the spectrum, from no frequency to half a cycle per pixel


def large_painting(scene: world.Scene) -> torch.Tensor:
    """A scene as the world draws it at 256 px: `(3, 256, 256)` in [0, 1]."""
    return torch.from_numpy(renderer.paint(scene, SCALE * renderer.SIDE).copy()).permute(2, 0, 1).float() / 255


def psnr(image: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    return -10 * math.log10(max(float((image - other).pow(2).mean()), 1e-10))


def gradient_spectrum(image: torch.Tensor) -> torch.Tensor:
    """Log10 of the mean power of the brightness's gradients, by spatial frequency: `(NUM_BANDS,)`."""
    grey = image.mean(0)
    dx, dy = (torch.fft.fft2(grey.diff(dim=dim)[:-1] if dim == 1 else grey.diff(dim=dim)[:, :-1]) for dim in (1, 0))
    power = dx.abs().pow(2) + dy.abs().pow(2)
    height, width = power.shape
    radius = (torch.fft.fftfreq(height)[:, None].pow(2) + torch.fft.fftfreq(width)[None].pow(2)).sqrt()
    band = (radius * 2 * NUM_BANDS).long().flatten()
    sums, counts = torch.zeros(2 * NUM_BANDS), torch.zeros(2 * NUM_BANDS)
    sums.index_add_(0, band, power.flatten())
    counts.index_add_(0, band, torch.ones_like(power).flatten())
    return (sums[:NUM_BANDS] / counts[:NUM_BANDS].clamp(min=1)).clamp(min=1e-6).log10()


def spectrum_distance(image: torch.Tensor, other: torch.Tensor) -> float:
    """Mean absolute difference of two images' `gradient_spectrum`, in decades."""
    return float((gradient_spectrum(image) - gradient_spectrum(other)).abs().mean())


def pairs(pipeline: MMInterleavedPipeline, seed: int, count: int) -> dict:
    """True drawings through the VAE, refined and enlarged, against the world's own at 256 px."""
    values: dict[str, dict[str, list]] = {"psnr": {}, "spectrum": {}}
    for number, scene in scenes_of(seed, count):
        with torch.no_grad():
            small = decode_latents(pipeline.vae, encode_latents(pipeline.vae, render_scene(scene)[None]))
        true, ways = large_painting(scene), {"bicubic": enlarge(small)[0].clamp(0, 1)}
        ways["refined"] = pipeline.refiner.refine(small[0])
        ways["refined, told the text"] = pipeline.refiner.refine(small[0], world.caption(scene))
        for way, image in ways.items():
            values["psnr"].setdefault(way, []).append((number, psnr(image, true)))
            values["spectrum"].setdefault(way, []).append((number, spectrum_distance(image, true)))
    result: dict = {}
    for measure, ways in values.items():
        result[measure] = {
            way: {**bootstrap_by_story(rows), "against bicubic": paired_difference(rows, ways["bicubic"])}
            for way, rows in ways.items()
        }
    return result


def kept_facts(
    pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int, cache: Path, sheet: Path | None
) -> dict:
    """What the classifier reads at 128 px from drawn panels, as they are and refined; and seconds an image.

    Args:
        sheet: A PNG of the first fifty, enlarged above refined, to look at.
    """
    values: dict[str, dict[str, list]] = {}
    seconds, shown = [], []
    drawn = drawn_candidates(pipeline, seed, count, None, 4, cache)
    for pixels, (number, panels, k) in zip(drawn, best_of_cases(seed, count, None)):
        image = torch.from_numpy(pixels[0]).movedim(-1, 0) / 255
        story = pipeline.encode_images(Story.of(panels[0].text, ImageSegment(render_scene(panels[0].scene))))
        story = story.add(panels[k].text)
        (context,) = pipeline.context_features([story])
        with torch.no_grad():
            (prompt_embeds,) = pipeline.synchronizer.conditioner.prompt_embeds([context])
        text, start = ranking_text(story), time.perf_counter()
        refined = pipeline.refiner.refine(image, text, prompt_embeds)
        seconds.append(time.perf_counter() - start)
        if len(shown) < 50:
            shown.append(torch.cat([enlarge(image[None])[0].clamp(0, 1), refined], dim=1))
        ways = {"as drawn": image, "refined": F.avg_pool2d(refined, SCALE)}
        ways["refined alone"] = F.avg_pool2d(pipeline.refiner.refine(image), SCALE)
        scene = panels[k].scene
        for way, seen in zip(ways, judge.predict(torch.stack(list(ways.values())))):
            facts = {
                "heroes": seen.looks == tuple(hero.look for hero in scene.heroes),
                "place and prop": (seen.place, seen.prop) == (scene.place, scene.prop),
                "action": seen.action == scene.action,
            }
            for fact, is_right in facts.items():
                values.setdefault(fact, {}).setdefault(way, []).append((number, is_right))
        pipeline.clear_cache()
    if sheet is not None:
        save_grid([torch.stack(shown[i : i + 10]) for i in range(0, len(shown), 10)], sheet)
    result: dict = {"seconds": statistics.median(seconds)}
    for fact, ways in values.items():
        result[fact] = {
            way: {**bootstrap_by_story(rows), "against as drawn": paired_difference(rows, ways["as drawn"])}
            for way, rows in ways.items()
        }
    return result
