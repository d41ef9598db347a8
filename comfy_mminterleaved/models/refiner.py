"""Stage II (StackGAN, 1612.03242): images at twice their size, with word attention (AttnGAN, 1711.10485)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import SystemConfig

SCALE = 2  # of the sides
SIZE_MULTIPLE = 4  # of the sides of what goes in


@dataclass(frozen=True)
class RefinerConfig(SystemConfig):
    """Sizes of a Refiner.

    Args:
        hidden_size: Channels at half of the input's sides.
        num_blocks: Residual blocks there, half of them before and half after those in the middle.
        mid_size, num_mid_blocks: The same at a quarter of the sides, where the attention is.
        word_dim: Of the words: `ContrastiveModel.text_hidden_states`.
        prompt_dim: Of the prompt embeddings, the story's states.
    """

    hidden_size: int = 64
    num_blocks: int = 6
    mid_size: int = 96
    num_mid_blocks: int = 4
    num_attention_heads: int = 4
    word_dim: int = 128
    prompt_dim: int = 192


class Refiner(nn.Module):
    """Images at twice their size: what bicubic interpolation gives, and a residual.

    The layers are convolutions, so sides may be any multiples of `SIZE_MULTIPLE`.
    """

    def __init__(self, c: RefinerConfig, operations=nn):
        super().__init__()
        self.config = c
        width, half, quarter = c.hidden_size, c.hidden_size // 2, c.hidden_size // 4
        self.conv_in = operations.Conv2d(12, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, operations) for _ in range(c.num_blocks))
        self.down = operations.Conv2d(width, c.mid_size, 4, 2, 1)
        self.attention = WordAttention(c, operations)
        self.mid_blocks = nn.ModuleList(ResidualBlock(c.mid_size, operations) for _ in range(c.num_mid_blocks))
        self.up0 = operations.Conv2d(c.mid_size, 4 * width, 3, padding=1)
        self.up1 = operations.Conv2d(width, 4 * half, 3, padding=1)
        self.skip = operations.Conv2d(3, half, 3, padding=1)
        self.conv_mid = operations.Conv2d(half, half, 3, padding=1)
        self.up2 = operations.Conv2d(half, 4 * quarter, 3, padding=1)
        self.conv_out = operations.Conv2d(quarter, 3, 3, padding=1)
        if isinstance(self.conv_out, nn.Conv2d):
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)

    def forward(self, images, words=None, word_mask=None, prompt_embeds=None, prompt_mask=None) -> torch.Tensor:
        """Images `(N, 3, H, W)` in [0, 1] -> `(N, 3, 2H, 2W)`, which can leave [0, 1].

        Args:
            words: `(N, L, word_dim)`, and `word_mask`, bool `(N, L)`: which of them count; None for no text.
            prompt_embeds: `(N, T, prompt_dim)` of the panel, and `prompt_mask`, bool `(N,)`; None for no story.
        """
        x = self.conv_in(F.pixel_unshuffle(images * 2 - 1, 2))
        middle = len(self.blocks) // 2
        for block in self.blocks[:middle]:
            x = block(x)
        mid = self.down(x)
        mid = mid + self.attention(mid, words, word_mask, prompt_embeds, prompt_mask)
        for block in self.mid_blocks:
            mid = block(mid)
        x = x + F.pixel_shuffle(self.up0(mid), 2)
        for block in self.blocks[middle:]:
            x = block(x)
        x = F.silu(F.pixel_shuffle(self.up1(x), 2) + self.skip(images * 2 - 1))
        x = x + F.silu(self.conv_mid(x))
        x = F.silu(F.pixel_shuffle(self.up2(x), 2))
        return enlarge(images) + self.conv_out(x)


class ResidualBlock(nn.Module):
    """x + Conv(SiLU(Conv(x)))."""

    def __init__(self, width: int, operations=nn):
        super().__init__()
        self.conv1 = operations.Conv2d(width, width, 3, padding=1)
        self.conv2 = operations.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class WordAttention(nn.Module):
    """Cells of the image attend to words and to the story's states (AttnGAN, section 3.1).

    An empty token stands beside them, so that cells can attend to nothing.
    """

    def __init__(self, c: RefinerConfig, operations=nn):
        super().__init__()
        self.num_heads = c.num_attention_heads
        self.query_norm = operations.GroupNorm(1, c.mid_size)
        self.to_q = operations.Conv2d(c.mid_size, c.mid_size, 1)
        self.word_norm = operations.LayerNorm(c.word_dim)
        self.word_proj = operations.Linear(c.word_dim, 2 * c.mid_size)
        self.prompt_norm = operations.LayerNorm(c.prompt_dim)
        self.prompt_proj = operations.Linear(c.prompt_dim, 2 * c.mid_size)
        self.empty = nn.Parameter(torch.zeros(1, 1, 2 * c.mid_size))
        self.to_out = operations.Conv2d(c.mid_size, c.mid_size, 1)

    def forward(self, x, words=None, word_mask=None, prompt_embeds=None, prompt_mask=None) -> torch.Tensor:
        """What the cells of `x` `(N, mid_size, h, w)` read."""
        n = len(x)
        keys = [self.empty.to(x).expand(n, -1, -1)]
        mask = [torch.ones(n, 1, dtype=torch.bool, device=x.device)]
        if words is not None:
            keys.append(self.word_proj(self.word_norm(words)))
            mask.append(torch.ones_like(mask[0]).expand(-1, words.shape[1]) if word_mask is None else word_mask)
        if prompt_embeds is not None:
            keys.append(self.prompt_proj(self.prompt_norm(prompt_embeds)))
            seen = mask[0] if prompt_mask is None else prompt_mask[:, None]
            mask.append(seen.expand(-1, prompt_embeds.shape[1]))
        k, v = torch.cat(keys, dim=1).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.to_q(self.query_norm(x)).flatten(2).transpose(1, 2)
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, torch.cat(mask, dim=1)[:, None, None])
        out = out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(-1, x.shape[-2:])
        return self.to_out(out)


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """Bicubic interpolation to twice the sides."""
    return F.interpolate(images, scale_factor=SCALE, mode="bicubic", align_corners=False)
