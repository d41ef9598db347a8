"""Add Story Text, Add Story Image, Introduce Character."""

from __future__ import annotations

from dataclasses import replace

import comfy.utils
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.stories.story import ImageSegment, Story, TextSegment
from .blocks import PatchedEncoder, PatchedLLM
from .preview import panels_ui, shows_panels, text_or_panels
from .types import CATEGORY, EncoderSocket, LLMSocket, StorySocket, advanced, search_aliases


def images_from_batch(image, origin: str = "own") -> list[ImageSegment]:
    """A ComfyUI IMAGE (B, H, W, 3 or more channels) in [0, 1] as images of this origin."""
    batch = (pixels.movedim(-1, 0)[:3].float().clamp(0, 1).cpu() for pixels in image)
    return [replace(ImageSegment.of(pixels), origin=origin) for pixels in batch]


def encode_story(encoder: PatchedEncoder | None, story: Story) -> Story:
    """The story with the encoder's features; raises StoryError if it has images and there is no encoder."""
    if not story.images:
        return story
    if encoder is None:
        raise StoryError("The story has images, but no encoder is connected; connect one.")
    bar = comfy.utils.ProgressBar(len(story.images))
    return encoder.encode_images(story, bar.update_absolute)


class AddStoryText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedStoryText",
            **search_aliases("Story Text"),
            display_name="Add Story Text",
            category=CATEGORY,
            description="Adds text to a story, or begins one.",
            inputs=[
                StorySocket.Input("story", optional=True, tooltip="The story to extend; without it a new one begins."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="One or two sentences, as they are to stand on the page.",
                ),
            ],
            outputs=[StorySocket.Output("story_out", display_name="story")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, text, story=None) -> io.NodeOutput:
        if not text.strip():
            raise StoryError("The text is empty; write what the story says here.")
        story = (story or Story()).add(TextSegment(text.strip()))
        return io.NodeOutput(story, ui=panels_ui(story) if shows_panels(cls.hidden) else None)


class AddStoryImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedStoryPicture",
            **search_aliases("Story Picture"),
            display_name="Add Story Image",
            category=CATEGORY,
            description="Adds an image to a story; a batch adds all its images in order.",
            inputs=[
                StorySocket.Input("story", optional=True, tooltip="The story to extend; without it a new one begins."),
                EncoderSocket.Input(
                    "encoder",
                    optional=True,
                    tooltip="Encodes the image, so that later panels can attend to it; other image models need none.",
                ),
                io.Image.Input("image", tooltip="Any image: drawn by the model, or your own."),
                io.Int.Input(
                    "seed",
                    optional=True,
                    force_input=True,
                    min=0,
                    max=2**63 - 1,
                    tooltip="The seed that it was drawn with, to be kept in the story.",
                ),
                io.String.Input(
                    "alt",
                    optional=True,
                    force_input=True,
                    tooltip="What the image shows, for those who do not see it; unconnected, the panel's text says so.",
                ),
                *advanced(
                    io.Combo.Input(
                        "origin",
                        options=["own", "drawn"],
                        default="own",
                        optional=True,
                        tooltip="'drawn' for an image that the model drew: Adapt Encoder to Drawings encodes it with an "
                        "adapter.",
                    )
                ),
                io.Image.Input(
                    "refined",
                    optional=True,
                    tooltip="The same image at a larger size, for pages and books; later panels see the other.",
                ),
            ],
            outputs=[StorySocket.Output("story_out", display_name="story")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, image, encoder=None, story=None, seed=None, alt=None, origin="own", refined=None) -> io.NodeOutput:
        images = images_from_batch(image, origin)
        if refined is not None:
            larger = images_from_batch(refined)
            if len(larger) != len(images):
                raise StoryError(f"There are {len(larger)} refined images of {len(images)}; connect as many.")
            images = [replace(each, refined=other.pixels) for each, other in zip(images, larger)]
        if len(images) == 1:
            images = [replace(images[0], seed=seed, alt=(alt or "").strip() or None)]
        story = (story or Story()).add(*images)
        if encoder is not None:
            story = encode_story(encoder, story)
        return io.NodeOutput(story, ui=panels_ui(story) if shows_panels(cls.hidden) else None)


class IntroduceCharacter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedIntroduce",
            display_name="Introduce Character",
            category=CATEGORY,
            description="Adds a sentence that says who is in the story's opening image, so the same character returns in "
            "every panel. A story that already has one is unchanged.",
            inputs=[
                LLMSocket.Input("llm", tooltip="Looks at the image and writes the sentence."),
                StorySocket.Input("story", tooltip="A story that opens with one image, with or without text."),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default="as the model's stories",
                    tooltip="Whether each text comes before or after its image.",
                ),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story"),
                io.String.Output("text_out", display_name="text", tooltip="The text of the opening image."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, llm: PatchedLLM, story, order) -> io.NodeOutput:
        story = story.arrange(llm.generator.resolve_image_first(story, ORDERS[order]))
        if story.images:
            llm.generator.truncate_to_context(story, 128, None)
            llm.load(story, 128)
            story = llm.generator.introduce(story)
        text = next((panel.text for panel in story.panels() if panel.image is not None), story.text)
        return io.NodeOutput(story, text, ui=text_or_panels(cls.hidden, text, story))


ORDERS = {"as the model's stories": None, "text first": False, "image first": True}
