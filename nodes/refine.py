"""Load Refiner and Refine Image: images at twice their size, with their text and what they were drawn from."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.generation.memory import refining_bytes
from ..comfy_mminterleaved.generation.ranking import panel_text
from ..comfy_mminterleaved.generation.refine import ImageRefiner, build_refiner
from ..comfy_mminterleaved.stories.story import Story
from .blocks import progress, system_patcher
from .contrastive import PatchedReader
from .load import check_systems, model_folder, models_with, read_system, sentence
from .segments import images_from_batch
from .types import CATEGORY, RefinerSocket, StorySocket


class PatchedRefiner(ImageRefiner):
    """A model's refiner, and the text tower that reads for it, as ComfyUI holds them."""

    def __init__(self, folder):
        embedder = PatchedReader(folder)
        super().__init__(build_refiner(*read_system(folder, "refiner"), "refiner", comfy.ops.manual_cast), embedder)
        self.patcher = system_patcher(self.model, embedder.model)
        embedder.device = self.device

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def refine(self, pixels, text: str = "", prompt_embeds: torch.Tensor | None = None) -> torch.Tensor:
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=refining_bytes(self.model.config, *pixels.shape[-2:])
        )
        return super().refine(pixels, text, prompt_embeds)


def refiner_models() -> list[str]:
    """Models that have a refiner."""
    return models_with("contrastive", "refiner")


class LoadRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadRefiner",
            display_name="Load Refiner",
            category=CATEGORY,
            description="Loads what makes a model's images twice as large, for Refine Image and Tell Story.",
            inputs=[io.Combo.Input("model", options=refiner_models(), tooltip="The model that draws the images.")],
            outputs=[RefinerSocket.Output("refiner_out", display_name="refiner")],
        )

    @classmethod
    def validate_inputs(cls, model):
        return model is None or sentence(lambda: check_systems(model, "contrastive", "refiner"))

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(PatchedRefiner(model_folder(model)))


class RefineImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedRefine",
            display_name="Refine Image",
            category=CATEGORY,
            description="Makes images twice as large, with sharp edges, in the style of the world that the refiner was trained on.",
            inputs=[
                RefinerSocket.Input("refiner", tooltip="From Load Refiner."),
                io.Image.Input("image", tooltip="Images of 1024 px a side at most."),
                StorySocket.Input(
                    "story",
                    optional=True,
                    tooltip="The story up to the panel's text: says what the image shows, and who is who.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="From Apply Synchronizer: what the image was drawn from."
                ),
            ],
            outputs=[io.Image.Output("image_out", display_name="image")],
        )

    @classmethod
    def execute(cls, refiner, image, story=None, positive=None) -> io.NodeOutput:
        images, text = images_from_batch(image), panel_text(story or Story())
        prompt_embeds = positive[0][0] if positive else None
        on_progress, refined = progress(len(images)), []
        for number, each in enumerate(images, 1):
            row = None if prompt_embeds is None else prompt_embeds[min(number, len(prompt_embeds)) - 1]
            refined.append(refiner.refine(each.pixels, text, row))
            on_progress(number, len(images))
        return io.NodeOutput(torch.stack([each.movedim(0, -1) for each in refined]))
