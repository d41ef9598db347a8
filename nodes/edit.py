"""Story Panel, Set Panel, Edit Panels: single panels of a story."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.stories.edit import arrange_panels, insert_panels, panel_of, set_panel
from .preview import panels_ui
from .segments import encode_story, images_from_batch
from .types import CATEGORY, EncoderSocket, StorySocket

MAX_PANELS = 1000


def number_input(tooltip: str):
    return io.Int.Input("number", default=1, min=1, max=MAX_PANELS, tooltip=tooltip)


class StoryPanel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedStoryPanel",
            display_name="Story Panel",
            category=CATEGORY,
            description="Takes one panel out of a story: its text, its image, and the story before it.",
            inputs=[
                StorySocket.Input("story", tooltip="The story to take it from."),
                number_input("Which panel, from 1."),
            ],
            outputs=[
                io.String.Output("text_out", display_name="text"),
                io.Image.Output("image_out", display_name="image", tooltip="Nothing runs on it if the panel has none."),
                StorySocket.Output("before_out", display_name="story before", tooltip="The panels before this one."),
            ],
        )

    @classmethod
    def execute(cls, story, number) -> io.NodeOutput:
        text, image, before = panel_of(story, number)
        pixels = ExecutionBlocker(None) if image is None else image.pixels.movedim(0, -1).unsqueeze(0)
        return io.NodeOutput(text, pixels, before)


class SetPanel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedSetPanel",
            display_name="Set Panel",
            category=CATEGORY,
            description="Puts another image or text into one panel of a story; everything else stays as it is.",
            inputs=[
                StorySocket.Input("story", tooltip="The story to change."),
                number_input("Which panel, from 1."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="The panel's new text; empty keeps the old one.",
                ),
                io.Image.Input("image", optional=True, tooltip="The panel's new image; without it the old one stays."),
                EncoderSocket.Input(
                    "encoder", optional=True, tooltip="Encodes the image, for stories that MM-Interleaved continues."
                ),
            ],
            outputs=[StorySocket.Output("story_out", display_name="story")],
        )

    @classmethod
    def execute(cls, story, number, text, image=None, encoder=None) -> io.NodeOutput:
        segments = images_from_batch(image) if image is not None else [None]
        if len(segments) != 1:
            raise StoryError(f"A panel has one image, not a batch of {len(segments)}; pick one.")
        story = set_panel(story, number, text.strip() or None, segments[0])
        story = story if encoder is None else encode_story(encoder, story)
        return io.NodeOutput(story, ui=panels_ui(story))


class EditPanels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedEditPanels",
            display_name="Edit Panels",
            category=CATEGORY,
            description="Reorders, removes and inserts panels of a story.",
            inputs=[
                StorySocket.Input("story", tooltip="The story to change."),
                io.String.Input(
                    "order",
                    default="",
                    tooltip="The panels to keep, in their new order, such as '1, 3, 2'; empty keeps all as they are.",
                ),
                StorySocket.Input("insert", optional=True, tooltip="A story whose panels are inserted."),
                io.Int.Input(
                    "before",
                    default=0,
                    min=0,
                    max=MAX_PANELS,
                    tooltip="The panel, in the new order, that they are inserted before; 0 for the end.",
                ),
            ],
            outputs=[StorySocket.Output("story_out", display_name="story")],
        )

    @classmethod
    def execute(cls, story, order, before, insert=None) -> io.NodeOutput:
        if order.strip():
            story = arrange_panels(story, panel_numbers(order))
        if insert is not None:
            story = insert_panels(story, insert, before or None)
        return io.NodeOutput(story, ui=panels_ui(story))


def panel_numbers(text: str) -> list[int]:
    """The numbers of a list like '1, 3, 2'; raises StoryError."""
    numbers = []
    for part in text.replace(",", " ").split():
        if not part.isdecimal() or len(part) > 9:
            raise StoryError(f"The order must be panel numbers, such as '1, 3, 2', not {text!r:.60}.")
        numbers.append(int(part))
    return numbers
