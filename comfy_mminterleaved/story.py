"""The story: an immutable document of text and pictures, its JSON form, and its layout as tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import StoryError
from .pictures import decode_url, encode_url, read_picture, to_bytes, to_pixels

if TYPE_CHECKING:
    from .config import LLMConfig
    from .encoder import Features


@dataclass(frozen=True)
class Text:
    """Text; `tokens` are the ids it was written with, if a model wrote it, else it is encoded when it is read."""

    text: str
    tokens: tuple[int, ...] | None = None

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise StoryError(f"A story's text must be a str, not {type(self.text).__name__}.")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise StoryError(f"The text {self.text[:40]!r} has half a character at place {error.start}.") from None


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture: RGB float32 (3, H, W) in [0, 1], and its features once an encoder has seen it.

    `Picture.of` takes PIL images, numpy arrays, tensors and paths.
    """

    pixels: torch.Tensor
    features: Features | None = field(default=None, repr=False)

    @classmethod
    def of(cls, source) -> Picture:
        """Any picture: see `pictures.to_pixels`; a str or Path is read from disk. Raises PictureError."""
        if isinstance(source, Picture):
            return source
        return cls(read_picture(source) if isinstance(source, (str, Path)) else to_pixels(source))

    @cached_property
    def key(self) -> str:
        """A digest of what can be seen: pictures with the same key have the same features."""
        data = to_bytes(self.pixels)
        return hashlib.blake2b(data.tobytes() + repr(data.shape).encode(), digest_size=16).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[-1], self.pixels.shape[-2]


Segment = Text | Picture


@dataclass(frozen=True)
class Panel:
    """One picture and the text that belongs to it; either may be missing."""

    text: str
    picture: Picture | None


@dataclass(frozen=True, eq=False)
class Story:
    """The interleaved document. `add` returns a new story; the old one stays as it was.

    >>> story = Story.of("Mia went to the beach.", picture, "Then it rained.")
    """

    segments: tuple[Segment, ...] = ()

    @classmethod
    def of(cls, *parts) -> Story:
        """A story of str or Text, and of anything `Picture.of` takes except paths, in order."""
        return cls().add(*parts)

    def add(self, *parts) -> Story:
        """This story and then `parts`; empty text is left out."""
        added = []
        for part in parts:
            if isinstance(part, str):
                part = Text(part)
            elif not isinstance(part, (Text, Picture)):
                part = Picture.of(part)
            if not (isinstance(part, Text) and not part.text and not part.tokens):
                added.append(part)
        return Story(self.segments + tuple(added))

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self):
        return iter(self.segments)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(s for s in self.segments if isinstance(s, Picture))

    @property
    def picture_first(self) -> bool:
        """Whether the story opens with a picture and ends with text: each text then belongs to the picture before."""
        return len(self) > 1 and isinstance(self.segments[0], Picture) and isinstance(self.segments[-1], Text)

    @property
    def text(self) -> str:
        """All text, a line a stretch between pictures."""
        return "\n".join(panel.text for panel in self.panels() if panel.text)

    def panels(self) -> tuple[Panel, ...]:
        """The story as panels: each picture with the text before it, or with that after it.

        The latter if the story is `picture_first`. One that opens with a picture and ends with one was gone on with,
        each picture drawn from the text before it: its first has none.
        """
        parts: list[str | Picture] = []
        for segment in self.segments:
            if isinstance(segment, Picture):
                parts.append(segment)
            elif parts and isinstance(parts[-1], str):
                parts[-1] = _join(parts[-1], segment.text)
            else:
                parts.append(segment.text.strip())
        panels: list[Panel] = []
        for part in parts:
            last = panels[-1] if panels else None
            if isinstance(part, Picture):
                joins = last is not None and last.picture is None and not self.picture_first
                panels = [*panels[:-1], Panel(last.text, part)] if joins else [*panels, Panel("", part)]
            else:
                joins = last is not None and not last.text and self.picture_first
                panels = [*panels[:-1], Panel(part, last.picture)] if joins else [*panels, Panel(part, None)]
        return tuple(panels)

    def without_oldest(self) -> Story:
        """The story without its first panel: everything up to and with its first picture, or its first text."""
        for i, segment in enumerate(self.segments):
            if isinstance(segment, Picture):
                end = i + 1
                picture_first = i == 0
                while picture_first and end < len(self.segments) and isinstance(self.segments[end], Text):
                    end += 1
                return Story(self.segments[end:])
        return Story(self.segments[1:])

    def with_features(self, features: list[Features]) -> Story:
        """The same story whose pictures carry these features, in order."""
        found = iter(features)
        return Story(tuple(replace(s, features=next(found)) if isinstance(s, Picture) else s for s in self.segments))

    # ---- JSON ----

    def to_json(self, picture_names: list[str] | None = None) -> dict:
        """A JSON-ready dict; pictures are named by `picture_names`, or carried as PNG data URLs."""
        names = iter(picture_names or [])
        segments = []
        for segment in self.segments:
            if isinstance(segment, Text):
                segments.append({"text": segment.text})
            else:
                segments.append({"picture": next(names) if picture_names else encode_url(segment.pixels)})
        return {"format": "mm-interleaved-story", "version": 1, "segments": segments}

    @classmethod
    def from_json(cls, data: dict | str, folder: str | Path = ".") -> Story:
        """The inverse of `to_json`; picture names are files below `folder`."""
        data = _parse(data)
        if data.get("format") != "mm-interleaved-story" or not isinstance(data.get("segments"), list):
            raise StoryError("This is not a story file: it has no format 'mm-interleaved-story' with segments.")
        if data.get("version", 1) != 1:
            raise StoryError(f"This story file has version {data['version']!r:.20}; this release reads version 1.")
        story = cls()
        for i, segment in enumerate(data["segments"]):
            if isinstance(segment, dict) and isinstance(segment.get("text"), str):
                story = story.add(segment["text"])
            elif isinstance(segment, dict) and isinstance(segment.get("picture"), str):
                story = story.add(read_named(segment["picture"], folder))
            else:
                raise StoryError(f"Segment {i + 1} of the story file must be a text or a picture, not {segment!r:.60}.")
        return story


def read_named(name: str, folder: str | Path) -> Picture:
    """A picture by data URL, or by its path below `folder`; a path that leaves the folder is refused."""
    if name.startswith("data:image/"):
        return Picture(decode_url(name))
    path, folder = Path(name), Path(folder)
    if path.is_absolute() or ".." in path.parts or ":" in name or "\\" in name:
        raise StoryError(f"The picture {name!r} must be named by a path below the story's own folder.")
    return Picture.of(folder / path)


def _parse(data) -> dict:
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except (json.JSONDecodeError, RecursionError) as error:
            raise StoryError(f"This is not JSON that can be read: {error}.") from None
    if not isinstance(data, dict):
        raise StoryError(f"A story file must hold an object, not a {type(data).__name__}.")
    return data


def _join(first: str, second: str) -> str:
    """Two stretches of text with one space between them."""
    return f"{first.rstrip()} {second.strip()}".strip()


# ---- tokens ----


@dataclass(frozen=True)
class TokenLayout:
    """A story as the LLM reads it: token ids, and the pictures of their slots in order.

    A picture is one start-of-image token and `slots` image tokens. Pictures that have no pixels yet are None.
    """

    ids: tuple[int, ...]
    pictures: tuple[Picture | None, ...]
    picture_ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, ids, pictures, c: LLMConfig) -> TokenLayout:
        """A layout from ids with their slots in place; raises StoryError if slots and pictures disagree."""
        ids, pictures = tuple(int(i) for i in ids), tuple(pictures)
        starts = [i for i, token in enumerate(ids) if token == c.tokens.image and ids[i - 1] == c.tokens.soi]
        whole = all(ids[i : i + c.slots] == (c.tokens.image,) * c.slots for i in starts)
        if not whole or ids.count(c.tokens.image) != len(starts) * c.slots or len(starts) != len(pictures):
            raise StoryError(
                f"These token ids hold {ids.count(c.tokens.image)} image tokens for {len(pictures)} pictures; a "
                f"picture is a start-of-image token and {c.slots} image tokens."
            )
        return cls(ids, pictures, tuple(i + c.slots for i in starts))

    def visible(self, c: LLMConfig, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Which pictures the positions start to end see: bool (end - start, pictures).

        A position sees the pictures whose first slot is at or before it and after its nearest bos.
        """
        ids = torch.tensor(self.ids)
        end = len(ids) if end is None else end
        position = torch.arange(len(ids))
        nearest_bos = torch.where(ids == c.tokens.bos, position, -1).cummax(0).values[start:end, None]
        first_slot = torch.tensor(self.picture_ends, dtype=torch.long) - c.slots
        return (first_slot > nearest_bos) & (first_slot <= position[start:end, None])


def layout(story: Story, tokenizer, c: LLMConfig) -> TokenLayout:
    """A story as tokens: bos, then texts and pictures in order.

    Texts next to each other are joined by one space; white space next to a picture is dropped, as in the reference.
    """
    ids, pictures = [c.tokens.bos], []
    segments = list(story.segments)
    i = 0
    while i < len(segments):
        segment = segments[i]
        i += 1
        if isinstance(segment, Picture):
            ids += [c.tokens.soi] + [c.tokens.image] * c.slots
            pictures.append(segment)
        elif segment.tokens is not None:
            ids += segment.tokens
        else:
            text = segment.text
            while i < len(segments) and isinstance(segments[i], Text) and segments[i].tokens is None:
                text = _join(text, segments[i].text)
                i += 1
            after_text = len(ids) > 1 and ids[-1] != c.tokens.image
            ids += require(tokenizer).encode(text.strip(), after_text=after_text)
    return TokenLayout.of(ids, pictures, c)


def require(tokenizer):
    """The tokenizer, or a StoryError if the checkpoint came without one."""
    if tokenizer is None:
        raise StoryError("This checkpoint has no tokenizer, so text cannot be read; put its tokenizer.json beside it.")
    return tokenizer
