"""Pick Image: of several drawings, the one that is most alike to the heroes."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from .context_images import embed_images
from .segments import images_from_batch
from .types import CATEGORY, StorySocket


class PickImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedPickImage",
            display_name="Pick Image",
            category=CATEGORY,
            description="Takes the image of a batch that is most alike to the heroes' images, by any CLIP vision model.",
            inputs=[
                io.Image.Input("images", tooltip="The drawings to choose from, as a batch."),
                StorySocket.Input("heroes", tooltip="A story with the heroes' images; its text does not count."),
                io.ClipVision.Input("clip_vision", tooltip="Compares images."),
            ],
            outputs=[
                io.Image.Output("best_out", display_name="best"),
                io.Float.Output(
                    "scores_out",
                    display_name="scores",
                    is_output_list=True,
                    tooltip="Of each image: its mean cosine similarity to the heroes, up to 1.",
                ),
                io.Int.Output("index_out", display_name="index", tooltip="Of the best image in the batch, from 0."),
            ],
        )

    @classmethod
    def execute(cls, images, heroes, clip_vision) -> io.NodeOutput:
        if not heroes.images:
            raise SettingError("The heroes' story has no images to compare with; add one.")
        embeds = embed_images(clip_vision, [*images_from_batch(images), *heroes.images])
        scores = (embeds[: len(images)] @ embeds[len(images) :].T).mean(1).tolist()
        index = max(range(len(scores)), key=lambda n: scores[n])
        return io.NodeOutput(images[index : index + 1], scores, index)
