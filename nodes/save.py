"""Save Story: a folder with numbered pictures, story.json and story.html."""

from __future__ import annotations

import json
import os
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import OutputError, StoryError
from ..comfy_mminterleaved.files import friendly_errors, path_below, write_numbered_dir
from ..comfy_mminterleaved.stories.page import save_story
from .preview import panels_ui
from .types import CATEGORY, StorySocket


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
            "a single self-contained page.",
            is_output_node=True,
            inputs=[
                StorySocket.Input("story", tooltip="The story to save."),
                io.String.Input(
                    "filename_prefix",
                    default="stories/story",
                    tooltip="Path below ComfyUI's output folder; a number is appended.",
                ),
                io.String.Input("title", default="", tooltip="Title at the top of the page."),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, story, filename_prefix, title) -> io.NodeOutput:
        if not story.segments:
            raise StoryError("The story is empty; there is nothing to save.")
        place = story_place(filename_prefix)
        metadata = {}
        if not args.disable_metadata:
            if cls.hidden.prompt is not None:
                metadata["prompt"] = json.dumps(cls.hidden.prompt)
            for key, value in (cls.hidden.extra_pnginfo or {}).items():
                metadata[key] = json.dumps(value)
        folder, paths = write_numbered_dir(*place, lambda path: save_story(path, story, title, metadata=metadata))
        subfolder = folder.relative_to(folder_paths.get_output_directory()).as_posix()
        files = [{"filename": path.name, "subfolder": subfolder, "type": "output"} for path in paths]
        images, pages = files[:-2], files[-2:]  # pages: for clients that collect what was saved
        return io.NodeOutput(ui={"images": images, "text": (story.text,), "pages": pages, **panels_ui(story, images)})
