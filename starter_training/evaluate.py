"""What a model of the picture-book world can do.

Stories of combinations that training never saw. Every panel after the first is drawn from the true text and the
model's own earlier pictures; a judge that knows only the generator's drawings says what is to be seen (see `judge`).
Each figure comes with its number of cases and a 95% interval (bootstrap over the cases).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
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


def interval(cases: list[bool], seed: int = 0, rounds: int = 1000) -> dict:
    """Share of true cases, their number, and a bootstrap 95% interval."""
    if not cases:
        return {"share": None, "cases": 0, "low": None, "high": None}
    rng = random.Random(seed)
    shares = sorted(sum(rng.choices(cases, k=len(cases))) / len(cases) for _ in range(rounds))
    low, high = shares[int(rounds * 0.025)], shares[int(rounds * 0.975) - 1]
    return {"share": sum(cases) / len(cases), "cases": len(cases), "low": low, "high": high}


def held_out_stories(seed: int, count: int) -> list[list[world.ScenePanel]]:
    """Held-out stories that do not introduce their heroes in text: what they look like is only to be seen."""
    found, number = [], seed * 100_000
    while len(found) < count:
        pages = world.make_story(number, held_out=True)
        if not world.parse(pages[0].text).heroes:
            found.append(pages)
        number += 1
    return found


def pixels_of(scene: world.Scene) -> torch.Tensor:
    return torch.from_numpy(renderer.paint(scene).copy()).permute(2, 0, 1).float() / 255


@contextlib.contextmanager
def llm_mmfs_disabled(model: MMInterleavedPipeline):
    """Within it, the synchronizers of the LLM add nothing."""
    gates = [layer.llama_cross_attn.gate for layer in model.llm.layers if layer.llama_cross_attn is not None]
    kept = [gate.clone() for gate in gates]
    model.clear_cache()
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    try:
        yield
    finally:
        model.clear_cache()
        with torch.no_grad():
            for gate, value in zip(gates, kept):
                gate.copy_(value)


def generate_from_gold_text(
    model: MMInterleavedPipeline,
    stories: list[list[world.ScenePanel]],
    drawing: ImageGenerationConfig,
    hidden: bool = False,
    at_once: int = 16,
) -> list[list[torch.Tensor]]:
    """Every panel after the first of each story, in view of the model's own pictures; or, `hidden`, of none."""
    drawn: list[list[torch.Tensor]] = [[] for _ in stories]
    for start in range(0, len(stories), at_once):
        batch = stories[start : start + at_once]
        current = [Story.of(pages[0].text) for pages in batch]
        if not hidden:
            current = [story.add(ImageSegment(pixels_of(pages[0].scene))) for story, pages in zip(current, batch)]
        for panel in range(1, max(map(len, batch))):
            going = [i for i, pages in enumerate(batch) if panel < len(pages)]
            for i in going:
                current[i] = model.encode_images(current[i].add(batch[i][panel].text))
            seeds = [1_000_000 * drawing.seed + 1000 * (start + i) + panel for i in going]  # no noise is shared
            for i, (picture,) in zip(going, model.generate_images([current[i] for i in going], drawing, seeds=seeds)):
                drawn[start + i].append(picture.pixels)
                if not hidden:
                    current[i] = current[i].add(picture)
    model.clear_cache()
    return drawn


def classify(judge: AttributeClassifier, drawn: list[list[torch.Tensor]]) -> list[list[Prediction]]:
    verdicts = iter(v for part in torch.stack([p for row in drawn for p in row]).split(64) for v in judge.judge(part))
    return [[next(verdicts) for _ in row] for row in drawn]


def score_panels(judge: AttributeClassifier, stories, drawn) -> list[tuple[world.Scene, Prediction, bool]]:
    """Of all panels after the first what they were to show, what they do, and whether all heroes are right."""
    return [
        (page.scene, verdict, verdict.looks == tuple(hero.look for hero in page.scene.heroes))
        for pages, verdicts in zip(stories, classify(judge, drawn))
        for page, verdict in zip(pages[1:], verdicts)
    ]


def evaluate_pictures(judge: AttributeClassifier, stories, drawn) -> dict:
    """Identity, place and prop, and scenes of two, over all panels after the first."""
    panels = score_panels(judge, stories, drawn)
    return {
        "same hero, accessory and colour": interval([right for *_, right in panels]),
        "place and prop": interval([(v.place, v.prop) == (scene.place, scene.prop) for scene, v, _ in panels]),
        "two heroes, both right": interval([right for scene, _, right in panels if len(scene.heroes) > 1]),
    }


def evaluate_scenes(judge: AttributeClassifier, stories, drawn) -> dict[str, dict[str, dict]]:
    """Identity by what is to be drawn: distance, action, species (a scene of two counts for both)."""
    groups: dict[str, dict[str, list[bool]]] = {"distance": {}, "action": {}, "species": {}}
    for scene, _, right in score_panels(judge, stories, drawn):
        groups["distance"].setdefault("far" if scene.far else "near", []).append(right)
        groups["action"].setdefault(scene.action, []).append(right)
        for hero in scene.heroes:
            groups["species"].setdefault(hero.species, []).append(right)
    return {group: {name: interval(found[name]) for name in sorted(found)} for group, found in groups.items()}


def evaluate_captions(model: MMInterleavedPipeline, scenes: list[world.Scene]) -> dict:
    """Captions of held-out drawings: place, prop, action and species, all right."""
    greedy = TextGenerationConfig(max_new_tokens=60, min_new_tokens=1, do_sample=False, repetition_penalty=1.0)
    right = []
    for scene in scenes:
        facts = world.parse(model.caption(ImageSegment(pixels_of(scene)), greedy)[0].text)
        species = tuple(hero.species for hero in scene.heroes)
        right.append(
            facts is not None
            and (facts.place, facts.prop, facts.action) == (scene.place, scene.prop, scene.action)
            and tuple(look[0] for look in facts.heroes) == species
        )
    model.clear_cache()
    return interval(right)


def evaluate_telling(
    model: MMInterleavedPipeline, judge: AttributeClassifier, stories, drawing: ImageGenerationConfig, panels: int = 5
) -> dict:
    """Stories told from a first page: texts that are in the world's grammar, and pictures that show what they say."""
    sampling = TextGenerationConfig(max_new_tokens=60, min_new_tokens=4, repetition_penalty=1.0, top_p=0.9)
    parsed, matching = [], []
    for number, pages in enumerate(stories):
        story = Story.of(pages[0].text, ImageSegment(pixels_of(pages[0].scene)))
        told = model.generate_story(
            story,
            panels - 1,
            text_config=sampling.with_seed_offset(10 * number),
            image_config=drawing.with_seed_offset(10 * number),
            seeds=range(panels - 1),
            introduce=False,  # looks are only to be seen, as in the figures published before
        )
        texts = [s.text for s in told.segments[2:] if isinstance(s, TextSegment)]
        verdicts = judge.judge(torch.stack([p.pixels for p in told.images[1:]]))
        for text, verdict in zip(texts, verdicts):
            facts = world.parse(text)
            parsed.append(facts is not None)
            said = facts and (facts.place, facts.prop, facts.action)
            matching.append(said == (verdict.place, verdict.prop, verdict.action))
    model.clear_cache()
    return {"texts in the grammar": interval(parsed), "texts that match their picture": interval(matching)}


@torch.no_grad()
def frechet_distance(judge: AttributeClassifier, found: list[torch.Tensor], true: list[torch.Tensor]) -> float:
    """Frechet distance between the judge's features of two sets of pictures; not comparable with Inception's FID."""

    def statistics(pictures):
        parts = [judge.features(part) for part in torch.stack(pictures).split(64)]
        features = torch.cat(parts).double()
        return features.mean(0), torch.cov(features.T)

    (mean_a, cov_a), (mean_b, cov_b) = statistics(found), statistics(true)
    # The trace of the root of cov_a cov_b is the sum of the roots of the eigenvalues of a symmetric matrix like it.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots)


def comparison(stories, drawn: dict[str, list[list[torch.Tensor]]], count: int = 2) -> Image.Image:
    """The first stories as rows of pictures: the true ones, then those of each kind; the first picture is given."""
    side, left, font = renderer.SIDE, 180, ImageFont.load_default(size=13)
    rows = []
    for pages, *kinds in list(zip(stories, *drawn.values()))[:count]:
        true = [pixels_of(page.scene) for page in pages]
        rows.append(("true", true))
        rows += [(name, [*([] if name == ABLATIONS[-1] else true[:1]), *row]) for name, row in zip(drawn, kinds)]
    widest = max(len(pages) for pages in stories[:count])
    sheet = Image.new("RGB", (left + widest * side, len(rows) * (side + 4)), "white")
    write = ImageDraw.Draw(sheet)
    for number, (name, pictures) in enumerate(rows):
        top = number * (side + 4)
        write.text((6, top + side // 2 - 6), name, fill="black", font=font)
        for i, picture in enumerate(pictures):  # where the first is hidden, its place stays empty
            column = i + len(stories[number // (len(drawn) + 1)]) - len(pictures)
            sheet.paste(to_pil(picture), (left + column * side, top))
    return sheet


def evaluate(
    model: MMInterleavedPipeline,
    judge: AttributeClassifier,
    seed: int,
    stories: int,
    steps: int = 20,
    sheet: Path | None = None,
) -> dict:
    """All figures, JSON-ready; `sheet` is a file for the `comparison` of the first stories. Raises SettingError."""
    if stories < 1:
        raise SettingError(f"stories must be at least 1, not {stories}.")
    pages = held_out_stories(seed, stories)
    drawing = ImageGenerationConfig(num_inference_steps=steps, scheduler="dpm++", guidance_scale=3.0, seed=seed)
    result: dict = {"seed": seed, "stories": stories, "steps": steps, "pictures": {}}
    shown = {}
    for kind in ABLATIONS:
        off = ImageGenerationConfig(**{**vars(drawing), "mmfs_scale": 0.0}) if kind.startswith("no ") else drawing
        with llm_mmfs_disabled(model) if kind == "no synchronizer" else contextlib.nullcontext():
            drawn = generate_from_gold_text(model, pages, off, hidden=kind == ABLATIONS[-1])
        result["pictures"][kind] = evaluate_pictures(judge, pages, drawn)
        shown[kind] = drawn[:2]
        if kind == "full":
            true = [pixels_of(page.scene) for story in pages for page in story[1:]]
            result["same hero by scene"] = evaluate_scenes(judge, pages, drawn)
            result["frechet distance"] = frechet_distance(judge, [p for row in drawn for p in row], true)
        sys.stderr.write(f"{kind}: {json.dumps(result['pictures'][kind])}\n")
    if sheet is not None:
        atomic_write(sheet, encode_png(to_tensor(comparison(pages, shown))))
    result["captions"] = evaluate_captions(model, [page.scene for story in pages for page in story][: 2 * stories])
    result |= evaluate_telling(model, judge, pages, drawing)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter", help="a checkpoint folder (default: the starter)")
    parser.add_argument("--judge", default=SHIPPED, help="of starter_training.classifier (default: the one that ships)")
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
