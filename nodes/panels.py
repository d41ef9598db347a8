"""Between a story and ComfyUI's lists of images and texts."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.stories.story import Story
from .segments import pictures_of, with_features
from .sockets import CATEGORY, EncoderSocket, StorySocket


class StoryToPanels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedStoryToPanels",
            display_name="Story to Panels",
            category=CATEGORY,
            description="Takes a story apart: the pictures, and the text of each.",
            inputs=[StorySocket.Input("story", tooltip="The story to take apart.")],
            outputs=[
                io.Image.Output(
                    "images_out",
                    display_name="images",
                    is_output_list=True,
                    tooltip="The pictures, one after the other.",
                ),
                io.String.Output(
                    "texts_out",
                    display_name="texts",
                    is_output_list=True,
                    tooltip="The text that belongs to each picture; empty if there is none.",
                ),
            ],
        )

    @classmethod
    def execute(cls, story) -> io.NodeOutput:
        return io.NodeOutput(*_taken_apart(story))


class PanelsInside(io.ComfyNode):
    """What Tell Story unfolds to at its end: ComfyUI makes a list output of a value that is a list, not of a list."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedPanelsInside",
            display_name="Panels (inside Tell Story)",
            category=f"{CATEGORY}/inside",
            description="A part of Tell Story; on the canvas use Story to Panels.",
            inputs=[StorySocket.Input("story", tooltip="The story to take apart.")],
            outputs=[
                io.Image.Output("images_out", display_name="images"),
                io.String.Output("texts_out", display_name="texts"),
            ],
        )

    @classmethod
    def execute(cls, story) -> io.NodeOutput:
        if not story.pictures:  # a storyboard may ask for text alone; what takes pictures then does not run
            return io.NodeOutput(ExecutionBlocker(None), [panel.text for panel in story.panels()])
        return io.NodeOutput(*_taken_apart(story))


def _taken_apart(story: Story):
    panels = [panel for panel in story.panels() if panel.picture is not None]
    if not panels:
        raise StoryError("The story has no pictures to take out.")
    return [p.picture.pixels.movedim(0, -1).unsqueeze(0) for p in panels], [p.text for p in panels]


class PanelsToStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedPanelsToStory",
            display_name="Panels to Story",
            category=CATEGORY,
            description="Puts pictures and texts together to a story, each text before its picture.",
            is_input_list=True,
            inputs=[
                EncoderSocket.Input("encoder", tooltip="Sees the pictures."),
                io.Image.Input("images", tooltip="Pictures, as a list or a batch."),
                io.String.Input(
                    "texts",
                    optional=True,
                    force_input=True,
                    tooltip="As many texts as pictures; a picture may have an empty one.",
                ),
            ],
            outputs=[StorySocket.Output("story_out", display_name="story")],
        )

    @classmethod
    def execute(cls, encoder, images, texts=None) -> io.NodeOutput:
        pictures = [picture for image in images for picture in pictures_of(image)]
        texts = texts or [""] * len(pictures)
        if len(texts) != len(pictures):
            raise StoryError(
                f"There are {len(pictures)} pictures and {len(texts)} texts; there must be as many of both."
            )
        story = Story()
        for text, picture in zip(texts, pictures):
            story = story.add(text.strip(), picture)
        return io.NodeOutput(with_features(encoder[0], story))
