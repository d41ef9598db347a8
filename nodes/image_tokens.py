"""VQ-VAE-2's blocks: Load Image Tokens, Encode Image Tokens."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.ops
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.generation.image_tokens import (
    ImageTokenizer,
    build_tokenizer,
)
from .blocks import system_patcher
from .load import check_systems, model_folder, models_with, read_system, sentence
from .types import CATEGORY, ImageTokensSocket, TokensSocket


class PatchedTokenizer(ImageTokenizer):
    """A model's image tokens, as ComfyUI holds them."""

    def __init__(self, folder: Path):
        super().__init__(build_tokenizer(*read_system(folder, "codes"), "codes", operations=comfy.ops.manual_cast))
        self.patcher = system_patcher(self.model)

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def load(self) -> None:
        comfy.model_management.load_models_gpu([self.patcher])


class LoadImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadImageTokens",
            display_name="Load Image Tokens",
            category=CATEGORY,
            description="Loads what makes a few hundred codes of an image, and an image of them.",
            inputs=[
                io.Combo.Input("model", options=models_with("codes"), tooltip="The model whose VAE makes the latents.")
            ],
            outputs=[ImageTokensSocket.Output("image_tokens_out", display_name="image tokens")],
        )

    @classmethod
    def validate_inputs(cls, model):
        return model is None or sentence(lambda: check_systems(model, "codes"))

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(PatchedTokenizer(model_folder(model)))


class EncodeImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedImageTokens",
            display_name="Encode Image Tokens",
            category=CATEGORY,
            description="Makes codes of images, and images of the codes again: what a few hundred bytes keep.",
            inputs=[
                ImageTokensSocket.Input("image_tokens", tooltip="From Load Image Tokens."),
                io.Latent.Input("latent", tooltip="From VAE Encode, with the VAE of the model."),
            ],
            outputs=[
                TokensSocket.Output("tokens_out", display_name="tokens"),
                io.Latent.Output("latent_out", display_name="latent", tooltip="Of the codes; for VAE Decode."),
                io.Int.Output("bytes_out", display_name="bytes", tooltip="Size of one image's codes."),
            ],
        )

    @classmethod
    def execute(cls, image_tokens, latent) -> io.NodeOutput:
        image_tokens.load()
        codes = image_tokens.encode(latent["samples"])
        samples = image_tokens.decode(codes).to(comfy.model_management.intermediate_device())
        return io.NodeOutput(codes, {"samples": samples}, image_tokens.num_bytes(codes))
