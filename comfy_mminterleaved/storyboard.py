"""Storyboard files: stories to make, in this project's format or the reference's annotation format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import PictureError, StoryError
from .story import Story, Text, read_named

MODES = {"generate_images": "draw", "generate_texts": "write"}


@dataclass(frozen=True)
class Plan:
    """One story to make: what it opens with, and the panels to go on with, each its steps "write" and "draw"."""

    opening: Story
    panels: tuple[tuple[str, ...], ...]
    title: str = ""
    seed: int = 0


def load_storyboard(path: str | Path) -> list[Plan]:
    """Reads a storyboard; pictures are files below its folder. Raises StoryError, PictureError.

    This project's format:

        {"format": "mm-interleaved-storyboard", "version": 1, "stories": [
            {"title": "Mia", "opening": [{"text": "..."}, {"picture": "mia.png"}], "panels": 4,
             "picture_first": false, "seed": 1}]}

    `picture_first` may be left away: see `plan_panels`.

    The reference's: a list of {sentences, images, sentence_ixs, image_first, generate_mode, num_iter}. With the mode
    generate_images its last picture stands for the one to draw and is not read.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise StoryError(f"The storyboard {str(path)!r} cannot be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StoryError(f"The storyboard {str(path)!r} is not JSON in UTF-8: {error}.") from None
    if isinstance(data, dict) and data.get("format") == "mm-interleaved-storyboard":
        if data.get("version", 1) != 1:
            raise StoryError(f"{str(path)!r} has version {data['version']!r:.20}; this release reads version 1.")
        entries, parse = data.get("stories"), _own
    elif isinstance(data, list):
        entries, parse = data, _annotation
    else:
        raise StoryError(
            f"{str(path)!r} is no storyboard: it must be a list of annotations, or have the format "
            "'mm-interleaved-storyboard'."
        )
    if not isinstance(entries, list) or not entries:
        raise StoryError(f"The storyboard {str(path)!r} holds no stories.")
    plans = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise StoryError(f"Story {number} of {path.name!r} must be an object, not {entry!r:.60}.")
        plans.append(parse(entry, path.parent, f"Story {number} of {path.name!r}"))
    return plans


def _own(entry: dict, folder: Path, name: str) -> Plan:
    opening = entry.get("opening", [])
    unknown = sorted(set(entry) - {"title", "opening", "panels", "picture_first", "seed"})
    if unknown:
        raise StoryError(f"{name} has settings that are not known: {', '.join(unknown)}.")
    if isinstance(opening, str):
        opening = [{"text": opening}]
    if not isinstance(opening, list):
        raise StoryError(f"{name}: opening must be text or a list of texts and pictures, not {opening!r:.60}.")
    panels = _integer(entry.get("panels", 3), f"{name}: panels", 1)
    try:
        story = Story.from_json({"format": "mm-interleaved-story", "segments": opening}, folder)
    except (StoryError, PictureError) as error:
        raise type(error)(f"{name}: {error}") from None
    picture_first = entry.get("picture_first")
    if not isinstance(picture_first, bool | None):
        raise StoryError(f"{name}: picture_first must be true or false, not {picture_first!r:.60}.")
    plan = plan_panels(story, panels, picture_first)
    title = entry.get("title", "")
    if not isinstance(title, str):
        raise StoryError(f"{name}: title must be text, not {title!r:.60}.")
    return Plan(story, plan, title, _integer(entry.get("seed", 0), f"{name}: seed", 0))


def plan_panels(story: Story, panels: int, picture_first: bool | None = None) -> tuple[tuple[str, ...], ...]:
    """The steps of `panels` more panels; text that a story ends with is, for text first, the next panel's.

    Args:
        picture_first: None goes on as the story does (`Story.picture_first`).
    """
    if story.picture_first if picture_first is None else picture_first:
        return (("draw", "write"),) * panels
    has_text = bool(story.segments) and isinstance(story.segments[-1], Text)
    first = ("draw",) if has_text else ("write", "draw")
    return (first, *(("write", "draw"),) * (panels - 1))


def _annotation(entry: dict, folder: Path, name: str) -> Plan:
    """As `load_annt_data` of the reference's inference.py places them."""
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
    if mode not in MODES:
        raise StoryError(f"{name}: generate_mode must be one of {', '.join(MODES)}, not {mode!r}.")
    count = _integer(entry.get("num_iter", 1), f"{name}: num_iter", 1)

    parts: list[list[str | None]] = [[sentence] for sentence in sentences]  # None is a picture's place
    for place, first in zip(places, firsts):
        if not isinstance(place, int) or not 0 <= place < len(sentences):
            raise StoryError(f"{name}: a sentence_ix must be from 0 to {len(sentences) - 1}, not {place!r}.")
        parts[place].insert(0 if first else len(parts[place]), None)
    flat = [part for sentence in parts for part in sentence]
    draws = MODES[mode] == "draw"
    if draws and (None not in flat or any(flat[len(flat) - flat[::-1].index(None) :])):
        raise StoryError(f"{name}: with generate_images the last picture, which is drawn, must be at the end.")
    if draws:  # the last picture is only a place
        flat = flat[: len(flat) - flat[::-1].index(None) - 1]
    names = iter(images)
    story = Story()
    for part in flat:
        story = story.add(part.strip() if part is not None else read_named(next(names), folder))
    order = ("draw", "write") if draws else ("write", "draw")
    return Plan(story, (order,) * (count // 2) + (order[:1],) * (count % 2))


def _integer(value, name: str, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise StoryError(f"{name} must be a whole number of at least {low}, not {value!r:.60}.")
    return value
