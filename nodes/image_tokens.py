"""VQ-VAE-2's and DALL-E's blocks: Load Image Tokens, Encode Image Tokens, Draft Images."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import comfy.model_management
import comfy.ops
from comfy_api.latest import io

from ..comfy_mminterleaved.checkpoints.load import read_config
from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.embedders import system_path
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
from ..comfy_mminterleaved.models.token_decoder import TokenDecoderConfig
from ..comfy_mminterleaved.models.vqvae import ImageCodes
from ..comfy_mminterleaved.stories.story import Story
from .blocks import attention, progress, system_patcher
from .load import check_systems, model_folder, models_with, read_system, sentence
from .types import CATEGORY, ImageTokensSocket, StorySocket, TokensSocket, seed_input


class PatchedImageTokens:
    """A model's image tokens as ComfyUI holds them: what makes codes of latents, and the decoder that predicts them.

    Args:
        folder, name: Of the model. The decoder is read when drafts are asked for.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.codec = build_tokenizer(
            *read_system(folder, "codes"), "The image tokens", operations=comfy.ops.manual_cast
        )
        self.patcher = system_patcher(self.codec)
        self.tokenizer = ImageTokenizer(self.codec, self.patcher.load_device)

    @cached_property
    def _decoder(self) -> tuple[TokenSampler, object]:
        if sentence(lambda: system_path(self.folder, "tokens")) is not True:
            raise SettingError(
                f"The model {self.name!r} has no decoder to draft images with; use another model, such as the starter."
            )
        label, (tensors, about) = "The decoder of image tokens", read_system(self.folder, "tokens")
        host = {"operations": comfy.ops.manual_cast, "attention": attention}
        model = build_token_decoder(tensors, about, read_config(self.folder), label, **host)
        check_tokens(self.codec, model, label)
        patcher = system_patcher(model)
        model.trunk.device = patcher.load_device  # in a partial load the weights are in several places
        return TokenSampler(model, about.get("encoder_id"), patcher.load_device), patcher

    @property
    def sampler(self) -> TokenSampler:
        """Raises SettingError for a model that has none."""
        return self._decoder[0]

    def load(self) -> None:
        comfy.model_management.load_models_gpu([self.patcher])

    def load_decoder(self) -> None:
        comfy.model_management.load_models_gpu([self.patcher, self._decoder[1]])


class LoadImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadImageTokens",
            display_name="Load Image Tokens",
            category=CATEGORY,
            description="Loads what turns an image into a few hundred codes and back, and what drafts images as codes.",
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
        return io.NodeOutput(PatchedImageTokens(model_folder(model), model))


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
        tokenizer = image_tokens.tokenizer
        codes = tokenizer.encode(latent["samples"])
        samples = tokenizer.decode(codes).to(comfy.model_management.intermediate_device())
        return io.NodeOutput(codes, {"samples": samples}, tokenizer.num_bytes(codes))


class DraftImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedDraftImages",
            display_name="Draft Images",
            category=CATEGORY,
            description="Drafts a story's next image as tokens, many at once: for VAE Decode and Best Panel, and for a KSampler to "
            "finish the one you like.",
            inputs=[
                ImageTokensSocket.Input("image_tokens", tooltip="From Load Image Tokens."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="From Apply Synchronizer, Draw in Context or Apply Image Embedding; of the same model.",
                ),
                StorySocket.Input("story", optional=True, tooltip="The story whose images the drafts attend to."),
                io.Int.Input("count", default=8, min=1, max=64, tooltip="How many drafts."),
                io.Float.Input(
                    "temperature",
                    default=TEMPERATURE,
                    min=0.05,
                    max=5.0,
                    step=0.05,
                    tooltip="How freely codes are chosen: low values give safe, similar drafts.",
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
                    default=TokenDecoderConfig.guidance_scale,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How strictly the drafts follow the conditioning and the earlier images; 1 is no guidance.",
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
                    tooltip="How many rows of codes from the top are taken from the tokens; the starter's images have 8.",
                ),
            ],
            outputs=[io.Latent.Output("latent_out", display_name="latent", tooltip="For VAE Decode or KSampler.")],
        )

    @classmethod
    def execute(
        cls,
        image_tokens,
        positive,
        count,
        temperature,
        top_k,
        guidance,
        seed,
        story=None,
        tokens: ImageCodes | None = None,
        rows=3,
    ) -> io.NodeOutput:
        sampler, story = image_tokens.sampler, story or Story()
        given = None
        if tokens is not None:
            side, (height, width) = sampler.model.config.grid_size, tokens.top.shape[-2:]
            if (height, width) != (side, side):
                raise SettingError(
                    f"The tokens are of an image of {width} x {height} codes, but drafts have {side} x {side}; scale the "
                    "image before VAE Encode."
                )
            given = rows_of(tokens, rows)
        if len(positive) != 1:
            raise SettingError(f"The conditioning has {len(positive)} entries; drafts are sampled from one.")
        ((prompt_embeds, _),) = positive
        sampler.check(count, temperature, top_k, guidance, given)
        sampler.check_prompt(prompt_embeds)
        sampler.check_images(story)
        image_tokens.load_decoder()
        on_step = progress(sampler.model.num_cells)
        codes = sampler.sample(prompt_embeds, story, count, seed, temperature, top_k, guidance, given, on_step)
        samples = image_tokens.tokenizer.decode(codes).to(comfy.model_management.intermediate_device())
        return io.NodeOutput({"samples": samples})
