"""Image -> visual tokens for the LLM, and feature maps for every MMFS layer (`VisualTokenizer`)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from ..config import VisualTokenizerConfig
from .attention import attention as default_attention
from .perceiver import PerceiverResampler
from .pos_embed import interpolate_pos_embed
from .vit_adapter import CLIPVisionAdapter

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageFeatures:
    """Encoder output for one image, or for a batch.

    Args:
        visual_tokens: `(num_img_token, llm_hidden_size)`, inserted at the image tokens of the LLM.
        feature_maps: `(C, H_l, W_l)` for each level, finest first; the values of every MMFS layer.
        encoder_id: Digest of the encoder's weights. Features of another encoder are not used.
    """

    visual_tokens: torch.Tensor
    feature_maps: tuple[torch.Tensor, ...]
    encoder_id: str | None = None

    def __getitem__(self, index) -> ImageFeatures:
        return ImageFeatures(self.visual_tokens[index], tuple(m[index] for m in self.feature_maps), self.encoder_id)

    def is_from(self, encoder_id: str | None) -> bool:
        """Whether an encoder of this digest made them, adapted to drawings or not; if one is unknown, it may."""
        return None in (encoder_id, self.encoder_id) or self.encoder_id.startswith(encoder_id)


class EncoderIdMixin:
    """Identity of an encoder, from its weights."""

    _encoder_id: tuple[int, str] | None = None

    @property
    def encoder_id(self) -> str:
        """Digest of the weights: of the last projection and the class token, which no two trained encoders share."""
        weight = self.proj.weight
        if self._encoder_id is None or self._encoder_id[0] != weight.data_ptr():
            parts = (weight, self.vision_model.embeddings.class_embedding)
            data = b"".join(t.detach().float().cpu().numpy().tobytes() for t in parts)
            self._encoder_id = weight.data_ptr(), hashlib.blake2b(data, digest_size=12).hexdigest()
        return self._encoder_id[1]


class VisualTokenizer(EncoderIdMixin, nn.Module):
    """Images `(N, 3, image_size, image_size)`, RGB in [0, 1] -> ImageFeatures of the batch."""

    def __init__(self, c: VisualTokenizerConfig, operations=nn, attention=default_attention):
        super().__init__()
        self.config = c
        self.register_buffer("clip_mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("clip_std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        self.vision_model = CLIPVisionAdapter(c, operations, attention)
        # Sine-cosine and fixed, but kept as the checkpoint has it; the first row is the class token's.
        table = torch.zeros(c.pos_embed_grid**2 + 1, c.hidden_size)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.pos_proj = operations.Linear(c.hidden_size, c.hidden_size)
        self.pos_ln = operations.LayerNorm(c.hidden_size, eps=1e-6)
        self.post_ln = operations.LayerNorm(c.hidden_size, eps=1e-6)
        self.perceiver_resampler = PerceiverResampler(c.perceiver, operations, attention)
        self.proj = operations.Linear(c.perceiver.hidden_size, c.llm_hidden_size)

    def forward_features(self, images) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the ViT's last hidden state `(N, 1 + grid^2, C)`, and the four maps without positions."""
        return self.vision_model((images - self.clip_mean.to(images)) / self.clip_std.to(images))

    def forward(self, images) -> ImageFeatures:
        hidden_states, maps = self.forward_features(images)
        table = self.pos_embed.to(hidden_states)
        maps = [m + interpolate_pos_embed(table[1:], m.shape[-2:]).T.view(-1, *m.shape[-2:]) for m in maps]
        grid = interpolate_pos_embed(table[1:], (self.config.grid_size,) * 2)
        tokens = self.pos_ln(self.pos_proj(hidden_states)) + torch.cat([table[:1], grid])
        visual_tokens = self.proj(self.perceiver_resampler(self.post_ln(tokens)))
        return ImageFeatures(visual_tokens, tuple(maps), self.encoder_id)
