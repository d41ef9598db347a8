"""Pages of a story: which panel goes where, and its caption. Lengths are points, 1/72 of an inch."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingError, StoryError
from ..stories.page import language_of
from ..stories.story import ImageSegment, Panel, Story
from .fonts import Face, check_direction, choose_font, is_right_to_left, wrap

log = logging.getLogger(__name__)
MM = 72 / 25.4
LAYOUTS = {
    "picture book": "1",
    "2 panels": "1 / 1",
    "3 panels": "3: 1 / 2: 1 1",
    "4 panels": "1 1 / 1 1",
    "6 panels": "1 1 / 1 1 / 1 1",
}
PAGE_SIZES = {  # width and height in mm
    "A4": (210, 297),
    "A5": (148, 210),
    "A6": (105, 148),
    "letter": (215.9, 279.4),
    "square": (210, 210),
    "comic": (168, 260),
}
BENEATH, BOX, NONE = "beneath", "box", "none"
CAPTIONS = (BENEATH, BOX, NONE)
FITS = ("whole", "crop")
MIN_FONT = 5.0  # pt to which a long caption shrinks, before it is cut
LINE = 1.35  # height of a line, in font sizes
MAX_PIXELS = 10_000  # a side of a page
CUT = "..."  # ends a caption that is cut


@dataclass(frozen=True)
class PageConfig:
    """How pages are laid out.

    Args:
        layout: A name of LAYOUTS, or cells: rows divided by "/", in each the widths of its cells, before them its
            height and ":" if rows differ. "2: 1 / 1: 1 1" is a tall row above two cells.
        page_size: A name of PAGE_SIZES, or "210 x 148 mm", "8.5 x 8.5 in".
        captions: "beneath" the image, in a "box" at its foot, or "none".
        fit: "whole" shows all of an image, "crop" fills its cell.
        order: Numbers of the panels that go into the cells, in order, such as "1, 3, 2"; 0 leaves a cell empty, and ""
            takes all.
        margin, gutter: In mm: around the page, and between cells.
        font: A font file; None for Pillow's own, or one of the system's that has the text's signs.
        font_size: In pt; 0 for one that suits the layout. Long captions are set smaller.
        dpi: Of images of pages, and the most that a PDF has of its images.
        language: A tag such as "de"; "" guesses it from the script.

    Raises:
        SettingError: For a value that is none of these.
    """

    layout: str = "picture book"
    page_size: str = "A5"
    captions: str = BENEATH
    fit: str = "whole"
    order: str = ""
    margin: float = 10.0
    gutter: float = 4.0
    font: str | Path | None = None
    font_size: float = 0.0
    dpi: int = 300
    language: str = ""

    def __post_init__(self):
        for name, choices in (("captions", CAPTIONS), ("fit", FITS)):
            if getattr(self, name) not in choices:
                raise SettingError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r:.60}.")
        for name, low, high in (("margin", 0, 100), ("gutter", 0, 100), ("font_size", 0, 200), ("dpi", 30, 1200)):
            if not low <= getattr(self, name) <= high:
                raise SettingError(f"{name} must be from {low} to {high}, not {getattr(self, name)}.")
        if not re.fullmatch(r"([A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*)?", self.language):
            raise SettingError(f"language must be a tag such as 'de' or 'pt-BR', not {self.language!r:.40}.")
        rows, (width, height) = parse_cells(self.layout), parse_page_size(self.page_size)
        longest = max(len(cells) for _, cells in rows)
        room = (
            width - (2 * self.margin + (longest - 1) * self.gutter) * MM,
            height - (2 * self.margin + (len(rows) - 1) * self.gutter) * MM,
        )
        if min(room[0] / longest, room[1] / len(rows)) < 5 * MM:
            raise SettingError(
                f"Cells of {self.layout!r:.60} on {self.page_size!r:.60} with a margin of {self.margin:g} mm and "
                f"gutters of {self.gutter:g} mm would be narrower than 5 mm; choose a larger page or fewer cells."
            )
        if max(width, height) * self.dpi / 72 > MAX_PIXELS:
            raise SettingError(
                f"A page of {self.page_size!r:.60} at {self.dpi} dpi would be over {MAX_PIXELS} px long; lower dpi."
            )


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Caption:
    """Centred lines of text in a box, from its top; `is_boxed` ones lie on the image, on white."""

    box: Box
    lines: tuple[str, ...]
    size: float
    is_boxed: bool
    is_rtl: bool

    @property
    def line_height(self) -> float:
        return self.size * LINE


@dataclass(frozen=True)
class Page:
    """Sizes and places are in points, from the top left; `images` are shown whole or cropped to their boxes."""

    width: float
    height: float
    images: tuple[tuple[ImageSegment, Box], ...]
    captions: tuple[Caption, ...]


def parse_cells(layout: str) -> list[tuple[float, list[float]]]:
    """Height and cell widths of each row, relative; raises SettingError."""
    rows = []
    for row in LAYOUTS.get(layout.strip().lower(), layout).split("/"):
        height, divider, cells = row.rpartition(":")
        numbers = [height, *cells.split()] if divider else ["1", *cells.split()]
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        if len(values) < 2 or len(values) > 13 or not all(0.01 <= value <= 100 for value in values):
            raise SettingError(
                f"The layout {layout!r:.80} must be one of {', '.join(LAYOUTS)}, or cells such as '2: 1 / 1: 1 1'."
            )
        rows.append((values[0], values[1:]))
    if len(rows) > 12:
        raise SettingError(f"The layout {layout!r:.80} has {len(rows)} rows; at most 12 are laid out.")
    return rows


def parse_page_size(text: str) -> tuple[float, float]:
    """Width and height in points; raises SettingError."""
    name, _, turned = text.strip().lower().partition(" ")
    number, unit = r"(\d+(?:[.,]\d+)?)\s*", r"(mm|cm|in)"
    match = re.fullmatch(rf"{number}{unit}?\s*[x\u00d7]\s*{number}{unit}", text.strip().lower())
    sizes = {key.lower(): size for key, size in PAGE_SIZES.items()}
    if name in sizes and turned in ("", "landscape"):
        width, height = sizes[name] if not turned else sizes[name][::-1]
    elif match and match[2] in (None, match[4]):
        factor = {"mm": 1, "cm": 10, "in": 25.4}[match[4]]
        width, height = (float(side.replace(",", ".")) * factor for side in (match[1], match[3]))
    else:
        width = height = 0
    if not (20 <= width <= 1000 and 20 <= height <= 1000):
        raise SettingError(
            f"The page size {text!r:.60} must be one of {', '.join(PAGE_SIZES)}, also 'A5 landscape', or like "
            "'210 x 148 mm' or '8.5 x 8.5 in', from 20 to 1000 mm."
        )
    return width * MM, height * MM


def parse_order(order: str, count: int) -> list[int | None]:
    """Panels in the order of the cells, from 0, None for an empty cell; raises SettingError."""
    if not order.strip():
        return list(range(count))
    numbers = [number for number in re.split(r"[,\s]+", order.strip()) if number]
    for number in numbers:
        if not (number.isdecimal() and len(number) < 6 and int(number) <= count):
            raise SettingError(f"order must be panel numbers such as '1, 3, 2', up to {count}; {number!r:.40} is none.")
    return [int(number) - 1 if int(number) else None for number in numbers]


def lay_out(story: Story, config: PageConfig = PageConfig(), strict: bool = True) -> tuple[list[Page], Face]:
    """The pages of a story, and the font of their captions.

    Args:
        strict: Raise SettingError for text that no font here can show; else show what can be.

    Raises:
        StoryError: For a story without panels.
        SettingError: For panels that it does not have.
    """
    panels = story.panels()
    if not panels:
        raise StoryError("The story is empty; there are no pages to make.")
    width, height = parse_page_size(config.page_size)
    texts = [panel.text if config.captions != NONE or panel.image is None else "" for panel in panels]
    face = choose_font(texts, config.font, strict, config.language or language_of(story.text))
    for sign in dict.fromkeys("".join(texts)):
        if not sign.isspace() and not face.printable(sign):
            log.warning("The font has no %r; it is left out.", sign)
    if strict:
        for text in texts:
            check_direction(text)
    cells, pages = _cells(config, width, height), []
    order = parse_order(config.order, len(panels))
    is_rtl = is_right_to_left(story.text)
    if is_rtl:  # rows are read from the right, too
        cells = [Box(width - cell.x - cell.width, cell.y, cell.width, cell.height) for cell in cells]
    size = _font_size(config, len(cells))
    used = [(number, cells[place % len(cells)]) for place, number in enumerate(order) if number is not None]
    reserves = _reserves([(panels[n], texts[n], cell) for n, cell in used], face, size, config)
    for start in range(0, len(order), len(cells)):
        images, captions = [], []
        for number, cell in zip(order[start : start + len(cells)], cells):
            if number is None:
                continue
            image, caption = _fill(cell, panels[number], texts[number], face, config, size, reserves[cell.y])
            images += [image] if image else []
            captions += [caption] if caption else []
            if caption and caption.lines[-1].endswith(f" {CUT}") and not texts[number].endswith(CUT):
                log.warning("The caption of panel %d is too long for its cell; its end is cut.", number + 1)
        pages.append(Page(width, height, tuple(images), tuple(captions)))
    return pages, face


def _cells(config: PageConfig, width: float, height: float) -> list[Box]:
    rows, margin, gutter = parse_cells(config.layout), config.margin * MM, config.gutter * MM
    free = height - 2 * margin - (len(rows) - 1) * gutter
    total, y, cells = sum(row for row, _ in rows), margin, []
    for row, columns in rows:
        row_height, x = free * row / total, margin
        room = width - 2 * margin - (len(columns) - 1) * gutter
        for column in columns:
            cell_width = room * column / sum(columns)
            cells.append(Box(x, y, cell_width, row_height))
            x += cell_width + gutter
        y += row_height + gutter
    return cells


def _font_size(config: PageConfig, num_cells: int) -> float:
    return config.font_size or (14.0 if num_cells == 1 else 10.0 if num_cells <= 4 else 8.0)


def _fill(cell: Box, panel: Panel, text: str, face: Face, config: PageConfig, size: float, reserve: float):
    """Where the image and the caption of a cell go.

    Args:
        size: Of the font, in pt.
        reserve: Height to keep free beneath the image, which its caption fits.
    """
    image, is_rtl = panel.image, is_right_to_left(text)
    if image is None:  # words alone: in the middle of the cell
        lines, size = _caption(text, face, size * 1.2, cell.width, cell.height)
        top = cell.y + (cell.height - len(lines) * size * LINE) / 2
        caption = Caption(Box(cell.x, top, cell.width, len(lines) * size * LINE), lines, size, False, is_rtl)
        return None, caption if lines else None
    if config.captions == BOX:
        place = cell if config.fit == "crop" else _inside(cell, *image.size)
        pad = size * 0.6
        lines, size = _caption(text, face, size, place.width - 2 * pad, place.height * 0.4)
        if not lines:
            return (image, place), None
        height = len(lines) * size * LINE + pad
        width = min(place.width, max(face.width(line, size, is_rtl) for line in lines) + 2 * pad)
        box = Box(place.x + (place.width - width) / 2, place.y + place.height - height - pad, width, height)
        return (image, place), Caption(box, lines, size, True, is_rtl)
    lines, size = _caption(text, face, size, cell.width, cell.height * 0.5)
    height = len(lines) * size * LINE
    room = Box(cell.x, cell.y, cell.width, cell.height - reserve)
    place = room if config.fit == "crop" else _inside(room, *image.size)
    box = Box(cell.x, place.y + place.height + size * 0.6, cell.width, height)
    return (image, place), Caption(box, lines, size, False, is_rtl) if lines else None


def _reserves(used: list[tuple[Panel, str, Box]], face: Face, size: float, config: PageConfig) -> dict[float, float]:
    """What the longest caption beneath takes, by the top of a row: images of a row, on every page, stand level."""
    heights = {cell.y: 0.0 for _, _, cell in used}
    for panel, text, cell in used:
        if panel.image is not None and config.captions == BENEATH:
            lines, own_size = _caption(text, face, size, cell.width, cell.height * 0.5)
            below = len(lines) * own_size * LINE + own_size * 0.6 if lines else 0.0
            heights[cell.y] = max(heights[cell.y], below)
    return heights


def _inside(room: Box, width: int, height: int) -> Box:
    """The largest box of an image's shape in a room, in its middle."""
    scale = min(room.width / width, room.height / height)
    width, height = width * scale, height * scale
    return Box(room.x + (room.width - width) / 2, room.y + (room.height - height) / 2, width, height)


def _caption(text: str, face: Face, size: float, width: float, height: float) -> tuple[tuple[str, ...], float]:
    """Lines of a caption and their font size, smaller if need be; text that never fits is cut."""
    lines = wrap(text, face, size, width)
    while len(lines) * size * LINE > height and size > MIN_FONT:
        size = max(MIN_FONT, size * 0.92)
        lines = wrap(text, face, size, width)
    fitting = max(1, int(height / (size * LINE)))
    if len(lines) > fitting:
        lines = [*lines[: fitting - 1], f"{lines[fitting - 1].rstrip('.')} {CUT}"]
    return tuple(lines), size
