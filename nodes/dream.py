"""DreamLLM's blocks: Load Dream Queries, and Draw in Context, where a text has images in it."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.ops
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.dream import (
    NAMES,
    DreamConditioner,
    build_dream,
    check_dream,
    in_context_story,
)
from ..comfy_mminterleaved.stories.story import ImageSegment, Story
from .blocks import PatchedLLM, PatchedSynchronizer, system_patcher
from .load import check_systems, model_folder, models_with, read_system, sentence
from .segments import images_from_batch
from .synchronize import apply_mmfs, check_blocks
from .types import CATEGORY, DreamSocket, EncoderSocket, LLMSocket, SynchronizerSocket


class PatchedDream(DreamConditioner):
    """A model's dream queries, and the LoRA with which the LLM reads them."""

    def __init__(self, folder: Path):
        super().__init__(*build_dream(*read_system(folder, "dream"), "dream", comfy.ops.manual_cast))
        modules = [self.model] if self.lora is None else [self.model, self.lora]
        self.patcher = system_patcher(*modules)

    def condition(self, llm: PatchedLLM, story: Story, drop_oldest: bool | None = None) -> tuple[torch.Tensor, Story]:
        """Prompt embeddings `(1, num_queries, C)` of a story, and the story as the LLM read it."""
        check_dream(self.model, self.lora, llm.module, llm.config, "The dream queries")
        story = llm.prepare(story, self.model.config.num_queries + 1, are_given=True, drop_oldest=drop_oldest)
        comfy.model_management.load_models_gpu([self.patcher])
        return self.prompt_embeds(llm.generator, [story]), story

    def negative(self, llm: PatchedLLM, synchronizer: PatchedSynchronizer) -> torch.Tensor:
        """What guidance leads away from: the queries behind nothing, or what the U-Net was trained with."""
        negative = self.negative_prompt_embeds(llm.generator)
        if negative is None:
            synchronizer.load(0)
            negative = synchronizer.module.conditioner.neg_prompt_embeds.detach()
        return negative.to(comfy.model_management.intermediate_device()).clone()


class LoadDreamQueries(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadDream",
            display_name="Load Dream Queries",
            category=CATEGORY,
            description="Loads what lets the LLM itself say what to draw, as DreamLLM does: for Draw in Context, Apply "
            "Synchronizer and Tell Story.",
            inputs=[
                io.Combo.Input("model", options=models_with("dream"), tooltip="The model whose LLM reads the queries.")
            ],
            outputs=[DreamSocket.Output("dream_out", display_name="dream queries")],
        )

    @classmethod
    def validate_inputs(cls, model):
        return model is None or sentence(lambda: check_systems(model, "dream"))

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(PatchedDream(model_folder(model)))


class DrawInContext(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedDrawInContext",
            display_name="Draw in Context",
            category=CATEGORY,
            description="Draws what a text with images in it asks for: '{A} waves on the beach with a kite.' brings the hero of A, "
            "'{A} in {B}.' puts him in the place of B, '{A} in a red coat.' changes A.",
            inputs=[
                DreamSocket.Input("dream", tooltip="From Load Dream Queries."),
                EncoderSocket.Input("encoder", tooltip="Encodes the images."),
                LLMSocket.Input("llm", tooltip="Reads the text with its images."),
                SynchronizerSocket.Input("synchronizer", tooltip="Of the same model."),
                io.Model.Input("model", tooltip="The U-Net that belongs to them; with LoRAs if you like."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="{A} waves on the beach with a kite.",
                    dynamic_prompts=False,
                    tooltip="What to draw, with {A} to {D} where the images belong.",
                ),
                *(
                    io.Image.Input(name, optional=True, tooltip=f"The image that {{{name}}} in the text stands for.")
                    for name in NAMES
                ),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="For any sampler."),
                io.Conditioning.Output("positive_out", display_name="positive"),
                io.Conditioning.Output("negative_out", display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, dream, encoder, llm, synchronizer, model, text, **images) -> io.NodeOutput:
        check_blocks(llm, synchronizer, model)
        segments: dict[str, ImageSegment] = {}
        for name, batch in images.items():
            if batch is None:
                continue
            if len(batch) != 1:
                raise SettingError(f"Image {name} is a batch of {len(batch)}; connect one image.")
            (segments[name],) = images_from_batch(batch)
        story = in_context_story(text, segments)
        positive, _ = dream.condition(llm, encoder.encode_images(story))
        device = comfy.model_management.intermediate_device()
        negative = dream.negative(llm, synchronizer)
        # No image for the U-Net: it would mix the heroes of all of them.
        patched = apply_mmfs(model, synchronizer, Story(), 1.0, 0.0, 1.0, 0)
        return io.NodeOutput(patched, [[positive.to(device), {}]], [[negative, {}]])
