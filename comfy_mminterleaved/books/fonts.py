"""Fonts for captions: a file, Pillow's own, or one of the system's that has the signs of a text; and lines of text."""

from __future__ import annotations

import functools
import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont, features

from ..errors import SettingError

MEASURE = 100  # px at which text is measured; lines are broken alike at every resolution
_STYLED = re.compile(r"bold|italic|oblique|mono|condensed|narrow|light|thin|black|heavy|medium|extra", re.IGNORECASE)
# Fonts for reading, before whatever else a computer has: how their files' names begin.
_READABLE = ("dejavusans", "notosans", "liberationsans", "segoeui", "arial", "helvetica", "msyh", "yugoth", "malgun")
_NO_LINE_START = set(
    "\u3002\uff0c\u3001\uff01\uff1f\uff1b\uff1a\u300d\u300f\uff09\u3011\u2026\u30fc,.!?;:)]}\u201d\u2019\u00bb"
)


@dataclass(frozen=True)
class Face:
    """A font at any size; `path` None is Pillow's own, which has little more than ASCII."""

    path: Path | None = None

    def at(self, size: float):
        """The font at a size in px."""
        return _load(self.path, max(1, round(size)))

    def lacks(self, text: str) -> list[str]:
        """The signs of a text that it has no glyphs for."""
        return [sign for sign in signs(text) if not _has(self.path, sign)]

    def width(self, text: str, size: float) -> float:
        """Of a line, in the unit of `size`."""
        return self.at(MEASURE).getlength(text, **self.direction(text)) * size / MEASURE

    def direction(self, text: str) -> dict[str, str]:
        """Arguments of Pillow's text functions; without raqm, which its own font never has, there are none."""
        if self.path is None or not features.check("raqm"):
            return {}
        return {"direction": "rtl" if is_right_to_left(text) else "ltr"}

    @property
    def data(self) -> bytes:
        """The font file."""
        if self.path is not None:
            return self.path.read_bytes()
        file = _load(None, 10).path
        return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()


@functools.lru_cache(maxsize=64)
def _load(path: Path | None, size: int):
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)


@functools.lru_cache(maxsize=4096)
def _has(path: Path | None, sign: str) -> bool:
    font = _load(path, 20)
    mask, missing = font.getmask(sign), font.getmask("\U0010ffff")
    return mask.size != missing.size or bytes(mask) != bytes(missing)


def signs(text: str) -> list[str]:
    """What a font must have a glyph for, once each: not spaces, controls and marks that only join others."""
    return [sign for sign in dict.fromkeys(text) if unicodedata.category(sign)[0] not in "ZC"]


def printable(text: str) -> str:
    """A text without emoji, which are in no font of text."""
    kept = (c for c in text if unicodedata.category(c) not in ("So", "Cs", "Co") and not "\ufe00" <= c <= "\ufe0f")
    return " ".join("".join(kept).split())


def choose_font(texts: Iterable[str], path: str | Path | None = None, strict: bool = True) -> Face:
    """A font that has all signs of some texts.

    Args:
        path: A font file; None for Pillow's own if it has them, else the system's first that does.
        strict: Raise SettingError if signs are missing; else take the font that lacks the fewest.
    """
    text = "".join(map(printable, texts))
    if path is not None:
        face = Face(Path(path))
        try:
            face.at(MEASURE)
        except (OSError, ValueError) as error:
            raise SettingError(f"The font {str(path)!r:.200} cannot be read: {error}.") from None
        missing = face.lacks(text)
        if missing and strict:
            raise SettingError(f"The font {face.path.name!r} has no sign for {missing[0]!r}; choose one that does.")
        return face
    best, fewest = Face(), Face().lacks(text)
    for file in system_fonts() if fewest else ():
        try:
            missing = Face(file).lacks(text)
        except (OSError, ValueError):  # no font of text, or a broken one
            continue
        if len(missing) < len(fewest):
            best, fewest = Face(file), missing
        if not fewest:
            break
    if fewest and strict:
        raise SettingError(
            f"No font of this computer has a sign for {fewest[0]!r}; install one, such as Noto Sans, or name "
            "a font file."
        )
    return best


@functools.lru_cache(maxsize=1)
def system_fonts() -> tuple[Path, ...]:
    """Font files of the system, the plain ones first."""
    home = Path.home()
    if sys.platform == "win32":
        folders = [
            Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts",
            home / "AppData/Local/Microsoft/Windows/Fonts",
        ]
    elif sys.platform == "darwin":
        folders = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    else:
        folders = [
            home / ".fonts",
            home / ".local/share/fonts",
            Path("/usr/local/share/fonts"),
            Path("/usr/share/fonts"),
        ]
    files = [
        Path(folder) / name
        for root in folders
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith((".ttf", ".otf", ".ttc", ".otc"))
    ]

    def rank(file: Path):
        stem = file.stem.lower()
        known = next((i for i, name in enumerate(_READABLE) if stem.startswith(name)), len(_READABLE))
        return bool(_STYLED.search(stem)), known, file.name

    return tuple(sorted(files, key=rank))


def is_right_to_left(text: str) -> bool:
    """Whether a text's first letter is of a script that runs from right to left."""
    kinds = (unicodedata.bidirectional(c) for c in text)
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"


def check_direction(text: str) -> None:
    """Raises SettingError for text that this Pillow would set in the wrong order."""
    if is_right_to_left(text) and not features.check("raqm"):
        raise SettingError(
            f"The text {text[:30]!r} runs from right to left, which Pillow cannot set here; install the library "
            "fribidi, or export HTML or EPUB."
        )


def wrap(text: str, face: Face, size: float, width: float) -> list[str]:
    """The lines of a text, each at most `width` wide, in the unit of `size`; East Asian text breaks anywhere."""
    lines: list[str] = []
    for piece, space in _pieces(printable(text)):
        joined = f"{lines[-1]}{space}{piece}" if lines else piece
        if lines and face.width(joined, size) <= width:
            lines[-1] = joined
        else:
            lines += _broken(piece, face, size, width)
    return lines


def _pieces(text: str):
    """Stretches of text that stay together, each with the space before it."""
    for word in text.split():
        space, piece = " ", ""
        for sign in word:
            is_wide = unicodedata.east_asian_width(sign) in "WF"
            if piece and sign not in _NO_LINE_START and (is_wide or unicodedata.east_asian_width(piece[-1]) in "WF"):
                yield piece, space
                piece, space = "", ""
            piece += sign
        yield piece, space


def _broken(piece: str, face: Face, size: float, width: float) -> list[str]:
    """A stretch that is alone too wide, in lines of as many signs as fit."""
    lines = [""]
    for sign in piece:
        if lines[-1] and face.width(lines[-1] + sign, size) > width:
            lines.append("")
        lines[-1] += sign
    return lines
