"""Adapt Encoder to Drawings: drawn images go through the encoder as a modality of their own (GMAIL, 2602.15368)."""

from __future__ import annotations

import copy

from comfy_api.latest import io

from ..comfy_mminterleaved.generation.embedders import load_lora, system_path
from .load import model_folder, models, sentence
from .types import CATEGORY, EncoderSocket


def adapted_models() -> list[str]:
    """Models that have an adapter for drawn images."""
    return [name for name in models() if sentence(lambda name=name: _path(name)) is True]


def _path(name: str):
    return system_path(model_folder(name), "drawn")


class AdaptEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedAdaptEncoder",
            display_name="Adapt Encoder to Drawings",
            category=CATEGORY,
            description="Has images that the model drew itself encoded with an adapter that was trained on drawings; images of your "
            "own are encoded as before.",
            inputs=[
                EncoderSocket.Input("encoder", tooltip="The encoder that the adapter belongs to."),
                io.Combo.Input("model", options=adapted_models(), tooltip="The model whose adapter is taken."),
            ],
            outputs=[EncoderSocket.Output("encoder_out", display_name="encoder")],
        )

    @classmethod
    def validate_inputs(cls, model):
        return model is None or sentence(lambda: _path(model))

    @classmethod
    def execute(cls, encoder, model) -> io.NodeOutput:
        adapter = load_lora(_path(model), "drawn", encoder.module.encoder_id)
        adapter.check(encoder.module, "The adapter for drawn images")
        adapted = copy.copy(encoder)  # the same weights, in the same patcher
        adapted.drawn_adapter = adapter.to(encoder.device, encoder.dtype)
        return io.NodeOutput(adapted)
