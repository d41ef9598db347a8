"""ViT with adapter -> features: visual tokens for the LLM, feature maps for the synchronizers (`VisualTokenizer`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import EncoderConfig
from .attention import attention as default_attention
from .deform_attn import bordered, gather
from .perceiver import Resampler
from .pos_embed import resize_positions

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STAGES = 4  # interactions between ViT and adapter, each around an equal share of the layers; one for each map


@dataclass(frozen=True)
class Features:
    """What the encoder makes of pictures: visual tokens (N, slots, LLM width), and maps (N, C, s, s), largest first.

    `made_by` is the encoder's identity: another encoder's features mean nothing to a model.
    """

    tokens: torch.Tensor
    maps: tuple[torch.Tensor, ...]
    made_by: object = None

    def __getitem__(self, index) -> Features:
        return Features(self.tokens[index], tuple(m[index] for m in self.maps), self.made_by)


# ---- ViT (CLIP's vision transformer without its last norm) ----


class SelfAttention(nn.Module):
    def __init__(self, c: EncoderConfig, operations, attention):
        super().__init__()
        self.heads, self.attend = c.heads, attention
        self.q, self.k, self.v, self.out = (operations.Linear(c.width, c.width) for _ in range(4))

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class ViTLayer(nn.Module):
    def __init__(self, c: EncoderConfig, operations, attention):
        super().__init__()
        self.norm1 = operations.LayerNorm(c.width, eps=c.eps)
        self.attention = SelfAttention(c, operations, attention)
        self.norm2 = operations.LayerNorm(c.width, eps=c.eps)
        self.fc1 = operations.Linear(c.width, c.ffn_width)
        self.fc2 = operations.Linear(c.ffn_width, c.width)
        self.quick = c.activation == "quick_gelu"

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        hidden = self.fc1(self.norm2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        return x + self.fc2(hidden)


# ---- ViT-Adapter (arXiv 2205.08534; the reference's `vit_adapter`) ----


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention with its own offsets and weights a level (`MSDeformAttn`)."""

    def __init__(self, c: EncoderConfig, levels: int, operations):
        super().__init__()
        self.heads, self.levels, self.points = c.heads, levels, c.points
        value_width = int(c.width * c.value_ratio)
        self.offsets = operations.Linear(c.width, c.heads * levels * c.points * 2)
        self.weights = operations.Linear(c.width, c.heads * levels * c.points)
        self.value_proj = operations.Linear(c.width, value_width)
        self.out_proj = operations.Linear(value_width, c.width)

    def reset_parameters(self):
        """Points on rays around the reference point, one direction a head, whatever the query (`_reset_parameters`)."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = (ray / ray.abs().max(-1, keepdim=True)[0]).view(self.heads, 1, 1, 2)
        ray = ray * torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(ray.expand(-1, self.levels, -1, -1).flatten())
        for projection in (self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query, reference, feature, sizes):
        """query (N, Q, C), reference (Q, 2) in [0, 1], feature (N, S, C) of levels with `sizes` -> (N, Q, C)."""
        n, q, _ = query.shape
        values = self.value_proj(feature).unflatten(-1, (self.heads, -1)).unsqueeze(1)  # (N, 1, S, H, D)
        offsets = self.offsets(query).view(n, q, self.heads, 1, self.levels, self.points, 2)
        precise = torch.promote_types(query.dtype, torch.float32)
        weights = self.weights(query).view(n, q, self.heads, -1).to(precise).softmax(-1).to(query.dtype)
        side = torch.tensor([(w, h) for h, w in sizes], device=query.device, dtype=precise).view(-1, 1, 2)
        centre = reference.view(q, 1, 1, 1, 1, 2) * side - 0.5
        weights = weights.view(n, q, self.heads, 1, self.levels, self.points)
        return self.out_proj(gather(bordered(values, sizes), sizes, centre + offsets.to(precise), weights))


class Injector(nn.Module):
    """The adapter's three maps into the ViT's tokens."""

    def __init__(self, c: EncoderConfig, operations):
        super().__init__()
        self.query_norm = operations.LayerNorm(c.width, eps=1e-6)
        self.feat_norm = operations.LayerNorm(c.width, eps=1e-6)
        self.attn = DeformableAttention(c, 3, operations)
        self.gamma = nn.Parameter(torch.zeros(c.width))

    def forward(self, x, reference, maps, sizes):
        found = self.attn(self.query_norm(x), reference, self.feat_norm(maps), sizes)
        return x + self.gamma.to(x) * found


class ConvFFN(nn.Module):
    """Feed-forward with a depthwise convolution on each of the three maps."""

    def __init__(self, c: EncoderConfig, operations):
        super().__init__()
        hidden = int(c.width * c.ffn_ratio)
        self.fc1 = operations.Linear(c.width, hidden)
        self.dwconv = operations.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = operations.Linear(hidden, c.width)

    def forward(self, x, sizes):
        parts = self.fc1(x).split([h * w for h, w in sizes], dim=1)
        parts = [
            self.dwconv(part.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
            for part, size in zip(parts, sizes)
        ]
        return self.fc2(F.gelu(torch.cat(parts, dim=1)))


class Extractor(nn.Module):
    """The ViT's tokens into the adapter's three maps."""

    def __init__(self, c: EncoderConfig, operations):
        super().__init__()
        self.query_norm = operations.LayerNorm(c.width, eps=1e-6)
        self.feat_norm = operations.LayerNorm(c.width, eps=1e-6)
        self.attn = DeformableAttention(c, 1, operations)
        self.ffn = ConvFFN(c, operations)
        self.ffn_norm = operations.LayerNorm(c.width, eps=1e-6)

    def forward(self, maps, reference, x, sizes, grid):
        maps = maps + self.attn(self.query_norm(maps), reference, self.feat_norm(x), [(grid, grid)])
        return maps + self.ffn(self.ffn_norm(maps), sizes)


class Interaction(nn.Module):
    def __init__(self, c: EncoderConfig, extra: int, operations):
        super().__init__()
        self.injector = Injector(c, operations)
        self.extractor = Extractor(c, operations)
        self.extra_extractors = nn.ModuleList(Extractor(c, operations) for _ in range(extra))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, h, w)."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        y = x.movedim(1, -1).float()
        y = F.layer_norm(y, y.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
        return y.movedim(-1, 1).to(x.dtype)


class SpatialPrior(nn.Module):
    """A small convolutional pyramid at 1/4, 1/8, 1/16 and 1/32 of the picture (`SpatialPriorModule`)."""

    def __init__(self, c: EncoderConfig, operations):
        super().__init__()
        w = c.stem_width

        def conv(inner, outer, stride):
            return [operations.Conv2d(inner, outer, 3, stride, 1, bias=False), ChannelNorm(outer), nn.ReLU()]

        self.stem = nn.Sequential(*conv(3, w, 2), *conv(w, w, 1), *conv(w, w, 1), nn.MaxPool2d(3, 2, 1))
        self.conv2 = nn.Sequential(*conv(w, 2 * w, 2))
        self.conv3 = nn.Sequential(*conv(2 * w, 4 * w, 2))
        self.conv4 = nn.Sequential(*conv(4 * w, 4 * w, 2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (operations.Conv2d(k * w, c.width, 1) for k in (1, 2, 4, 4))

    def forward(self, picture):
        c1 = self.stem(picture)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))


def cell_centres(*sizes) -> torch.Tensor:
    """Centres (sum of h * w, 2) of the cells of maps, x and y in [0, 1]."""
    points = []
    for h, w in sizes:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        points.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(points)


class Encoder(nn.Module):
    """Pictures (N, 3, image_size, image_size), RGB in [0, 1] -> Features."""

    def __init__(self, c: EncoderConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.config = c
        self.identity = object()
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.patch_embedding = operations.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = operations.Embedding(c.grid**2 + 1, c.width)
        self.pre_norm = operations.LayerNorm(c.width, eps=c.eps)
        self.layers = nn.ModuleList(ViTLayer(c, operations, attention) for _ in range(c.layers))

        self.spatial_prior = SpatialPrior(c, operations)
        self.level_embedding = nn.Parameter(torch.zeros(3, c.width))
        self.interactions = nn.ModuleList(
            Interaction(c, 2 if i == STAGES - 1 else 0, operations) for i in range(STAGES)
        )
        self.up = operations.ConvTranspose2d(c.width, c.width, 2, 2)

        # Sine-cosine, fixed, but kept as the checkpoint has it; the first row is the class token's.
        self.position_map = nn.Parameter(torch.zeros(c.position_grid**2 + 1, c.width), requires_grad=False)
        self.token_proj = operations.Linear(c.width, c.width)
        self.token_norm = operations.LayerNorm(c.width, eps=1e-6)
        self.post_norm = operations.LayerNorm(c.width, eps=1e-6)
        self.resampler = Resampler(c.resampler, operations, attention)
        self.out_proj = operations.Linear(c.resampler.width, c.out_width)

    def hidden(self, pictures) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The ViT's last hidden state (N, 1 + grid^2, C), class token first, and the four maps without positions."""
        c, g = self.config, self.config.grid
        pictures = (pictures - self.mean.to(pictures)) / self.std.to(pictures)
        x = self.patch_embedding(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x).expand(x.shape[0], 1, -1), x], dim=1)
        x = self.pre_norm(x + self.position_embedding(torch.arange(g * g + 1, device=x.device)).to(x))

        sizes = [(g * 2, g * 2), (g, g), (g // 2, g // 2)]
        prior = F.interpolate(pictures, size=(g * 16, g * 16), mode="bilinear", align_corners=False)
        first, *rest = self.spatial_prior(prior)
        level = self.level_embedding.to(x)
        maps = torch.cat([m.flatten(2).transpose(1, 2) + level[i] for i, m in enumerate(rest)], dim=1)
        patches, cells = (cell_centres(*s).to(x.device) for s in ([(g, g)], sizes))

        outs = []
        for i, block in enumerate(self.interactions):
            begin, end = (c.layers * k // STAGES for k in (i, i + 1))
            x = torch.cat([x[:, :1], block.injector(x[:, 1:], patches, maps, sizes)], dim=1)
            for layer in self.layers[begin:end]:
                x = layer(x)
            for extractor in (block.extractor, *block.extra_extractors):
                maps = extractor(maps, cells, x[:, 1:], sizes, g)
            outs.append(x[:, 1:].transpose(1, 2).unflatten(2, (g, g)))

        maps = [m.transpose(1, 2).unflatten(2, s) for m, s in zip(maps.split([h * w for h, w in sizes], 1), sizes)]
        maps = [first + self.up(maps[0]), *maps]
        # The ViT's outputs after each interaction, resized to the maps; the third has its map's size already.
        for i, scale in ((0, 4), (1, 2), (3, 0.5)):
            outs[i] = F.interpolate(outs[i], scale_factor=scale, mode="bilinear", align_corners=False)
        return x, [m + out for m, out in zip(maps, outs)]

    def forward(self, pictures) -> Features:
        hidden, maps = self.hidden(pictures)
        table = self.position_map.to(hidden)
        maps = [m + resize_positions(table[1:], m.shape[-2:]).T.view(-1, *m.shape[-2:]) for m in maps]
        grid = resize_positions(table[1:], (self.config.grid,) * 2)
        tokens = self.token_norm(self.token_proj(hidden)) + torch.cat([table[:1], grid])
        return Features(self.out_proj(self.resampler(self.post_norm(tokens))), tuple(maps), self.identity)
