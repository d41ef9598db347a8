"""Sounds: what is heard among forty, and skies that are put over images by their sound."""

from __future__ import annotations

from dataclasses import replace

import torch

from comfy_mminterleaved.generation.prior import turn
from comfy_mminterleaved.generation.sound import SOUND_STRENGTH
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from .. import sounds, world
from ..classifier import AttributeClassifier
from ..evaluate import render_scene
from ..sound_training import phrase
from .contrastive import scenes_of
from .prior import draw
from .statistics import bootstrap_by_story, paired_difference

SNR = (30, 20, 10, 5)  # of the hiss, in dB, in turn


def heard(pipeline: MMInterleavedPipeline, seed: int, versions: int = 12) -> dict:
    """Each of the forty sounds, from parameters that training never drew, named by its phrase among all."""
    system, rows = pipeline.systems.sounds, {}
    texts = system.embedder.text_embeds(system.phrases).cpu()
    for number, (kind, name) in enumerate(sounds.NAMES):
        for k in range(versions):
            x = sounds.make_sound(kind, name, f"{seed} {k}", True, SNR[k % len(SNR)])
            best = int((texts @ system.embed(torch.from_numpy(x)[None], sounds.RATE)).argmax())
            is_right = system.phrases[best] == phrase(kind, name)
            for group in ("all", kind, f"{SNR[k % len(SNR)]} dB"):
                rows.setdefault(group, []).append((number, is_right))
    return {group: bootstrap_by_story(values) for group, values in rows.items()}


def over_images(
    pipeline: MMInterleavedPipeline,
    judge: AttributeClassifier,
    seed: int,
    count: int,
    amount: float = SOUND_STRENGTH,
    denoise: float = 1.0,
) -> dict:
    """Held-out images of plain day, drawn again as rain, snowfall or night sounds: is it, and is the rest kept?

    Beside the sound: the sentence that says so, another sound of no sky, and the sound without the image beside it.
    """
    days = [(number, scene) for number, scene in scenes_of(seed, 4 * count) if scene.sky == "day"][:count]
    rows: dict[str, dict[str, list]] = {}
    for k, (number, scene) in enumerate(days):
        sky = "night" if k % 2 else "snowfall" if scene.place == "snow" else "rain"
        target, image = replace(scene, sky=sky), ImageSegment(render_scene(scene))
        embed = pipeline.embedder.image_embeds([image])
        directions = []
        for kind, name in (("sky", sky), ("prop", "drum")):
            x = torch.from_numpy(sounds.make_sound(kind, name, f"{seed} {k}", True))[None]
            directions.append(pipeline.systems.sounds.direction(x, sounds.RATE))
        texts = pipeline.embedder.text_embeds([world.caption(target), world.caption(scene)])
        moved = {
            "sound": turn(embed, directions[0], amount),
            "sentence": turn(embed, texts[0] - texts[1], amount),
            "another sound": turn(embed, directions[1], amount),
            "without the image": turn(embed, directions[0], amount),
        }
        for way, each in moved.items():
            options = {} if way == "without the image" else {"story": Story.of(image), "init_image": image}
            (seen,) = draw(pipeline, judge, each, number, denoise, **options)
            facts = {
                "sky as heard": seen.sky == sky,
                "rest kept": (seen.looks, seen.place, seen.prop)
                == (tuple(hero.look for hero in scene.heroes), scene.place, scene.prop),
            }
            facts["both"] = all(facts.values())
            for fact, is_right in facts.items():
                rows.setdefault(fact, {}).setdefault(way, []).append((number, is_right))
    return {
        fact: {
            way: {**bootstrap_by_story(values), "against the sentence": paired_difference(values, ways["sentence"])}
            for way, values in ways.items()
        }
        for fact, ways in rows.items()
    }
