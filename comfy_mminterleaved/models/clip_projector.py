"""CLIP's patches through one linear layer as visual tokens (DreamLLM, 2309.11499; LLaVA, 2304.08485)."""

from __future__ import annotations

import torch
from torch import nn

from ..config import VisualTokenizerConfig
from .attention import attention as default_attention
from .visual_tokenizer import CLIP_MEAN, CLIP_STD, EncoderIdMixin, ImageFeatures
from .vit_adapter import CLIPEncoderLayer, CLIPVisionEmbeddings

MAP_CHANNELS = 8  # of the feature maps, which are empty: such models have no synchronizer


class CLIPVisionLayers(nn.Module):
    """CLIP's ViT up to the layer that is projected."""

    def __init__(self, c: VisualTokenizerConfig, operations, attention):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(c, operations)
        self.pre_layrnorm = operations.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        count = c.num_hidden_layers + 1 + c.select_layer  # -1 is the last layer's output
        self.layers = nn.ModuleList(CLIPEncoderLayer(c, operations, attention) for _ in range(count))

    def forward(self, images):
        x = self.pre_layrnorm(self.embeddings(images))
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPProjector(EncoderIdMixin, nn.Module):
    """Images `(N, 3, image_size, image_size)`, RGB in [0, 1] -> ImageFeatures of the batch, one token a patch."""

    def __init__(self, c: VisualTokenizerConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.config = c
        self.register_buffer("clip_mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("clip_std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        self.vision_model = CLIPVisionLayers(c, operations, attention)
        self.proj = operations.Linear(c.hidden_size, c.llm_hidden_size)

    def forward(self, images) -> ImageFeatures:
        x = self.vision_model((images - self.clip_mean.to(images)) / self.clip_std.to(images))
        maps = tuple(x.new_zeros(len(x), MAP_CHANNELS, side, side) for side in self.config.feature_map_sizes)
        return ImageFeatures(self.proj(x[:, 1:]), maps, self.encoder_id)
