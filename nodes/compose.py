"""Compose Pages: a story as pages to print, picture book or comic."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.books.fonts import system_fonts
from ..comfy_mminterleaved.books.layout import CAPTIONS, FITS, LAYOUTS, PAGE_SIZES, PageConfig, lay_out, parse_page_size
from ..comfy_mminterleaved.books.render import render_page
from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.files import format_bytes
from .blocks import progress
from .types import CATEGORY, PagesSocket, StorySocket, advanced

FONT_FOLDER, DEFAULT_FONT = "fonts", "default"
FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
folder_paths.add_model_folder_path(FONT_FOLDER, str(Path(folder_paths.models_dir) / FONT_FOLDER))


def fonts() -> dict[str, Path | None]:
    """Font files by the names that the list has: those in models/fonts, then the system's."""
    files: dict[str, Path | None] = {DEFAULT_FONT: None}
    for folder in map(Path, folder_paths.get_folder_paths(FONT_FOLDER)):
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.suffix.lower() in FONT_SUFFIXES:
                files.setdefault(path.relative_to(folder).as_posix(), path)
    for path in system_fonts():
        files.setdefault(path.name, path)
    return files


class ComposePages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedComposePages",
            display_name="Compose Pages",
            category=CATEGORY,
            description="Lays a story out as pages: a picture book with one panel a page, a comic grid, or cells of your own. Which "
            "panel goes where, its caption and the size of the page are yours to choose.",
            inputs=[
                StorySocket.Input("story", tooltip="The story, with its images."),
                io.Combo.Input("layout", options=list(LAYOUTS), default="picture book", tooltip="Panels on a page."),
                io.Combo.Input("page_size", options=list(PAGE_SIZES), default="A5", tooltip="Of the printed page."),
                io.Combo.Input(
                    "captions",
                    options=list(CAPTIONS),
                    default="beneath",
                    tooltip="Where the text goes: beneath the image, or in a box at its foot.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="whole",
                    tooltip="'whole' shows all of an image, 'crop' fills its cell and cuts what is over.",
                ),
                io.String.Input(
                    "order",
                    default="",
                    tooltip="Which panel goes into which cell, such as '1, 3, 2'; 0 leaves a cell empty. If empty, all in order.",
                ),
                io.Int.Input(
                    "dpi", default=300, min=30, max=1200, tooltip="Pixels per inch: 300 to print, 100 to see."
                ),
                io.Combo.Input(
                    "font",
                    options=list(fonts()),
                    default=DEFAULT_FONT,
                    tooltip="A font file in models/fonts, or one of the system's. 'default' is a plain one that has the text's signs.",
                ),
                *advanced(
                    io.Float.Input(
                        "font_size",
                        default=0.0,
                        min=0.0,
                        max=200.0,
                        step=0.5,
                        tooltip="In points; 0 for one that suits the layout. A caption that is too long is set smaller.",
                    ),
                    io.Float.Input(
                        "margin", default=10.0, min=0.0, max=100.0, step=0.5, tooltip="Around the page, in mm."
                    ),
                    io.Float.Input(
                        "gutter", default=4.0, min=0.0, max=100.0, step=0.5, tooltip="Between cells, in mm."
                    ),
                    io.String.Input(
                        "cells",
                        default="",
                        tooltip="Cells of your own, instead of the layout: rows divided by '/', in each the widths of its cells, "
                        "before them its height and ':'. '2: 1 / 1: 1 1' is a tall row above two cells.",
                    ),
                    io.String.Input(
                        "custom_size",
                        default="",
                        tooltip="Another page size, such as '210 x 148 mm' or '8.5 x 8.5 in'.",
                    ),
                ),
            ],
            outputs=[
                io.Image.Output("pages_out", display_name="pages", tooltip="The pages as one batch."),
                PagesSocket.Output(
                    "layout_out", display_name="layout", tooltip="For Save Story: PDF and CBZ are laid out like this."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, font):
        return True  # files come and go; `execute` says which are there

    @classmethod
    def execute(
        cls,
        story,
        layout,
        page_size,
        captions,
        fit,
        order,
        dpi,
        font,
        font_size,
        margin,
        gutter,
        cells,
        custom_size,
    ) -> io.NodeOutput:
        files = fonts()
        if font not in files:
            raise SettingError(f"There is no font {font!r:.80} in models/{FONT_FOLDER}, nor among the system's.")
        config = PageConfig(
            layout=cells.strip() or layout,
            page_size=custom_size.strip() or page_size,
            captions=captions,
            fit=fit,
            order=order,
            margin=margin,
            gutter=gutter,
            font=files[font],
            font_size=font_size,
            dpi=dpi,
        )
        pages, face = lay_out(story, config)
        check_memory(len(pages), config)
        on_progress, images = progress(len(pages)), []
        for number, page in enumerate(pages, 1):
            image = np.asarray(render_page(page, face, config))
            images.append(torch.from_numpy(image.astype(np.float32) / 255))
            on_progress(number, len(pages))
        return io.NodeOutput(torch.stack(images), config)


def check_memory(count: int, config: PageConfig) -> None:
    """Raises SettingError for pages that would take more than half of the free memory."""
    width, height = (round(side * config.dpi / 72) for side in parse_page_size(config.page_size))
    needed = 2 * count * width * height * 3 * 4  # once as a list, once as a batch
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > free / 2:
        raise SettingError(
            f"{count} pages of {width} x {height} px would take {format_bytes(needed)} of memory; lower dpi, choose a smaller "
            "page, or have Save Story write a PDF."
        )
