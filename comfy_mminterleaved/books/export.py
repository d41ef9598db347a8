"""Writes a story as a book of any format."""

from __future__ import annotations

from pathlib import Path

from ..errors import OutputError
from ..files import atomic_write
from ..stories.page import book_title, render_page
from ..stories.story import Story
from .archives import render_cbz, render_epub
from .layout import PageConfig
from .pdf import render_pdf

FORMATS = (".html", ".pdf", ".epub", ".cbz")


def render_book(
    story: Story, suffix: str, title: str = "", config: PageConfig = PageConfig(), strict: bool = True
) -> bytes:
    """A story as the bytes of a book.

    Args:
        suffix: One of FORMATS; HTML and EPUB reflow: of `config` only the language counts there.
        strict: As for `lay_out`.

    Raises:
        OutputError: For another suffix.
        SettingError, StoryError: As `lay_out`.
    """
    title = title.strip() or book_title(story)
    if suffix == ".html":
        return render_page(story, title, config.language).encode("utf-8")
    if suffix == ".epub":
        return render_epub(story, title, config.language)
    if suffix == ".pdf":
        return render_pdf(story, title, config, strict)
    if suffix == ".cbz":
        return render_cbz(story, title, config, strict)
    raise OutputError(f"A book can be written as {', '.join(FORMATS)}, not {suffix!r:.20}.")


def export_story(path: str | Path, story: Story, title: str = "", config: PageConfig = PageConfig()) -> Path:
    """Writes a book whose format is the path's suffix, whole or not at all; raises as `render_book`."""
    path = Path(path)
    atomic_write(path, render_book(story, path.suffix.lower(), title, config))
    return path
