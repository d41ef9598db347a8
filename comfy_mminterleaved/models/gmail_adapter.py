"""Drawn images as a modality of their own (GMAIL, 2602.15368): they go through the encoder with an adapter."""

from __future__ import annotations

from dataclasses import replace

import torch

from .lora import LoRA
from .visual_tokenizer import ImageFeatures, VisualTokenizer

DRAWN = "drawn"  # the origin of an image that the model drew; any other is an original


def features_id(encoder_id: str, origin: str, adapter: LoRA | None) -> str:
    """The `encoder_id` of the features of an image of this origin."""
    return encoder_id if adapter is None or origin != DRAWN else f"{encoder_id}+{adapter.lora_id}"


def encode_image(
    encoder: VisualTokenizer, pixels: torch.Tensor, origin: str = "own", adapter: LoRA | None = None
) -> ImageFeatures:
    """Features of an image `(1, 3, image_size, image_size)`; a drawn one goes through the adapter, if there is one."""
    if adapter is None or origin != DRAWN:
        return encoder(pixels)[0]
    with adapter.attached(encoder):
        features = encoder(pixels)[0]
    return replace(features, encoder_id=features_id(features.encoder_id, origin, adapter))
