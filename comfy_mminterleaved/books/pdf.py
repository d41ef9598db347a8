"""PDF: with reportlab (an extra) images and text that can be searched, else Pillow's, with pages as images."""

from __future__ import annotations

import io
import unicodedata
from dataclasses import replace

from PIL import Image

from ..stories.story import Story
from .encode import encode_image
from .fonts import Face
from .layout import Box, Caption, Page, PageConfig, lay_out
from .render import INK, PAPER, caption_lines, draw_caption, fitted, render_page


def render_pdf(story: Story, title: str, config: PageConfig, strict: bool = True) -> bytes:
    """The pages of a story as one PDF; raises as `lay_out`."""
    pages, face = lay_out(story, config, strict)
    try:
        import reportlab  # noqa: F401
    except ImportError:
        return _with_pillow(pages, face, title, config)
    return _with_reportlab(pages, face, title, config)


def _with_pillow(pages: list[Page], face: Face, title: str, config: PageConfig) -> bytes:
    images = [render_page(page, face, config) for page in pages]
    file = io.BytesIO()
    about = {"title": title, "creationDate": None, "modDate": None}
    images[0].save(file, "PDF", save_all=True, append_images=images[1:], resolution=config.dpi, quality=92, **about)
    return file.getvalue()


def _with_reportlab(pages: list[Page], face: Face, title: str, config: PageConfig) -> bytes:
    from reportlab.lib.utils import ImageReader
    from reportlab.pdfgen import canvas

    file, scale = io.BytesIO(), config.dpi / 72
    name = _embed(face)
    # A font of its own from the start: else one that is not embedded would be named.
    pdf = canvas.Canvas(file, pageCompression=1, invariant=1, initialFontName=name or _embed(Face()))
    pdf.setTitle(title), pdf.setAuthor(""), pdf.setCreator("comfy-mminterleaved"), pdf.setProducer("reportlab")
    for page in pages:
        pdf.setPageSize((page.width, page.height))
        for image, box in page.images:
            # No more pixels than the image has: a PDF scales it where it is shown.
            width, height = min(box.width * scale, 2 * image.size[0]), min(box.height * scale, 2 * image.size[1])
            factor = min(width / box.width, height / box.height)
            picture = fitted(image, round(box.width * factor), round(box.height * factor))
            reader = ImageReader(io.BytesIO(encode_image(picture)[0]))
            pdf.drawImage(reader, box.x, page.height - box.y - box.height, box.width, box.height)
        for caption in page.captions:
            if name is not None and all(map(is_plain, caption.lines)):
                _draw_text(pdf, page, caption, face, name)
            else:
                _draw_as_image(pdf, page, caption, face, max(scale, 300 / 72), ImageReader)
        pdf.showPage()
    pdf.save()
    return file.getvalue()


def _embed(face: Face) -> str | None:
    """reportlab's name of a font; None for one that it cannot embed (OpenType with PostScript outlines)."""
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFError, TTFont

    name = f"story-{face.path.stem if face.path else 'default'}-{face.index}"
    try:
        pdfmetrics.registerFont(TTFont(name, io.BytesIO(face.data), subfontIndex=face.index))
    except (TTFError, OSError):
        return None
    return name


def is_plain(text: str) -> bool:
    """Whether a text is its letters one after the other, from left to right: not Arabic, Hebrew or Devanagari."""
    scripts = (
        "LATIN",
        "GREEK",
        "CYRILLIC",
        "ARMENIAN",
        "GEORGIAN",
        "CJK",
        "IDEOGRAPHIC",
        "HIRAGANA",
        "KATAKANA",
        "HALFWIDTH",
        "FULLWIDTH",
        "HANGUL",
        "MASCULINE",
        "FEMININE",
    )
    return all(
        not unicodedata.category(sign).startswith(("L", "M")) or unicodedata.name(sign, "?").startswith(scripts)
        for sign in text
    )


def _draw_text(pdf, page: Page, caption: Caption, face: Face, name: str) -> None:
    if caption.is_boxed:
        box = caption.box
        pdf.setFillColor(PAPER), pdf.setStrokeColor(INK), pdf.setLineWidth(0.6)
        y = page.height - box.y - box.height
        pdf.roundRect(box.x, y, box.width, box.height, caption.size * 0.35, stroke=1, fill=1)
    pdf.setFillColor(INK), pdf.setFont(name, caption.size)
    for line, x, y in caption_lines(caption, face):
        pdf.drawString(x, page.height - y, line)


def _draw_as_image(pdf, page: Page, caption: Caption, face: Face, scale: float, reader) -> None:
    """A caption that reportlab cannot set: in another order, joined letters, or a font that it cannot embed."""
    pad = caption.size  # room for what hangs below the last line
    box = Box(caption.box.x, caption.box.y - pad, caption.box.width, caption.box.height + 2 * pad)
    size = max(1, round(box.width * scale)), max(1, round(box.height * scale))
    picture = Image.new("RGBA", size, (255, 255, 255, 0))
    draw_caption(picture, replace(caption, box=Box(0, pad, caption.box.width, caption.box.height)), face, scale)
    data = io.BytesIO()
    picture.save(data, "PNG")
    pdf.drawImage(reader(data), box.x, page.height - box.y - box.height, box.width, box.height, mask="auto")
