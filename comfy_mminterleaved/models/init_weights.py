"""Fresh weights, as the reference starts from them: for training, and for models that stay random."""

import torch
from torch import nn

from .llama_mmfs import LlamaMMFS, LlamaMMFSAttention
from .mmfs import MMFS
from .perceiver import PerceiverResampler
from .pos_embed import get_2d_sincos_pos_embed
from .unet_synchronizer import ContextConditioner, MMFSBlock
from .visual_tokenizer import CLIP_MEAN, CLIP_STD, VisualTokenizer
from .vit_adapter import CLIPVisionAdapter, Injector, MSDeformAttn


@torch.no_grad()
def init_weights(block: nn.Module, std: float = 0.02) -> None:
    """Fills a block's parameters in place: layers first, then what each module defines itself."""
    for part in block.modules():
        if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
            part.reset_parameters()
        elif isinstance(part, (nn.Linear, nn.Embedding, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(part.weight, std=std)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)
            if isinstance(part, nn.Conv2d) and part.groups == 1:  # ReLU follows in the stem
                nn.init.kaiming_normal_(part.weight)
    for part in block.modules():
        if isinstance(part, (MMFS, MSDeformAttn)):
            part.reset_parameters()
    for part in block.modules():
        if isinstance(part, PerceiverResampler):
            nn.init.normal_(part.queries, std=std)
        elif isinstance(part, Injector):
            nn.init.zeros_(part.gamma)
        elif isinstance(part, LlamaMMFSAttention):
            nn.init.zeros_(part.gate)
        elif isinstance(part, MMFSBlock):
            nn.init.uniform_(part.mmfs.sampling_offsets.bias, -1.0, 1.0)
            grid, channels = int(part.pos_embed.shape[0] ** 0.5), part.pos_embed.shape[1]
            part.pos_embed.copy_(get_2d_sincos_pos_embed(channels, grid))
            nn.init.zeros_(part.conv.weight)
        elif isinstance(part, VisualTokenizer):
            c = part.config
            part.clip_mean.copy_(torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
            part.clip_std.copy_(torch.tensor(CLIP_STD).view(1, 3, 1, 1))
            part.pos_embed.copy_(get_2d_sincos_pos_embed(c.hidden_size, c.pos_embed_grid, cls_token=True))
        elif isinstance(part, CLIPVisionAdapter):
            nn.init.normal_(part.embeddings.class_embedding, std=std)
            nn.init.normal_(part.embeddings.position_embedding.weight, std=std)
            nn.init.zeros_(part.adapter_level_embed)
        elif isinstance(part, LlamaMMFS):
            nn.init.zeros_(part.soi_token)
        elif isinstance(part, ContextConditioner):
            nn.init.normal_(part.neg_prompt_embeds, std=std)
