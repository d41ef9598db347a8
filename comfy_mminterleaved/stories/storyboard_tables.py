"""Storyboards as people write them: Markdown, with a heading for each story, and CSV, with a row."""

from __future__ import annotations

import csv
import io
import re

from ..errors import StoryError

SETTINGS = ("panels", "seed", "image_first")  # lines or columns beside texts and images
DEFAULT_PANELS = 3
_HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*\s*")
_IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)>]+?)>?(?:\s+\"[^\"]*\")?\s*\)|!?\[\[([^\]|]+)(?:\|[^\]]*)?\]\]")
_SETTING = re.compile(r"(?:[-*]\s+)?(\w+)\s*:\s*(.+)")


def markdown_entries(text: str, name: str) -> list[dict]:
    """The stories of a Markdown file, as entries of a storyboard's JSON form; raises StoryError.

        # Otto
        panels: 5
        seed: 3

        ![Otto](otto.png) Otto waves in the village.

        Otto runs in the snow.

    A heading begins a story and is its title. Lines `panels:`, `seed:` and `image_first:` below it are its settings.
    Then a blank line stands between panels. Those with an image are the opening; of the others each gives a panel's
    text, and the model writes the rest of `panels` (three, if there are no more texts).
    """
    stories: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        heading = _HEADING.fullmatch(line)
        if heading:
            stories.append((heading[1], []))
        elif stories:
            stories[-1][1].append(line)
        elif line.strip():
            raise StoryError(
                f"{name} begins with {line.strip()[:60]!r}; each story begins with a heading, like '# Otto'."
            )
    return [_markdown_story(title, lines, name) for title, lines in stories]


def _markdown_story(title: str, lines: list[str], name: str) -> dict:
    entry: dict = {"title": title}
    while lines and (not lines[0].strip() or (setting := _SETTING.fullmatch(lines[0].strip()))):
        if lines[0].strip():
            if setting[1].lower() not in SETTINGS:
                break  # a text with a colon
            entry[setting[1].lower()] = setting[2].strip()
        lines = lines[1:]
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", "\n".join(lines)) if p.strip()]
    opening: list[dict] = []
    script: list[str] = []
    for paragraph in paragraphs:
        parts = _segments(paragraph)
        if not any("image" in part for part in parts):
            script.append(paragraph)
        elif script:
            image = next(part["image"] for part in parts if "image" in part)
            raise StoryError(
                f"{name}: the story {title!r:.60} has the image {image!r:.60} after the text of a panel; images stand "
                "in its first paragraphs."
            )
        else:
            opening += parts
    return _with_panels(entry, opening, script, name)


def _segments(paragraph: str) -> list[dict]:
    """Texts and images of a paragraph in order."""
    parts, end = [], 0
    for match in _IMAGE.finditer(paragraph):
        parts += [{"text": paragraph[end : match.start()].strip()}, {"image": match[1] or match[2]}]
        end = match.end()
    parts.append({"text": paragraph[end:].strip()})
    return [part for part in parts if part.get("text") or "image" in part]


def csv_entries(text: str, name: str) -> list[dict]:
    """The stories of a CSV file, as entries of a storyboard's JSON form; raises StoryError.

    The first row names the columns: `title`, `text` and `image` (what the story opens with), `panels`, `seed`,
    `image_first`, and `panel` as often as needed (also `panel 1`, `panel 2`, ...) for the texts of panels. Columns are
    separated by commas, semicolons or tabs.
    """
    first = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(map(str.strip, row))]
    if not rows:
        return []
    columns = [re.sub(r"^panel[ _]?\d+$", "panel", column.strip().lower()) for column in rows[0]]
    known = ("title", "text", "image", "panel", *SETTINGS)
    unknown = [column for column in columns if column not in known]
    if unknown or not {"text", "image", "panel"} & set(columns):
        problem = f"the columns {', '.join(unknown)}" if unknown else "no column text, image or panel"
        raise StoryError(f"{name} has {problem}; the first row must name columns among {', '.join(known)}.")
    entries = []
    for row in rows[1:]:
        if len(row) > len(columns):
            raise StoryError(f"{name}: the row of {row[0]!r:.60} has {len(row)} fields for {len(columns)} columns.")
        fields = [(column, field.strip()) for column, field in zip(columns, row) if field.strip()]
        entry = {column: field for column, field in fields if column in ("title", *SETTINGS)}
        opening = [{column: field} for column, field in fields if column in ("text", "image")]
        entries.append(_with_panels(entry, opening, [field for column, field in fields if column == "panel"], name))
    return entries


def _with_panels(entry: dict, opening: list[dict], script: list[str], name: str) -> dict:
    """An entry with settings as JSON has them: numbers, true and false, and panels as a list of texts."""
    for key in ("panels", "seed"):
        if key in entry:
            if not re.fullmatch(r"\d{1,30}", entry[key]):
                raise StoryError(f"{name}: {key} must be a whole number, not {entry[key]!r:.60}.")
            entry[key] = int(entry[key])
    if "image_first" in entry:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if entry["image_first"].lower() not in words:
            raise StoryError(f"{name}: image_first must be true or false, not {entry['image_first']!r:.60}.")
        entry["image_first"] = words[entry["image_first"].lower()]
    count = entry.get("panels", len(script) if len(script) > 1 else DEFAULT_PANELS)
    if script:
        if count < len(script):
            raise StoryError(
                f"{name}: the story {entry.get('title', '')!r:.60} has {len(script)} texts for {count} panels."
            )
        count = min(count, 10**4)  # what is too many is said elsewhere, in its own words
        return {**entry, "opening": opening, "panels": [{"text": t} for t in script] + [{}] * (count - len(script))}
    return {**entry, "opening": opening, "panels": count}
