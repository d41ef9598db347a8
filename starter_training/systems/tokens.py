"""VQ-VAE-2 and DALL-E: what codes keep of an image, and drafts of a story's next image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from comfy_mminterleaved.generation.image_tokens import rows_of
from comfy_mminterleaved.generation.latents import decode_latents, encode_latents
from comfy_mminterleaved.models.token_decoder import TokenDecoder
from comfy_mminterleaved.models.vqvae import ImageCodes
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from .. import world
from ..classifier import AttributeClassifier, Prediction
from ..evaluate import held_out_stories, render_scene
from .contrastive import scenes_of
from .statistics import bootstrap_by_story, paired_difference

NUM_CANDIDATES = 16
NUM_TRIALS = 4  # drafts of a panel with each of the settings
SETTINGS = [(guidance, temperature) for guidance in (1.5, 2.0, 3.0) for temperature in (0.3, 0.5, 0.7)]
ROWS = 3  # of 8 that are given, when a draft goes on from an image


def codes(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Held-out images as they are, through the VAE, and through their codes."""
    values: dict[str, dict[str, list]] = {}
    used: dict[str, set[int]] = {"top": set(), "bottom": set()}
    size = 0
    for start in range(0, count, 32):
        part = scenes_of(seed, count)[start : start + 32]
        pixels = torch.stack([render_scene(scene) for _, scene in part])
        with torch.no_grad():
            vae = decode_latents(pipeline.vae, encode_latents(pipeline.vae, pixels)).cpu()
        encoded = [pipeline.image_codes(ImageSegment(each)) for each in pixels]
        both = ImageCodes(*(torch.cat(level) for level in zip(*encoded)))
        size = pipeline.systems.image_tokenizer.num_bytes(both)
        for name, level in zip(used, both):
            used[name] |= set(level.flatten().tolist())
        ways = {"painted": pixels, "VAE": vae, "codes": pipeline.decode_codes(both)}
        for way, images in ways.items():
            for (number, scene), seen in zip(part, judge.predict(images)):
                facts = {"place and prop": (seen.place, seen.prop) == (scene.place, scene.prop)}
                heroes = "lone heroes" if len(scene.heroes) == 1 else "pairs"
                facts[heroes] = seen.looks == tuple(hero.look for hero in scene.heroes)
                for fact, is_right in facts.items():
                    values.setdefault(fact, {}).setdefault(way, []).append((number, is_right))
    num_codes = pipeline.systems.image_tokenizer.model.config.num_codes
    return {
        **{fact: {way: bootstrap_by_story(rows) for way, rows in ways.items()} for fact, ways in values.items()},
        "used codes": {name: len(each) / num_codes for name, each in used.items()},
        "bytes": size,
    }


def _facts(seen: Prediction, scene: world.Scene) -> dict[str, bool]:
    looks = tuple(hero.look for hero in scene.heroes)
    return {
        "place and prop": (seen.place, seen.prop) == (scene.place, scene.prop),
        "species": tuple(look[0] for look in seen.looks) == tuple(look[0] for look in looks),
        "same hero": seen.looks == looks,
    }


class _WithoutImages:
    """Context in which a decoder's synchronizer sees no earlier image."""

    def __init__(self, model: TokenDecoder):
        self.gates = [layer.llama_cross_attn.gate for layer in model.trunk.layers if layer.llama_cross_attn is not None]

    def __enter__(self):
        self.saved = [gate.data.clone() for gate in self.gates]
        for gate in self.gates:
            gate.data.zero_()

    def __exit__(self, *_):
        for gate, value in zip(self.gates, self.saved):
            gate.data.copy_(value)


def second_panels(seed: int, count: int) -> Iterator[tuple[Story, world.Scene]]:
    """Held-out stories up to their second panel's text, and what that panel shows; the opening image is a true one."""
    for panels in held_out_stories(seed, count):
        opening = Story.of(panels[0].text, ImageSegment(render_scene(panels[0].scene)))
        yield opening.add(panels[1].text), panels[1].scene


def settings(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> list[dict]:
    """Shares of single drafts with each fact, by guidance and temperature: to choose them, on seeds below 20."""
    values: dict[tuple, list[dict[str, bool]]] = {each: [] for each in SETTINGS}
    for number, (story, scene) in enumerate(second_panels(seed, count)):
        story = pipeline.encode_images(story)
        prompt_embeds = pipeline.prompt_embeds([story])
        for guidance, temperature in SETTINGS:
            codes = pipeline.systems.token_sampler.sample(
                prompt_embeds, story, NUM_TRIALS, 1000 * number, temperature, guidance_scale=guidance
            )
            seen = judge.predict(pipeline.decode_codes(codes))
            values[guidance, temperature] += [_facts(each, scene) for each in seen]
        pipeline.clear_cache()
    return [
        {
            "guidance": guidance,
            "temperature": temperature,
            **{fact: statistics.fmean(each[fact] for each in rows) for fact in rows[0]},
        }
        for (guidance, temperature), rows in values.items()
    ]


def drafts(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Second panels of held-out stories as drafts: the first, the one ranked best, any of several.

    The opening image is in the story, and the texts are the true ones.
    """
    values: dict[str, dict[str, list]] = {}
    seconds = []

    def add(way: str, number: int, facts: dict[str, bool]) -> None:
        for fact, is_right in facts.items():
            values.setdefault(fact, {}).setdefault(way, []).append((number, is_right))

    for number, (story, scene) in enumerate(second_panels(seed, count)):
        started = time.perf_counter()
        images = pipeline.draft_images(story, NUM_CANDIDATES, seed=1000 * number)
        seconds.append(time.perf_counter() - started)
        first = next(i for i, image in enumerate(images) if image.seed == 1000 * number)
        seen = [_facts(each, scene) for each in judge.predict(torch.stack([image.pixels for image in images]))]
        add("one", number, seen[first])
        add(f"best of {NUM_CANDIDATES}", number, seen[0])
        add(f"any of {NUM_CANDIDATES}", number, {fact: any(each[fact] for each in seen) for fact in seen[0]})
        with _WithoutImages(pipeline.systems.token_sampler.model):
            (image,) = pipeline.draft_images(story, 1, seed=1000 * number)
        add("without the synchronizer", number, _facts(judge.predict(image.pixels[None])[0], scene))
        pipeline.clear_cache()
    return {
        **{
            fact: {
                **{way: bootstrap_by_story(rows) for way, rows in ways.items()},
                f"best of {NUM_CANDIDATES} against one": paired_difference(
                    ways[f"best of {NUM_CANDIDATES}"], ways["one"]
                ),
            }
            for fact, ways in values.items()
        },
        f"seconds for {NUM_CANDIDATES}": statistics.median(seconds),
    }


def from_rows(pipeline: MMInterleavedPipeline, judge: AttributeClassifier, seed: int, count: int) -> dict:
    """Held-out images whose lower rows are drafted anew from their caption: sky and place as in the image."""
    rows: dict[str, list] = {"sky": [], "place": [], "sky and place": []}
    for number, scene in scenes_of(seed, count):
        given = rows_of(pipeline.image_codes(ImageSegment(render_scene(scene))), ROWS)
        story = Story.of(world.caption(scene))
        (image,) = pipeline.draft_images(story, 1, seed=number, given=given)
        seen = judge.predict(image.pixels[None])[0]
        facts = {"sky": seen.sky == scene.sky, "place": seen.place == scene.place}
        for fact, is_kept in (*facts.items(), ("sky and place", all(facts.values()))):
            rows[fact].append((number, is_kept))
        pipeline.clear_cache()
    return {fact: bootstrap_by_story(values) for fact, values in rows.items()}
