"""Fixed sine-cosine position embeddings (the reference's `pos_embed`), computed in float32 as it does."""

import numpy as np
import torch
import torch.nn.functional as F


def get_1d_sincos_pos_embed(embed_dim: int, positions) -> torch.Tensor:
    """Positions (M,) -> (M, embed_dim): sines, then cosines, of wavelengths 2 pi to 20000 pi."""
    omega = np.arange(embed_dim // 2, dtype=np.float32)
    omega /= embed_dim / 2.0
    omega = 1.0 / 10000**omega
    angles = np.outer(np.asarray(positions, dtype=np.float32), omega)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32))


def get_2d_sincos_pos_embed(embed_dim: int, grid: int, cls_token: bool = False) -> torch.Tensor:
    """(grid * grid, embed_dim), row by row: half for the row, half for the column; a class token's row is zero."""
    row, column = (axis.reshape(-1) for axis in np.mgrid[:grid, :grid])
    table = torch.cat(
        [get_1d_sincos_pos_embed(embed_dim // 2, row), get_1d_sincos_pos_embed(embed_dim // 2, column)], dim=1
    )
    return torch.cat([torch.zeros(1, embed_dim), table]) if cls_token else table


def interpolate_pos_embed(table: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A square table (g * g, C) resized bicubic to (h * w, C); itself if it has that size already."""
    grid = int(table.shape[0] ** 0.5)
    if (grid, grid) == tuple(size):
        return table
    image = table.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(size), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)
