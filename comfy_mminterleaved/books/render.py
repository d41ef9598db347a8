"""Draws pages with Pillow."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageDraw

from ..stories.images import to_pil
from ..stories.story import ImageSegment, Story
from .fonts import Face
from .layout import Box, Caption, Page, PageConfig, lay_out

PAPER, INK = "#ffffff", "#1d1d1f"


def render_pages(story: Story, config: PageConfig = PageConfig(), strict: bool = True) -> Iterator[Image.Image]:
    """The pages of a story as RGB images, in the resolution of `config.dpi`; raises as `lay_out`."""
    pages, face = lay_out(story, config, strict)
    return (render_page(page, face, config) for page in pages)


def render_page(page: Page, face: Face, config: PageConfig, captions: bool = True) -> Image.Image:
    scale = config.dpi / 72
    canvas = Image.new("RGB", (round(page.width * scale), round(page.height * scale)), PAPER)
    for image, box in page.images:
        left, top, right, bottom = _pixels(box, scale)
        canvas.paste(fitted(image, right - left, bottom - top), (left, top))
    for caption in page.captions if captions else ():
        draw_caption(canvas, caption, face, scale)
    return canvas


def fitted(image: ImageSegment, width: int, height: int) -> Image.Image:
    """An image scaled to fill a size; what is over it is cut at both sides."""
    picture = to_pil(image.display_pixels)
    scale = max(width / picture.width, height / picture.height)
    crop_width, crop_height = width / scale, height / scale
    left, top = (picture.width - crop_width) / 2, (picture.height - crop_height) / 2
    box = (max(0, left), max(0, top), min(picture.width, left + crop_width), min(picture.height, top + crop_height))
    return picture.resize((max(1, width), max(1, height)), Image.Resampling.LANCZOS, box=box)


def draw_caption(canvas: Image.Image, caption: Caption, face: Face, scale: float) -> None:
    draw = ImageDraw.Draw(canvas)
    if caption.is_boxed:
        draw.rounded_rectangle(
            _pixels(caption.box, scale), round(caption.size * 0.35 * scale), PAPER, INK, max(1, round(0.6 * scale))
        )
    font = face.at(caption.size * scale)
    for line, x, y in caption_lines(caption, face):
        draw.text((x * scale, y * scale), line, INK, font, anchor="ls", **face.direction(caption.is_rtl))


def caption_lines(caption: Caption, face: Face) -> Iterator[tuple[str, float, float]]:
    """The lines of a caption, each with where its baseline begins, at the left, in points."""
    box, pad = caption.box, (caption.size * 0.3 if caption.is_boxed else 0)
    for number, line in enumerate(caption.lines):
        width = face.width(line, caption.size, caption.is_rtl)
        free = box.width - width
        yield line, box.x + free / 2, box.y + pad + number * caption.line_height + caption.size


def _pixels(box: Box, scale: float) -> tuple[int, int, int, int]:
    return (
        round(box.x * scale),
        round(box.y * scale),
        round((box.x + box.width) * scale),
        round((box.y + box.height) * scale),
    )
