"""CLIP's ViT with a ViT-Adapter (arXiv 2205.08534; the reference's `vit_adapter`): image -> four feature maps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..config import VisualTokenizerConfig
from .deform_attn import ms_deform_attn, pad_levels

NUM_INTERACTIONS = 4  # of ViT and adapter, each around an equal share of the layers; one for each feature map

# ---- ViT (CLIP's vision transformer without its last norm) ----


class CLIPAttention(nn.Module):
    def __init__(self, c: VisualTokenizerConfig, operations, attention):
        super().__init__()
        self.num_heads, self.attention_fn = c.num_attention_heads, attention
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            operations.Linear(c.hidden_size, c.hidden_size) for _ in range(4)
        )

    def forward(self, x):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for proj in projections)
        return self.out_proj(self.attention_fn(q, k, v).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    def __init__(self, c: VisualTokenizerConfig, operations):
        super().__init__()
        self.fc1 = operations.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = operations.Linear(c.intermediate_size, c.hidden_size)
        self.is_quick = c.hidden_act == "quick_gelu"

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.is_quick else F.gelu(x))


class CLIPEncoderLayer(nn.Module):
    def __init__(self, c: VisualTokenizerConfig, operations, attention):
        super().__init__()
        self.layer_norm1 = operations.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.self_attn = CLIPAttention(c, operations, attention)
        self.layer_norm2 = operations.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = CLIPMLP(c, operations)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPVisionEmbeddings(nn.Module):
    """A class token and the patches of images, with learned positions: `(N, 3, H, W)` -> `(N, 1 + grid^2, C)`."""

    def __init__(self, c: VisualTokenizerConfig, operations):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = operations.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = operations.Embedding(c.grid_size**2 + 1, c.hidden_size)

    def forward(self, images):
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x).expand(x.shape[0], 1, -1), x], dim=1)
        return x + self.position_embedding(torch.arange(x.shape[1], device=x.device)).to(x)


# ---- ViT-Adapter (arXiv 2205.08534; the reference's `vit_adapter`) ----


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its own offsets and weights a level (`MSDeformAttn`)."""

    def __init__(self, c: VisualTokenizerConfig, levels: int, operations):
        super().__init__()
        self.n_heads, self.n_levels, self.n_points = c.num_attention_heads, levels, c.n_points
        value_dim = int(c.hidden_size * c.deform_ratio)
        self.sampling_offsets = operations.Linear(c.hidden_size, c.num_attention_heads * levels * c.n_points * 2)
        self.attention_weights = operations.Linear(c.hidden_size, c.num_attention_heads * levels * c.n_points)
        self.value_proj = operations.Linear(c.hidden_size, value_dim)
        self.output_proj = operations.Linear(value_dim, c.hidden_size)

    def reset_parameters(self):
        """Points on rays around the reference point, one direction a head, whatever the query (`_reset_parameters`)."""
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = (ray / ray.abs().max(-1, keepdim=True)[0]).view(self.n_heads, 1, 1, 2)
        ray = ray * torch.arange(1, self.n_points + 1).view(1, 1, -1, 1)
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ray.expand(-1, self.n_levels, -1, -1).flatten())
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query, reference_points, feature, spatial_shapes):
        """query (N, Q, C), reference_points (Q, 2) in [0, 1], feature (N, S, C) of all levels -> (N, Q, C)."""
        n, q, _ = query.shape
        values = self.value_proj(feature).unflatten(-1, (self.n_heads, -1)).unsqueeze(1)  # (N, 1, S, H, D)
        offsets = self.sampling_offsets(query).view(n, q, self.n_heads, 1, self.n_levels, self.n_points, 2)
        compute_dtype = torch.promote_types(query.dtype, torch.float32)
        weights = (
            self.attention_weights(query).view(n, q, self.n_heads, -1).to(compute_dtype).softmax(-1).to(query.dtype)
        )
        side = torch.tensor([(w, h) for h, w in spatial_shapes], device=query.device, dtype=compute_dtype).view(
            -1, 1, 2
        )
        center = reference_points.view(q, 1, 1, 1, 1, 2) * side - 0.5
        weights = weights.view(n, q, self.n_heads, 1, self.n_levels, self.n_points)
        return self.output_proj(
            ms_deform_attn(
                pad_levels(values, spatial_shapes), spatial_shapes, center + offsets.to(compute_dtype), weights
            )
        )


class Injector(nn.Module):
    """Adds attention from the ViT's tokens to the adapter's three maps."""

    def __init__(self, c: VisualTokenizerConfig, operations):
        super().__init__()
        self.query_norm = operations.LayerNorm(c.hidden_size, eps=1e-6)
        self.feat_norm = operations.LayerNorm(c.hidden_size, eps=1e-6)
        self.attn = MSDeformAttn(c, 3, operations)
        self.gamma = nn.Parameter(torch.zeros(c.hidden_size))

    def forward(self, x, reference_points, maps, sizes):
        return x + self.gamma.to(x) * self.attn(self.query_norm(x), reference_points, self.feat_norm(maps), sizes)


class ConvFFN(nn.Module):
    """Feed-forward with a depthwise convolution on each of the three maps."""

    def __init__(self, c: VisualTokenizerConfig, operations):
        super().__init__()
        hidden = int(c.hidden_size * c.cffn_ratio)
        self.fc1 = operations.Linear(c.hidden_size, hidden)
        self.dwconv = operations.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = operations.Linear(hidden, c.hidden_size)

    def forward(self, x, sizes):
        parts = self.fc1(x).split([h * w for h, w in sizes], dim=1)
        parts = [
            self.dwconv(part.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
            for part, size in zip(parts, sizes)
        ]
        return self.fc2(F.gelu(torch.cat(parts, dim=1)))


class Extractor(nn.Module):
    """Adds attention from the adapter's three maps to the ViT's tokens, then a feed-forward sublayer."""

    def __init__(self, c: VisualTokenizerConfig, operations):
        super().__init__()
        self.query_norm = operations.LayerNorm(c.hidden_size, eps=1e-6)
        self.feat_norm = operations.LayerNorm(c.hidden_size, eps=1e-6)
        self.attn = MSDeformAttn(c, 1, operations)
        self.ffn = ConvFFN(c, operations)
        self.ffn_norm = operations.LayerNorm(c.hidden_size, eps=1e-6)

    def forward(self, maps, reference_points, x, sizes, grid):
        maps = maps + self.attn(self.query_norm(maps), reference_points, self.feat_norm(x), [(grid, grid)])
        return maps + self.ffn(self.ffn_norm(maps), sizes)


class InteractionBlock(nn.Module):
    def __init__(self, c: VisualTokenizerConfig, extra: int, operations):
        super().__init__()
        self.injector = Injector(c, operations)
        self.extractor = Extractor(c, operations)
        self.extra_extractors = nn.ModuleList(Extractor(c, operations) for _ in range(extra))


def layer_norm_2d(operations, channels: int) -> nn.Module:
    """LayerNorm over the channels of `(N, C, h, w)`; a layer of the host, so that it can load and cast it alone."""

    class LayerNorm2d(operations.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    return LayerNorm2d(channels, eps=1e-6)


class SpatialPriorModule(nn.Module):
    """A small convolutional pyramid at 1/4, 1/8, 1/16 and 1/32 of the image (`SpatialPriorModule`)."""

    def __init__(self, c: VisualTokenizerConfig, operations):
        super().__init__()
        w = c.conv_inplane

        def conv(inner, outer, stride):
            return [
                operations.Conv2d(inner, outer, 3, stride, 1, bias=False),
                layer_norm_2d(operations, outer),
                nn.ReLU(),
            ]

        self.stem = nn.Sequential(*conv(3, w, 2), *conv(w, w, 1), *conv(w, w, 1), nn.MaxPool2d(3, 2, 1))
        self.conv2 = nn.Sequential(*conv(w, 2 * w, 2))
        self.conv3 = nn.Sequential(*conv(2 * w, 4 * w, 2))
        self.conv4 = nn.Sequential(*conv(4 * w, 4 * w, 2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (operations.Conv2d(k * w, c.hidden_size, 1) for k in (1, 2, 4, 4))

    def forward(self, images):
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))


def get_reference_points(*sizes) -> torch.Tensor:
    """Centers `(sum of h * w, 2)` of the cells of maps, x and y in [0, 1]."""
    points = []
    for h, w in sizes:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        points.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(points)


class CLIPVisionAdapter(nn.Module):
    """Normalized images -> the ViT's last hidden state, and four feature maps."""

    def __init__(self, c: VisualTokenizerConfig, operations, attention):
        super().__init__()
        self.config = c
        self.embeddings = CLIPVisionEmbeddings(c, operations)
        self.pre_layrnorm = operations.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.layers = nn.ModuleList(CLIPEncoderLayer(c, operations, attention) for _ in range(c.num_hidden_layers))
        self.adapter_spm = SpatialPriorModule(c, operations)
        self.adapter_level_embed = nn.Parameter(torch.zeros(3, c.hidden_size))
        self.adapter_interactions = nn.ModuleList(
            InteractionBlock(c, 2 if i == NUM_INTERACTIONS - 1 else 0, operations) for i in range(NUM_INTERACTIONS)
        )
        self.adapter_up = operations.ConvTranspose2d(c.hidden_size, c.hidden_size, 2, 2)

    def forward(self, images) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the hidden state `(N, 1 + grid^2, C)`, class token first, and the four maps, finest first."""
        c, g = self.config, self.config.grid_size
        x = self.pre_layrnorm(self.embeddings(images))

        sizes = [(g * 2, g * 2), (g, g), (g // 2, g // 2)]
        prior = F.interpolate(images, size=(g * 16, g * 16), mode="bilinear", align_corners=False)
        finest, *coarser = self.adapter_spm(prior)
        level = self.adapter_level_embed.to(x)
        maps = torch.cat([m.flatten(2).transpose(1, 2) + level[i] for i, m in enumerate(coarser)], dim=1)
        patches, cells = (get_reference_points(*s).to(x.device) for s in ([(g, g)], sizes))

        outs = []
        for i, block in enumerate(self.adapter_interactions):
            begin, end = (c.num_hidden_layers * k // NUM_INTERACTIONS for k in (i, i + 1))
            x = torch.cat([x[:, :1], block.injector(x[:, 1:], patches, maps, sizes)], dim=1)
            for layer in self.layers[begin:end]:
                x = layer(x)
            for extractor in (block.extractor, *block.extra_extractors):
                maps = extractor(maps, cells, x[:, 1:], sizes, g)
            outs.append(x[:, 1:].transpose(1, 2).unflatten(2, (g, g)))

        maps = [m.transpose(1, 2).unflatten(2, s) for m, s in zip(maps.split([h * w for h, w in sizes], 1), sizes)]
        maps = [finest + self.adapter_up(maps[0]), *maps]
        # The ViT's outputs after each interaction, resized to the maps; the third already has its map's size.
        for i, scale in ((0, 4), (1, 2), (3, 0.5)):
            outs[i] = F.interpolate(outs[i], scale_factor=scale, mode="bilinear", align_corners=False)
        return x, [m + out for m, out in zip(maps, outs)]
