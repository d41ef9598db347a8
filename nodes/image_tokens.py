"""VQ-VAE-2's and DALL-E's blocks: Load Image Tokens, Image Tokens, Draft Images."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.ops
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.checkpoints.load import read_config
from ..comfy_mminterleaved.errors import CheckpointError, SettingError
from ..comfy_mminterleaved.generation.image_tokens import (
    TEMPERATURE,
    TOP_K,
    ImageTokenizer,
    TokenSampler,
    build_token_decoder,
    build_tokenizer,
    check_tokens,
    rows_of,
)
from ..comfy_mminterleaved.models.vqvae import ImageCodes
from ..comfy_mminterleaved.stories.story import Story
from .blocks import attention, check_features, progress, system_patcher
from .load import check_systems, model_folder, models_with, read_system, sentence
from .types import CATEGORY, LLMSocket, StorySocket, TokenDecoderSocket, TokensSocket, seed_input

SYSTEMS = ("codes", "tokens")


class PatchedImageTokens:
    """A model's image tokens: what makes codes of latents, and what predicts them, as ComfyUI holds both."""

    def __init__(self, folder: Path):
        host = {"operations": comfy.ops.manual_cast}
        tokenizer = build_tokenizer(*read_system(folder, "codes"), "codes", **host)
        decoder = build_token_decoder(
            *read_system(folder, "tokens"), read_config(folder), "tokens", attention=attention, **host
        )
        check_tokens(tokenizer, decoder, "tokens")
        self.patcher = system_patcher(tokenizer, decoder)
        device = self.patcher.load_device

        class Tokenizer(ImageTokenizer):
            @property
            def device(self) -> torch.device:
                return device

        class Sampler(TokenSampler):
            @property
            def device(self) -> torch.device:
                return device

        decoder.trunk.device = device  # in a partial load the weights are in several places
        self.tokenizer, self.sampler = Tokenizer(tokenizer), Sampler(decoder)

    def load(self) -> None:
        comfy.model_management.load_models_gpu([self.patcher])


class LoadImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadImageTokens",
            display_name="Load Image Tokens",
            category=CATEGORY,
            description="Loads what makes an image a few hundred codes, and what predicts them from a story, as DALL-E does.",
            inputs=[
                io.Combo.Input("model", options=models_with(*SYSTEMS), tooltip="The model whose LLM reads the story.")
            ],
            outputs=[TokenDecoderSocket.Output("image_tokens_out", display_name="image tokens")],
        )

    @classmethod
    def validate_inputs(cls, model):
        return model is None or sentence(lambda: check_systems(model, *SYSTEMS))

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(PatchedImageTokens(model_folder(model)))


class EncodeImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedImageTokens",
            display_name="Encode Image Tokens",
            category=CATEGORY,
            description="Makes codes of images, and images of the codes again: what a few hundred bytes keep.",
            inputs=[
                TokenDecoderSocket.Input("image_tokens", tooltip="From Load Image Tokens."),
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
        codes = image_tokens.tokenizer.encode(latent["samples"])
        samples = image_tokens.tokenizer.decode(codes).to(comfy.model_management.intermediate_device())
        return io.NodeOutput(codes, {"samples": samples}, image_tokens.tokenizer.num_bytes(codes))


class DraftImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedDraftImages",
            display_name="Draft Images",
            category=CATEGORY,
            description="Drafts a story's next image as its next tokens, many at once: for VAE Decode and Best Panel, or for a "
            "KSampler to finish.",
            inputs=[
                TokenDecoderSocket.Input("image_tokens", tooltip="From Load Image Tokens."),
                LLMSocket.Input("llm", tooltip="Reads the story; of the same model."),
                StorySocket.Input("story", tooltip="The story up to the text of the panel to draft."),
                io.Int.Input("count", default=8, min=1, max=64, tooltip="How many drafts."),
                io.Float.Input(
                    "temperature",
                    default=TEMPERATURE,
                    min=0.05,
                    max=5.0,
                    step=0.05,
                    tooltip="How freely codes are chosen: low is safe and alike.",
                ),
                io.Int.Input(
                    "top_k",
                    default=TOP_K,
                    min=0,
                    max=100000,
                    tooltip="Sample among this many likeliest codes; 0 for all.",
                ),
                io.Float.Input(
                    "guidance",
                    default=2.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How strictly the drafts follow the story; 1 is no guidance.",
                ),
                seed_input("the first draft; the others' follow"),
                TokensSocket.Input(
                    "tokens", optional=True, tooltip="From Encode Image Tokens: an image that drafts go on from."
                ),
                io.Int.Input(
                    "rows",
                    default=3,
                    min=1,
                    max=63,
                    optional=True,
                    tooltip="How many rows of codes from the top are taken from the tokens, of 8 of the starter.",
                ),
            ],
            outputs=[io.Latent.Output("latent_out", display_name="latent", tooltip="For VAE Decode or KSampler.")],
        )

    @classmethod
    def execute(
        cls,
        image_tokens,
        llm,
        story,
        count,
        temperature,
        top_k,
        guidance,
        seed,
        tokens: ImageCodes | None = None,
        rows=3,
    ) -> io.NodeOutput:
        sampler, story = image_tokens.sampler, story or Story()
        width = sampler.model.start.shape[-1]
        if width != llm.config.llm.hidden_size:
            raise CheckpointError(
                f"The image tokens are for an LLM of width {width}, but this one has {llm.config.llm.hidden_size}; use "
                "those of one model."
            )
        check_features(story, width)
        given = None
        if tokens is not None:
            if tokens.top.shape[-2:] != (sampler.model.config.grid_size,) * 2:
                side = sampler.model.config.grid_size
                raise SettingError(
                    f"The tokens are of an image of {tokens.top.shape[-1]} x {tokens.top.shape[-2]} codes, but drafts have "
                    f"{side} x {side}; scale the image before VAE Encode."
                )
            given = rows_of(tokens, rows)
        story = llm.prepare(story, sampler.model.num_cells, count, are_given=True)
        image_tokens.load()
        on_step = progress(sampler.model.num_cells)
        codes = sampler.sample(
            llm.generator, story, count, seed, temperature, top_k, guidance, given=given, on_step=on_step
        )
        samples = image_tokens.tokenizer.decode(codes).to(comfy.model_management.intermediate_device())
        return io.NodeOutput({"samples": samples})
