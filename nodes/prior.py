"""DALL-E 2's blocks: Load Prior, Text to Image Embedding, Embed Image, Blend and Move Embeddings, Apply Image Embedding."""

from __future__ import annotations

from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.ops
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.embedders import Embedder
from ..comfy_mminterleaved.generation.prior import (
    TEXT_STRENGTH,
    ImagePrior,
    blend,
    build_prior,
    check_embeds,
    check_prior,
    is_prior_folder,
    load_prior_folder,
    make_prior_scheduler,
    move,
    of_embedder,
)
from ..comfy_mminterleaved.generation.ranking import embed_images
from ..comfy_mminterleaved.stories.story import Story
from .blocks import check_features, load_whole, progress, system_patcher
from .contrastive import PatchedReader
from .load import SystemModels, model_folder, read_system, sentence
from .segments import images_from_batch
from .synchronize import apply_mmfs, check_unet
from .types import CATEGORY, ContrastiveSocket, PriorSocket, StorySocket, SynchronizerSocket, seed_input, strength_input


class PatchedPrior(ImagePrior):
    """A model's prior, the text tower that reads for it, and what has the U-Net draw its embeddings."""

    def __init__(self, folder: Path):
        reader = PatchedReader(folder)
        module = build_prior(*read_system(folder, "prior"), "prior", comfy.ops.manual_cast)
        check_prior(module, reader, "The prior")
        encode = of_embedder(reader, module.config.num_embeddings)
        super().__init__(module.prior, make_prior_scheduler(), encode, True, module.config.guidance_scale)
        self.conditioner = module.conditioner
        self.patcher = system_patcher(module, reader.model)
        reader.device = self.device

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def load(self) -> None:
        comfy.model_management.load_models_gpu([self.patcher])


class PatchedPriorFolder(ImagePrior):
    """A prior of diffusers that ComfyUI loads and unloads; its embeddings are drawn by unCLIP checkpoints."""

    conditioner = None

    def __init__(self, folder: Path):
        is_cpu = comfy.model_management.is_device_cpu(comfy.model_management.text_encoder_device())
        prior = load_prior_folder(folder, dtype=torch.float32 if is_cpu else torch.float16)
        super().__init__(prior.model, prior.scheduler, prior.encode_texts)
        self.patcher = system_patcher(prior.model, prior.encode_texts.tower)

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def load(self) -> None:
        load_whole(self.patcher)


PRIORS = SystemModels("diffusers", is_prior_folder, "contrastive", "prior")


def as_output(image_embeds: torch.Tensor):
    """Image embeddings `(N, D)` as what ComfyUI's unCLIP nodes take."""
    output = comfy.clip_vision.Output()
    output["image_embeds"] = image_embeds.float().to(comfy.model_management.intermediate_device())
    output["last_hidden_state"] = output["penultimate_hidden_states"] = None
    return output


def embeds_of(output) -> torch.Tensor:
    """The image embeddings `(N, D)` of a CLIP vision output; raises SettingError if it has none."""
    embeds = getattr(output, "image_embeds", None)
    if embeds is None or not embeds.numel():
        raise SettingError("This CLIP vision output has no image embedding; use one of a CLIP that has a projection.")
    return embeds.reshape(-1, embeds.shape[-1]).float()


class LoadPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadPrior",
            display_name="Load Prior",
            category=CATEGORY,
            description="Loads a model that makes image embeddings from texts, as DALL-E 2 does: the starter's own, or Karlo's or "
            "Kandinsky 2.2's.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=PRIORS.names(),
                    tooltip="'starter' comes with the package and knows its picture-book world; others are folders of "
                    "diffusers in models/diffusers, such as karlo-v1-alpha or kandinsky-2-2-prior.",
                )
            ],
            outputs=[PriorSocket.Output("prior_out", display_name="prior")],
        )

    @classmethod
    def validate_inputs(cls, model):
        return model is None or sentence(lambda: PRIORS.check(model))

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        folder = PRIORS.path(model)
        return io.NodeOutput(PatchedPrior(model_folder(model)) if folder is None else PatchedPriorFolder(folder))


class TextToImageEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedTextToImageEmbedding",
            display_name="Text to Image Embedding",
            category=CATEGORY,
            description="Imagines what an image of a text could be: samples its embedding with a diffusion prior. What the text "
            "leaves open comes out differently with each seed.",
            inputs=[
                PriorSocket.Input("prior", tooltip="From Load Prior."),
                io.String.Input(
                    "text", multiline=True, default="", dynamic_prompts=False, tooltip="What the image should show."
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many embeddings, each another idea. Core's unCLIPConditioning mixes several into one.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How strictly the embedding follows the text. 1 is no guidance, which leaves the most open; "
                    "for Karlo and Kandinsky take 4.",
                ),
                io.Int.Input("steps", default=25, min=2, max=1000, tooltip="Denoising steps; they cost little."),
                seed_input("the embeddings"),
            ],
            outputs=[io.ClipVisionOutput.Output("embedding_out", display_name="embedding")],
        )

    @classmethod
    def execute(cls, prior, text, count, guidance, steps, seed) -> io.NodeOutput:
        prior.load()
        return io.NodeOutput(as_output(prior.sample(text, count, guidance, steps, seed, progress(steps))))


class EmbedImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedEmbedImage",
            display_name="Embed Image",
            category=CATEGORY,
            description="Gives images their embeddings: one vector each that says what they show, not where.",
            inputs=[
                ContrastiveSocket.Input("contrastive", tooltip="Of the model that will draw them again."),
                io.Image.Input("image", tooltip="An image, or a batch."),
            ],
            outputs=[io.ClipVisionOutput.Output("embedding_out", display_name="embedding")],
        )

    @classmethod
    def execute(cls, contrastive: Embedder, image) -> io.NodeOutput:
        segments = images_from_batch(image)
        return io.NodeOutput(as_output(embed_images(contrastive, segments, progress(len(segments)))))


class BlendEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedBlendEmbeddings",
            display_name="Blend Embeddings",
            category=CATEGORY,
            description="Goes from one image's embedding to another's, on the arc between them.",
            inputs=[
                io.ClipVisionOutput.Input("embedding", tooltip="Where the way begins."),
                io.ClipVisionOutput.Input("other", tooltip="Where it ends."),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How far to go: 0 stays at the first, 1 arrives at the other. With a count, where the way ends.",
                ),
                io.Int.Input(
                    "count", default=1, min=1, max=64, tooltip="How many embeddings, evenly from the first to there."
                ),
            ],
            outputs=[io.ClipVisionOutput.Output("embedding_out", display_name="embedding")],
        )

    @classmethod
    def execute(cls, embedding, other, amount, count) -> io.NodeOutput:
        first, last = embeds_of(embedding)[:1], embeds_of(other)[:1].to(embeds_of(embedding).device)
        amounts = [amount] if count == 1 else [amount * i / (count - 1) for i in range(count)]
        return io.NodeOutput(as_output(torch.cat([blend(first, last, each) for each in amounts])))


class MoveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedMoveEmbedding",
            display_name="Move Embedding",
            category=CATEGORY,
            description="Changes what an image's embedding says by the difference of two texts: the same image, but at night.",
            inputs=[
                PriorSocket.Input("prior", tooltip="Reads the texts; of the model that embedded the image."),
                io.ClipVisionOutput.Input("embedding", tooltip="Of the image to change."),
                io.String.Input(
                    "text", multiline=True, default="", dynamic_prompts=False, tooltip="What the image should show."
                ),
                io.String.Input(
                    "neutral",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="What it shows now, in the same words but for what should change.",
                ),
                io.Float.Input(
                    "amount",
                    default=TEXT_STRENGTH,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How far to go; much changes more than the texts say.",
                ),
            ],
            outputs=[io.ClipVisionOutput.Output("embedding_out", display_name="embedding")],
        )

    @classmethod
    def execute(cls, prior, embedding, text, neutral, amount) -> io.NodeOutput:
        if not text.strip():
            raise SettingError("The text that the image should show is empty; write one.")
        embeds = embeds_of(embedding)
        prior.load()
        texts = prior.text_embeds([text, neutral]).to(embeds.device)
        return io.NodeOutput(as_output(move(embeds, *texts, amount)))


class ApplyImageEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedApplyImageEmbedding",
            display_name="Apply Image Embedding",
            category=CATEGORY,
            description="Prepares a stock KSampler to draw image embeddings (unCLIP). One vector does not say which of two heroes "
            "wears what; a story beside it does.",
            inputs=[
                PriorSocket.Input("prior", tooltip="Of the model that draws; its embeddings become the conditioning."),
                SynchronizerSocket.Input("synchronizer", tooltip="Of the same model."),
                io.Model.Input("model", tooltip="The U-Net that belongs to them; with LoRAs if you like."),
                io.ClipVisionOutput.Input(
                    "embedding", tooltip="What to draw. For several, give the KSampler a batch of as many latents."
                ),
                StorySocket.Input(
                    "story", optional=True, tooltip="The U-Net attends to its images; its texts are not read."
                ),
                strength_input(),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="For any sampler."),
                io.Conditioning.Output("positive_out", display_name="positive"),
                io.Conditioning.Output("negative_out", display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, prior, synchronizer, model, embedding, strength, story=None) -> io.NodeOutput:
        if prior.conditioner is None:
            raise SettingError(
                "This prior's embeddings are drawn by unCLIP checkpoints; use unCLIPConditioning, or the starter's prior."
            )
        check_unet(synchronizer, model)
        story, embeds = story or Story(), embeds_of(embedding)
        check_embeds(embeds, prior.conditioner.proj.weight)
        width, expected = prior.conditioner.fc2.weight.shape[0], synchronizer.config.synchronizer.perceiver.hidden_size
        if width != expected:
            raise SettingError(
                f"The prior gives conditioning of width {width}, but the U-Net takes {expected}; use the prior of its model."
            )
        check_features(story, synchronizer.config.synchronizer.llm_hidden_size)
        prior.load()
        device = comfy.model_management.intermediate_device()
        positive = prior.conditioner(embeds.to(prior.device)).to(device)
        synchronizer.load(0)
        negative = synchronizer.module.conditioner.neg_prompt_embeds.detach().to(device).clone()
        count = synchronizer.config.synchronizer.num_context_images
        patched = apply_mmfs(model, synchronizer, story, strength, 0.0, 1.0, count)
        return io.NodeOutput(patched, [[positive, {}]], [[negative, {}]])
