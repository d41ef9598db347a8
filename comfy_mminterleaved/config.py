"""One dataclass a block, and the whole: read from and written to a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from .errors import CheckpointError


@dataclass(frozen=True)
class ResamplerConfig:
    """A Perceiver in the layout of BLIP-2's Q-Former without text (paper 3.1; `PerceiverResampler`)."""

    queries: int
    width: int
    encoder_width: int
    layers: int
    heads: int
    ffn_width: int = 3072
    cross_attention_every: int = 1
    qk_norm: bool = False
    eps: float = 1e-12


@dataclass(frozen=True)
class EncoderConfig:
    """CLIP's ViT with a ViT-Adapter, and the Perceiver that makes visual tokens (`VisualTokenizer`)."""

    resampler: ResamplerConfig
    out_width: int
    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    ffn_width: int = 4096
    activation: str = "quick_gelu"
    eps: float = 1e-5
    position_grid: int = 16
    stem_width: int = 64
    points: int = 4
    value_ratio: float = 0.5
    ffn_ratio: float = 0.25

    def __post_init__(self):
        if self.image_size % self.patch_size or self.grid % 2:
            raise CheckpointError(
                f"The encoder's image size {self.image_size} and patch size {self.patch_size} give a grid of "
                f"{self.image_size / self.patch_size:g} patches; it must be a whole even number."
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def map_sizes(self) -> tuple[int, ...]:
        """Side lengths of the four feature maps, largest first."""
        return self.grid * 4, self.grid * 2, self.grid, self.grid // 2


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that no text encodes to; a picture is one `soi` and then `image` once a visual token."""

    bos: int = 1
    eos: int = 2
    pad: int = 31999
    soi: int = 32000
    image: int = 32001

    def all(self) -> frozenset[int]:
        return frozenset(dataclasses.astuple(self))


@dataclass(frozen=True)
class LLMConfig:
    """Llama with a gated synchronizer in every `sync_every`-th layer (`modeling_llama_mmfs`, `TextDecoder`)."""

    slots: int
    vocab_size: int = 32002
    new_tokens: int = 2
    width: int = 5120
    layers: int = 40
    heads: int = 40
    kv_heads: int = 40
    ffn_width: int = 13824
    eps: float = 1e-6
    rope_theta: float = 10000.0
    context_length: int = 2048
    tokens: SpecialTokens = SpecialTokens()
    sync_every: int = 4
    sync_levels: tuple[int, ...] = (32, 16, 8)
    sync_base: int = 16
    sync_heads: int = 16
    sync_points: int = 8
    sync_width: int = 1024
    feature_width: int = 1024
    max_pictures: int = 50


@dataclass(frozen=True)
class DecoderConfig:
    """From the LLM's hidden states to the U-Net: context, Perceiver and sites (`ImageDecoder`, `MMFSNet`)."""

    llm_width: int
    resampler: ResamplerConfig
    site_widths: tuple[int, ...]
    site_grids: tuple[int, ...]
    picture_size: int = 512
    position_grid: int = 64
    feature_width: int = 1024
    levels: tuple[int, ...] = (64, 32, 16, 8)
    sync_heads: int = 16
    sync_points: int = 8
    sync_width: int = 1024
    max_pictures: int = 10
    look_back: int = 1


# The reference's prompts (`collator.py`); {story} is where the story's own segments go.
PROMPTS = {
    "caption": "{story}a photo of",
    "ask": "Based on the image, please answer the question. {story}{question} "
    "Please provide an accurate answer within one word. The answer is:",
}


@dataclass(frozen=True)
class Config:
    """The whole model.

    `unet`, `vae` and `scheduler` are diffusers' own configurations, kept as they are; `prompts` are what the model was
    trained to be asked with.
    """

    encoder: EncoderConfig
    llm: LLMConfig
    decoder: DecoderConfig
    unet: dict = field(default_factory=dict)
    vae: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    prompts: dict = field(default_factory=lambda: dict(PROMPTS))

    def to_dict(self) -> dict:
        return {"format": "mm-interleaved", "version": 1, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict) -> Config:
        """The inverse of `to_dict`; raises CheckpointError for a config that is not this project's."""
        if data.get("format") != "mm-interleaved":
            raise CheckpointError(
                "This config.json is not of an MM-Interleaved model: it has no format 'mm-interleaved'."
            )
        if data.get("version") != 1:
            raise CheckpointError(f"This config.json has version {data.get('version')}; this release reads version 1.")
        data = {key: value for key, value in data.items() if key not in ("format", "version")}
        return _build(cls, data, "config.json")


_NESTED = {
    Config: {"encoder": EncoderConfig, "llm": LLMConfig, "decoder": DecoderConfig},
    EncoderConfig: {"resampler": ResamplerConfig},
    LLMConfig: {"tokens": SpecialTokens},
    DecoderConfig: {"resampler": ResamplerConfig},
}


def _build(cls, data: dict, where: str):
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} must hold an object, not {data!r:.60}.")
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - names)
    if unknown:
        raise CheckpointError(f"{where} has entries that this release does not know: {', '.join(unknown)}.")
    values = {}
    for name, value in data.items():
        nested = _NESTED.get(cls, {}).get(name)
        if nested:
            value = _build(nested, value, f"{where}, {name}")
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except TypeError as error:
        raise CheckpointError(f"{where} is incomplete: {error}.") from None


# ---- from the reference's component configurations ----

# Those of the released model: Vicuna-13B v1.3, CLIP ViT-L/14, Stable Diffusion 2.1-base, mm_inference.yaml.
OFFICIAL = {
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


def sites_of(block_widths, layers_per_block: int, grids) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and grids of the sites of a U-Net, skips in the order they are made and then the mid output.

    `grids` gives the side of the skips of each resolution, largest first (`MMFSNet.__init__`).
    """
    widths, sizes = [block_widths[0]], [grids[0]]
    for level, width in enumerate(block_widths):
        widths += [width] * layers_per_block
        sizes += [grids[level]] * layers_per_block
        if level + 1 < len(block_widths):
            widths.append(width)
            sizes.append(grids[level + 1])
    return (*widths, block_widths[-1]), (*sizes, grids[-1])


def from_reference(parts: dict[str, dict]) -> Config:
    """The Config of a reference checkpoint, from its component configurations.

    Args:
        parts: any of model, llm, clip, unet, vae, scheduler; what is absent or unsaid is as in the released model.
    """
    model, llm, clip, unet, vae, scheduler = ({**OFFICIAL[name], **parts.get(name, {})} for name in OFFICIAL)
    special = SpecialTokens(**model["special_tokens"])
    feature_width = clip["hidden_size"]
    visual, context = model["visual_perceiver"], model["image_perceiver"]

    def resampler(c: dict) -> ResamplerConfig:
        return ResamplerConfig(
            queries=c["num_queries"],
            width=c["hidden_size"],
            encoder_width=c["encoder_hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            ffn_width=c.get("intermediate_size", 3072),
            cross_attention_every=c["cross_attention_frequency"],
            qk_norm=c.get("qk_normalization", False),
        )

    shrink = 512 // model["image_size"]  # the reference's `downsample_factor`
    levels = (64, 32, 16, 8)
    blocks = unet["block_out_channels"]
    grids = [size // shrink for size in levels]
    site_widths, _ = sites_of(blocks, unet["layers_per_block"], [0] * len(blocks))
    # The reference takes every three skips for one resolution; with two layers a block, as in SD, they are.
    site_grids = (*(grids[min(i // 3, len(grids) - 1)] for i in range(len(site_widths) - 1)), grids[-1])
    width = llm["hidden_size"]
    return Config(
        encoder=EncoderConfig(
            resampler=resampler(visual),
            out_width=width,
            image_size=clip["image_size"],
            patch_size=clip["patch_size"],
            width=feature_width,
            layers=clip["num_hidden_layers"],
            heads=clip["num_attention_heads"],
            ffn_width=clip["intermediate_size"],
            activation=clip["hidden_act"],
            eps=clip["layer_norm_eps"],
        ),
        llm=LLMConfig(
            slots=model["num_img_token"],
            vocab_size=model["txt_vocab_size"],
            new_tokens=model["txt_vocab_size"] - llm["vocab_size"],
            width=width,
            layers=llm["num_hidden_layers"],
            heads=llm["num_attention_heads"],
            kv_heads=llm.get("num_key_value_heads") or llm["num_attention_heads"],
            ffn_width=llm["intermediate_size"],
            eps=llm["rms_norm_eps"],
            rope_theta=llm.get("rope_theta") or 10000.0,
            context_length=min(model["seq_len"], llm["max_position_embeddings"]),
            tokens=special,
            sync_every=model["cross_attention_frequency"],
            sync_levels=tuple(model["spatial_shapes"]),
            sync_width=int(width * (model["image_embed_dim"] / width)),
            feature_width=feature_width,
        ),
        decoder=DecoderConfig(
            llm_width=width,
            resampler=resampler(context),
            site_widths=site_widths,
            site_grids=site_grids,
            picture_size=model["image_size"],
            position_grid=64 // shrink,
            feature_width=feature_width,
            levels=levels,
        ),
        unet=unet,
        vae=vae,
        scheduler=scheduler,
    )


def to_reference(config: Config) -> dict[str, dict]:
    """The inverse of `from_reference`: the component configurations by file name."""
    e, m, d = config.encoder, config.llm, config.decoder

    def perceiver(c: ResamplerConfig) -> dict:
        return {
            "num_queries": c.queries,
            "hidden_size": c.width,
            "encoder_hidden_size": c.encoder_width,
            "cross_attention_frequency": c.cross_attention_every,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "intermediate_size": c.ffn_width,
            "qk_normalization": c.qk_norm,
        }

    return {
        "config.json": {
            "txt_vocab_size": m.vocab_size,
            "num_img_token": m.slots,
            "seq_len": m.context_length,
            "image_embed_dim": m.sync_width,
            "cross_attention_frequency": m.sync_every,
            "spatial_shapes": list(m.sync_levels),
            "special_tokens": dataclasses.asdict(m.tokens),
            "visual_perceiver": perceiver(e.resampler),
            "image_perceiver": perceiver(d.resampler),
            "image_size": d.picture_size,
        },
        "llm/config.json": {
            "model_type": "llama",
            "vocab_size": m.vocab_size - m.new_tokens,
            "hidden_size": m.width,
            "num_hidden_layers": m.layers,
            "num_attention_heads": m.heads,
            "num_key_value_heads": m.kv_heads,
            "intermediate_size": m.ffn_width,
            "rms_norm_eps": m.eps,
            "rope_theta": m.rope_theta,
            "max_position_embeddings": m.context_length,
        },
        "clip/config.json": {
            "model_type": "clip_vision_model",
            "hidden_size": e.width,
            "num_hidden_layers": e.layers,
            "num_attention_heads": e.heads,
            "intermediate_size": e.ffn_width,
            "patch_size": e.patch_size,
            "image_size": e.image_size,
            "hidden_act": e.activation,
            "layer_norm_eps": e.eps,
        },
        "sd/unet/config.json": config.unet,
        "sd/vae/config.json": config.vae,
        "sd/scheduler/scheduler_config.json": config.scheduler,
    }


def small(width: int = 64, picture_size: int = 128) -> Config:
    """A small whole model of this code: ViT and Llama of `width`, a U-Net of three resolutions, a tiny VAE."""
    grids = [picture_size // 8, picture_size // 16, picture_size // 32]
    blocks = [32, 64, 64]
    widths, sizes = sites_of(blocks, 1, grids)
    tokens = SpecialTokens(pad=259, soi=260, image=261)
    return Config(
        encoder=EncoderConfig(
            ResamplerConfig(8, width, width, 2, 4, 2 * width, 2, qk_norm=True),
            out_width=width,
            image_size=128,
            patch_size=16,
            width=width,
            layers=4,
            heads=4,
            ffn_width=2 * width,
            position_grid=8,
            stem_width=16,
        ),
        llm=LLMConfig(
            slots=8,
            vocab_size=262,
            width=width,
            layers=4,
            heads=4,
            kv_heads=4,
            ffn_width=2 * width,
            tokens=tokens,
            sync_every=2,
            sync_levels=(16, 8, 4),
            sync_base=8,
            sync_heads=4,
            sync_points=4,
            sync_width=width,
            feature_width=width,
            context_length=1024,
        ),
        decoder=DecoderConfig(
            width,
            ResamplerConfig(16, width, width, 1, 4, 2 * width),
            widths,
            sizes,
            picture_size,
            grids[0],
            feature_width=width,
            levels=(32, 16, 8, 4),
            sync_heads=4,
            sync_points=4,
            sync_width=width,
        ),
        unet={
            "_class_name": "UNet2DConditionModel",
            "sample_size": grids[0],
            "block_out_channels": blocks,
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
        scheduler=OFFICIAL["scheduler"],
    )
