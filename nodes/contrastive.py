"""Load Contrastive Model, CLIP Score, Best Panel, Find Image: how well images fit texts and each other."""

from __future__ import annotations

import re
from pathlib import Path

import comfy.model_management
import comfy.ops
import torch
from comfy_api.latest import io, ui

from ..comfy_mminterleaved.checkpoints.load import read_config
from ..comfy_mminterleaved.checkpoints.native import block_file
from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.embedders import (
    CLIPEmbedder,
    Embedder,
    FeatureEmbedder,
    build_contrastive,
    parse_system_metadata,
    system_path,
)
from ..comfy_mminterleaved.generation.ranking import RankedImage, find_images, rank_images
from ..comfy_mminterleaved.models.gmail_adapter import DRAWN
from ..comfy_mminterleaved.models.visual_tokenizer import ImageFeatures
from ..comfy_mminterleaved.stories.story import ImageSegment, Story
from .blocks import PatchedEncoder, block_patcher, load_whole, progress, system_patcher
from .context_images import embed_images
from .load import SystemModels, load_block, model_folder, read, read_system, sentence
from .segments import images_from_batch
from .types import CATEGORY, ContrastiveSocket, EncoderSocket, StorySocket, advanced


class PatchedContrastive(FeatureEmbedder):
    """The contrastive model of a checkpoint, its layers ComfyUI's, on the features of an encoder."""

    def __init__(self, folder: Path, encoder: PatchedEncoder | None = None):
        management, path = comfy.model_management, system_path(folder, "contrastive")
        self.encoder = encoder or load_block(PatchedEncoder, folder / block_file(read_config(folder), "encoder"))
        load_device = management.text_encoder_device()
        tensors, metadata = read(path)
        about = parse_system_metadata(metadata, "contrastive", repr(path.name))
        tensors = {name: tensor.to(self.encoder.dtype) for name, tensor in tensors.items()}
        special_tokens = self.encoder.config.llm.special_tokens
        model, tokenizer = build_contrastive(tensors, about, path.name, special_tokens, comfy.ops.manual_cast)
        self.patcher = block_patcher(model, load_device, management.text_encoder_offload_device())
        super().__init__(model, tokenizer, self._encode, about.get("encoder_id"))

    def _encode(self, images):
        return self.encoder.encode_images(Story(tuple(images))).images

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def features(self, images) -> ImageFeatures:
        features = super().features(images)
        comfy.model_management.load_models_gpu([self.patcher])
        return features

    def text_embeds(self, texts) -> torch.Tensor:
        comfy.model_management.load_models_gpu([self.patcher])
        return super().text_embeds(texts)


class PatchedReader(FeatureEmbedder):
    """A model's text tower, without its encoder; whoever holds it loads it.

    Args:
        device: Where that is.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path):
        tensors, about = read_system(folder, "contrastive")
        special_tokens = read_config(folder).llm.special_tokens
        model, tokenizer = build_contrastive(tensors, about, "contrastive", special_tokens, comfy.ops.manual_cast)
        super().__init__(model, tokenizer, lambda images: images)


class PatchedCLIP(CLIPEmbedder):
    """A CLIP of transformers that ComfyUI loads and unloads."""

    def __init__(self, model, processor):
        super().__init__(model, processor)
        self.patcher = system_patcher(model)

    def image_embeds(self, images) -> torch.Tensor:
        load_whole(self.patcher)
        return super().image_embeds(images).cpu()

    def text_embeds(self, texts) -> torch.Tensor:
        load_whole(self.patcher)
        return super().text_embeds(texts).cpu()


class ClipVisionEmbedder:
    """An `Embedder` of ComfyUI's CLIP vision, and for texts of its CLIP."""

    truncates_end = True

    def __init__(self, clip_vision, clip=None):
        self.clip_vision, self.clip = clip_vision, clip

    def image_embeds(self, images) -> torch.Tensor:
        return embed_images(self.clip_vision, list(images)).cpu()

    def text_embeds(self, texts) -> torch.Tensor:
        if self.clip is None:
            raise SettingError("This contrastive model has no texts; connect the CLIP that belongs to its CLIP vision.")
        plain = [re.sub(r"([()])", r"\\\1", text) for text in texts]  # no weights: it is a story's text
        pooled = [self.clip.encode_from_tokens(self.clip.tokenize(text), return_pooled=True)[1] for text in plain]
        if any(each is None for each in pooled):
            raise SettingError("This CLIP gives no pooled output to compare with images; use the text half of a CLIP.")
        embeds = torch.cat([each.reshape(1, -1) for each in pooled]).float().cpu()
        self._check_projection(embeds.shape[-1])
        return torch.nn.functional.normalize(embeds, dim=-1)

    def _check_projection(self, width: int) -> None:
        """Core puts an identity in the place of a text projection that a file lacks, and does not say so."""
        weights = [
            weight
            for name, weight in self.clip.cond_stage_model.named_parameters()
            if name.endswith("text_projection.weight") and tuple(weight.shape) == (width, width)
        ]
        if any(weight.float().cpu().equal(torch.eye(width)) for weight in weights):
            raise SettingError(
                "The CLIP's file has no text projection, so its texts cannot be compared with images; load a whole CLIP "
                "as a folder of transformers with Load Contrastive Model."
            )


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder holds a model with its weights as transformers saves it."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


CONTRASTIVE_MODELS = SystemModels("clip_vision", is_transformers_folder, "contrastive")


class LoadContrastive(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadContrastive",
            display_name="Load Contrastive Model",
            category=CATEGORY,
            description="Loads a model that compares images and texts: the starter's own, or a CLIP or SigLIP of transformers.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=CONTRASTIVE_MODELS.names(),
                    tooltip="'starter' comes with the package and knows its picture-book world; others are folders of "
                    "transformers (config.json, model.safetensors, tokenizer) in models/clip_vision.",
                ),
                EncoderSocket.Input(
                    "encoder",
                    optional=True,
                    tooltip="The encoder that the starter's compares by. If nothing is connected, its own is loaded.",
                ),
            ],
            outputs=[ContrastiveSocket.Output("contrastive_out", display_name="contrastive")],
        )

    @classmethod
    def validate_inputs(cls, model):
        return model is None or sentence(lambda: CONTRASTIVE_MODELS.check(model))

    @classmethod
    def execute(cls, model, encoder=None) -> io.NodeOutput:
        folder = CONTRASTIVE_MODELS.path(model)
        if folder is None:
            return io.NodeOutput(PatchedContrastive(model_folder(model), encoder))
        device = comfy.model_management.text_encoder_device()
        dtype = torch.float32 if comfy.model_management.is_device_cpu(device) else torch.float16
        return io.NodeOutput(PatchedCLIP.load(folder, comfy.model_management.text_encoder_offload_device(), dtype))


class ContrastiveFromClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedContrastiveFromClip",
            display_name="Contrastive Model from CLIP",
            category=CATEGORY,
            description="Compares images by a CLIP vision model, and texts by the CLIP that belongs to it.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="Embeds images."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Embeds texts; it must be the text half of the same CLIP. Without it, images are compared "
                    "with images only.",
                ),
            ],
            outputs=[ContrastiveSocket.Output("contrastive_out", display_name="contrastive")],
        )

    @classmethod
    def execute(cls, clip_vision, clip=None) -> io.NodeOutput:
        return io.NodeOutput(ClipVisionEmbedder(clip_vision, clip))


def scores_output(tooltip: str):
    return io.Float.Output("scores_out", display_name="scores", is_output_list=True, tooltip=tooltip)


def as_list(ranked: list[RankedImage]) -> list[torch.Tensor]:
    return [each.image.pixels.movedim(0, -1).unsqueeze(0) for each in ranked]


def table(ranked: list[RankedImage], texts: list[str] | None = None) -> str:
    """A line for each image: its score, its number from 1, and its text."""
    rows = (f"{each.score:6.3f}  image {each.index + 1}" for each in ranked)
    return "\n".join(f"{row}  {text}".rstrip() for row, text in zip(rows, texts or [""] * len(ranked)))


class CLIPScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedClipScore",
            display_name="CLIP Score",
            category=CATEGORY,
            description="Scores how well each image of a batch fits a text, and sorts the batch by it.",
            is_output_node=True,
            inputs=[
                ContrastiveSocket.Input("contrastive", tooltip="Compares images with the text."),
                io.Image.Input("images", tooltip="An image, or a batch."),
                io.String.Input(
                    "text", multiline=True, default="", dynamic_prompts=False, tooltip="What the images should show."
                ),
            ],
            outputs=[
                io.Image.Output("best_out", display_name="best"),
                io.Image.Output("ranked_out", display_name="ranked", tooltip="The whole batch, the best image first."),
                scores_output("The cosine of each image with the text, from -1 to 1, in the order of the batch."),
            ],
        )

    @classmethod
    def execute(cls, contrastive: Embedder, images, text) -> io.NodeOutput:
        segments = images_from_batch(images)
        ranked = find_images(contrastive, text, segments, progress(len(segments)))
        order = [each.index for each in ranked]
        scores = [each.score for each in sorted(ranked, key=lambda each: each.index)]
        return io.NodeOutput(images[order[:1]], images[order], scores, ui=ui.PreviewText(table(ranked)))


class BestPanel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedBestPanel",
            display_name="Best Panel",
            category=CATEGORY,
            description="Of several drawings of a panel, keeps the one that fits its text and its heroes best. Put it between "
            "VAE Decode, with a batch in the latent, and Add Story Image.",
            inputs=[
                ContrastiveSocket.Input("contrastive", tooltip="Compares images and texts."),
                StorySocket.Input(
                    "story",
                    tooltip="The story up to the panel's text. Sentences like 'Mia is ...' say how heroes look.",
                ),
                io.Image.Input("images", tooltip="The drawings, as a batch."),
                *advanced(
                    io.Float.Input(
                        "references",
                        default=0.0,
                        min=0.0,
                        max=10.0,
                        step=0.05,
                        tooltip="How much likeness to the story's earlier images counts beside the text: for a CLIP of "
                        "your own, which does not know your heroes by name, try 1.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output("best_out", display_name="best"),
                io.Int.Output("index_out", display_name="index", tooltip="Of the best image in the batch, from 0."),
                scores_output("The cosine of each image with the panel's text, in the order of the batch."),
            ],
        )

    @classmethod
    def execute(cls, contrastive: Embedder, story: Story, images, references) -> io.NodeOutput:
        ranked = rank_images(contrastive, story, images_from_batch(images, DRAWN), references)
        index = ranked[0].index
        scores = [each.score for each in sorted(ranked, key=lambda each: each.index)]
        return io.NodeOutput(images[index : index + 1], index, scores)


class FindImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedFindImage",
            display_name="Find Image",
            category=CATEGORY,
            description="Finds the images of a batch or of stories that fit a text, or that are most alike to an image.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                ContrastiveSocket.Input("contrastive", tooltip="Compares images and texts."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="What to look for. Leave it empty to look for an image instead.",
                ),
                io.Int.Input("count", default=4, min=1, max=1000, tooltip="How many images to give at most."),
                io.Image.Input("images", optional=True, tooltip="Where to look: a batch, or a list of images."),
                StorySocket.Input("story", optional=True, tooltip="Where to look: a story, or a list of stories."),
                io.Image.Input("query", optional=True, tooltip="An image to look for, in the place of the text."),
            ],
            outputs=[
                io.Image.Output("images_out", display_name="images", is_output_list=True, tooltip="The best first."),
                scores_output("The cosine of each image that was found, from -1 to 1."),
                io.String.Output(
                    "texts_out", display_name="texts", is_output_list=True, tooltip="The text of each image's panel."
                ),
            ],
        )

    @classmethod
    def execute(cls, contrastive, text, count, images=None, story=None, query=None) -> io.NodeOutput:
        candidates: list[tuple[ImageSegment, str]] = []
        for batch in images or []:
            candidates += [(image, "") for image in images_from_batch(batch)]
        for each in story or []:
            candidates += [(panel.image, panel.text) for panel in each.panels() if panel.image is not None]
        if not candidates:
            raise SettingError("There are no images to look through; connect images or a story.")
        target_text = text[0].strip()
        if query is not None and target_text:
            raise SettingError(
                "There are a text and an image to look for; leave the text empty, or take the image off."
            )
        if query is None and not target_text:
            raise SettingError("There is nothing to look for; write a text, or connect an image.")
        target = images_from_batch(query[0])[0] if query is not None else target_text
        segments = [image for image, _ in candidates]
        ranked = find_images(contrastive[0], target, segments, progress(len(segments)))[: count[0]]
        texts = [candidates[each.index][1] for each in ranked]
        scores = [each.score for each in ranked]
        return io.NodeOutput(as_list(ranked), scores, texts, ui=ui.PreviewText(table(ranked, texts)))
