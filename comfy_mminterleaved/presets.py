"""Configurations that ship: the released 13B model, a tiny one, and where the starter is."""

from pathlib import Path

from .config import (
    Config,
    LlamaMMFSConfig,
    MMFSConfig,
    PerceiverConfig,
    SpecialTokens,
    SynchronizerConfig,
    VisualTokenizerConfig,
    skip_channels,
)

STARTER_DIR = Path(__file__).parent / "starter"

# Component configurations of the released model: Vicuna-13B v1.3, CLIP ViT-L/14, Stable Diffusion 2.1-base,
# mm_inference.yaml.
RELEASED_13B = {
    "model": {
        "txt_vocab_size": 32002,
        "num_img_token": 64,
        "seq_len": 2048,
        "image_embed_dim": 1024,
        "cross_attention_frequency": 4,
        "spatial_shapes": [32, 16, 8],
        "image_size": 512,
        "special_tokens": {"bos": 1, "eos": 2, "pad": 31999, "soi": 32000, "image": 32001},
        "visual_perceiver": {
            "num_queries": 64,
            "hidden_size": 768,
            "encoder_hidden_size": 1024,
            "cross_attention_frequency": 2,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "qk_normalization": True,
        },
        "image_perceiver": {
            "num_queries": 77,
            "hidden_size": 1024,
            "encoder_hidden_size": 5120,
            "cross_attention_frequency": 1,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
        },
    },
    "llm": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "intermediate_size": 13824,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
    "clip": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "scheduler": {
        "_class_name": "DDPMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_sample": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    },
}


def tiny_config(width: int = 64, image_size: int = 128) -> Config:
    """A tiny whole model: ViT and Llama of `width`, a U-Net of three resolutions, a small VAE."""
    grids = [image_size // 8, image_size // 16, image_size // 32]
    channels = [32, 64, 64]
    base_shapes = [grids[0], grids[0], grids[1], grids[1], grids[2], grids[2], grids[2]]
    shared = {"n_heads": 4, "n_points": 4, "d_model": width, "d_value": width}
    return Config(
        encoder=VisualTokenizerConfig(
            PerceiverConfig(8, width, width, 2, 4, 2 * width, 2, qk_normalization=True),
            llm_hidden_size=width,
            image_size=128,
            patch_size=16,
            hidden_size=width,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=2 * width,
            pos_embed_grid=8,
            conv_inplane=16,
        ),
        llm=LlamaMMFSConfig(
            num_img_token=8,
            mmfs=MMFSConfig((16, 8, 4), 8, **shared, cross_attention_frequency=2),
            vocab_size=262,
            hidden_size=width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=2 * width,
            special_tokens=SpecialTokens(pad=259, soi=260, image=261),
            max_position_embeddings=1024,
        ),
        synchronizer=SynchronizerConfig(
            width,
            PerceiverConfig(16, width, width, 1, 4, 2 * width),
            MMFSConfig((32, 16, 8, 4), **shared, max_num_image_per_seq=10),
            skip_channels(channels, 1),
            tuple(base_shapes),
            image_size,
            grids[0],
        ),
        unet={
            "_class_name": "UNet2DConditionModel",
            "sample_size": grids[0],
            "block_out_channels": channels,
            "layers_per_block": 1,
            "cross_attention_dim": width,
            "attention_head_dim": [1, 2, 2],
            "use_linear_projection": True,
            "norm_num_groups": 32,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        vae={
            "_class_name": "AutoencoderTiny",
            "encoder_block_out_channels": [16] * 4,
            "decoder_block_out_channels": [16] * 4,
            "num_encoder_blocks": [1] * 4,
            "num_decoder_blocks": [1] * 4,
        },
        scheduler=RELEASED_13B["scheduler"],
    )
