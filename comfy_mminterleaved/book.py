"""A story as files: numbered pictures, story.json, and story.html, one page that holds everything."""

from __future__ import annotations

import contextlib
import html
import json
import re
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from .files import write_bytes, write_json
from .pictures import encode_png, encode_url
from .story import Story

METADATA_KEY = "mm-interleaved"


def save_story(
    folder: str | Path, story: Story, title: str = "", settings: dict | None = None, metadata: dict | None = None
) -> list[Path]:
    """Writes a story into a folder that is there; each file appears whole or not at all. Raises OutputError.

    Args:
        folder: a story saved there before is replaced, pictures and all.
        settings: JSON-ready; kept in story.json and in the pictures' metadata with the story's text.
        metadata: more text chunks for every picture, by keyword.

    Returns:
        The files: 01.png, 02.png, ..., story.json, story.html.
    """
    folder = Path(folder)
    old = _pictures_of(folder)
    names = [f"{i:02d}.png" for i in range(1, len(story.pictures) + 1)]
    data = {**story.to_json(names), "title": title, "settings": settings or {}}
    files = []
    for name, picture in zip(names, story.pictures):
        info = PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps({"picture": name, **data}, ensure_ascii=False))
        for keyword, text in (metadata or {}).items():
            info.add_text(keyword, text)
        write_bytes(folder / name, encode_png(picture.pixels, info))
        files.append(folder / name)
    write_json(folder / "story.json", data)
    write_bytes(folder / "story.html", page(story, title).encode("utf-8"))
    for name in set(old) - set(names):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    return [*files, folder / "story.json", folder / "story.html"]


def _pictures_of(folder: Path) -> list[str]:
    """The numbered pictures of a story saved in a folder before; none if there is no such story."""
    try:
        segments = json.loads((folder / "story.json").read_text(encoding="utf-8"))["segments"]
        names = [segment.get("picture") for segment in segments]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [name for name in names if isinstance(name, str) and re.fullmatch(r"\d+\.png", name)]


def load_story(path: str | Path) -> Story:
    """Reads a story.json, with the pictures beside it."""
    from .errors import StoryError

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StoryError(
            f"The story {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None
    return Story.from_json(text, path.parent)


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
            source = encode_url(panel.picture.pixels)
            picture = f'<img src="{source}" width="{width}" height="{height}" alt="{alt}">'
        text = "".join(f'<p dir="auto">{html.escape(p)}</p>' for p in panel.text.split("\n") if p.strip())
        kind = "sheet" if picture else "sheet words"
        sheets.append(f'<section class="{kind}">{picture}<div class="text">{text}</div><span>{number}</span></section>')
    parts = {"title": html.escape(title), "sheets": "\n".join(sheets)}
    return re.sub(
        r"\{\{(title|sheets)\}\}", lambda found: parts[found[1]], _PAGE
    )  # in one pass: texts stay as they are


def _title(text: str, longest: int = 60) -> str:
    sentence = text.split(". ")[0].split("\n")[0].strip(" .")
    if len(sentence) > longest:
        sentence = sentence[:longest].rsplit(" ", 1)[0] + "\N{HORIZONTAL ELLIPSIS}"
    return sentence or "A story"


_PAGE = """<!DOCTYPE html>
<html lang="en">
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
  section:first-of-type p:first-child::first-letter { font-size: 3.1em; line-height: .82; float: left;
               padding: .08em .09em 0 0; color: #8a4b2a; }
  .sheet > span { display: block; text-align: center; font-size: .85rem; color: #8d7f6d; }
  @media print {
    @page { margin: 14mm; }
    body { background: none; font-size: 15pt; }
    main { max-width: none; padding: 0; }
    h1 { margin-bottom: 8mm; }
    .sheet { box-shadow: none; padding: 0 0 6mm; margin: 0; break-inside: avoid; background: none; }
    .sheet + .sheet { break-before: page; padding-top: 6mm; }
    .sheet img { width: auto; max-width: 100%; min-width: 60%; max-height: 165mm; }
  }
</style>
</head>
<body>
<main>
<h1 dir="auto">{{title}}</h1>
{{sheets}}
</main>
</body>
</html>
"""
