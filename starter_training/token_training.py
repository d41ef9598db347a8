"""The stage `tokens`: images as the codes that come next in a story (DALL-E, 2102.12092)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.dream import DreamConditioner
from comfy_mminterleaved.models.dream import ContinuedRows
from comfy_mminterleaved.models.llama_mmfs import KVCache, LlamaMMFS
from comfy_mminterleaved.models.token_decoder import CELL_CODES, TokenDecoder, to_cells
from comfy_mminterleaved.models.vqvae import VQVAE

from .dream_training import DreamBatch, DreamBatches

STORY_DROPOUT = 0.1  # of the images: predicted from nothing, for guidance
CODE_DROPOUT = 0.1  # of the codes that are read: others in their place, for what is sampled is never quite right
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


class TokenBatches:
    """Stories with the codes of their images, by seed: each image in view of all that comes before it."""

    def __init__(self, batches: DreamBatches, cells: np.ndarray):
        self.batches, self.cells = batches, cells

    def build(self, seed: int) -> tuple[DreamBatch, torch.Tensor]:
        batch = self.batches.stories.build(seed)
        cells = torch.from_numpy(self.cells[batch.image_indices.flatten().numpy()]).long()
        return self.batches.of_stories(batch), cells


class TokenObjective(nn.Module):
    """Cross-entropy of every code, behind the story and its dream queries, which the frozen LLM reads."""

    def __init__(self, model: TokenDecoder, llm: LlamaMMFS, dream: DreamConditioner):
        super().__init__()
        self.model, self.dream, self.frozen = model, dream, [llm.eval().requires_grad_(False)]

    def forward(self, batch: DreamBatch, cells: torch.Tensor) -> dict[str, torch.Tensor]:
        """`cells`: `(Q, cells, CELL_CODES)`."""
        llm, count = self.frozen[0].to(cells.device), len(batch.input_ids)
        cache = KVCache(count)
        with torch.no_grad():
            x = llm.embed_inputs(batch.input_ids, batch.visual_tokens.flatten(0, 1))
            image_values, rows = llm.project_images(batch.feature_maps), batch.rows.tolist()
            llm(x, image_values, batch.image_mask, cache)
            cache = cache.select_rows(rows)
            cache.lengths = batch.lengths.tolist()
            self.dream.read(llm, cache, image_values.select_rows(rows), batch.visible)
        image_values = self.model.trunk.project_images(batch.feature_maps).select_rows(rows)
        lengths, visible = torch.tensor(cache.lengths, device=cells.device), batch.visible
        if self.training:
            dropped = torch.rand(len(lengths), device=lengths.device) < STORY_DROPOUT
            lengths, visible = torch.where(dropped, 1, lengths), visible & ~dropped[:, None]
        rest = ContinuedRows(cache, range(len(rows)), lengths.tolist()), image_values
        given = self.corrupted(cells) if self.training else cells
        hidden = self.model.hidden_states(self.model.inputs(given), *rest, visible)
        logits = self.model.code_logits(hidden, cells[..., :-1])
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
    """Has the decoder start as a copy of the story's LLM, and its codes where the VQ-VAE's are near each other."""
    trunk = {name: t for name, t in llm.state_dict().items() if name.startswith(("layers.", "norm."))}
    model.trunk.load_state_dict(trunk)
    generator = torch.Generator().manual_seed(0)
    for embed, quantizer in ((model.embed_top, codes.quantize_top), (model.embed_bottom, codes.quantize_bottom)):
        codebook = quantizer.codebook / quantizer.codebook.std()
        projection = torch.randn(codebook.shape[1], embed.weight.shape[1], generator=generator)
        embed.weight.data.copy_(codebook @ projection / projection.shape[0] ** 0.5 * 0.05)
