"""Evaluates how often a hero stays the same in stories that open with an image from outside the world.

The sixty images are in no training set: animals of two other icon sets (Noto, Twemoji), photographs and scans from
scikit-image, renderings of the world in other styles, and noise. Each opens two stories, `text, image` and
`image, text`, generated as by the command line; the classifier compares the looks in the four generated panels.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from comfy_mminterleaved.errors import MMInterleavedError, SettingError
from comfy_mminterleaved.files import atomic_write, ensure_writable_dir, write_json
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.images import encode_png, to_pil, to_tensor
from comfy_mminterleaved.stories.story import ImageSegment, Story

from . import renderer, world
from .classifier import SHIPPED, AttributeClassifier, load

ICONS = Path(__file__).parent / "art" / "foreign.json"
NUM_PANELS = 4
PHOTOS = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "clock",
    "grass",
    "horse",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
PHOTO_ANIMALS = {"cat": "cat"}


def foreign_images(icons: Path = ICONS) -> list[tuple[str, str | None, Image.Image]]:
    """Returns name, animal (if it is one of the world's) and image."""
    images: list[tuple[str, str | None, Image.Image]] = []
    for name, group in json.loads(icons.read_text(encoding="utf-8")).items():
        for animal, body in group["icons"].items():
            rng = random.Random(f"{name} {animal}")
            images.append((f"{name} {animal}", animal, _icon(body, group["side"], rng)))
    images += [(f"photo {name}", PHOTO_ANIMALS.get(name), _photo(name)) for name in PHOTOS]
    images += [(f"style {name}", animal, image) for name, animal, image in _styles()]
    return images + [(f"noise {name}", None, image) for name, image in _noise()]


def _icon(body: str, side: int, rng: random.Random, size: int = 256) -> Image.Image:
    """Renders an icon on a plain background of a random colour."""
    import io

    import resvg_py

    background = f"hsl({rng.randrange(360)},{rng.randrange(10, 60)}%,{rng.randrange(70, 95)}%)"
    scale, shift = rng.uniform(0.6, 0.95) * size / side, rng.uniform(0.02, 0.05) * size
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {size} {size}">'
        f'<rect width="{size}" height="{size}" fill="{background}"/>'
        f'<g transform="translate({shift} {shift}) scale({scale})">{body}</g></svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)))).convert("RGB")


def _photo(name: str) -> Image.Image:
    from skimage import data

    pixels = getattr(data, name)()
    image = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels)
    image = image.convert("RGB")
    image.thumbnail((512, 512))
    return image


def _styles() -> list[tuple[str, str, Image.Image]]:
    """Renders scenes of the world in other styles."""
    styles = {
        "grey": lambda x: ImageOps.grayscale(x),
        "inverted": ImageOps.invert,
        "pixels": lambda x: x.resize((24, 24), Image.Resampling.BOX).resize((128, 128), Image.Resampling.NEAREST),
        "blurred": lambda x: x.filter(ImageFilter.GaussianBlur(3)),
        "pencil": lambda x: ImageOps.invert(x.convert("L").filter(ImageFilter.FIND_EDGES)),
        "posters": lambda x: ImageOps.posterize(x, 2),
        "sepia": lambda x: ImageOps.colorize(x.convert("L"), "#2b1a0a", "#f6e3bd"),
        "turned": lambda x: x.rotate(180),
    }
    images = []
    for number, (name, style) in enumerate(styles.items()):
        scene = world.make_story(900_000 + number, held_out=True, heroes=1)[0].scene
        images.append((name, scene.heroes[0].species, style(Image.fromarray(renderer.paint(scene))).convert("RGB")))
    return images


def _noise() -> list[tuple[str, Image.Image]]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    noises = {
        "white": rng.integers(0, 256, (128, 128, 3)),
        "clouds": np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), "uint8")).resize((128, 128), 3)),
        "stripes": np.stack([128 + 127 * np.sin(x / 5), 128 + 127 * np.sin(y / 9), 128 + 0 * x], -1),
        "plain": np.full((128, 128, 3), (200, 60, 90)),
    }
    return [(name, Image.fromarray(np.asarray(pixels).astype("uint8"))) for name, pixels in noises.items()]


def evaluate_foreign(
    model: MMInterleavedPipeline,
    judge: AttributeClassifier,
    images,
    seed: int = 0,
    introduce: bool = True,
    sheet: Path | None = None,
) -> dict:
    """Returns all figures, JSON-ready, and writes every story's images to `sheet`, a row each."""
    from .evaluate import bootstrap_interval

    same_hero, recognized, rows, stories = {"text, image": [], "image, text": []}, [], [], []
    for number, (name, animal, image) in enumerate(images):
        panel = world.make_story(seed * 100_000 + number, held_out=True, heroes=1)[0]
        text, first = world.describe(panel.scene, random.Random(number)), ImageSegment.of(image)
        for order, opening in (("text, image", (text, first)), ("image, text", (first, text))):
            offset = seed + 1000 * number
            story = model.generate_story(
                Story.of(*opening),
                NUM_PANELS,
                text_config=model.generation_config.text.with_seed_offset(offset),
                image_config=model.generation_config.image.with_seed_offset(offset),
                introduce=introduce,
            )
            generated = [segment.pixels for segment in story.images[1:]]
            looks = [prediction.looks for prediction in judge.predict(torch.stack(generated))]
            same_hero[order].append(len(set(looks)) == 1 and len(looks[0]) == 1)
            if animal is not None:
                species = [look[0][0] for look in looks if look]
                recognized.append(max(set(species), key=species.count, default="") == animal)
            rows.append([first.pixels, *generated])
            stories.append({"picture": name, "order": order, "texts": [p.text for p in story.panels()], "looks": looks})
        shares = {order: f"{sum(cases)} of {len(cases)}" for order, cases in same_hero.items()}
        sys.stderr.write(f"{name}: {shares}, animal {sum(recognized)} of {len(recognized)}\n")
    if sheet is not None:
        atomic_write(sheet, encode_png(to_tensor(_sheet(rows))))
    figures = {order: bootstrap_interval(cases) for order, cases in same_hero.items()}
    both = bootstrap_interval([case for cases in same_hero.values() for case in cases])
    return {
        "same hero in all panels": {**figures, "both": both},
        "animal recognized": bootstrap_interval(recognized),
        "told": stories,
    }


def _sheet(rows: list[list[torch.Tensor]], side: int = 96, columns: int = 3) -> Image.Image:
    width, height = (NUM_PANELS + 1) * side + 8, side + 4
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    for number, row in enumerate(rows):
        left, top = number % columns * width, number // columns * height
        for i, pixels in enumerate(row):
            sheet.paste(ImageOps.fit(to_pil(pixels), (side, side)), (left + i * side, top))
    return sheet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.evaluate_foreign", description=__doc__)
    parser.add_argument("--model", default="starter", help="a checkpoint folder (default: the starter)")
    parser.add_argument("--judge", default=SHIPPED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=60, help="number of images, evenly spaced (default: all)")
    parser.add_argument("--icons", default=ICONS, help="another icon file (default: the held-out icons)")
    parser.add_argument("--no-introduction", action="store_true", help="do not introduce the hero in the text")
    parser.add_argument("--out", default="runs/foreign", help="a folder for foreign.json and foreign.png")
    args = parser.parse_args(argv)
    try:
        images = foreign_images(Path(args.icons))
        if not 1 <= args.pictures <= len(images):
            raise SettingError(f"--pictures must be from 1 to {len(images)}, not {args.pictures}.")
        images = [images[i * len(images) // args.pictures] for i in range(args.pictures)]
        out, judge = ensure_writable_dir(args.out), load(args.judge)
        model = MMInterleavedPipeline.load(args.model)
        result = evaluate_foreign(model, judge, images, args.seed, not args.no_introduction, out / "foreign.png")
        write_json(out / "foreign.json", {"model": str(args.model), "seed": args.seed, **result})
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    sys.stdout.write(json.dumps({k: v for k, v in result.items() if k != "told"}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
