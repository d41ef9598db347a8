"""The stage of drawn images: an adapter with which the encoder sees in a drawing what it sees in the original.

Drawn images are a modality of their own (GMAIL, 2602.15368): a LoRA of the encoder is trained on them alone, towards
the frozen encoder's features of the originals.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.finetune.lora import TrainableLoRA
from comfy_mminterleaved.models.contrastive import ContrastiveModel
from comfy_mminterleaved.models.visual_tokenizer import ImageFeatures, VisualTokenizer

from .pretraining import relative_mse

RANK = 4
# Query, value and MLP of the ViT's layers, and the values of the adapter's extractors.
LAYERS = re.compile(
    r"vision_model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.fc[12])"
    r"|vision_model\.adapter_interactions\.\d+\.(extractor|extra_extractors\.\d+)\.attn\.value_proj"
)
PAINTED_WEIGHT, CONTRASTIVE_WEIGHT = 0.1, 0.1
NUM_PAINTED = 4  # of a batch's originals that go through the adapter, so that it does them no harm


def with_lora(module: nn.Module, pattern: re.Pattern, rank: int = RANK) -> LoRAState:
    """Puts peft's LoRA into the linear layers whose whole name matches, in place; returns its weights."""
    return LoRAState(TrainableLoRA(module, pattern, rank))


class LoRAState(nn.Module):
    """The LoRA's weights of a module, under peft's names: what a stage saves."""

    def __init__(self, lora: TrainableLoRA):
        super().__init__()
        self.lora = lora

    def state_dict(self, *_, **__) -> dict[str, torch.Tensor]:
        return self.lora.parameters

    def switch(self, is_on: bool) -> None:
        """Turns the LoRA on or off."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in self.lora.module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(is_on)


class DrawnObjective(nn.Module):
    """Features of drawn images with the adapter against those of the originals without it.

    Args:
        on_both: Train the one encoder on drawn images and originals alike, the baseline without a modality.
    """

    def __init__(self, encoder: VisualTokenizer, lora: LoRAState, contrastive: ContrastiveModel, on_both: bool = False):
        super().__init__()
        self.encoder, self.lora, self.contrastive = encoder, [lora], contrastive.requires_grad_(False)
        self.painted_weight = 1.0 if on_both else PAINTED_WEIGHT

    def forward(self, drawn: torch.Tensor, painted: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images `(N, 3, side, side)` of the same scenes."""
        (lora,) = self.lora
        with torch.no_grad():
            lora.switch(False)
            target = self.encoder(painted)
        lora.switch(True)
        count = len(painted) if self.painted_weight == 1.0 else NUM_PAINTED
        both = self.encoder(torch.cat([drawn, painted[:count]]))
        features, kept = both[: len(drawn)], both[len(drawn) :]
        losses = {
            "drawn": feature_error(features, target),
            "painted": feature_error(kept, target[:count]),
            "contrastive": self.contrastive_loss(features, target),
        }
        total = losses["drawn"] + self.painted_weight * losses["painted"]
        return {"loss": total + CONTRASTIVE_WEIGHT * losses["contrastive"], **losses}

    def contrastive_loss(self, features: ImageFeatures, target: ImageFeatures) -> torch.Tensor:
        """Cross-entropy, both ways, of which drawing belongs to which original."""
        logits = self.contrastive.logits(self.contrastive.encode_image(features), self.contrastive.encode_image(target))
        rows = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


def feature_error(features: ImageFeatures, target: ImageFeatures) -> torch.Tensor:
    """Mean of the relative squared errors of the visual tokens and of each map."""
    pairs = [
        (features.visual_tokens, target.visual_tokens),
        *zip(features.feature_maps, target.feature_maps),
    ]
    return sum(relative_mse(pred, actual) for pred, actual in pairs) / len(pairs)
