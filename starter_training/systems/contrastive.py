"""The contrastive model: retrieval, changed facts, the best of four drawings, masks of words."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.latents import decode_latents, encode_latents
from comfy_mminterleaved.generation.ranking import rank_images, ranking_text
from comfy_mminterleaved.generation.word_masks import occlusion_map, pixel_map, window_embeds
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

from .. import renderer, world
from ..augmentation import random_blur
from ..classifier import AttributeClassifier
from ..drawn_images import BATCH, draw_again
from ..evaluate import render_scene
from ..targets import attribute_labels
from .statistics import bootstrap_by_story, paired_difference

REDRAW_NOISE = 0.4


def scenes_of(seed: int, count: int) -> list[tuple[int, world.Scene]]:
    """Scenes of held-out stories, each with the number of its story."""
    scenes, number = [], seed * 100_000
    while len(scenes) < count:
        scenes += [(number, panel.scene) for panel in world.make_story(number, held_out=True)]
        number += 1
    return scenes[:count]


def changed_captions(scene: world.Scene, rng: random.Random) -> dict[str, str]:
    """The caption of a scene with one fact changed, by fact."""

    def other(values, value):
        return rng.choice([each for each in values if each != value])

    hero, *others = scene.heroes
    looks = {
        "species": replace(hero, species=other(world.SPECIES, hero.species)),
        "coat": replace(hero, colour=other(world.COLOURS, hero.colour)),
        "accessory": replace(hero, accessory=other(world.ACCESSORIES, hero.accessory)),
    }
    scenes = {name: replace(scene, heroes=(changed, *others)) for name, changed in looks.items()}
    scenes |= {
        "action": replace(scene, action=other(world.ACTIONS, scene.action)),
        "place": replace(scene, place=other(world.PLACES, scene.place)),
        "prop": replace(scene, prop=other(world.PROPS, scene.prop)),
    }
    return {name: world.caption(changed) for name, changed in scenes.items()}


@torch.no_grad()
def retrieval(pipeline: MMInterleavedPipeline, seed: int, count: int = 1000) -> dict:
    """Text to image among `count` held-out images, and captions with one fact changed; on clean and changed images."""
    embedder, scenes = pipeline.embedder, scenes_of(seed, count)
    clean = torch.stack([render_scene(scene) for _, scene in scenes])
    torch.manual_seed(seed)
    latents = torch.cat([encode_latents(pipeline.image.vae, part) for part in clean.split(64)])
    noisy = latents + REDRAW_NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
    kinds = {
        "painted": clean,
        "softened": random_blur(clean, random.Random(seed), 1.0),
        "redrawn": torch.cat([decode_latents(pipeline.image.vae, part) for part in noisy.split(64)]),
        "drawn": drawn_again(pipeline, [scene for _, scene in scenes], latents),
    }
    texts = embedder.text_embeds([world.caption(scene) for _, scene in scenes])
    rng, result = random.Random(seed), {}
    changed = [changed_captions(scene, rng) for _, scene in scenes]
    for kind, images in kinds.items():
        segments = [ImageSegment(image) for image in images]
        embeds = torch.cat([embedder.image_embeds(segments[i : i + 64]) for i in range(0, count, 64)])
        first = (texts @ embeds.T).argmax(1) == torch.arange(count)
        figures = {"R@1": bootstrap_by_story([(n, hit) for (n, _), hit in zip(scenes, first.tolist())])}
        own = (texts * embeds).sum(1)
        for fact in changed[0]:
            others = embedder.text_embeds([captions[fact] for captions in changed])
            right = own > (others * embeds).sum(1)
            figures[fact] = bootstrap_by_story([(n, hit) for (n, _), hit in zip(scenes, right.tolist())])
        result[kind] = figures
    return result


def drawn_again(pipeline: MMInterleavedPipeline, scenes: list[world.Scene], latents: torch.Tensor) -> torch.Tensor:
    """The scenes drawn by the U-Net from their noised latents, told what they show (`drawn_images`)."""
    labels = torch.tensor([list(attribute_labels(scene).values()) for scene in scenes])
    blocks, vae = {"synchronizer": pipeline.synchronizer, "unet": pipeline.unet}, pipeline.image.vae
    starts = range(0, len(scenes), BATCH)
    parts = [draw_again(blocks, vae, pipeline.config, latents[i : i + BATCH], labels[i : i + BATCH], i) for i in starts]
    return torch.cat(parts)


def best_of_cases(seed: int, count: int, heroes: int | None) -> list[tuple[int, list[world.ScenePanel], int]]:
    """(story, its panels, a panel to draw) of held-out stories that do not introduce their heroes."""
    cases, number = [], seed * 100_000 + 50_000
    while len(cases) < count:
        story = world.make_story(number, held_out=True, heroes=heroes)
        if not world.parse(story[0].text).heroes:
            panels = [k for k in range(1, len(story)) if heroes is None or len(story[k].scene.heroes) == heroes]
            cases += [(number, story, k) for k in panels]
        number += 1
    return cases[:count]


def model_digest(pipeline: MMInterleavedPipeline) -> str:
    """Digest of what draws: no two trained models share it."""
    weights = (pipeline.unet.conv_out.weight, pipeline.llm.soi_token, pipeline.encoder.proj.weight)
    data = b"".join(weight.detach().float().cpu().numpy().tobytes() for weight in weights)
    return hashlib.blake2b(data, digest_size=4).hexdigest()


def drawn_candidates(
    pipeline: MMInterleavedPipeline, seed: int, count: int, heroes: int | None, num_candidates: int, cache: Path
) -> list[np.ndarray]:
    """uint8 `(num_candidates, side, side, 3)` of each case, drawn after a true first panel; kept in `cache`."""
    config = ImageGenerationConfig(num_inference_steps=20, scheduler="dpm++", guidance_scale=3.0, seed=seed)
    out = []
    for case, (_, panels, k) in enumerate(best_of_cases(seed, count, heroes)):
        path = cache / f"candidates-{model_digest(pipeline)}-{seed}-{heroes or 'any'}-{num_candidates}-{case}.npy"
        if not path.exists():
            opening = Story.of(panels[0].text, ImageSegment(render_scene(panels[0].scene)))
            story = pipeline.encode_images(opening).add(panels[k].text)
            (images,) = pipeline.generate_images(
                [story], config, num_candidates, seeds=[1_000_000 * seed + 1000 * case]
            )
            pixels = np.stack([(image.pixels.movedim(0, -1) * 255).round().byte().numpy() for image in images])
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
                np.save(file, pixels)
            pipeline.clear_cache()
        out.append(np.load(path))
    return out


def best_of(
    pipeline: MMInterleavedPipeline,
    judge: AttributeClassifier,
    seed: int,
    count: int,
    cache: Path,
    heroes: int | None = None,
    num_candidates: int = 4,
) -> dict:
    """Candidates for panels after a true first panel: the first, the one ranked best, any; and a ranking by the LLM.

    The heroes' looks are read from the first panel alone, by the model's own introduction.
    """
    ways = ("first", "ranked", "ranked with references", "by the LLM", "any")
    values: dict[str, dict[str, list]] = {}
    drawn = drawn_candidates(pipeline, seed, count, heroes, num_candidates, cache)
    for pixels, (number, panels, k) in zip(drawn, best_of_cases(seed, count, heroes)):
        candidates = [ImageSegment(torch.from_numpy(image).movedim(-1, 0) / 255) for image in pixels]
        candidates = pipeline.encode_images(Story.of(*candidates)).images
        opening = Story.of(panels[0].text, ImageSegment(render_scene(panels[0].scene)))
        told = pipeline.encode_images(pipeline.introduce(opening).add(panels[k].text))
        text = ranking_text(told)
        likelihoods = [pipeline.score(Story.of(image), [text])[0] for image in candidates]
        chosen = {
            "first": 0,
            "ranked": rank_images(pipeline.embedder, told, candidates)[0].index,
            "ranked with references": rank_images(pipeline.embedder, told, candidates, 0.5)[0].index,
            "by the LLM": max(range(num_candidates), key=lambda i: likelihoods[i]),
        }
        predictions = judge.predict(torch.stack([image.pixels for image in candidates]))
        scene = panels[k].scene
        hits = {
            "heroes": [p.looks == tuple(hero.look for hero in scene.heroes) for p in predictions],
            "place and prop": [(p.place, p.prop) == (scene.place, scene.prop) for p in predictions],
        }
        facts = world.parse(told.panels()[0].text)
        if facts is not None and facts.heroes == tuple(hero.look for hero in panels[0].scene.heroes):
            hits["heroes, where the first panel was read right"] = hits["heroes"]
        for name, row in hits.items():
            for way in ways:
                values.setdefault(name, {}).setdefault(way, []).append(
                    (number, any(row) if way == "any" else row[chosen[way]])
                )
        pipeline.clear_cache()
    result: dict = {}
    for name, by_way in values.items():
        figures = {way: bootstrap_by_story(cases) for way, cases in by_way.items()}
        gap = figures["any"]["mean"] - figures["first"]["mean"]
        closed = figures["ranked"]["mean"] - figures["first"]["mean"]
        figures["gap closed"] = closed / gap if gap else None
        figures["ranked against first"] = paired_difference(by_way["ranked"], by_way["first"])
        figures["ranked against the LLM"] = paired_difference(by_way["ranked"], by_way["by the LLM"])
        result[name] = figures
    return result


def words_in_boxes(scene: world.Scene) -> list[tuple[str, str, tuple, tuple[float, float, float, float]]]:
    """(kind, word, words of the same kind, box in shares of the side) of what a caption says of a scene."""
    prop, *heroes = [tuple(edge / renderer.SIDE for edge in box) for box in renderer.bounding_boxes(scene)]
    cases = [("prop", scene.prop, tuple(world.PROPS), prop)]
    if len(scene.heroes) == 1:
        (hero,) = scene.heroes
        cases += [
            ("species", hero.species, world.SPECIES, heroes[0]),
            ("coat", hero.colour, world.COLOURS, heroes[0]),
            ("accessory", hero.accessory, world.ACCESSORIES, heroes[0]),
        ]
    else:
        cases += [("species of two", h.species, world.SPECIES, box) for h, box in zip(scene.heroes, heroes)]
    return cases


def word_masks(pipeline: MMInterleavedPipeline, seed: int, count: int) -> dict:
    """Where the map of a word has its peak, and how much of the box its mask covers (intersection over union)."""
    embedder = pipeline.embedder
    values: dict[str, dict[str, list]] = {}
    for number, scene in scenes_of(seed, count):
        (image,) = pipeline.encode_images(Story.of(ImageSegment(render_scene(scene)))).images
        caption, embeds = world.caption(scene), window_embeds(embedder, image)
        for kind, word, same_kind, box in words_in_boxes(scene):
            row = values.setdefault(kind, {})
            inside = _inside(box, image.size)
            row.setdefault("share of the area", []).append((number, float(inside.mean())))
            ways = {"left out": (), "same kind": same_kind}
            for name, rivals in ways.items():
                pixels = pixel_map(occlusion_map(embedder, image, caption, word, rivals, embeds=embeds), image.size)
                _add_place(row, name, number, pixels, inside)
            tokens = pipeline.tokenizer.encode(caption)
            start = _token_of(pipeline.tokenizer, tokens, word)
            if start is not None:
                cells = embedder.word_maps(caption, image)[start][None, None]
                side = image.size[1], image.size[0]
                attention = torch.nn.functional.interpolate(cells, size=side, mode="bilinear")[0, 0]
                _add_place(row, "AttnGAN's attention", number, attention / attention.max(), inside)
    return {
        kind: {name: bootstrap_by_story(cases) for name, cases in row.items()} for kind, row in sorted(values.items())
    }


def _inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> torch.Tensor:
    left, top, right, bottom = box
    y, x = ((torch.arange(side) + 0.5) / side for side in (size[1], size[0]))
    return (((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]).float()


def _add_place(row: dict, name: str, number: int, pixels: torch.Tensor, inside: torch.Tensor) -> None:
    peak = (pixels >= pixels.max() - 1e-6).float()
    mask = (pixels >= 0.5).float()
    union = torch.maximum(mask, inside).sum()
    row.setdefault(f"peak inside, {name}", []).append((number, float((peak * inside).sum() / peak.sum() > 0.5)))
    row.setdefault(f"intersection over union, {name}", []).append((number, float((mask * inside).sum() / union)))


def _token_of(tokenizer, tokens: list[int], word: str) -> int | None:
    """The first token of a word in a text's tokens."""
    for start in range(len(tokens)):
        if tokenizer.decode(tokens[start:]).strip().lower().startswith(word):
            is_end = start + 1 == len(tokens) or not tokenizer.decode(tokens[start + 1 :]).strip().lower().startswith(
                word
            )
            if is_end:
                return start
    return None
