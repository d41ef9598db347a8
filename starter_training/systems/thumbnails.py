"""StackGAN's Stage-I: what thumbnails of a text show, and how much they differ."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.generation.latents import decode_latents, encode_latents
from comfy_mminterleaved.pipeline import MMInterleavedPipeline

from .. import world
from ..classifier import AttributeClassifier
from ..evaluate import render_scene
from ..renderer import SIDE
from ..thumbnail_training import NOISE_DIM, ThumbnailGenerator
from .contrastive import scenes_of
from .statistics import bootstrap_by_story

NUM_AT_ONCE = 16
VARIETIES = {"augmented": 1.0, "mean": 0.0}


def thumbnails(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int, path: Path) -> dict:
    """Thumbnails of held-out captions, with conditioning augmentation and with its mean, beside true ones.

    Args:
        path: The generator's weights.
    """
    generator = ThumbnailGenerator().eval()
    generator.load_state_dict(read_tensors(path))
    torch.manual_seed(seed)

    @torch.no_grad()
    def draw(texts: list[str], variety: float) -> torch.Tensor:
        embeds = pipeline.embedder.text_embeds(texts).float()
        latents, _ = generator(embeds, torch.randn(len(texts), NOISE_DIM), variety)
        return decode_latents(pipeline.vae, latents).cpu()

    @torch.no_grad()
    def reconstruct(part: list[tuple[int, world.Scene]]) -> torch.Tensor:
        images = F.avg_pool2d(torch.stack([render_scene(scene) for _, scene in part]), 2)
        return decode_latents(pipeline.vae, encode_latents(pipeline.vae, images)).cpu()

    rows: dict[str, dict[str, list]] = {}
    distances: dict[str, list[float]] = {}
    seconds, scenes = [], scenes_of(seed, count)
    for start in range(0, count, NUM_AT_ONCE):
        part = scenes[start : start + NUM_AT_ONCE]
        texts = [world.caption(scene) for _, scene in part]
        for way, images in {
            "true, through the VAE": reconstruct(part),
            **{way: draw(texts, variety) for way, variety in VARIETIES.items()},
        }.items():
            large = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
            for (number, scene), seen in zip(part, judge.predict(large)):
                looks = tuple(look[0] for look in seen.looks) == tuple(hero.species for hero in scene.heroes)
                facts = {name: getattr(seen, name) == getattr(scene, name) for name in ("place", "sky", "prop")}
                for name, is_right in {**facts, "species": looks}.items():
                    rows.setdefault(name, {}).setdefault(way, []).append((number, is_right))
        for way, variety in VARIETIES.items():
            started = time.perf_counter()
            same = draw(texts[:1] * NUM_AT_ONCE, variety).flatten(1)
            seconds.append(time.perf_counter() - started)
            distances.setdefault(way, []).append(float(F.pdist(same).mean() / same.shape[1] ** 0.5))
    return {
        **{name: {way: bootstrap_by_story(values) for way, values in ways.items()} for name, ways in rows.items()},
        "distance of thumbnails of one text": {way: statistics.mean(values) for way, values in distances.items()},
        f"seconds for {NUM_AT_ONCE}": statistics.median(seconds),
    }
