"""A story as files: numbered pictures, story.json, and story.html, one page that holds everything."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from ..errors import StoryError
from ..files import write_bytes, write_json
from .images import encode_png
from .story import Picture, Story

METADATA_KEY = "mm-interleaved"


@dataclass(frozen=True)
class Book:
    """A story as it was saved: its title, and the settings that it was made with."""

    story: Story
    title: str
    settings: dict


def save_story(
    folder: str | Path, story: Story, title: str = "", settings: dict | None = None, metadata: dict | None = None
) -> list[Path]:
    """Writes a story into a folder that is there; each file appears whole or not at all. Raises OutputError.

    A picture that came from a file keeps its bytes; others become PNGs that carry their panel's text and the settings.
    One that the folder holds already is not written again.

    Args:
        folder: a story saved there before is replaced, pictures and all.
        settings: JSON-ready; kept in story.json and in the pictures' metadata.
        metadata: more text chunks for every PNG that is made, by keyword.

    Returns:
        The files: 01.png, 02.png, ..., story.json, story.html.
    """
    folder = Path(folder)
    old = _saved_pictures(folder)
    names, states = [], {}
    for number, panel in enumerate((p for p in story.panels() if p.picture is not None), 1):
        picture = panel.picture
        name = f"{number:02d}{picture.file.suffix if picture.file else '.png'}"
        about = {"picture": name, "panel": number, "text": panel.text, "title": title, "settings": settings or {}}
        data = json.dumps(about, ensure_ascii=False)
        state = hashlib.blake2b(f"{picture.key} {data} {metadata}".encode(), digest_size=16).hexdigest()
        if old.get(name) != state or not (folder / name).is_file():
            write_bytes(folder / name, picture.file.data if picture.file else _png(picture, data, metadata))
        names.append(name)
        states[name] = state
    data = {**story.to_json(names), "title": title, "settings": settings or {}, "saved": states}
    write_json(folder / "story.json", data)
    write_bytes(folder / "story.html", page(story, title).encode("utf-8"))
    for name in set(old) - set(names):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    return [*(folder / name for name in names), folder / "story.json", folder / "story.html"]


def _png(picture: Picture, data: str, metadata: dict | None) -> bytes:
    info = PngInfo()
    info.add_itxt(METADATA_KEY, data)
    for keyword, text in (metadata or {}).items():
        info.add_text(keyword, text)
    return encode_png(picture.pixels, info)


def _saved_pictures(folder: Path) -> dict[str, str]:
    """The numbered pictures of a story saved in a folder before, and the state that each was saved in."""
    try:
        data = json.loads((folder / "story.json").read_text(encoding="utf-8"))
        names = [segment.get("image", segment.get("picture")) for segment in data["segments"]]
        states = data.get("saved", {})
        return {n: states.get(n, "") for n in names if isinstance(n, str) and re.fullmatch(r"\d+\.(png|jpg|webp)", n)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def has_book(folder: Path) -> bool:
    """Whether a folder holds a saved story, or numbered folders of them."""
    try:
        return any(folder.glob("story.json")) or any(folder.glob("[0-9][0-9][0-9]*/story.json"))
    except (OSError, ValueError):
        return False


def load_story(path: str | Path) -> Story:
    """Reads a story.json, or the folder of one, with the pictures beside it."""
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


def page(story: Story, title: str = "") -> str:
    """The story as one HTML page, pictures inside: a book on a screen, a phone, and on paper."""
    panels = story.panels()
    title = title or _title(next((panel.text for panel in panels if panel.text), ""))
    sheets = []
    for number, panel in enumerate(panels, 1):
        picture = ""
        if panel.picture is not None:
            width, height = panel.picture.size
            alt = html.escape(panel.text or f"Picture {number}", quote=True)
            picture = f'<img src="{panel.picture.page_url}" width="{width}" height="{height}" alt="{alt}">'
        text = "".join(f'<p dir="auto">{html.escape(p)}</p>' for p in panel.text.split("\n") if p.strip())
        kind = "sheet" if picture else "sheet words"
        sheets.append(f'<section class="{kind}">{picture}<div class="text">{text}</div><span>{number}</span></section>')
    language = language_of(story.text)
    parts = {
        "title": html.escape(title),
        "sheets": "\n".join(sheets),
        "language": language,
        "initials": "initials" if language in _WITH_INITIALS else "",
    }
    # In one pass: texts stay as they are.
    return re.sub(r"\{\{(title|sheets|language|initials)\}\}", lambda match: parts[match[1]], _PAGE)


def _title(text: str, longest: int = 60) -> str:
    sentence = text.split(". ")[0].split("\n")[0].strip(" .")
    if len(sentence) > longest:
        sentence = sentence[:longest].rsplit(" ", 1)[0] + "\N{HORIZONTAL ELLIPSIS}"
    return sentence or "A story"


_PAGE = """<!DOCTYPE html>
<html lang="{{language}}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
  :root { --ink: #2c2622; --paper: #fffdf7; --desk: #e9e1d3; --rule: #c8b89c; }
  * { box-sizing: border-box; }
  body { margin: 0; background: var(--desk); color: var(--ink); font: 1.25rem/1.65 Georgia, "Iowan Old Style",
         "Palatino Linotype", "Noto Serif", serif; }
  main { max-width: 44rem; margin: 0 auto; padding: 3rem 1rem 4rem; }
  h1 { font-size: clamp(1.7rem, 6vw, 2.7rem); line-height: 1.2; font-weight: normal; text-align: center;
       text-wrap: balance; margin: 0 auto 2.5rem; padding-bottom: 1.2rem; overflow-wrap: anywhere; }
  h1::after { content: ""; display: block; width: 5rem; margin: 1.2rem auto 0; border-top: 2px solid var(--rule); }
  .sheet { background: var(--paper); margin: 0 0 2.5rem; padding: clamp(1rem, 4vw, 2.5rem); border-radius: 3px;
           box-shadow: 0 1px 2px rgb(60 40 20 / .25), 0 10px 30px rgb(60 40 20 / .13); position: relative; }
  .sheet img { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; border-radius: 2px;
               box-shadow: 0 0 0 1px rgb(60 40 20 / .15); }
  .text { display: flow-root; max-width: 32rem; margin: 1.4rem auto .6rem; overflow-wrap: anywhere; }
  .words .text { margin-top: .4rem; }
  .text:empty { margin: 0; }
  p { margin: 0 0 .6em; text-wrap: pretty; }
  .initials section:first-of-type p:first-child::first-letter { font-size: 3.1em; line-height: .82;
               float: inline-start; padding-block-start: .08em; padding-inline-end: .09em; color: #8a4b2a; }
  .sheet > span { display: block; text-align: center; font-size: .85rem; color: #8d7f6d; }
  @media print {
    @page { margin: 14mm; }
    body { background: none; font-size: 20pt; }
    main { max-width: none; padding: 0; }
    h1 { margin-bottom: 6mm; }
    .sheet { box-shadow: none; padding: 0; margin: 0; break-inside: avoid; background: none; }
    .sheet + .sheet { break-before: page; }
    .sheet img { width: 100%; max-width: 100%; max-height: 74vh; object-fit: contain; box-shadow: none; }
    section:first-of-type img { max-height: 62vh; }
    .text { max-width: none; }
  }
</style>
</head>
<body>
<main class="{{initials}}">
<h1 dir="auto">{{title}}</h1>
{{sheets}}
</main>
</body>
</html>
"""
