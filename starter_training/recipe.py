"""What the starter model is: its config and its vocabulary."""

from __future__ import annotations

from comfy_mminterleaved.config import (
    OFFICIAL,
    Config,
    DecoderConfig,
    EncoderConfig,
    LLMConfig,
    ResamplerConfig,
    SpecialTokens,
    sites_of,
)
from comfy_mminterleaved.tokenizer import Tokenizer

from . import world

TEXT_TOKENS = 768
LATENTS = 16  # channels; in 4 small faces and props are lost
PROMPTS = {"caption": "{story}Caption:", "ask": "{story}Question: {question} Answer:"}


def starter() -> Config:
    """A model of 18 million values: 128 px, 16 visual tokens a picture, a U-Net on 16 x 16 latents."""
    width, feature, context = 192, 128, 192
    blocks, layers, grids = [64, 128, 192], 1, [16, 8, 4]
    site_widths, site_grids = sites_of(blocks, layers, grids)
    tokens = SpecialTokens(bos=1, eos=2, pad=0, soi=TEXT_TOKENS, image=TEXT_TOKENS + 1)
    return Config(
        encoder=EncoderConfig(
            ResamplerConfig(16, feature, feature, 2, 4, 2 * feature, 1, qk_norm=True),
            out_width=width,
            image_size=128,
            patch_size=16,
            width=feature,
            layers=4,
            heads=4,
            ffn_width=4 * feature,
            activation="gelu",
            position_grid=8,
            stem_width=32,
        ),
        llm=LLMConfig(
            slots=16,
            vocab_size=TEXT_TOKENS + 2,
            width=width,
            layers=6,
            heads=6,
            kv_heads=6,
            ffn_width=512,
            context_length=1024,
            tokens=tokens,
            sync_every=2,
            sync_levels=(16, 8, 4),
            sync_base=8,
            sync_heads=4,
            sync_points=4,
            sync_width=feature,
            feature_width=feature,
            max_pictures=33,
        ),
        decoder=DecoderConfig(
            width,
            ResamplerConfig(16, context, width, 2, 6, 2 * context),
            site_widths,
            site_grids,
            picture_size=128,
            position_grid=16,
            feature_width=feature,
            levels=(16, 8, 4),
            sync_heads=4,
            sync_points=4,
            sync_width=feature,
            max_pictures=9,
            look_back=4,
        ),
        unet={
            "_class_name": "UNet2DConditionModel",
            "sample_size": 16,
            "in_channels": LATENTS,
            "out_channels": LATENTS,
            "block_out_channels": blocks,
            "layers_per_block": layers,
            "cross_attention_dim": context,
            "attention_head_dim": [2, 4, 6],
            "use_linear_projection": True,
            "norm_num_groups": 32,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        vae={"_class_name": "AutoencoderTiny", "latent_channels": LATENTS, "scaling_factor": 1.0},
        scheduler={**OFFICIAL["scheduler"], "prediction_type": "v_prediction"},
        prompts=PROMPTS,
    )


def make_tokenizer(stories: int = 4000) -> Tokenizer:
    """Byte-level BPE over the world's texts: any text can be typed, the world's words are whole tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_texts(stories), trainer)
    return Tokenizer(backend, starter().llm.tokens, TEXT_TOKENS)


def _texts(stories: int):
    for seed in range(stories):
        for page in world.make_story(seed):
            yield page.text
            yield f"Caption: {world.caption(page.scene)}"
            for question, answer in world.questions(page.scene):
                yield f"Question: {question} Answer: {answer}"
