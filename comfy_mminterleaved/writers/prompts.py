"""Prompts for writers: plain text files with fields such as {story}, which users can replace by their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingError, StoryError
from ..stories.story import ImageSegment, Story, TextSegment

PROMPTS_DIR = Path(__file__).parent / "prompts"
STORY = "story"  # the set that comes with the package
FIELDS = {
    "panel": {"story", "panel", "panels", "style", "idea"},
    "script": {"story", "panel", "panels", "style", "idea"},
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


def text_only(parts: Parts) -> str:
    """The texts of a prompt, for models that do not see."""
    return join_parts([part for part in parts if isinstance(part, str)])[0]


def parse_panel(answer: str) -> str:
    """The text of one panel in a chat model's answer: without thoughts, a label, marks around it, and line ends."""
    text = _without_thoughts(answer)
    panels = [*_labelled(text), *_paragraphs(text)]
    return _clean(panels[0]) if panels else ""


def parse_script(answer: str) -> list[str]:
    """The texts of panels in a chat model's answer: labelled lines, else paragraphs, else lines."""
    text = _without_thoughts(answer)
    panels = _labelled(text) or _paragraphs(text)
    if len(panels) == 1:
        panels = panels[0].splitlines()
    return [panel for panel in map(_clean, panels) if panel]


def parse_ranking(answer: str, count: int) -> list[int]:
    """Places of options, best first, from the numbers in an answer; raises StoryError if it names none."""
    numbers = [int(number) - 1 for number in re.findall(r"\d{1,4}", _without_thoughts(answer))]
    order = list(dict.fromkeys(number for number in numbers if 0 <= number < count))
    if not order:
        raise StoryError(f"The writer answered {answer.strip()!r:.80}, which is none of the numbers 1 to {count}.")
    return [*order, *(number for number in range(count) if number not in order)]


_LABEL = re.compile(
    r"^[\s*_#>\-]*(?:[^\W\d]+\s*)?\d{1,3}\s*[^\W\d_]?[\s*_]*[:.)\uff1a\u3001][\s*_]*"  # 'Panel 3:', '**3.**'
    r"|^[\s*_#>\-]*[^\W\d]+\s*\d{1,3}[\s*_]*$"  # a heading: '### Panel 3'
    r"|(?<=\s)Panel\s+\d{1,3}\s*:\s*",  # within a line
    re.MULTILINE,
)


def _labelled(text: str) -> list[str]:
    """What follows each label, 'Panel 3:' or '3.', up to an empty line."""
    ends = [*(match.start() for match in _LABEL.finditer(text)), len(text)]
    starts = [match.end() for match in _LABEL.finditer(text)]
    return [re.split(r"\n\s*\n", text[start:end].strip())[0] for start, end in zip(starts, ends[1:])]


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, without those that only introduce what follows: 'Here is the text:'."""
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text)]
    return [paragraph for paragraph in paragraphs if paragraph and not paragraph.endswith((":", "\uff1a"))]


def _without_thoughts(answer: str) -> str:
    """An answer without what stands between <think> and </think>; thoughts may begin in the prompt, or not end."""
    answer = re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL)
    return answer.rpartition("</think>")[2].strip()


def _clean(text: str) -> str:
    """Text on one line, without Markdown's emphasis, a bullet, or quotation marks around all of it."""
    text = re.sub(r"^[\s>#]*(?:[-*\u2022]\s+)?", "", " ".join(text.split()))
    text = re.sub(r"(\*\*|__)(.+?)\1", r"\2", text)
    text = re.sub(r"(?<!\w)([*_])(?=\S)([^*_]+)(?<=\S)\1(?!\w)", r"\2", text).strip()
    pairs = {'"': '"', "\u201c": "\u201d", "\u201e": "\u201c", "\u00ab": "\u00bb", "\u300c": "\u300d"}
    if len(text) > 1 and pairs.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to the end of its last whole sentence; as it is if it has none."""
    ends = [
        match.end()
        for match in re.finditer(r"[.!?\u2026\u3002\uff01\uff1f\u061f\u06d4]+[\"'\u201d\u00bb\u300d)]*", text)
    ]
    return text[: ends[-1]] if ends else text
