"""The story: an immutable document of text and images, and its JSON form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ImageError, StoryError
from .images import ImageFile, decode_data_url, encode_data_url, encode_page_url, read_image_file, to_bytes, to_tensor

if TYPE_CHECKING:
    from ..models.visual_tokenizer import ImageFeatures


@dataclass(frozen=True)
class TextSegment:
    """Text; `token_ids` are those that a model generated it with, None for any other text."""

    text: str
    token_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise StoryError(f"A story's text must be a str, not {type(self.text).__name__}.")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise StoryError(f"The text {self.text[:40]!r} has half a character at place {error.start}.") from None


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """An image: RGB float32 `(3, H, W)` in [0, 1], and its features once an encoder has seen it.

    `ImageSegment.of` takes PIL images, numpy arrays, tensors and paths. `file` keeps the bytes of an image read from
    disk, so that saving writes them unchanged. `seed` is the one that the image was drawn with, None for any other.
    `alt` says what it shows, for those who do not see it; None where its panel's text does. `origin` is "drawn" for an
    image that the model drew, "own" for any other; an encoder can have an adapter for drawn ones. `refined` is the same
    image at a larger size, for pages: models look at `pixels`, people at `display_pixels`.
    """

    pixels: torch.Tensor = field(repr=False)
    features: ImageFeatures | None = field(default=None, repr=False)
    file: ImageFile | None = field(default=None, repr=False)
    seed: int | None = None
    alt: str | None = None
    origin: str = "own"
    refined: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, source) -> ImageSegment:
        """From anything that `images.to_tensor` takes; a str or Path is read from disk. Raises ImageError."""
        if isinstance(source, ImageSegment):
            return source
        if isinstance(source, (str, Path)):
            pixels, file = read_image_file(source)
            return cls(pixels, file=file)
        return cls(to_tensor(source))

    def with_features(self, features: ImageFeatures) -> ImageSegment:
        """The same image with an encoder's features; what was computed from its pixels is kept."""
        other = replace(self, features=features)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k not in other.__dict__})
        return other

    @cached_property
    def digest(self) -> str:
        """Digest of the pixels."""
        data = to_bytes(self.pixels)
        return hashlib.blake2b(data.tobytes() + repr(data.shape).encode(), digest_size=16).hexdigest()

    @property
    def display_pixels(self) -> torch.Tensor:
        """The refined image if there is one, else the image."""
        return self.pixels if self.refined is None else self.refined

    @property
    def features_key(self) -> tuple[str, str]:
        """Images with the same key have the same features."""
        return self.digest, self.origin

    @cached_property
    def page_url(self) -> str:
        """A data URL of at most `PAGE_SIDE` px a side, for a page; a PNG if small, else a JPEG."""
        return encode_page_url(self.display_pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[-1], self.pixels.shape[-2]


Segment = TextSegment | ImageSegment


@dataclass(frozen=True)
class Panel:
    """One image and the text that belongs to it; either may be missing."""

    text: str
    image: ImageSegment | None

    @property
    def alt(self) -> str:
        """What the image shows, in words: its own, else the panel's."""
        return (self.image.alt if self.image is not None else None) or self.text


@dataclass(frozen=True, eq=False, repr=False)
class Story:
    """The interleaved document. `add` returns a new story; the old one stays as it was.

    `image_first` says whether a panel's text follows its image; None infers it from the segments.

    >>> story = Story.of("Mia went to the beach.", image, "Then it rained.")
    """

    segments: tuple[Segment, ...] = ()
    image_first: bool | None = None

    @classmethod
    def of(cls, *parts) -> Story:
        """From strings, segments, and anything that `ImageSegment.of` takes except paths, in order."""
        return cls().add(*parts)

    def add(self, *parts) -> Story:
        """Returns the story with `parts` appended; empty text is left out.

        Texts that an `image_first` story opens with belong to its first image, which is put before them.
        """
        added = []
        for part in parts:
            if isinstance(part, str):
                part = TextSegment(part)
            elif not isinstance(part, (TextSegment, ImageSegment)):
                part = ImageSegment.of(part)
            if not (isinstance(part, TextSegment) and not part.text and not part.token_ids):
                added.append(part)
        segments = [*self.segments, *added]
        first = next((i for i, segment in enumerate(segments) if isinstance(segment, ImageSegment)), 0)
        if self.image_first and first >= len(self.segments):
            segments.insert(0, segments.pop(first))
        return replace(self, segments=tuple(segments))

    def __repr__(self) -> str:
        parts = (repr(s.text) if isinstance(s, TextSegment) else "<image {}x{}>".format(*s.size) for s in self.segments)
        return f"Story({', '.join(parts)})"

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self):
        return iter(self.segments)

    @property
    def images(self) -> tuple[ImageSegment, ...]:
        return tuple(s for s in self.segments if isinstance(s, ImageSegment))

    @property
    def is_image_first(self) -> bool:
        """Whether each text belongs to the image before it: `image_first`, or if that is None, inferred.

        True is inferred for a story that opens with an image and ends with text.
        """
        if self.image_first is not None:
            return self.image_first
        return len(self) > 1 and self.opens_image_first

    @property
    def opens_image_first(self) -> bool:
        """Whether it is a single image, or opens with an image and ends with text."""
        first = self.segments[:1]
        return (
            bool(first)
            and isinstance(first[0], ImageSegment)
            and (len(self) == 1 or isinstance(self.segments[-1], TextSegment))
        )

    @property
    def text(self) -> str:
        """All text, one line per stretch between images."""
        return "\n".join(panel.text for panel in self.panels() if panel.text)

    def panels(self) -> tuple[Panel, ...]:
        """The story as panels: each image with the text before it, or after it if the story `is_image_first`."""
        panels = []
        for texts, image in self.panel_segments():
            text = ""
            for segment in texts:
                text = join_texts(text, segment.text)
            panels.append(Panel(text, image))
        return tuple(panels)

    def panel_segments(self) -> list[tuple[list[TextSegment], ImageSegment | None]]:
        """The segments of each panel: its texts, and its image if it has one."""
        panels: list[tuple[list[TextSegment], ImageSegment | None]] = []
        image_first, is_open = self.is_image_first, False  # is_open: the last panel takes the next segment
        for segment in self.segments:
            if isinstance(segment, TextSegment):
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
        """The same panels, each with its text after its image (`image_first`), or before it."""
        return self.from_panels(self.panel_segments(), image_first)

    @classmethod
    def from_panels(cls, panels, image_first: bool) -> Story:
        """A story from the texts and the image (or None) of each panel."""
        segments: list[Segment] = []
        for texts, image in panels:
            images = [] if image is None else [image]
            segments += [*images, *texts] if image_first else [*texts, *images]
        return cls(tuple(segments), image_first)

    def drop_oldest_panel(self) -> Story:
        """The story without its first panel: everything up to and including its first image, or its first text."""
        for i, segment in enumerate(self.segments):
            if isinstance(segment, ImageSegment):
                end = i + 1
                while i == 0 and end < len(self.segments) and isinstance(self.segments[end], TextSegment):
                    end += 1
                return replace(self, segments=self.segments[end:])
        return replace(self, segments=self.segments[1:])

    def with_features(self, features: list[ImageFeatures]) -> Story:
        """The same story whose images carry these features, in order."""
        remaining = iter(features)
        segments = (s.with_features(next(remaining)) if isinstance(s, ImageSegment) else s for s in self.segments)
        return replace(self, segments=tuple(segments))

    def map_images(self, fn: Callable[[ImageSegment], ImageSegment]) -> Story:
        """The same story with `fn` applied to every image."""
        segments = (fn(s) if isinstance(s, ImageSegment) else s for s in self.segments)
        return replace(self, segments=tuple(segments))

    # ---- JSON ----

    def to_json(self, image_names: list[str] | None = None, refined_names: list[str | None] | None = None) -> dict:
        """A JSON-ready dict; images are named by `image_names`, or carried as PNG data URLs.

        Args:
            refined_names: The same of the images' refined forms, None for those without.
        """
        names, refined = iter(image_names or []), iter(refined_names or [])
        segments = []
        for segment in self.segments:
            if isinstance(segment, ImageSegment):
                name = next(names) if image_names else encode_data_url(segment.pixels)
                origin = segment.origin if segment.origin != "own" else None
                larger = next(refined, None)
                if refined_names is None and segment.refined is not None:
                    larger = encode_data_url(segment.refined)
                about = {"seed": segment.seed, "alt": segment.alt, "origin": origin, "refined": larger}
                segments.append({"image": name, **{k: v for k, v in about.items() if v is not None}})
            elif segment.token_ids is None:
                segments.append({"text": segment.text})
            else:
                segments.append({"text": segment.text, "token_ids": list(segment.token_ids)})
        order = {} if self.image_first is None else {"image_first": self.image_first}
        return {"format": "mm-interleaved-story", "version": 1, **order, "segments": segments}

    @classmethod
    def from_json(cls, data: dict | str, folder: str | Path = ".") -> Story:
        """The inverse of `to_json`; image names are files below `folder`."""
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
                story = story.add(TextSegment(segment["text"], _token_ids(segment.get("token_ids"), i + 1)))
            elif isinstance(name, str):
                about = {"seed": _seed(segment.get("seed"), i + 1), "alt": _alt(segment.get("alt"), i + 1)}
                about["origin"] = _origin(segment.get("origin", "own"), i + 1)
                about["refined"] = _refined(segment.get("refined"), folder, i + 1)
                story = story.add(replace(open_named_image(name, folder), **about))
            else:
                raise StoryError(f"Segment {i + 1} of the story file must be a text or an image, not {segment!r:.60}.")
        return story


def _token_ids(value, number: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        raise StoryError(f"Segment {number} of the story file: token_ids must be a list of whole numbers.")
    return tuple(value)


def _seed(value, number: int) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value < 2**64):
        raise StoryError(f"Segment {number} of the story file: seed must be a whole number, not {value!r:.60}.")
    return value


def _origin(value, number: int) -> str:
    if value not in ("own", "drawn"):
        raise StoryError(f"Segment {number} of the story file: origin must be 'own' or 'drawn', not {value!r:.60}.")
    return value


def _refined(value, folder, number: int) -> torch.Tensor | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise StoryError(f"Segment {number} of the story file: refined must name an image, not {value!r:.60}.")
    try:
        return open_named_image(value, folder).pixels
    except ImageError:  # the image itself is there: it can be refined again
        return None


def _alt(value, number: int) -> str | None:
    if value is not None and not isinstance(value, str):
        raise StoryError(f"Segment {number} of the story file: alt must be text, not {value!r:.60}.")
    return value


def open_named_image(name: str, folder: str | Path) -> ImageSegment:
    """Opens an image from a data URL or a path below `folder`; raises StoryError for a path that leaves it.

    Back slashes count as slashes: files written on Windows have them.
    """
    if name.startswith("data:image/"):
        return ImageSegment(decode_data_url(name))
    path, folder = Path(name.replace("\\", "/")), Path(folder)
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise StoryError(f"The image {name!r} must be named by a path below the story's own folder.")
    return ImageSegment.of(folder / path)


def _parse(data) -> dict:
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StoryError(f"The story is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise StoryError(f"A story file must hold an object, not a {type(data).__name__}.")
    return data


def join_texts(first: str, second: str) -> str:
    """Two stretches of text with one space between them."""
    return f"{first.rstrip()} {second.strip()}".strip()
