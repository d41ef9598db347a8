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
    """A font at any size.

    Args:
        path: Its file; None for Pillow's own, which has little more than ASCII.
        index: Of the font in a collection.
    """

    path: Path | None = None
    index: int = 0

    def at(self, size: float):
        """The font at a size in px."""
        return _load(self.path, self.index, max(1, round(size)))

    def lacks(self, signs: Iterable[str]) -> list[str]:
        """Those of some signs that it has no glyphs for."""
        return [sign for sign in signs if not _has(self.path, self.index, sign)]

    def printable(self, text: str) -> str:
        """A text without emoji and other symbols that the font lacks, and without invisible marks between letters."""
        return "".join(c for c in text if not _is_mark(c) and not (_is_symbol(c) and self.lacks(c)))

    def width(self, line: str, size: float, is_rtl: bool) -> float:
        """Of a line, in the unit of `size`."""
        return self.at(MEASURE).getlength(line, **self.direction(is_rtl)) * size / MEASURE

    def direction(self, is_rtl: bool) -> dict[str, str]:
        """Arguments of Pillow's text functions; without raqm, which its own font never has, there are none."""
        if self.path is None or not features.check("raqm"):
            return {}
        return {"direction": "rtl" if is_rtl else "ltr"}

    @property
    def data(self) -> bytes:
        """The font file."""
        if self.path is not None:
            return self.path.read_bytes()
        file = _load(None, 0, 10).path
        return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()


@functools.lru_cache(maxsize=64)
def _load(path: Path | None, index: int, size: int):
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size, index)


@functools.lru_cache(maxsize=4096)
def _has(path: Path | None, index: int, sign: str) -> bool:
    font = _load(path, index, 20)
    mask, missing = font.getmask(sign), font.getmask("\U0010ffff")
    return mask.size != missing.size or bytes(mask) != bytes(missing)


def _is_symbol(sign: str) -> bool:
    return unicodedata.category(sign) in ("So", "Cs", "Co") or "\U0001f3fb" <= sign <= "\U0001f3ff"


def _is_mark(sign: str) -> bool:
    """A soft hyphen, a key's frame, or a variation selector."""
    return sign in "\u00ad\u20e3" or "\ufe00" <= sign <= "\ufe0f"


def letters(text: str) -> list[str]:
    """What a font must have, once each: no spaces, controls, marks that only join others, or symbols."""
    signs = dict.fromkeys(text)
    return [c for c in signs if unicodedata.category(c)[0] not in "ZC" and not _is_symbol(c) and not _is_mark(c)]


def choose_font(texts: Iterable[str], path: str | Path | None = None, strict: bool = True, language: str = "") -> Face:
    """A font that has all signs of some texts; symbols as ♥, if a font has them; emoji are in none.

    Args:
        path: A font file; None for Pillow's own if it has them, else the system's first that does.
        strict: Raise SettingError if letters are missing; else take the font that lacks the fewest.
        language: A tag such as "zh", by which one of a collection of East Asian fonts is taken.
    """
    texts = list(texts)
    needed = letters("".join(texts))
    symbols = [c for c in dict.fromkeys("".join(texts)) if _is_symbol(c) and c < "\U0001f000"]
    if path is not None:
        try:
            face = _of_language(Path(path), language)
        except (OSError, ValueError) as error:
            raise SettingError(f"The font {str(path)!r:.200} cannot be read: {error}.") from None
        missing = face.lacks(needed)
        if missing and strict:
            raise SettingError(
                f"The font {face.path.name!r} has no sign for {missing[0]!r}, which is in "
                f"{_excerpt(texts, missing[0])}; choose one that does."
            )
        return face
    best, fewest = Face(), (Face().lacks(needed), Face().lacks(symbols))
    for file in system_fonts() if any(fewest) else ():
        try:
            face = _of_language(file, language)
            missing = face.lacks(needed), face.lacks(symbols)
        except (OSError, ValueError):  # no font of text, or a broken one
            continue
        if [len(part) for part in missing] < [len(part) for part in fewest]:
            best, fewest = face, missing
        if not any(fewest):
            break
    if fewest[0] and strict:
        sign = fewest[0][0]
        raise SettingError(
            f"No font of this computer has a sign for {sign!r}, which is in {_excerpt(texts, sign)}; install one, "
            "such as Noto Sans, or name a font file."
        )
    return best


def _excerpt(texts: list[str], sign: str) -> str:
    return repr(next(text for text in texts if sign in text)[:30])


_VARIANTS = {"zh": " SC", "zh-tw": " TC", "zh-hant": " TC", "zh-hk": " HK", "ja": " JP", "ko": " KR"}


def _of_language(path: Path, language: str) -> Face:
    """The font of a file; of a collection, the one for the language. Raises OSError."""
    face, suffix = Face(path), _VARIANTS.get(language.lower(), _VARIANTS.get(language.lower()[:2]))
    face.at(MEASURE)
    if suffix is None or path.suffix.lower() not in (".ttc", ".otc"):
        return face
    for index in range(16):
        try:
            if Face(path, index).at(10).getname()[0].endswith(suffix):
                return Face(path, index)
        except OSError:  # there are no more
            break
    return face


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
    """The lines of a text, each at most `width` wide, in the unit of `size`.

    Line ends of the text stay; lines break at spaces, in East Asian text anywhere.
    """
    lines: list[str] = []
    is_rtl = is_right_to_left(text)
    for part in face.printable(text).splitlines():
        wrapped: list[str] = []
        for piece, space in _pieces(part):
            joined = f"{wrapped[-1]}{space}{piece}" if wrapped else piece
            if wrapped and face.width(joined, size, is_rtl) <= width:
                wrapped[-1] = joined
            else:
                wrapped += _broken(piece, face, size, width, is_rtl)
        lines += wrapped
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


def _broken(piece: str, face: Face, size: float, width: float, is_rtl: bool) -> list[str]:
    """A stretch that is alone too wide, in lines of as many signs as fit."""
    lines = [""]
    for sign in piece:
        if lines[-1] and face.width(lines[-1] + sign, size, is_rtl) > width:
            lines.append("")
        lines[-1] += sign
    return lines
