"""Prompts for writers: plain text files with fields such as {story}, which users can replace by their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingError
from ..stories.story import ImageSegment, Story, TextSegment

PROMPTS_DIR = Path(__file__).parent / "prompts"
STORY = "story"  # the set that comes with the package
FIELDS = {
    "panel": {"story", "panel", "panels", "style", "idea"},
    "script": {"story", "panel", "last", "panels", "style", "idea"},
    "question": {"story", "question"},
    "caption": {"story"},
    "rank": {"story", "question", "options"},
}
_FIELD = re.compile(r"\{([a-z]+)\}")

Parts = list[str | ImageSegment]


@dataclass(frozen=True)
class Prompts:
    """A set of prompts, by name: those of FIELDS."""

    texts: Mapping[str, str]

    def parts(self, name: str, story: Story, heroes: Story | None = None, **values: str) -> Parts:
        """A prompt with a story where {story} stands, as texts and images in order.

        A line with a field that is empty is left out.
        """
        head, _, tail = self.texts[name].partition("{story}")
        return join_parts([_fill(head, values), *story_parts(story, heroes), _fill(tail, values)])


def prompt_names(folders: Sequence[Path]) -> list[str]:
    """Names of the sets of prompts: the package's own, and the folders with text files in `folders`."""
    names = [STORY]
    for folder in folders:
        names += sorted(path.parent.name for path in folder.glob("*/*.txt"))
    return list(dict.fromkeys(names))


def load_prompts(name: str = STORY, folders: Sequence[Path] = ()) -> Prompts:
    """Reads a set of prompts; files that it lacks are taken from the package's own.

    Args:
        folders: Where users keep theirs; they go before the package's.

    Raises:
        SettingError: For an unknown set, a file that is not UTF-8, has no {story}, or a field that it cannot have.
    """
    if name not in prompt_names(folders):
        raise SettingError(f"There are no prompts {name!r:.60}; there are {', '.join(prompt_names(folders))}.")
    texts = {}
    for kind, fields in FIELDS.items():
        paths = [*(folder / name / f"{kind}.txt" for folder in folders), PROMPTS_DIR / STORY / f"{kind}.txt"]
        path = next(path for path in paths if path.is_file())
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise SettingError(f"The prompt {str(path)!r} cannot be read as UTF-8: {error}.") from None
        unknown = set(_FIELD.findall(text)) - fields
        if unknown or "{story}" not in text:
            problem = f"has {{{sorted(unknown)[0]}}}" if unknown else "has no {story}"
            listed = ", ".join(f"{{{field}}}" for field in sorted(fields))
            raise SettingError(f"The prompt {str(path)!r} {problem}; it must have {{story}}, and may have {listed}.")
        texts[kind] = text
    return Prompts(texts)


def number_of_panels(story: Story) -> int:
    """Panels as writers count them: a text and an image that stand side by side are one, and so is a text alone."""
    return len(_panels(story))


def _panels(story: Story) -> list[list[TextSegment | ImageSegment]]:
    panels: list[list[TextSegment | ImageSegment]] = []
    for segment in story.segments:
        if not panels or any(type(other) is type(segment) for other in panels[-1]):
            panels.append([])
        panels[-1].append(segment)
    return panels


def story_parts(story: Story, heroes: Story | None = None) -> Parts:
    """A story as texts and images in order, each panel with its number; the heroes, if any, stand before it."""
    parts: Parts = []
    if heroes is not None and heroes.segments:
        parts += ["(Who is in it: ", *_parts(heroes.segments), ")\n"]
    for number, panel in enumerate(_panels(story), 1):
        parts += [f"Panel {number}: ", *_parts(panel), "\n"]
    return parts if story.segments else [*parts, "(It begins now.)"]


def _parts(segments) -> Parts:
    return [segment if isinstance(segment, ImageSegment) else f"{segment.text.strip()} " for segment in segments]


def join_parts(parts: Parts) -> Parts:
    """The same parts with texts that follow each other joined."""
    joined: Parts = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif not isinstance(part, str) or part:
            joined.append(part)
    if joined and isinstance(joined[0], str):
        joined[0] = joined[0].lstrip()
    if joined and isinstance(joined[-1], str):
        joined[-1] = joined[-1].rstrip()
    return [part for part in joined if part]


def _fill(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        if not value.strip():
            text = "".join(line for line in text.splitlines(True) if f"{{{name}}}" not in line)
    return _FIELD.sub(lambda match: values.get(match[1], match[0]).strip(), text)
