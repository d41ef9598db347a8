"""Storyboard files: stories to generate, in this project's format or the reference's annotation format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import ImageError, StoryError
from .story import ImageSegment, Story, TextSegment, open_named_image
from .storyboard_tables import csv_entries, markdown_entries

MAX_PANELS = 1000
SCHEMA_FILE = "comfy_mminterleaved/stories/storyboard.schema.json"
TABLES = (".md", ".csv", ".tsv")


class Step(str, Enum):
    """What a step of a plan generates."""

    TEXT = "text"
    IMAGE = "image"


GENERATE_MODES = {"generate_images": Step.IMAGE, "generate_texts": Step.TEXT}


@dataclass(frozen=True)
class StoryPlan:
    """One story to generate.

    Args:
        opening: The opening; its `image_first` is the file's, None if the file does not set it.
        panels: How many panels follow.
        script: The text of each panel, None where the model writes it; may be shorter than `panels`.
        steps: The steps of each panel where the file spells them out (the reference's annotations).
    """

    opening: Story
    panels: int
    title: str = ""
    seed: int = 0
    script: tuple[str | None, ...] = ()
    steps: tuple[tuple[Step | TextSegment, ...], ...] | None = None

    def steps_after(self, opening: Story) -> tuple[tuple[Step | TextSegment, ...], ...]:
        """The steps of each panel after `opening`: this plan's opening, arranged and introduced by the model."""
        return plan_panels(opening, self.panels, self.script) if self.steps is None else self.steps


def split_script(script: str) -> list[str]:
    """The texts of a script's panels, which blank lines divide."""
    panels = [" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", script.replace("\r\n", "\n"))]
    return [panel for panel in panels if panel]


def load_storyboard(path: str | Path) -> list[StoryPlan]:
    """Reads a storyboard; images are files below its folder. Raises StoryError, ImageError.

    Markdown (.md) and CSV (.csv, .tsv): see `storyboard_tables`. This project's JSON (storyboard.schema.json):

        {"format": "mm-interleaved-storyboard", "version": 1, "stories": [
            {"title": "Mia", "opening": [{"text": "..."}, {"image": "mia.png"}], "panels": 4,
             "image_first": false, "seed": 1}]}

    `panels` is their number, or a list of their texts: {"text": "..."} or a string; {} where the model writes it.
    Without `image_first`, the model's own order is used.

    The reference's: a list of {sentences, images, sentence_ixs, image_first, generate_mode, num_iter}. With the mode
    generate_images its last image stands for the one to generate and is not read.
    """
    path = Path(path)
    entries, parse = _read_entries(path)
    return [parse(entry, path.parent, f"Story {n} of {path.name!r}") for n, entry in enumerate(entries, 1)]


def storyboard_images(path: str | Path) -> list[str]:
    """The files that a storyboard names, as it names them, each once; those of data URLs are left out."""
    entries, parse = _read_entries(Path(path))
    names = []
    for entry in entries:
        if parse is _own:
            opening = entry.get("opening", [])
            segments = opening if isinstance(opening, list) else []
            names += [s.get("image", s.get("picture")) for s in segments if isinstance(s, dict) and "text" not in s]
        else:
            last = -1 if entry.get("generate_mode") == "generate_images" else None  # it stands for the one to generate
            names += entry["images"][:last]
    return [name.replace("\\", "/") for name in dict.fromkeys(names) if not name.startswith("data:image/")]


def _read_entries(path: Path) -> tuple[list[dict], Callable]:
    """The stories of a storyboard file, and what parses one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise StoryError(f"The storyboard {str(path)!r} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise StoryError(f"The storyboard {str(path)!r} is not text in UTF-8: {error}; save it as UTF-8.") from None
    data = _table(text, path) if path.suffix.lower() in TABLES else None
    try:
        data = data or json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise StoryError(
            f"The storyboard {str(path)!r} is not JSON: {error}. A storyboard is a .json file with the format "
            f"'mm-interleaved-storyboard', as {SCHEMA_FILE} describes it, a list of the reference's annotations, or "
            "a file in Markdown (.md) or CSV (.csv)."
        ) from None
    if isinstance(data, dict) and data.get("format") == "mm-interleaved-storyboard":
        if data.get("version", 1) != 1:
            raise StoryError(f"{str(path)!r} has version {data['version']!r:.20}; this release reads version 1.")
        entries, parse = data.get("stories"), _own
    elif isinstance(data, list):
        entries, parse = data, _annotation
    else:
        raise StoryError(
            f"{str(path)!r} is no storyboard: it must be a list of annotations, or have the format "
            f"'mm-interleaved-storyboard', as {SCHEMA_FILE} describes it."
        )
    if not isinstance(entries, list) or not entries:
        raise StoryError(f"The storyboard {str(path)!r} holds no stories.")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise StoryError(f"Story {number} of {path.name!r} must be an object, not {entry!r:.60}.")
    return entries, parse


def _table(text: str, path: Path) -> dict:
    """A Markdown or CSV storyboard in the JSON form."""
    entries = markdown_entries if path.suffix.lower() == ".md" else csv_entries
    return {"format": "mm-interleaved-storyboard", "stories": entries(text, repr(path.name))}


def _own(entry: dict, folder: Path, name: str) -> StoryPlan:
    unknown = sorted(set(entry) - {"title", "opening", "panels", "image_first", "picture_first", "seed"})
    if unknown:
        raise StoryError(f"{name} has settings that are not known: {', '.join(unknown)} ({SCHEMA_FILE} has all).")
    opening = entry.get("opening", [])
    if isinstance(opening, str):
        opening = [{"text": opening}]
    if not isinstance(opening, list):
        raise StoryError(f"{name}: opening must be text or a list of texts and images, not {opening!r:.60}.")
    panels, script = _panels(entry.get("panels", 3), f"{name}: panels")
    key = "image_first" if "image_first" in entry else "picture_first"
    image_first = entry.get(key)
    if not isinstance(image_first, bool | None):
        raise StoryError(f"{name}: {key} must be true or false, not {image_first!r:.60}.")
    title = entry.get("title", "")
    if not isinstance(title, str):
        raise StoryError(f"{name}: title must be text, not {title!r:.60}.")
    seed = _integer(entry.get("seed", 0), f"{name}: seed", 0, 2**63 - 1 - MAX_PANELS)
    try:
        data = {"format": "mm-interleaved-story", "image_first": image_first, "segments": opening}
        story = Story.from_json(data, folder)
    except (StoryError, ImageError) as error:
        raise type(error)(f"{name}: {error}") from None
    return StoryPlan(story, panels, title, seed, script)


def _panels(value, name: str) -> tuple[int, tuple[str | None, ...]]:
    """The number of panels, and their texts if these are listed."""
    if not isinstance(value, list):
        return _integer(value, name, 1, MAX_PANELS), ()
    if not 1 <= len(value) <= MAX_PANELS:
        raise StoryError(f"{name} must list 1 to {MAX_PANELS} panels, not {len(value)}.")
    script = []
    for number, panel in enumerate(value, 1):
        text = panel.get("text", "") if isinstance(panel, dict) and not set(panel) - {"text"} else panel
        if not isinstance(text, str):
            raise StoryError(f"{name}: panel {number} must be text, or an object with its text, not {panel!r:.60}.")
        script.append(text.strip() or None)
    return len(script), tuple(script)


def plan_panels(story: Story, panels: int, script=()) -> tuple[tuple[Step | TextSegment, ...], ...]:
    """The steps of `panels` more panels in the story's own order.

    Text at the end of a text-first story, and all text of a story without images, belongs to the next panel. An
    image-first story that ends with an image first gets the text of that image.

    Args:
        script: Given texts of the panels; None where the model writes the text.
    """
    texts = [TextSegment(text) if text else Step.TEXT for text in script] + [Step.TEXT] * (panels - len(script))
    if story.image_first if story.image_first is not None else story.opens_image_first:
        steps = [(Step.IMAGE, text) for text in texts]
        if story.segments and isinstance(story.segments[-1], ImageSegment):
            return ((Step.TEXT,), *steps)
        if story.segments and not story.images and texts[0] == Step.TEXT:
            steps[0] = (Step.IMAGE,)
        return tuple(steps)
    steps = [(text, Step.IMAGE) for text in texts]
    if steps[0][0] == Step.TEXT and story.segments and isinstance(story.segments[-1], TextSegment):
        steps[0] = (Step.IMAGE,)
    return tuple(steps)


def panel_seeds(story: Story, plan) -> list[int]:
    """Seed offset of each entry of a plan: the number of its panel in the story, from 0.

    Panels that are added later thus have the same seeds as in a story generated at once.
    """
    count, seeds = len(story.images), []
    for steps in plan:
        draws = Step.IMAGE in steps
        seeds.append(count if draws or not story.is_image_first else max(count - 1, 0))
        count += draws
    return seeds


def _annotation(entry: dict, folder: Path, name: str) -> StoryPlan:
    """Parses an annotation; places texts and images as `load_annt_data` of the reference's inference.py does."""
    sentences, images, places, firsts = (
        entry.get(key) for key in ("sentences", "images", "sentence_ixs", "image_first")
    )
    if not all(isinstance(v, list) for v in (sentences, images, places, firsts)):
        raise StoryError(f"{name} must have the lists sentences, images, sentence_ixs and image_first.")
    if not len(images) == len(places) == len(firsts):
        raise StoryError(
            f"{name} has {len(images)} images, {len(places)} sentence_ixs and {len(firsts)} image_first; "
            "they must agree."
        )
    if not all(isinstance(v, str) for v in sentences + images):
        raise StoryError(f"{name}: sentences and images must hold texts.")
    mode = entry.get("generate_mode", "generate_texts")
    if mode not in GENERATE_MODES:
        raise StoryError(f"{name}: generate_mode must be one of {', '.join(GENERATE_MODES)}, not {mode!r}.")
    count = _integer(entry.get("num_iter", 1), f"{name}: num_iter", 1, 2 * MAX_PANELS)

    parts: list[list[str | None]] = [[sentence] for sentence in sentences]  # None is an image's place
    for place, first in zip(places, firsts):
        if not isinstance(place, int) or not 0 <= place < len(sentences):
            raise StoryError(f"{name}: a sentence_ix must be from 0 to {len(sentences) - 1}, not {place!r}.")
        parts[place].insert(0 if first else len(parts[place]), None)
    flat = [part for sentence in parts for part in sentence]
    draws = GENERATE_MODES[mode] == Step.IMAGE
    if draws and (None not in flat or any(flat[len(flat) - flat[::-1].index(None) :])):
        raise StoryError(f"{name}: with generate_images the last image, which is generated, must be at the end.")
    if draws:  # the last image is only a place
        flat = flat[: len(flat) - flat[::-1].index(None) - 1]
    names = iter(images)
    story = Story()
    for part in flat:
        story = story.add(part.strip() if part is not None else open_named_image(next(names), folder))
    order = (Step.IMAGE, Step.TEXT) if draws else (Step.TEXT, Step.IMAGE)
    steps = (order,) * (count // 2) + (order[:1],) * (count % 2)
    return StoryPlan(story, sum(Step.IMAGE in panel for panel in steps), steps=steps)


def _integer(value, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        label = f"{value!r:.60}" if not isinstance(value, int) or abs(value) < 10**30 else "one of over thirty digits"
        raise StoryError(f"{name} must be a whole number from {low} to {high}, not {label}.")
    return value
