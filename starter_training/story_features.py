"""The encoder's features of a dataset's images, computed once, for stages in which the encoder is frozen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.models.llama_mmfs import LlamaMMFS

from .augmentation import reconstruct_some
from .dataset import StoryDataset

BATCH = 64


class StoryFeatures:
    """Visual tokens and the feature maps that the LLM attends to, of every image; float16 on disk.

    Some images are encoded as the VAE decodes them (`reconstruct_some`): a model reads its own.

    Args:
        run_dir: Where they are kept.
        llm: Whose levels of the maps are kept.
    """

    def __init__(self, run_dir: Path, dataset: StoryDataset, encoder, vae, latents, llm: LlamaMMFS):
        self.sides = [side for side in sorted(llm.config.mmfs.spatial_shapes, reverse=True)]
        paths = [run_dir / f"{part}-{dataset.name}.npy" for part in ("story-tokens", "story-maps")]
        if not all(path.exists() for path in paths):
            self._encode(paths, dataset, encoder, vae, latents, llm)
        self.tokens, self.maps = (np.load(path, mmap_mode="r") for path in paths)

    @torch.no_grad()
    def _encode(self, paths, dataset: StoryDataset, encoder, vae, latents, llm: LlamaMMFS) -> None:
        cells, width = sum(side**2 for side in self.sides), llm.config.mmfs.d_value
        shape = len(dataset), llm.config.num_img_token, llm.config.hidden_size
        with atomic_path(paths[0]) as tokens_path, atomic_path(paths[1]) as maps_path:
            tokens = np.lib.format.open_memmap(tokens_path, "w+", np.float16, shape)
            maps = np.lib.format.open_memmap(maps_path, "w+", np.float16, (len(dataset), cells, width))
            for start in range(0, len(dataset), BATCH):
                rows = slice(start, min(start + BATCH, len(dataset)))
                torch.manual_seed(start)
                x = torch.from_numpy(np.array(latents[rows])).float()
                images = reconstruct_some(vae, dataset.images(range(*rows.indices(len(dataset)))), x)
                with torch.autocast("cpu", torch.bfloat16):
                    features = encoder(images.contiguous(memory_format=torch.channels_last))
                levels = [m for m in features.feature_maps if m.shape[-1] in self.sides]
                tokens[rows] = features.visual_tokens.half().numpy()
                maps[rows] = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2).half().numpy()
            for array in (tokens, maps):
                array.flush()
            del tokens, maps

    def __call__(self, indices: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Visual tokens `(N, P, T, C)` and maps, each `(N, P, C, side, side)`, of images by index `(N, P)`."""
        flat, shape = indices.flatten().numpy(), tuple(indices.shape)
        tokens = torch.from_numpy(self.tokens[flat]).float().unflatten(0, shape)
        cells = torch.from_numpy(self.maps[flat]).float().transpose(1, 2)
        levels = cells.split([side**2 for side in self.sides], dim=2)
        return tokens, [level.unflatten(2, (side, side)).unflatten(0, shape) for level, side in zip(levels, self.sides)]
