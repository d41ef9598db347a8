"""Config, generation settings and tokenizer of the starter model."""

from __future__ import annotations

from comfy_mminterleaved.config import (
    Config,
    LlamaMMFSConfig,
    MMFSConfig,
    PerceiverConfig,
    SpecialTokens,
    SynchronizerConfig,
    VisualTokenizerConfig,
    skip_channels,
)
from comfy_mminterleaved.generation.config import (
    GenerationConfig,
    ImageGenerationConfig,
    Introduction,
    TextGenerationConfig,
)
from comfy_mminterleaved.presets import RELEASED_13B
from comfy_mminterleaved.tokenizer import Tokenizer

from . import world

TEXT_VOCAB_SIZE = 768
LATENT_CHANNELS = 16  # with 4, small faces and props are lost
PROMPTS = {"caption": "{story}Caption:", "ask": "{story}Question: {question} Answer:"}


def starter_config() -> Config:
    """18 million parameters: 128 px, 16 visual tokens per image, a U-Net on 16 x 16 latents."""
    hidden_size, d_value, num_queries = 192, 128, 16
    channels, layers = [64, 128, 192], 1
    mmfs = {"n_heads": 4, "n_points": 4, "d_model": d_value, "d_value": d_value}
    return Config(
        encoder=VisualTokenizerConfig(
            PerceiverConfig(num_queries, d_value, d_value, 2, 4, 2 * d_value, 1, qk_normalization=True),
            llm_hidden_size=hidden_size,
            image_size=128,
            patch_size=16,
            hidden_size=d_value,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=4 * d_value,
            hidden_act="gelu",
            pos_embed_grid=8,
            conv_inplane=32,
        ),
        llm=LlamaMMFSConfig(
            num_img_token=num_queries,
            mmfs=MMFSConfig((16, 8, 4), 8, **mmfs, max_num_image_per_seq=33, cross_attention_frequency=2),
            vocab_size=TEXT_VOCAB_SIZE + 2,
            hidden_size=hidden_size,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            intermediate_size=512,
            max_position_embeddings=1024,
            special_tokens=SpecialTokens(bos=1, eos=2, pad=0, soi=TEXT_VOCAB_SIZE, image=TEXT_VOCAB_SIZE + 1),
        ),
        synchronizer=SynchronizerConfig(
            hidden_size,
            PerceiverConfig(num_queries, hidden_size, hidden_size, 2, 6, 2 * hidden_size),
            MMFSConfig((16, 8, 4), **mmfs, max_num_image_per_seq=9),
            block_channels=skip_channels(channels, layers),
            block_base_shapes=(16, 16, 8, 8, 4, 4, 4),
            image_size=128,
            pos_embed_grid=16,
            num_context_images=4,
        ),
        unet={
            "_class_name": "UNet2DConditionModel",
            "sample_size": 16,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "block_out_channels": channels,
            "layers_per_block": layers,
            "cross_attention_dim": hidden_size,
            "attention_head_dim": [2, 4, 6],
            "use_linear_projection": True,
            "norm_num_groups": 32,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        vae={"_class_name": "AutoencoderTiny", "latent_channels": LATENT_CHANNELS, "scaling_factor": 1.0},
        scheduler={**RELEASED_13B["scheduler"], "prediction_type": "v_prediction"},
        prompts=PROMPTS,
    )


# Default generation settings, and how stories introduce a hero.
GENERATION = GenerationConfig(
    TextGenerationConfig(max_new_tokens=60, min_new_tokens=4, temperature=0.7, repetition_penalty=1.0),
    ImageGenerationConfig(num_inference_steps=20, guidance_scale=3.0, scheduler="dpm++"),
    image_first=False,
    introduction=Introduction(
        "{name} is",
        tuple(f"{{name}} {does}" for does, _ in world.ACTIONS.values()),
        tuple(world.NAMES),
        r"\b[Aa]n? \w+ in an? \w+ coat with (?:an? )?\w+",
    ),
)


def make_tokenizer(num_stories: int = 4000) -> Tokenizer:
    """Trains byte-level BPE on the world's texts: it encodes any text, and the world's words are single tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCAB_SIZE, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_texts(num_stories), trainer)
    return Tokenizer(backend, starter_config().llm.special_tokens, TEXT_VOCAB_SIZE)


def _texts(num_stories: int):
    for seed in range(num_stories):
        for panel in world.make_story(seed):
            yield panel.text
            yield f"Caption: {world.caption(panel.scene)}"
            for question, answer in world.questions(panel.scene):
                yield f"Question: {question} Answer: {answer}"
