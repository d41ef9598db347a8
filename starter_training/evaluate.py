"""Evaluates a model of the picture-book world.

The stories have combinations that training never saw. Every panel after the first is generated from the true text and
the model's own earlier images, and a classifier trained on renderings of the world judges it (`classifier.py`). Each
figure has its number of cases and a 95% interval (bootstrap over the cases).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from comfy_mminterleaved.errors import MMInterleavedError, SettingError
from comfy_mminterleaved.files import atomic_write, ensure_writable_dir, write_json
from comfy_mminterleaved.generation.config import ImageGenerationConfig, TextGenerationConfig
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.images import encode_png, to_pil, to_tensor
from comfy_mminterleaved.stories.story import ImageSegment, Story, TextSegment

from . import renderer, world
from .classifier import SHIPPED, AttributeClassifier, Prediction, load

ABLATIONS = ("full", "no synchronizer in the U-Net", "no synchronizer", "earlier pictures hidden")


def bootstrap_interval(cases: list[bool], seed: int = 0, rounds: int = 1000) -> dict:
    """Returns the share of true cases, the number of cases, and a bootstrap 95% interval."""
    if not cases:
        return {"share": None, "cases": 0, "low": None, "high": None}
    rng = random.Random(seed)
    shares = sorted(sum(rng.choices(cases, k=len(cases))) / len(cases) for _ in range(rounds))
    low, high = shares[int(rounds * 0.025)], shares[int(rounds * 0.975) - 1]
    return {"share": sum(cases) / len(cases), "cases": len(cases), "low": low, "high": high}


def held_out_stories(seed: int, count: int) -> list[list[world.ScenePanel]]:
    """Returns held-out stories that do not introduce their heroes: their looks are in the images only."""
    stories, number = [], seed * 100_000
    while len(stories) < count:
        story = world.make_story(number, held_out=True)
        if not world.parse(story[0].text).heroes:
            stories.append(story)
        number += 1
    return stories


def render_scene(scene: world.Scene) -> torch.Tensor:
    """Renders a scene, float (3, side, side) in [0, 1]."""
    return torch.from_numpy(renderer.paint(scene).copy()).permute(2, 0, 1).float() / 255


@contextlib.contextmanager
def llm_mmfs_disabled(model: MMInterleavedPipeline):
    """Context in which the LLM's MMFS layers add nothing."""
    gates = [layer.llama_cross_attn.gate for layer in model.llm.layers if layer.llama_cross_attn is not None]
    saved = [gate.clone() for gate in gates]
    model.clear_cache()
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    try:
        yield
    finally:
        model.clear_cache()
        with torch.no_grad():
            for gate, value in zip(gates, saved):
                gate.copy_(value)


def generate_from_gold_text(
    model: MMInterleavedPipeline,
    stories: list[list[world.ScenePanel]],
    image_config: ImageGenerationConfig,
    hide_history: bool = False,
    batch_size: int = 16,
) -> list[list[torch.Tensor]]:
    """Generates every panel after the first from its true text and the model's own images, or from no images."""
    generated: list[list[torch.Tensor]] = [[] for _ in stories]
    for start in range(0, len(stories), batch_size):
        batch = stories[start : start + batch_size]
        current = [Story.of(panels[0].text) for panels in batch]
        if not hide_history:
            openings = [ImageSegment(render_scene(panels[0].scene)) for panels in batch]
            current = [story.add(image) for story, image in zip(current, openings)]
        for number in range(1, max(map(len, batch))):
            unfinished = [i for i, panels in enumerate(batch) if number < len(panels)]
            for i in unfinished:
                current[i] = model.encode_images(current[i].add(batch[i][number].text))
            # Every panel has noise of its own.
            seeds = [1_000_000 * image_config.seed + 1000 * (start + i) + number for i in unfinished]
            outputs = model.generate_images([current[i] for i in unfinished], image_config, seeds=seeds)
            for i, (image,) in zip(unfinished, outputs):
                generated[start + i].append(image.pixels)
                if not hide_history:
                    current[i] = current[i].add(image)
    model.clear_cache()
    return generated


def classify(judge: AttributeClassifier, generated: list[list[torch.Tensor]]) -> list[list[Prediction]]:
    """Classifies the images of all stories."""
    batches = torch.stack([image for images in generated for image in images]).split(64)
    predictions = iter(prediction for batch in batches for prediction in judge.predict(batch))
    return [[next(predictions) for _ in images] for images in generated]


def score_panels(judge: AttributeClassifier, stories, generated) -> list[tuple[world.Scene, Prediction, bool]]:
    """Returns, for all panels after the first, the true scene, the prediction, and whether all heroes match."""
    return [
        (panel.scene, prediction, prediction.looks == tuple(hero.look for hero in panel.scene.heroes))
        for panels, predictions in zip(stories, classify(judge, generated))
        for panel, prediction in zip(panels[1:], predictions)
    ]


def evaluate_images(judge: AttributeClassifier, stories, generated) -> dict:
    """Returns the accuracy of heroes, of place and prop, and of scenes with two heroes, over panels after the first."""
    panels = score_panels(judge, stories, generated)
    settings = [(p.place, p.prop) == (scene.place, scene.prop) for scene, p, _ in panels]
    return {
        "same hero, accessory and colour": bootstrap_interval([match for *_, match in panels]),
        "place and prop": bootstrap_interval(settings),
        "two heroes, both right": bootstrap_interval([match for scene, _, match in panels if len(scene.heroes) > 1]),
    }


def evaluate_scenes(judge: AttributeClassifier, stories, generated) -> dict[str, dict[str, dict]]:
    """Returns the accuracy of heroes by distance, action and species; a scene of two counts for both species."""
    groups: dict[str, dict[str, list[bool]]] = {"distance": {}, "action": {}, "species": {}}
    for scene, _, match in score_panels(judge, stories, generated):
        groups["distance"].setdefault("far" if scene.far else "near", []).append(match)
        groups["action"].setdefault(scene.action, []).append(match)
        for hero in scene.heroes:
            groups["species"].setdefault(hero.species, []).append(match)
    return {group: {name: bootstrap_interval(cases[name]) for name in sorted(cases)} for group, cases in groups.items()}


def evaluate_captions(model: MMInterleavedPipeline, scenes: list[world.Scene]) -> dict:
    """Returns how often the caption of a rendered scene has place, prop, action and species all right."""
    greedy = TextGenerationConfig(max_new_tokens=60, min_new_tokens=1, do_sample=False, repetition_penalty=1.0)
    cases = []
    for scene in scenes:
        facts = world.parse(model.caption(ImageSegment(render_scene(scene)), greedy)[0].text)
        species = tuple(hero.species for hero in scene.heroes)
        cases.append(
            facts is not None
            and (facts.place, facts.prop, facts.action) == (scene.place, scene.prop, scene.action)
            and tuple(look[0] for look in facts.heroes) == species
        )
    model.clear_cache()
    return bootstrap_interval(cases)


def evaluate_stories(
    model: MMInterleavedPipeline,
    judge: AttributeClassifier,
    stories,
    image_config: ImageGenerationConfig,
    num_panels: int = 5,
) -> dict:
    """Generates stories from a first panel; returns how often texts are in the grammar and how often images match."""
    text_config = TextGenerationConfig(max_new_tokens=60, min_new_tokens=4, repetition_penalty=1.0, top_p=0.9)
    in_grammar, matches = [], []
    for number, panels in enumerate(stories):
        opening = Story.of(panels[0].text, ImageSegment(render_scene(panels[0].scene)))
        story = model.generate_story(
            opening,
            num_panels - 1,
            text_config=text_config.with_seed_offset(10 * number),
            image_config=image_config.with_seed_offset(10 * number),
            seeds=range(num_panels - 1),
            introduce=False,  # looks are in the images only, as in the figures published before
        )
        texts = [s.text for s in story.segments[2:] if isinstance(s, TextSegment)]
        predictions = judge.predict(torch.stack([image.pixels for image in story.images[1:]]))
        for text, prediction in zip(texts, predictions):
            facts = world.parse(text)
            in_grammar.append(facts is not None)
            expected = facts and (facts.place, facts.prop, facts.action)
            matches.append(expected == (prediction.place, prediction.prop, prediction.action))
    model.clear_cache()
    return {
        "texts in the grammar": bootstrap_interval(in_grammar),
        "texts that match their picture": bootstrap_interval(matches),
    }


@torch.no_grad()
def frechet_distance(judge: AttributeClassifier, images: list[torch.Tensor], references: list[torch.Tensor]) -> float:
    """Frechet distance between two sets of images in the classifier's features; not comparable with Inception's FID."""

    def statistics(batch):
        parts = [judge.features(part) for part in torch.stack(batch).split(64)]
        features = torch.cat(parts).double()
        return features.mean(0), torch.cov(features.T)

    (mean_a, cov_a), (mean_b, cov_b) = statistics(images), statistics(references)
    # The trace of (cov_a cov_b)^1/2 is the sum of the roots of the eigenvalues of cov_a^1/2 cov_b cov_a^1/2.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots)


def comparison_sheet(stories, generated: dict[str, list[list[torch.Tensor]]], count: int = 2) -> Image.Image:
    """Draws the first stories as rows: the true images, then those of each ablation; the first image is given."""
    side, left, font = renderer.SIDE, 180, ImageFont.load_default(size=13)
    rows = []
    for panels, *by_ablation in list(zip(stories, *generated.values()))[:count]:
        true_images = [render_scene(panel.scene) for panel in panels]
        rows.append(("true", true_images))
        for name, images in zip(generated, by_ablation):
            rows.append((name, [*([] if name == ABLATIONS[-1] else true_images[:1]), *images]))
    widest = max(len(panels) for panels in stories[:count])
    sheet = Image.new("RGB", (left + widest * side, len(rows) * (side + 4)), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, (name, images) in enumerate(rows):
        top = number * (side + 4)
        canvas.text((6, top + side // 2 - 6), name, fill="black", font=font)
        for i, image in enumerate(images):  # without a first image its place stays empty
            column = i + len(stories[number // (len(generated) + 1)]) - len(images)
            sheet.paste(to_pil(image), (left + column * side, top))
    return sheet


def evaluate(
    model: MMInterleavedPipeline,
    judge: AttributeClassifier,
    seed: int,
    num_stories: int,
    steps: int = 20,
    sheet: Path | None = None,
) -> dict:
    """Returns all figures, JSON-ready, and writes the `comparison_sheet` of the first stories to `sheet`.

    Raises:
        SettingError: If there are no stories.
    """
    if num_stories < 1:
        raise SettingError(f"stories must be at least 1, not {num_stories}.")
    stories = held_out_stories(seed, num_stories)
    image_config = ImageGenerationConfig(num_inference_steps=steps, scheduler="dpm++", guidance_scale=3.0, seed=seed)
    result: dict = {"seed": seed, "stories": num_stories, "steps": steps, "pictures": {}}
    sheet_images = {}
    for ablation in ABLATIONS:
        config = replace(image_config, mmfs_scale=0.0) if ablation.startswith("no ") else image_config
        with llm_mmfs_disabled(model) if ablation == "no synchronizer" else contextlib.nullcontext():
            generated = generate_from_gold_text(model, stories, config, hide_history=ablation == ABLATIONS[-1])
        result["pictures"][ablation] = evaluate_images(judge, stories, generated)
        sheet_images[ablation] = generated[:2]
        if ablation == "full":
            references = [render_scene(panel.scene) for panels in stories for panel in panels[1:]]
            result["same hero by scene"] = evaluate_scenes(judge, stories, generated)
            images = [image for row in generated for image in row]
            result["frechet distance"] = frechet_distance(judge, images, references)
        sys.stderr.write(f"{ablation}: {json.dumps(result['pictures'][ablation])}\n")
    if sheet is not None:
        atomic_write(sheet, encode_png(to_tensor(comparison_sheet(stories, sheet_images))))
    scenes = [panel.scene for panels in stories for panel in panels]
    result["captions"] = evaluate_captions(model, scenes[: 2 * num_stories])
    result |= evaluate_stories(model, judge, stories, image_config)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter", help="a checkpoint folder (default: the starter)")
    parser.add_argument(
        "--judge", default=SHIPPED, help="a classifier of starter_training.classifier (default: the included one)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/evaluation", help="a folder for evaluation.json and comparison.png")
    args = parser.parse_args(argv)
    try:
        out, judge = ensure_writable_dir(args.out), load(args.judge)
        model = MMInterleavedPipeline.load(args.model)
        result = evaluate(model, judge, args.seed, args.stories, args.steps, Path(out) / "comparison.png")
        write_json(Path(out) / "evaluation.json", {"model": args.model, **result})
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
