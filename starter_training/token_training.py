"""The stage `tokens`: images as codes, predicted from prompt embeddings and earlier images (DALL-E, 2102.12092)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.models.attention import attention
from comfy_mminterleaved.models.llama_mmfs import LlamaMMFS
from comfy_mminterleaved.models.token_decoder import CELL_CODES, TokenDecoder, to_cells
from comfy_mminterleaved.models.vqvae import VQVAE

from .batches import StoryBatches
from .story_features import StoryFeatures
from .targets import ConditioningTargets

STORY_DROPOUT = 0.1  # of the images: predicted without prompt and earlier images, for guidance
CODE_DROPOUT = 0.1  # of the codes that are read: others in their place, for what is sampled is never quite right
PROMPT_NOISE = 0.2  # on the prompt embeddings: those that are predicted are a little off
TOP_WEIGHT = 2.0  # of a top code's cross-entropy, against one of the bottom level


@torch.no_grad()
def cached_cells(path: Path, latents: np.ndarray, model: VQVAE) -> np.ndarray:
    """Codes `(images, cells, CELL_CODES)` of latents; computed once and kept at `path`."""
    if not path.exists():
        parts = []
        for start in range(0, len(latents), 256):
            x = torch.from_numpy(np.array(latents[start : start + 256])).float()
            parts.append(to_cells(model.encode(x)).short().numpy())
        with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
            np.save(file, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class TokenBatch:
    """Q images of N stories, with what is known before each.

    Args:
        cells: `(Q, cells, CELL_CODES)`.
        labels: `(Q, attributes)`, with IGNORE_INDEX for what the prompt embeddings do not say.
        feature_maps: Of each level, `(N, P, C, side, side)`.
        rows: `(Q,)`, the story of each image.
        visible: bool `(Q, P)`, the earlier images.
    """

    cells: torch.Tensor
    labels: torch.Tensor
    feature_maps: tuple[torch.Tensor, ...]
    rows: torch.Tensor
    visible: torch.Tensor

    def to(self, device) -> TokenBatch:
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return TokenBatch(**moved, feature_maps=tuple(level.to(device) for level in self.feature_maps))


class TokenBatches:
    """Every image of some stories, by seed, each in view of all that comes before it."""

    def __init__(self, stories: StoryBatches, features: StoryFeatures, cells: np.ndarray):
        self.stories, self.features, self.cells = stories, features, cells

    def build(self, seed: int) -> TokenBatch:
        batch = self.stories.build(seed)
        n, p = batch.image_indices.shape
        _, maps = self.features(batch.image_indices)
        return TokenBatch(
            torch.from_numpy(self.cells[batch.image_indices.flatten().numpy()]).long(),
            batch.inferable_labels.flatten(0, 1),
            tuple(maps),
            torch.arange(n).repeat_interleave(p),
            torch.ones(p, p, dtype=torch.bool).tril(-1).repeat(n, 1),
        )


def float32_attention(q, k, v, **options):
    """Attention in float32: on a CPU faster than in bfloat16, for the few codes of a cell."""
    with torch.autocast(q.device.type, enabled=False):
        return attention(q.float(), k.float(), v.float(), **options).to(q.dtype)


class TokenObjective(nn.Module):
    """Cross-entropy of every code, behind the prompt embeddings that the U-Net was pretrained with."""

    def __init__(self, model: TokenDecoder, targets: ConditioningTargets):
        super().__init__()
        self.model, self.targets = model, targets

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        cells, visible, given, is_dropped = batch.cells, batch.visible, batch.cells, None
        prompt_embeds = self.targets(batch.labels)
        if self.training:
            prompt_embeds = prompt_embeds + PROMPT_NOISE * torch.randn_like(prompt_embeds)
            is_dropped = torch.rand(len(cells), device=cells.device) < STORY_DROPOUT
            visible, given = visible & ~is_dropped[:, None], self.corrupted(cells)
        image_values = self.model.trunk.project_images(batch.feature_maps).select_rows(batch.rows.tolist())
        prompt = self.model.embed_prompt(prompt_embeds, is_dropped)
        logits = self.model(cells, prompt, image_values, visible, given)
        errors = F.cross_entropy(logits.flatten(0, -2).float(), cells.flatten(), reduction="none").view_as(cells)
        top, bottom = errors[..., 0].mean(), errors[..., 1:].mean()
        loss = (TOP_WEIGHT * top + (CELL_CODES - 1) * bottom) / (TOP_WEIGHT + CELL_CODES - 1)
        return {"loss": loss, "top": top, "bottom": bottom}

    @staticmethod
    def corrupted(cells: torch.Tensor) -> torch.Tensor:
        """Codes with some cells of other images in their place."""
        others = cells[torch.randperm(len(cells), device=cells.device)]
        return torch.where(torch.rand(cells.shape[:2], device=cells.device)[..., None] < CODE_DROPOUT, others, cells)


def init_from_llm(model: TokenDecoder, llm: LlamaMMFS, codes: VQVAE) -> None:
    """Starts the decoder as the LLM's first layers, with codes that are near each other where the VQ-VAE's are."""
    weights = llm.state_dict()
    model.trunk.load_state_dict({name: weights[name] for name in model.trunk.state_dict()})
    torch.nn.init.normal_(model.prompt_proj.weight, std=0.1 / model.config.prompt_dim**0.5)
    generator = torch.Generator().manual_seed(0)
    for embed, quantizer in ((model.embed_top, codes.quantize_top), (model.embed_bottom, codes.quantize_bottom)):
        codebook = quantizer.codebook / quantizer.codebook.std()
        projection = torch.randn(codebook.shape[1], embed.weight.shape[1], generator=generator)
        embed.weight.data.copy_(codebook @ projection / projection.shape[0] ** 0.5 * 0.05)
