"""Select Context Images: which of a story's images the next panel refers to."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.stories.story import ImageSegment, Story
from .references import as_batch
from .segments import images_from_batch
from .types import CATEGORY, StorySocket

FIRST_AND_LAST, LAST, FIRST, ALIKE = "first and last", "last", "first", "most alike"
CHOICES = (FIRST_AND_LAST, LAST, FIRST, ALIKE)


def choose_panels(choice: str, count: int, available: int) -> list[int]:
    """Numbers of the images that a panel refers to, in order, out of `available`; at most `count`."""
    count = min(count, available)
    if choice == LAST:
        return list(range(available - count, available))
    if choice == FIRST:
        return list(range(min(count, 1)))
    return [0, *range(available - count + 1, available)] if count else []


def embed_images(clip_vision, images: list[ImageSegment]) -> torch.Tensor:
    """Normed embeddings `(N, D)` of images, by any stock CLIP vision model."""
    batches = [image.pixels.movedim(0, -1).unsqueeze(0) for image in images]
    embeds = [clip_vision.encode_image(batch)["image_embeds"].float().flatten(1) for batch in batches]
    return torch.nn.functional.normalize(torch.cat(embeds), dim=-1)


def most_alike(clip_vision, images: list[ImageSegment], hero: ImageSegment, count: int) -> list[int]:
    """Numbers of the images that are most alike to the hero's, in their own order."""
    embeds = embed_images(clip_vision, [hero, *images])
    scores = (embeds[1:] @ embeds[0]).tolist()
    best = sorted(range(len(images)), key=lambda n: -scores[n])[:count]
    return sorted(best)


class SelectContextImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedSelectContext",
            display_name="Select Context Images",
            category=CATEGORY,
            description="Keeps some of a story's images, and the text after its last one: what the next panel refers to. Images that "
            "have drifted from the hero are left out with 'most alike'.",
            inputs=[
                StorySocket.Input("story", tooltip="The story up to the image to draw."),
                io.Combo.Input(
                    "choose",
                    options=list(CHOICES),
                    default=FIRST_AND_LAST,
                    tooltip="'first and last' is the first image and then the last ones, 'first' that one alone; 'most alike' "
                    "needs a CLIP vision model.",
                ),
                io.Int.Input("count", default=2, min=0, max=16, tooltip="How many images to keep."),
                io.Image.Input("hero", optional=True, tooltip="An image of the hero, put before the others."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="Compares images, for 'most alike'."),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story"),
                io.Image.Output(
                    "images_out", display_name="images", tooltip="The images that were kept, as one batch."
                ),
            ],
        )

    @classmethod
    def execute(cls, story, choose, count, hero=None, clip_vision=None) -> io.NodeOutput:
        images, heroes = list(story.images), images_from_batch(hero)[:1] if hero is not None else []
        if choose == ALIKE:
            if clip_vision is None:
                raise SettingError("'most alike' needs a CLIP vision model; connect one, or choose otherwise.")
            reference = (heroes or images)[:1]
            numbers = most_alike(clip_vision, images, reference[0], count) if images and count else []
        else:
            numbers = choose_panels(choose, count, len(images))
        kept = [*heroes, *(images[number] for number in numbers)]
        end = max((n for n, s in enumerate(story.segments) if isinstance(s, ImageSegment)), default=-1)
        chosen = Story((*kept, *story.segments[end + 1 :]), False)
        batch = as_batch([image.pixels.movedim(0, -1).unsqueeze(0) for image in kept])
        return io.NodeOutput(chosen, batch)
