"""Refines images: twice the size, with the text of their panel and the story's states (StackGAN's Stage II)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import CheckpointError, SettingError
from ..models.refiner import SCALE, SIZE_MULTIPLE, Refiner, RefinerConfig
from .config import MAX_REFINED_SIDE
from .embedders import FeatureEmbedder, read_system


class ImageRefiner:
    """Images at twice their size.

    Args:
        embedder: Of the same model: its contrastive model reads the texts. None refines without them.
    """

    def __init__(self, model: Refiner, embedder: FeatureEmbedder | None = None):
        self.model, self.embedder = model, embedder
        c = model.config
        if embedder is not None and embedder.model.config.hidden_size != c.word_dim:
            raise SettingError(
                f"The contrastive model's words have width {embedder.model.config.hidden_size}, but the refiner takes "
                f"{c.word_dim}; use those of one model."
            )

    @property
    def device(self) -> torch.device:
        return self.model.conv_out.weight.device

    @torch.no_grad()
    def refine(self, pixels: torch.Tensor, text: str = "", prompt_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """An image `(3, H, W)` in [0, 1] -> `(3, 2H, 2W)` float32 in [0, 1].

        Args:
            text: Of the panel, with who is who (`ranking.ranking_text`).
            prompt_embeds: `(T, prompt_dim)`, what the panel was drawn from; None for any other image.

        Raises:
            SettingError: For an image that is too large, and for prompt embeddings of another model.
        """
        height, width = pixels.shape[-2:]
        check_size(width, height)
        if prompt_embeds is not None:
            if prompt_embeds.shape[-1] != self.model.config.prompt_dim:
                raise SettingError(
                    f"The conditioning has width {prompt_embeds.shape[-1]}, but the refiner takes "
                    f"{self.model.config.prompt_dim}; use the refiner of the model that drew the image."
                )
            prompt_embeds = prompt_embeds[None].to(self.device, torch.float32)
        words = None
        if text.strip() and self.embedder is not None:
            words = self.embedder.word_states(text)[None].to(self.device, torch.float32)
        below, right = -height % SIZE_MULTIPLE, -width % SIZE_MULTIPLE
        images = F.pad(pixels[None].to(self.device, torch.float32), (0, right, 0, below), mode="replicate")
        out = self.model(images, words, None, prompt_embeds)[0]
        return out[:, : SCALE * height, : SCALE * width].clamp(0, 1).float().cpu()


def check_size(width: int, height: int) -> None:
    """Raises SettingError for an image that is too large to refine."""
    if max(height, width) > MAX_REFINED_SIDE:
        raise SettingError(
            f"An image to refine may have {MAX_REFINED_SIDE} px a side at most, not {width} x {height}; draw it "
            "smaller, or do not refine."
        )


def load_refiner(path: Path, embedder: FeatureEmbedder | None = None, device="cpu") -> ImageRefiner:
    """The refiner of a system's file, in float32; raises CheckpointError."""
    tensors, about = read_system(path, "refiner")
    model = build_refiner({name: t.to(device, torch.float32) for name, t in tensors.items()}, about, repr(path.name))
    return ImageRefiner(model, embedder)


def build_refiner(tensors: dict[str, torch.Tensor], about: dict, label: str, operations=None) -> Refiner:
    """Refiner with these weights; raises CheckpointError.

    Args:
        about: From `embedders.parse_system_metadata`.
        operations: Layers of the host, None for `torch.nn`.
    """
    from ..models.build import check_shapes, param_shapes

    try:
        model = Refiner(RefinerConfig.from_dict(about["config"], label), *(() if operations is None else (operations,)))
    except TypeError:
        raise CheckpointError(f"{label} has settings of a wrong type.") from None
    check_shapes(param_shapes(model), {name: tuple(t.shape) for name, t in tensors.items()}, label)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)
