"""Saves and loads stories as files: numbered images, story.json, and story.html, a self-contained page."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from ..errors import StoryError
from ..files import atomic_write, remove_leftovers, write_json
from .images import encode_png
from .story import ImageSegment, Story

METADATA_KEY = "mm-interleaved"


@dataclass(frozen=True)
class Book:
    """A story as it was saved: its title, and the settings that it was made with."""

    story: Story
    title: str
    settings: dict


def save_story(
    folder: str | Path,
    story: Story,
    title: str = "",
    settings: dict | None = None,
    metadata: dict | None = None,
    has_metadata: bool = True,
) -> list[Path]:
    """Writes a story into an existing folder, each file atomically; raises OutputError.

    An image that came from a file keeps its bytes; others become PNGs that carry their panel's text and the settings.
    Unchanged images are not written again.

    Args:
        folder: A story saved there before is replaced, including its images.
        settings: JSON-ready; kept in story.json and in the images' metadata.
        metadata: Further text chunks of every PNG that is made, by keyword.
        has_metadata: False leaves all of it, and the panel's text, out of the images; those that came from files are
            encoded anew.

    Returns:
        The files: 01.png, 02.png, ..., also 01-refined.png where there is one, story.json, story.html.
    """
    folder = Path(folder)
    remove_leftovers(folder)
    old = _saved_images(folder)
    names, refined_names, states = [], [], {}
    for number, panel in enumerate((p for p in story.panels() if p.image is not None), 1):
        image = panel.image if has_metadata else replace(panel.image, file=None)
        name = f"{number:02d}{image.file.suffix if image.file else '.png'}"
        about = {"image": name, "panel": number, "text": panel.text, "title": title, "settings": settings or {}}
        if image.seed is not None:
            about["seed"] = image.seed
        data = json.dumps(about, ensure_ascii=False)
        kept = f"{data} {metadata}" if has_metadata else ""
        state = hashlib.blake2b(f"{image.digest} {kept}".encode(), digest_size=16).hexdigest()
        if old.get(name) != state or not (folder / name).is_file():
            atomic_write(
                folder / name, image.file.data if image.file else _png(image, data if has_metadata else None, metadata)
            )
        names.append(name)
        states[name] = state
        refined_names.append(None)
        if image.refined is not None:
            larger = replace(image, pixels=image.refined, refined=None, file=None)
            refined_names[-1] = name = f"{number:02d}-refined.png"
            states[name] = hashlib.blake2b(f"{larger.digest} {kept}".encode(), digest_size=16).hexdigest()
            if old.get(name) != states[name] or not (folder / name).is_file():
                about = json.dumps({**about, "image": name}, ensure_ascii=False)
                atomic_write(folder / name, _png(larger, about if has_metadata else None, metadata))
    data = {**story.to_json(names, refined_names), "title": title, "settings": settings or {}, "saved": states}
    write_json(folder / "story.json", data)
    atomic_write(folder / "story.html", render_page(story, title).encode("utf-8"))
    for name in set(old) - set(states):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    return [*(folder / name for name in states), folder / "story.json", folder / "story.html"]


def displayed_images(names: Sequence[str]) -> list[str]:
    """Of a saved story's files the images that a page shows, one a panel: the refined one where there is one."""
    images = [name for name in names if re.fullmatch(r"\d+(-refined)?\.(png|jpg|webp)", name)]
    refined = {name.partition("-")[0] for name in images if "-refined" in name}
    return [name for name in images if "-refined" in name or name.partition(".")[0] not in refined]


def _png(image: ImageSegment, data: str | None, metadata: dict | None) -> bytes:
    if data is None:
        return encode_png(image.pixels)
    info = PngInfo()
    info.add_itxt(METADATA_KEY, data)
    for keyword, text in (metadata or {}).items():
        info.add_text(keyword, text)
    return encode_png(image.pixels, info)


def _saved_images(folder: Path) -> dict[str, str]:
    """The numbered images of a story saved in a folder before, and the state that each was saved in."""
    try:
        data = json.loads((folder / "story.json").read_text(encoding="utf-8"))
        names = [segment.get("image", segment.get("picture")) for segment in data["segments"]]
        names += [segment.get("refined") for segment in data["segments"]]
        states = data.get("saved", {})
        return {
            n: states.get(n, "")
            for n in names
            if isinstance(n, str) and re.fullmatch(r"\d+(-refined)?\.(png|jpg|webp)", n)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def has_book(folder: Path) -> bool:
    """Whether a folder holds a saved story, or numbered folders of them."""
    try:
        return any(folder.glob("story.json")) or any(folder.glob("[0-9][0-9][0-9]*/story.json"))
    except (OSError, ValueError):
        return False


def load_story(path: str | Path) -> Story:
    """Reads a story.json, or the folder of one, with the images beside it."""
    return load_book(path).story


def load_book(path: str | Path) -> Book:
    """`load_story`, with the title and the settings that were saved with it."""
    path = Path(path)
    try:
        if path.is_dir():
            path = path / "story.json"
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise StoryError(f"The story {str(path)!r} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise StoryError(f"The story {str(path)!r} is not JSON in UTF-8: {error}.") from None
    story = Story.from_json(data, path.parent)
    title, settings = data.get("title", ""), data.get("settings", {})
    if not isinstance(title, str) or not isinstance(settings, dict):
        raise StoryError(f"The story {str(path)!r} must have text as its title and an object as its settings.")
    return Book(story, title, settings)


# First word of the Unicode names of a script's letters -> language tag; the languages most often written in it.
_LANGUAGES = {
    "LATIN": "en",
    "CYRILLIC": "ru",
    "GREEK": "el",
    "HEBREW": "he",
    "ARABIC": "ar",
    "CJK": "zh",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "DEVANAGARI": "hi",
    "THAI": "th",
}
_WITH_INITIALS = ("en", "ru", "el", "he")  # scripts whose letters stand apart: the first can be set large


def language_of(text: str) -> str:
    """A language tag for a text, by the script that most of its letters are in; kana make Chinese signs Japanese."""
    scripts = Counter(unicodedata.name(c, "?").split(" ")[0].split("-")[0] for c in text if c.isalpha())
    for kana in ("HIRAGANA", "KATAKANA"):
        if scripts[kana]:
            scripts[kana] += scripts.pop("CJK", 0)
    return _LANGUAGES.get(scripts.most_common(1)[0][0], "und") if scripts else "en"


def render_page(story: Story, title: str = "", language: str = "") -> str:
    """The story as one HTML page, images inside: a book on a screen, a phone, and on paper.

    Args:
        language: A tag such as "de"; "" guesses it from the script.
    """
    panels = story.panels()
    title = title.strip() or book_title(story)
    pages = []
    for number, panel in enumerate(panels, 1):
        image = ""
        if panel.image is not None:
            width, height = panel.image.size
            alt = html.escape(panel.alt or f"Image {number}", quote=True)
            seed = "" if panel.image.seed is None else f' title="seed {panel.image.seed}"'
            image = f'<img src="{panel.image.page_url}" width="{width}" height="{height}" alt="{alt}"{seed}>'
        text = "".join(f'<p dir="auto">{html.escape(p)}</p>' for p in panel.text.split("\n") if p.strip())
        kind = "sheet" if image else "sheet words"
        pages.append(f'<section class="{kind}">{image}<div class="text">{text}</div><span>{number}</span></section>')
    language = language or language_of(story.text)
    parts = {
        "title": html.escape(title),
        "pages": "\n".join(pages),
        "language": language,
        "initials": "initials" if language_of(story.text) in _WITH_INITIALS else "",
    }
    # In one pass: texts stay as they are.
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|pages|language|initials)\}\}", lambda match: parts[match[1]], template)


def book_title(story: Story, longest: int = 60) -> str:
    """A title for a story that has none: its first sentence."""
    text = next((panel.text for panel in story.panels() if panel.text), "")
    sentence = text.split(". ")[0].split("\n")[0].strip(" .")
    if len(sentence) > longest:
        sentence = sentence[:longest].rsplit(" ", 1)[0] + "\N{HORIZONTAL ELLIPSIS}"
    return sentence or "A story"
