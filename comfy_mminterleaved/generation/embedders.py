"""Embedders: images and texts in one space, by the model's own contrastive model or by a CLIP of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from ..checkpoints.tensors import read_json, read_tensors
from ..errors import CheckpointError, SettingError, StoryError
from ..models.contrastive import ContrastiveConfig, ContrastiveModel, pad_ids, word_attention
from ..models.lora import LoRA
from ..models.visual_tokenizer import ImageFeatures
from ..stories.images import to_pil
from ..stories.story import ImageSegment
from ..tokenizer import Tokenizer
from .config import SYSTEMS

METADATA = "mm-interleaved-system"
BATCH = 32  # images and texts that are embedded at once, so that memory does not grow with their number


class Embedder(Protocol):
    """Embeds images and texts in one space; rows are of unit length, so their products are cosines.

    `truncates_end` says whether a text that is too long loses its end, as in CLIP.
    """

    truncates_end: bool

    def image_embeds(self, images: Sequence[ImageSegment]) -> torch.Tensor: ...  # (N, D)

    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor: ...  # (N, D)


class FeatureEmbedder:
    """An `Embedder` on the features that the model's encoder computes anyway.

    Args:
        encode: Gives images features of the encoder that the contrastive model was trained with.
        encoder_id: Of that encoder; None accepts any whose features have the right sizes.
    """

    truncates_end = False

    def __init__(
        self,
        model: ContrastiveModel,
        tokenizer: Tokenizer,
        encode: Callable[[Sequence[ImageSegment]], Sequence[ImageSegment]],
        encoder_id: str | None = None,
    ):
        self.model, self.tokenizer, self.encode, self.encoder_id = model, tokenizer, encode, encoder_id

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.logit_scale.dtype

    @torch.no_grad()
    def image_embeds(self, images: Sequence[ImageSegment]) -> torch.Tensor:
        """`(N, projection_dim)`, of unit length; raises StoryError for features of another width."""
        return torch.cat(
            [self.model.encode_image(self.features(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        )

    def features(self, images: Sequence[ImageSegment]) -> ImageFeatures:
        """Features of a batch, in the dtype of the contrastive model."""
        features = [image.features for image in self.encode(images)]
        c = self.model.config
        for each in features:
            if each is None:
                raise StoryError("An image has no features; connect the encoder that the contrastive model belongs to.")
            width = each.visual_tokens.shape[-1]
            if width != c.llm_hidden_size:
                raise StoryError(
                    f"The images have features of width {width}, but the contrastive model takes {c.llm_hidden_size}; "
                    "use the encoder that it was trained with."
                )
            shapes = {tuple(level.shape) for level in each.feature_maps}
            is_other = len(each.visual_tokens) != c.num_img_token
            is_other |= (c.num_channels, c.grid_size, c.grid_size) not in shapes
            if is_other or not each.is_from(self.encoder_id):
                raise StoryError(
                    "The images have features of another encoder than the contrastive model was trained with; use that "
                    "one."
                )
        tokens = torch.stack([each.visual_tokens for each in features])
        maps = (torch.stack(level) for level in zip(*(each.feature_maps for each in features)))
        return ImageFeatures(
            tokens.to(self.device, self.dtype), tuple(level.to(self.device, self.dtype) for level in maps)
        )

    @torch.no_grad()
    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """`(N, projection_dim)`, of unit length."""
        parts = [self.token_ids(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        return torch.cat([self.model.encode_text(*part) for part in parts])

    @torch.no_grad()
    def word_states(self, text: str) -> torch.Tensor:
        """The text tower's hidden states of a text's tokens, `(L, hidden_size)`."""
        return self.model.text_hidden_states(*self.token_ids([text]))[0]

    def token_ids(self, texts: Sequence[str], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask `(N, L)`, on the model's device; with a length, padded and cut to it."""
        limit = self.model.config.max_position_embeddings
        rows = [self.tokenizer.encode(text) for text in texts]
        ids, mask = pad_ids(rows, min(length or limit, limit), length is not None)
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def word_maps(self, text: str, image: ImageSegment) -> torch.Tensor:
        """AttnGAN's attention of each token to the cells of the image, `(L, grid_size, grid_size)`.

        On deep feature maps it is a weak guide to places, for every cell knows what the image shows
        (`word_masks.occlusion_map` is the better one).
        """
        ids, mask = self.token_ids([text])
        side = self.model.config.grid_size
        feature_map = next(m for m in self.features([image]).feature_maps if m.shape[-1] == side)
        words = self.model.encode_words(self.model.text_hidden_states(ids, mask))
        return word_attention(words, self.model.encode_regions(feature_map), mask)[0].unflatten(-1, (side, side))


class CLIPEmbedder:
    """An `Embedder` of a local folder that transformers wrote: a CLIPModel, a SiglipModel, or what has their methods.

    Args:
        model, processor: transformers'.
    """

    truncates_end = True

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype=None) -> CLIPEmbedder:
        """Reads a folder, never the network; raises CheckpointError."""
        from transformers import AutoModel, AutoProcessor

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"The folder {str(folder)!r} has no config.json; it must hold a CLIP of transformers."
            )
        kind = read_json(folder / "config.json").get("model_type")
        try:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises errors of any type
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
            raise CheckpointError(f"The folder {str(folder)!r} cannot be read as a CLIP: {reason}.") from None
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise CheckpointError(
                f"The folder {str(folder)!r} holds a {kind}, which does not embed images and texts; use a CLIP or a "
                "SigLIP."
            )
        return cls(model.eval().requires_grad_(False).to(device), processor)

    @torch.no_grad()
    def image_embeds(self, images: Sequence[ImageSegment]) -> torch.Tensor:
        parts = []
        for i in range(0, len(images), BATCH):
            batch = [to_pil(image.pixels) for image in images[i : i + BATCH]]
            inputs = self.processor(images=batch, return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
            parts.append(pooled(self.model.get_image_features(pixel_values=pixels)))
        return F.normalize(torch.cat(parts).float(), dim=-1)

    @torch.no_grad()
    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        is_siglip = "siglip" in type(self.model).__name__.lower()  # trained on texts that are padded to the full length
        parts = []
        for i in range(0, len(texts), BATCH):
            inputs = self.processor(
                text=list(texts[i : i + BATCH]),
                padding="max_length" if is_siglip else True,
                truncation=True,
                return_tensors="pt",
            )
            # Other names, such as token types, are the tokenizer's; SigLIP was trained without a mask.
            names = ("input_ids",) if is_siglip else ("input_ids", "attention_mask")
            inputs = {name: inputs[name].to(self.model.device) for name in names if name in inputs}
            parts.append(pooled(self.model.get_text_features(**inputs)))
        return F.normalize(torch.cat(parts).float(), dim=-1)


def pooled(output) -> torch.Tensor:
    """The embeddings in what transformers' methods return: a tensor, or since version 5 an object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def cosines(embeds: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`(N, M)` of unit embeddings `(N, D)` and `(M, D)`; raises SettingError for other widths, and for NaN."""
    if embeds.shape[-1] != others.shape[-1]:
        raise SettingError(
            f"The embeddings have widths {embeds.shape[-1]} and {others.shape[-1]}; take images and texts through one "
            "model."
        )
    out = embeds.float() @ others.float().T
    if not out.isfinite().all():
        raise SettingError("An embedding is not a number; the image or the model's weights hold NaN.")
    return out


def system_path(folder: Path, name: str) -> Path:
    """The file of a model's system, `systems/NAME.safetensors`; raises CheckpointError if there is none."""
    path = folder / SYSTEMS / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"The model {folder.name!r} has no {name} model: {str(path)!r} does not exist.")
    return path


def system_metadata(
    config: dict, name: str, tokenizer: Tokenizer | None = None, encoder_id: str | None = None
) -> dict[str, str]:
    """The metadata of a system's file.

    Args:
        encoder_id: Of the encoder that it was trained with.
    """
    text = tokenizer.to_text() if tokenizer is not None else None
    return {METADATA: json.dumps({"system": name, "config": config, "tokenizer": text, "encoder_id": encoder_id})}


def parse_system_metadata(metadata: dict | None, name: str, label: str) -> dict:
    """`config`, `tokenizer` and `encoder_id` of a system's file; raises CheckpointError."""
    try:
        about = json.loads((metadata or {})[METADATA])
        system, _ = about["system"], about["config"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{label} is not a system of MM-Interleaved; use a file from a model's systems."
        ) from None
    if system != name:
        raise CheckpointError(f"{label} holds {system!r}, not {name!r}.")
    return about


def build_contrastive(tensors: dict[str, torch.Tensor], about: dict, label: str, special_tokens, operations=None):
    """ContrastiveModel with these weights, and its tokenizer; raises CheckpointError.

    Args:
        about: From `parse_system_metadata`.
        operations: Layers of the host, None for `torch.nn`.
    """
    from ..models.build import check_shapes, param_shapes

    config = ContrastiveConfig.from_dict(about["config"], label)
    model = ContrastiveModel(config, *(() if operations is None else (operations,)))
    check_shapes(param_shapes(model), {name: tuple(t.shape) for name, t in tensors.items()}, label)
    model.load_state_dict(tensors, assign=True)
    tokenizer = Tokenizer.of_text(about["tokenizer"], special_tokens, config.vocab_size, label)
    return model.eval().requires_grad_(False), tokenizer


def read_system(path: Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a system's file; raises CheckpointError."""
    from safetensors import safe_open

    tensors = read_tensors(path)  # first: it has a sentence for a file that is cut off
    with safe_open(path, "pt") as file:
        return tensors, parse_system_metadata(file.metadata(), name, repr(path.name))


def load_lora(path: Path, name: str, encoder_id: str | None = None) -> LoRA:
    """LoRA of a system's file; raises CheckpointError, also for one that was trained with another encoder."""
    tensors, about = read_system(path, name)
    if None not in (encoder_id, about.get("encoder_id")) and about["encoder_id"] != encoder_id:
        raise CheckpointError(f"{path.name!r} was trained with another encoder; use the one of its model.")
    return LoRA(tensors, repr(path.name))


def load_contrastive(path: Path, special_tokens, encode, dtype=torch.float32, device="cpu") -> FeatureEmbedder:
    """The embedder of a file; raises CheckpointError.

    Args:
        encode: `FeatureEmbedder`'s.
    """
    tensors, about = read_system(path, "contrastive")
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    model, tokenizer = build_contrastive(tensors, about, repr(path.name), special_tokens)
    return FeatureEmbedder(model, tokenizer, encode, about.get("encoder_id"))
