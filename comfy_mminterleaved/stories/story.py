"""The story: an immutable document of text and pictures, its JSON form, and its layout as tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import StoryError
from .images import ImageFile, decode_url, encode_page_url, encode_url, read_image_file, to_bytes, to_pixels

if TYPE_CHECKING:
    from ..config import LLMConfig
    from ..models.visual_tokenizer import Features


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

    `Picture.of` takes PIL images, numpy arrays, tensors and paths. `file` keeps the bytes of a picture read from disk,
    so that saving writes them as they were.
    """

    pixels: torch.Tensor
    features: Features | None = field(default=None, repr=False)
    file: ImageFile | None = field(default=None, repr=False)

    @classmethod
    def of(cls, source) -> Picture:
        """Any picture: see `pictures.to_pixels`; a str or Path is read from disk. Raises PictureError."""
        if isinstance(source, Picture):
            return source
        if isinstance(source, (str, Path)):
            pixels, file = read_image_file(source)
            return cls(pixels, file=file)
        return cls(to_pixels(source))

    def with_features(self, features: Features) -> Picture:
        """The same picture with an encoder's features; what was computed from its pixels stays."""
        other = replace(self, features=features)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k not in other.__dict__})
        return other

    @cached_property
    def key(self) -> str:
        """A digest of what can be seen: pictures with the same key have the same features."""
        data = to_bytes(self.pixels)
        return hashlib.blake2b(data.tobytes() + repr(data.shape).encode(), digest_size=16).hexdigest()

    @cached_property
    def page_url(self) -> str:
        """A data URL of at most `PAGE_SIDE` px a side, for a page; a PNG if small, else a JPEG."""
        return encode_page_url(self.pixels)

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

    `image_first` says whether a panel's text follows its picture; None infers it from the segments.

    >>> story = Story.of("Mia went to the beach.", picture, "Then it rained.")
    """

    segments: tuple[Segment, ...] = ()
    image_first: bool | None = None

    @classmethod
    def of(cls, *parts) -> Story:
        """A story of str or Text, and of anything `Picture.of` takes except paths, in order."""
        return cls().add(*parts)

    def add(self, *parts) -> Story:
        """This story and then `parts`; empty text is left out.

        Texts that an `image_first` story opens with belong to its first picture: that is put before them.
        """
        added = []
        for part in parts:
            if isinstance(part, str):
                part = Text(part)
            elif not isinstance(part, (Text, Picture)):
                part = Picture.of(part)
            if not (isinstance(part, Text) and not part.text and not part.tokens):
                added.append(part)
        segments = [*self.segments, *added]
        first = next((i for i, segment in enumerate(segments) if isinstance(segment, Picture)), 0)
        if self.image_first and first >= len(self.segments):
            segments.insert(0, segments.pop(first))
        return replace(self, segments=tuple(segments))

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self):
        return iter(self.segments)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(s for s in self.segments if isinstance(s, Picture))

    @property
    def is_image_first(self) -> bool:
        """Whether each text belongs to the picture before it: `image_first`, or if that is None, as it opens and ends.

        A story that opens with a picture and ends with text is.
        """
        if self.image_first is not None:
            return self.image_first
        return len(self) > 1 and self.opens_image_first

    @property
    def opens_image_first(self) -> bool:
        """Whether it is one picture, or opens with a picture and ends with text."""
        first = self.segments[:1]
        return bool(first) and isinstance(first[0], Picture) and (len(self) == 1 or isinstance(self.segments[-1], Text))

    @property
    def text(self) -> str:
        """All text, a line a stretch between pictures."""
        return "\n".join(panel.text for panel in self.panels() if panel.text)

    def panels(self) -> tuple[Panel, ...]:
        """The story as panels: each picture with the text before it, or after it if the story `is_image_first`."""
        panels = []
        for texts, picture in self._panel_segments():
            text = ""
            for segment in texts:
                text = _join(text, segment.text)
            panels.append(Panel(text, picture))
        return tuple(panels)

    def _panel_segments(self) -> list[tuple[list[Text], Picture | None]]:
        """The segments of each panel: its texts, and its picture if it has one."""
        panels: list[tuple[list[Text], Picture | None]] = []
        image_first, is_open = self.is_image_first, False  # is_open: the last panel takes the next segment
        for segment in self.segments:
            if isinstance(segment, Text):
                if not is_open:
                    panels.append(([], None))
                    is_open = True
                panels[-1][0].append(segment)
            elif image_first:
                panels.append(([], segment))
                is_open = True
            else:
                texts = panels.pop()[0] if is_open else []
                panels.append((texts, segment))
                is_open = False
        return panels

    def arrange(self, image_first: bool) -> Story:
        """The same panels, each with its text after its picture (`image_first`), or before it."""
        return self.from_panels(self._panel_segments(), image_first)

    @classmethod
    def from_panels(cls, panels, image_first: bool) -> Story:
        """A story from the texts and the picture (or None) of each panel."""
        segments: list[Segment] = []
        for texts, picture in panels:
            pictures = [] if picture is None else [picture]
            segments += [*pictures, *texts] if image_first else [*texts, *pictures]
        return cls(tuple(segments), image_first)

    def without_oldest(self) -> Story:
        """The story without its first panel: everything up to and with its first picture, or its first text."""
        for i, segment in enumerate(self.segments):
            if isinstance(segment, Picture):
                end = i + 1
                while i == 0 and end < len(self.segments) and isinstance(self.segments[end], Text):
                    end += 1
                return replace(self, segments=self.segments[end:])
        return replace(self, segments=self.segments[1:])

    def with_features(self, features: list[Features]) -> Story:
        """The same story whose pictures carry these features, in order."""
        remaining = iter(features)
        segments = (s.with_features(next(remaining)) if isinstance(s, Picture) else s for s in self.segments)
        return replace(self, segments=tuple(segments))

    # ---- JSON ----

    def to_json(self, picture_names: list[str] | None = None) -> dict:
        """A JSON-ready dict; pictures are named by `picture_names`, or carried as PNG data URLs."""
        names = iter(picture_names or [])
        segments = []
        for segment in self.segments:
            if isinstance(segment, Picture):
                segments.append({"picture": next(names) if picture_names else encode_url(segment.pixels)})
            elif segment.tokens is None:
                segments.append({"text": segment.text})
            else:
                segments.append({"text": segment.text, "token_ids": list(segment.tokens)})
        order = {} if self.image_first is None else {"image_first": self.image_first}
        return {"format": "mm-interleaved-story", "version": 1, **order, "segments": segments}

    @classmethod
    def from_json(cls, data: dict | str, folder: str | Path = ".") -> Story:
        """The inverse of `to_json`; picture names are files below `folder`."""
        data = _parse(data)
        if data.get("format") != "mm-interleaved-story" or not isinstance(data.get("segments"), list):
            raise StoryError("This is not a story file: it has no format 'mm-interleaved-story' with segments.")
        if data.get("version", 1) != 1:
            raise StoryError(f"This story file has version {data['version']!r:.20}; this release reads version 1.")
        image_first = data.get("image_first", data.get("picture_first"))
        if not isinstance(image_first, bool | None):
            raise StoryError(f"image_first must be true or false, not {image_first!r:.60}.")
        story = cls(image_first=image_first)
        for i, segment in enumerate(data["segments"]):
            name = segment.get("image", segment.get("picture")) if isinstance(segment, dict) else None
            if isinstance(segment, dict) and isinstance(segment.get("text"), str):
                story = story.add(Text(segment["text"], _token_ids(segment.get("token_ids"), i + 1)))
            elif isinstance(name, str):
                story = story.add(read_named(name, folder))
            else:
                raise StoryError(f"Segment {i + 1} of the story file must be a text or a picture, not {segment!r:.60}.")
        return story


def _token_ids(value, number: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        raise StoryError(f"Segment {number} of the story file: token_ids must be a list of whole numbers.")
    return tuple(value)


def read_named(name: str, folder: str | Path) -> Picture:
    """A picture by data URL, or by its path below `folder`; a path that leaves the folder is refused.

    Back slashes count as slashes: files written on Windows have them.
    """
    if name.startswith("data:image/"):
        return Picture(decode_url(name))
    path, folder = Path(name.replace("\\", "/")), Path(folder)
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise StoryError(f"The picture {name!r} must be named by a path below the story's own folder.")
    return Picture.of(folder / path)


def _parse(data) -> dict:
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except (ValueError, RecursionError) as error:
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
    `segment_ends` has for each segment of the story where its tokens end; texts that are joined end together.
    """

    ids: tuple[int, ...]
    pictures: tuple[Picture | None, ...]
    picture_ends: tuple[int, ...]
    segment_ends: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, ids, pictures, c: LLMConfig, segment_ends=()) -> TokenLayout:
        """A layout from ids with their slots in place; raises StoryError if slots and pictures disagree."""
        ids, pictures = tuple(int(i) for i in ids), tuple(pictures)
        starts = [i for i, token in enumerate(ids) if token == c.tokens.image and ids[i - 1] == c.tokens.soi]
        whole = all(ids[i : i + c.slots] == (c.tokens.image,) * c.slots for i in starts)
        if not whole or ids.count(c.tokens.image) != len(starts) * c.slots or len(starts) != len(pictures):
            raise StoryError(
                f"These token ids hold {ids.count(c.tokens.image)} image tokens for {len(pictures)} pictures; a "
                f"picture is a start-of-image token and {c.slots} image tokens."
            )
        return cls(ids, pictures, tuple(i + c.slots for i in starts), tuple(segment_ends))

    def prefix(self, length: int, slots: int) -> TokenLayout:
        """The first `length` tokens, with the pictures of which they hold a slot."""
        count = sum(end - slots < length for end in self.picture_ends)
        return TokenLayout(self.ids[:length], self.pictures[:count], self.picture_ends[:count])

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
    ids, pictures, ends = [c.tokens.bos], [], []
    segments = list(story.segments)
    i = 0
    while i < len(segments):
        segment, first = segments[i], i
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
        ends += [len(ids)] * (i - first)
    return TokenLayout.of(ids, pictures, c, ends)


def require(tokenizer):
    """The tokenizer, or a StoryError if the checkpoint came without one."""
    if tokenizer is None:
        raise StoryError("This checkpoint has no tokenizer, so text cannot be read; put its tokenizer.json beside it.")
    return tokenizer
