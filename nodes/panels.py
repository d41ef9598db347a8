"""Between a story and ComfyUI's lists of images and texts."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.stories.story import Story
from .preview import is_inside, panels_ui
from .segments import encode_story, images_from_batch
from .types import CATEGORY, EncoderSocket, StorySocket


class StoryToPanels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedStoryToPanels",
            display_name="Story to Panels",
            category=CATEGORY,
            description="Splits a story into its images and the text of each.",
            inputs=[StorySocket.Input("story", tooltip="The story to split.")],
            outputs=[
                io.Image.Output(
                    "images_out",
                    display_name="images",
                    is_output_list=True,
                    tooltip="The images in order.",
                ),
                io.String.Output(
                    "texts_out",
                    display_name="texts",
                    is_output_list=True,
                    tooltip="The text of each image; empty if there is none.",
                ),
            ],
        )

    @classmethod
    def execute(cls, story) -> io.NodeOutput:
        return io.NodeOutput(*split_panels(story), ui=panels_ui(story))


class PanelsInside(io.ComfyNode):
    """Last node of Tell Story's expansion: ComfyUI accepts a list output of an expansion only as one value, a list."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedPanelsInside",
            display_name="Panels (inside Tell Story)",
            category=f"{CATEGORY}/internal",
            description="A part of Tell Story; on the canvas use Story to Panels.",
            inputs=[StorySocket.Input("story", tooltip="The story to split.")],
            outputs=[
                io.Image.Output("images_out", display_name="images"),
                io.String.Output("texts_out", display_name="texts"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, story) -> io.NodeOutput:
        if not is_inside(cls.hidden):
            raise StoryError("This node is a part of Tell Story; use Story to Panels instead.")
        if not story.images:  # a storyboard may ask for text alone; what takes pictures then does not run
            return io.NodeOutput(ExecutionBlocker(None), [panel.text for panel in story.panels()], ui=panels_ui(story))
        return io.NodeOutput(*split_panels(story, True), ui=panels_ui(story))


def split_panels(story: Story, is_displayed: bool = False):
    """Images and texts of the panels that have an image.

    Args:
        is_displayed: Takes the refined images, which people see, where there are some.
    """
    panels = [panel for panel in story.panels() if panel.image is not None]
    if not panels:
        raise StoryError("The story has no images.")
    images = [p.image.display_pixels if is_displayed else p.image.pixels for p in panels]
    return [image.movedim(0, -1).unsqueeze(0) for image in images], [p.text for p in panels]


class PanelsToStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedPanelsToStory",
            display_name="Panels to Story",
            category=CATEGORY,
            description="Joins images and texts to a story, each text before its image.",
            is_input_list=True,
            inputs=[
                EncoderSocket.Input("encoder", tooltip="Encodes the images."),
                io.Image.Input("images", tooltip="Images, as a list or a batch."),
                io.String.Input(
                    "texts",
                    optional=True,
                    force_input=True,
                    tooltip="As many texts as images; a text may be empty.",
                ),
            ],
            outputs=[StorySocket.Output("story_out", display_name="story")],
        )

    @classmethod
    def execute(cls, encoder, images, texts=None) -> io.NodeOutput:
        images = [segment for batch in images for segment in images_from_batch(batch)]
        texts = texts or [""] * len(images)
        if len(texts) != len(images):
            raise StoryError(f"There are {len(images)} images and {len(texts)} texts; their numbers must be equal.")
        story = Story()
        for text, image in zip(texts, images):
            story = story.add(text.strip(), image)
        return io.NodeOutput(encode_story(encoder[0], story))
