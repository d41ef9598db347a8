"""Fresh weights, as the reference starts from them: for training, and for models that stay random."""

import torch
from torch import nn

from ..config import Config
from .llama_mmfs import GatedSynchronizer, StoryLLM
from .mmfs import Synchronizer
from .perceiver import Resampler
from .pos_embed import sincos_2d
from .unet_synchronizer import Decoder, Site
from .visual_tokenizer import CLIP_MEAN, CLIP_STD, DeformableAttention, Encoder, Injector


def new_blocks(config: Config, seed: int = 0) -> dict[str, nn.Module]:
    """All blocks of a config, on the CPU in float32, with fresh weights.

    Gates, the injectors' gammas and the sites' last convolutions start at zero: a synchronizer adds nothing before it
    is trained (`zero_module`, `init_values=0.`).
    """
    from ..checkpoints.load import diffusers_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = {
            "encoder": Encoder(config.encoder),
            "llm": StoryLLM(config.llm),
            "synchronizer": Decoder(config.decoder),
            "unet": diffusers_model(config.unet),
            "vae": diffusers_model(config.vae),
        }
        for name in ("encoder", "llm", "synchronizer"):
            initialize(blocks[name])
    return blocks


@torch.no_grad()
def initialize(block: nn.Module, std: float = 0.02) -> None:
    """Fills a block's parameters in place; layers first, then what the blocks say of themselves."""
    for part in block.modules():
        if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
            part.reset_parameters()
        elif isinstance(part, (nn.Linear, nn.Embedding, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(part.weight, std=std)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)
            if (
                isinstance(part, nn.Conv2d) and part.groups == 1
            ):  # ReLU follows in the stem, as in any convolutional net
                nn.init.kaiming_normal_(part.weight)
    for part in block.modules():
        if isinstance(part, (Synchronizer, DeformableAttention)):
            part.reset_parameters()
    for part in block.modules():
        if isinstance(part, Resampler):
            nn.init.normal_(part.queries, std=std)
        elif isinstance(part, Injector):
            nn.init.zeros_(part.gamma)
        elif isinstance(part, GatedSynchronizer):
            nn.init.zeros_(part.gate)
        elif isinstance(part, Site):
            nn.init.uniform_(part.mmfs.offsets.bias, -1.0, 1.0)
            part.positions.copy_(sincos_2d(part.positions.shape[1], int(part.positions.shape[0] ** 0.5)))
            nn.init.zeros_(part.conv.weight)
        elif isinstance(part, Encoder):
            part.mean.copy_(torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
            part.std.copy_(torch.tensor(CLIP_STD).view(1, 3, 1, 1))
            part.position_map.copy_(sincos_2d(part.config.width, part.config.position_grid, with_class=True))
            nn.init.normal_(part.class_embedding, std=std)
            nn.init.normal_(part.position_embedding.weight, std=std)
            nn.init.zeros_(part.level_embedding)
        elif isinstance(part, StoryLLM):
            nn.init.zeros_(part.soi)
        elif isinstance(part, Decoder):
            nn.init.normal_(part.negative, std=std)
