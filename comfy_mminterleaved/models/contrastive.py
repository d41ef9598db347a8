"""Images and texts in one space, by a contrastive loss (CLIP, 2103.00020), on top of the frozen visual tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import SystemConfig
from .visual_tokenizer import ImageFeatures

MAX_LOGIT_SCALE = 100.0  # section 2.5 of the paper


@dataclass(frozen=True)
class ContrastiveConfig(SystemConfig):
    """Sizes of a ContrastiveModel.

    Args:
        projection_dim: Of the common space.
        num_img_token, llm_hidden_size, num_channels, grid_size: Of the encoder's features: its visual tokens, and the
            map that is used beside them.
        image_hidden_size: Of the hidden layer that sees the tokens; what sees the map has two thirds of it.
    """

    projection_dim: int = 256
    vocab_size: int = 770
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 96
    num_img_token: int = 16
    llm_hidden_size: int = 192
    num_channels: int = 128
    grid_size: int = 8
    image_hidden_size: int = 384


class ContrastiveModel(nn.Module):
    """Unit embeddings of images and texts, whose cosine says how well they fit.

    The image tower is a head on features that an encoder has computed already, so scoring a drawn panel costs next to
    nothing.
    """

    def __init__(self, c: ContrastiveConfig, operations=nn):
        super().__init__()
        self.config = c
        width, map_width = c.hidden_size, c.image_hidden_size * 2 // 3
        self.token_norm = operations.LayerNorm(c.llm_hidden_size)
        self.token_proj = operations.Linear(c.num_img_token * c.llm_hidden_size, c.image_hidden_size)
        self.map_conv = operations.Conv2d(c.num_channels, c.num_channels // 4, 1)
        self.map_proj = operations.Linear(c.num_channels // 4 * c.grid_size**2, map_width)
        self.visual_projection = operations.Linear(c.image_hidden_size + map_width, c.projection_dim)
        self.embed_tokens = operations.Embedding(c.vocab_size, width)
        self.embed_positions = operations.Embedding(c.max_position_embeddings, width)
        self.layers = nn.ModuleList(TextLayer(c, operations) for _ in range(c.num_hidden_layers))
        self.text_norm = operations.LayerNorm(width)
        self.text_projection = operations.Linear(width, c.projection_dim)
        self.word_projection = operations.Linear(width, c.projection_dim)
        self.region_projection = operations.Linear(c.num_channels, c.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, features: ImageFeatures) -> torch.Tensor:
        """`(N, projection_dim)` of a batch of features."""
        side = self.config.grid_size
        feature_map = next(m for m in features.feature_maps if m.shape[-1] == side)
        return self.embed_features(features.visual_tokens, feature_map)

    def embed_features(self, visual_tokens: torch.Tensor, feature_map: torch.Tensor) -> torch.Tensor:
        """`(N, projection_dim)` of visual tokens `(N, T, C)` and the map `(N, C, grid_size, grid_size)`."""
        tokens = self.token_proj(self.token_norm(visual_tokens).flatten(1))
        cells = self.map_proj(self.map_conv(feature_map).flatten(1))
        return F.normalize(self.visual_projection(F.gelu(torch.cat([tokens, cells], dim=1))), dim=-1)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(N, projection_dim)` of token ids `(N, L)` and which of them count."""
        return self.pool(self.text_hidden_states(input_ids, attention_mask), attention_mask)

    def text_hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(N, L, hidden_size)`, normed."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_states = self.embed_tokens(input_ids) + self.embed_positions(positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return self.text_norm(hidden_states)

    def pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(N, projection_dim)`, the mean of `text_hidden_states` in the common space."""
        weights = attention_mask.to(hidden_states)[..., None]
        mean = (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return F.normalize(self.text_projection(mean), dim=-1)

    def encode_words(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(N, L, projection_dim)` of `text_hidden_states`, of unit length: AttnGAN's words."""
        return F.normalize(self.word_projection(hidden_states), dim=-1)

    def encode_regions(self, feature_map: torch.Tensor) -> torch.Tensor:
        """`(N, grid_size^2, projection_dim)` of the map, of unit length: AttnGAN's regions."""
        return F.normalize(self.region_projection(feature_map.flatten(2).transpose(1, 2)), dim=-1)

    def logits(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Scaled cosines `(N, M)`."""
        return self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * image_embeds @ text_embeds.T


# AttnGAN's sharpness of the attention, weight of the best word, and scale of the batch's logits (1711.10485, section
# 3.2). Words and regions are of unit length here, so their products are scaled before the softmax over words.
GAMMA1, GAMMA2, GAMMA3, WORD_SCALE = 4.0, 5.0, 10.0, 4.0


def word_attention(words: torch.Tensor, regions: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Which regions each word attends to, `(N, L, S)` (AttnGAN, equations 8 and 9).

    Args:
        words: `(N, L, D)`, from `encode_words`.
        regions: `(N, S, D)`, from `encode_regions`.
        attention_mask: bool `(N, L)`.
    """
    products = WORD_SCALE * words @ regions.transpose(-1, -2)
    over_words = products.masked_fill(~attention_mask[..., None], -torch.inf).softmax(-2)
    return (GAMMA1 * over_words).softmax(-1)


def match_words(words: torch.Tensor, regions: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """How well the words of N texts match the regions of M images, `(M, N)` (AttnGAN, equation 10)."""
    scores = []
    for image in regions:
        attention = word_attention(words, image.expand(len(words), -1, -1), attention_mask)
        cosines = F.cosine_similarity(attention @ image, words, dim=-1)
        weighted = (GAMMA2 * cosines).masked_fill(~attention_mask, -torch.inf)
        scores.append(weighted.logsumexp(-1) / GAMMA2)
    return torch.stack(scores)


class TextLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, c: ContrastiveConfig, operations=nn):
        super().__init__()
        self.num_heads = c.num_attention_heads
        self.layer_norm1 = operations.LayerNorm(c.hidden_size)
        self.qkv_proj = operations.Linear(c.hidden_size, 3 * c.hidden_size)
        self.out_proj = operations.Linear(c.hidden_size, c.hidden_size)
        self.layer_norm2 = operations.LayerNorm(c.hidden_size)
        self.fc1 = operations.Linear(c.hidden_size, 4 * c.hidden_size)
        self.fc2 = operations.Linear(4 * c.hidden_size, c.hidden_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """hidden_states `(N, L, C)`, attention_mask `(N, L)` of bools."""
        heads = self.qkv_proj(self.layer_norm1(hidden_states)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attention_mask[:, None, None])
        hidden_states = hidden_states + self.out_proj(out.transpose(1, 2).flatten(2))
        return hidden_states + self.fc2(F.gelu(self.fc1(self.layer_norm2(hidden_states))))


def pad_ids(rows: list[list[int]], limit: int, pad_to_limit: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `(N, L)` of texts; longer ones are cut at the front, for a text ends with what it says."""
    rows = [row[-limit:] or [0] for row in rows]
    length = limit if pad_to_limit else max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids, mask
