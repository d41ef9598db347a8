"""Load Story: a story that Save Story or the command line saved."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.files import path_below
from ..comfy_mminterleaved.stories.page import load_book
from .preview import panels_ui
from .segments import encode_story
from .types import CATEGORY, EncoderSocket, StorySocket

NOTHING = "(no saved story yet)"


def saved_stories() -> list[str]:
    """Folders with a story.json below ComfyUI's output and input folders, the newest first."""
    stories = []
    for folder in (folder_paths.get_output_directory(), folder_paths.get_input_directory()):
        for path in Path(folder).rglob("story.json"):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                stories.append((path.stat().st_mtime, path.parent.relative_to(folder).as_posix()))
    return [name for _, name in sorted(stories, reverse=True)] or [NOTHING]


def story_path(name: str) -> Path:
    """The story.json of a folder's name; raises StoryError."""
    for folder in (folder_paths.get_output_directory(), folder_paths.get_input_directory()):
        path = path_below(folder, f"{name}/story.json")
        if path is not None and path.is_file():
            return path
    raise StoryError(f"There is no saved story {name!r:.80} in ComfyUI's output or input folder.")


class LoadStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        options = saved_stories()
        return io.Schema(
            node_id="MMInterleavedLoadStory",
            display_name="Load Story",
            category=CATEGORY,
            description="Reads a saved story, to continue it, change single panels, or draw one anew.",
            inputs=[
                io.Combo.Input(
                    "folder", options=options, tooltip="A folder that Save Story wrote, in the output or input folder."
                ),
                EncoderSocket.Input(
                    "encoder", optional=True, tooltip="Encodes the images, for stories that MM-Interleaved continues."
                ),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story"),
                io.String.Output("title_out", display_name="title"),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder):
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, encoder=None):
        path = story_path(folder)
        return f"{path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, folder, encoder=None) -> io.NodeOutput:
        book = load_book(story_path(folder))
        story = book.story if encoder is None else encode_story(encoder, book.story)
        return io.NodeOutput(story, book.title, ui=panels_ui(story))
