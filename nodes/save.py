"""Save Story: a folder with numbered images, story.json, story.html, and books to print or to read."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io

from ..comfy_mminterleaved.books.export import render_book
from ..comfy_mminterleaved.books.layout import PageConfig
from ..comfy_mminterleaved.errors import MMInterleavedError, OutputError, StoryError
from ..comfy_mminterleaved.files import atomic_write, friendly_errors, path_below, write_numbered_dir
from ..comfy_mminterleaved.stories.page import displayed_images, save_story
from .preview import panels_ui
from .types import CATEGORY, PagesSocket, StorySocket


def story_place(prefix: str) -> tuple[Path, str, int]:
    """Where a prefix leads below ComfyUI's output folder: folder, name and the next number; raises OutputError."""
    output = Path(folder_paths.get_output_directory())
    normal = os.path.normpath(prefix.replace("\\", "/"))
    folder = path_below(output, normal)
    if not prefix.strip() or prefix.strip().endswith(("/", "\\")) or folder is None:
        raise OutputError(
            f"The prefix {prefix!r:.80} must name something below ComfyUI's output folder, as 'stories/mia'."
        )
    with friendly_errors(folder, "The folder"):
        parent, name, counter, _, _ = folder_paths.get_save_image_path(normal, str(output))
    return Path(parent), name, counter


class SaveStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedSaveStory",
            display_name="Save Story",
            category=CATEGORY,
            description="Saves a story as a folder: numbered images with the workflow embedded, story.json, and story.html, "
            "a single self-contained page; if you like also a PDF, an EPUB and a comic book archive.",
            is_output_node=True,
            inputs=[
                StorySocket.Input("story", tooltip="The story to save."),
                io.String.Input(
                    "filename_prefix",
                    default="stories/story",
                    tooltip="Path below ComfyUI's output folder; a number is appended.",
                ),
                io.String.Input("title", default="", tooltip="Title at the top of the page."),
                io.Boolean.Input("pdf", default=False, optional=True, tooltip="Also save story.pdf, for print."),
                io.Boolean.Input("epub", default=False, optional=True, tooltip="Also save story.epub, for e-readers."),
                io.Boolean.Input(
                    "cbz", default=False, optional=True, tooltip="Also save story.cbz, for comic readers."
                ),
                io.Boolean.Input(
                    "metadata",
                    default=True,
                    optional=True,
                    tooltip="Off: the images hold neither the workflow nor the story, so you can give them away.",
                ),
                io.String.Input(
                    "language",
                    default="",
                    optional=True,
                    tooltip="Of the texts, such as 'de', for e-readers and screen readers; if empty, guessed from the script.",
                ),
                PagesSocket.Input(
                    "layout",
                    optional=True,
                    tooltip="From Compose Pages, for PDF and CBZ; unconnected, a picture book in A5.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, story, filename_prefix, title, pdf=False, epub=False, cbz=False, metadata=True, language="", layout=None
    ) -> io.NodeOutput:
        if not story.segments:
            raise StoryError("The story is empty; there is nothing to save.")
        place = story_place(filename_prefix)
        chunks = {}
        if metadata and not args.disable_metadata:
            if cls.hidden.prompt is not None:
                chunks["prompt"] = json.dumps(cls.hidden.prompt)
            for key, value in (cls.hidden.extra_pnginfo or {}).items():
                chunks[key] = json.dumps(value)
        # Text that no font here can show is no reason to lose a story: it is saved as well as it can be.
        suffixes = [suffix for suffix, is_asked in ((".pdf", pdf), (".epub", epub), (".cbz", cbz)) if is_asked]
        books, problem = {}, None
        try:
            config = replace(layout or PageConfig(), language=language.strip())
            books = {f"story{s}": render_book(story, s, title, config, strict=False) for s in suffixes}
        except MMInterleavedError as error:  # said when the story is safe
            problem = error

        def write(path: Path) -> list[Path]:
            paths = save_story(path, story, title, metadata=chunks, has_metadata=metadata)
            for name, data in books.items():
                atomic_write(path / name, data)
            return [*paths, *(path / name for name in books)]

        folder, paths = write_numbered_dir(*place, write)
        subfolder = folder.relative_to(folder_paths.get_output_directory()).as_posix()
        if problem is not None:
            raise OutputError(f"The story is saved in {subfolder}, but not as {' and '.join(suffixes)}: {problem}")
        displayed = displayed_images([path.name for path in paths])
        files = [{"filename": path.name, "subfolder": subfolder, "type": "output"} for path in paths]
        # What is shown of each panel, and the rest for clients that collect what was saved.
        images = [f for f in files if f["filename"] in displayed]
        pages = [f for f in files if f["filename"] not in displayed]
        return io.NodeOutput(ui={"images": images, "text": (story.text,), "pages": pages, **panels_ui(story, images)})
