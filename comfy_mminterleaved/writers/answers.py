"""The texts in a chat model's answers, which come with thoughts, labels, Markdown and remarks."""

from __future__ import annotations

import re
from itertools import pairwise

from ..errors import StoryError

_WORDS = (
    "panel|page|picture|image|scene|frame|part|bild|seite|szene|p\u00e1gina|escena|imagen|vi\u00f1eta|planche|vignette|"
    "sc\u00e8ne|pagina|vignetta|scena|\u30b3\u30de|\u30da\u30fc\u30b8"
)
_MARKUP = r"[ \t*_#>\-]{0,12}"
_COUNTER = r"(?:\s?(?:\u9875|\u9801|\u683c|\u5e45|\u30b3\u30de))?"
_END = r"[ \t*_]{0,4}(?:[:.)\uff1a\u3001](?!\d)[ \t*_]{0,4}|$)"
_NAMED = re.compile(rf"{_MARKUP}(?:\u7b2c\s?(?=\d)|(?:{_WORDS})\s{{0,3}})(\d{{1,3}}){_COUNTER}{_END}", re.IGNORECASE)
_BARE = re.compile(rf"{_MARKUP}(\d{{1,3}}){_END}")
_SENTENCE_END = "[.!?\u2026\u3002\uff01\uff1f\u061f\u06d4]"


def parse_panel(answer: str, number: int = 1) -> str:
    """The text of one panel: the one with this number if there are several, else the first."""
    text = _without_thoughts(answer)
    labelled = _labelled(text, number)
    panels = [panel for n, panel in labelled if n == number] or [panel for _, panel in labelled] or _paragraphs(text)
    return clean(panels[0]) if panels else ""


def parse_script(answer: str, first: int = 1) -> list[str]:
    """The texts of panels from number `first` on: labelled lines, else paragraphs, else lines."""
    text = _without_thoughts(answer)
    labelled = _labelled(text, first)
    panels = [panel for n, panel in labelled if n >= first] if labelled else _paragraphs(text)
    if len(panels) == 1:
        panels = panels[0].splitlines()
    return [panel for panel in map(clean, panels) if panel]


def parse_answer(answer: str) -> str:
    """The first paragraph of an answer to a question; it has no labels."""
    paragraphs = _paragraphs(_without_thoughts(answer))
    return clean(paragraphs[0]) if paragraphs else ""


def parse_ranking(answer: str, count: int) -> list[int]:
    """Places of options, best first, from the numbers in an answer; raises StoryError if it names none."""
    numbers = [int(number) - 1 for number in re.findall(r"\d{1,4}", _without_thoughts(answer))]
    order = list(dict.fromkeys(number for number in numbers if 0 <= number < count))
    if not order:
        raise StoryError(f"The writer answered {answer.strip()!r:.80}, which is none of the numbers 1 to {count}.")
    return [*order, *(number for number in range(count) if number not in order)]


def _labelled(text: str, first: int) -> list[tuple[int, str]]:
    """(number, text) of what stands behind 'Panel 3:', or behind '3.' if such numbers follow each other."""
    lines = re.sub(r"(?<=\S)[ \t](?=Panel \d{1,3}:)", "\n", text).split("\n")
    labels = [(n, match) for n, line in enumerate(lines) if (match := _NAMED.match(line))]
    if not labels:
        labels = [(n, match) for n, line in enumerate(lines) if (match := _BARE.match(line))]
        numbers = [int(match[1]) for _, match in labels]
        if any(b != a + 1 for a, b in pairwise(numbers)) or numbers[:1] not in ([1], [first]):
            return []
    panels = []
    for (start, match), (end, _) in pairwise([*labels, (len(lines), None)]):
        block = "\n".join([lines[start][match.end() :], *lines[start + 1 : end]])
        paragraphs = [part.strip() for part in block.split("\n\n") if part.strip(" \t\n*_#")]
        if len(paragraphs) > 1 and not re.search(_SENTENCE_END, paragraphs[0]):
            del paragraphs[0]  # a title
        if paragraphs:
            panels.append((int(match[1]), paragraphs[0]))
    return panels


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, without those that only introduce what follows: 'Here is the text:'."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    return [paragraph for paragraph in paragraphs if paragraph and not paragraph.endswith((":", "\uff1a"))]


def _without_thoughts(answer: str) -> str:
    """An answer without what stands between <think> and </think>; thoughts may begin in the prompt, or not end.

    Lines have no space at their ends, and no more than one empty line is between two.
    """
    answer = re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL).rpartition("</think>")[2]
    lines = [line.rstrip() for line in answer.replace("\r\n", "\n").split("\n")]
    kept = [line for line, before in zip(lines, ["", *lines]) if line or before]
    return "\n".join(kept).strip()


def clean(text: str) -> str:
    """Text on one line, without Markdown's emphasis, a bullet, or quotation marks around all of it."""
    text = re.sub(r"^[\s>#]*(?:[-*\u2022]\s+)?", "", " ".join(text.split()))
    text = re.sub(r"(\*\*|__)(.+?)\1", r"\2", text)
    text = re.sub(r"(?<!\w)([*_])(?=\S)([^*_]+)(?<=\S)\1(?!\w)", r"\2", text).strip()
    pairs = {'"': '"', "\u201c": "\u201d", "\u201e": "\u201c", "\u00ab": "\u00bb", "\u300c": "\u300d"}
    if len(text) > 1 and pairs.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text if text.strip("*_#- ") else ""


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to the end of its last whole sentence; as it is if it has none."""
    ends = [match.end() for match in re.finditer(rf"{_SENTENCE_END}+[\"'\u201d\u00bb\u300d)]*", text)]
    return text[: ends[-1]] if ends else text
