"""Configurations, one dataclass per block and one for the whole model, stored in a checkpoint's config.json.

Keys are those of the reference's and Hugging Face's configurations.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field, fields

from .errors import CheckpointError

BLOCKS = ("encoder", "llm", "synchronizer", "unet", "vae")
VERSION = 2


@dataclass(frozen=True)
class PerceiverConfig:
    """A Perceiver resampler in the layout of BLIP-2's Q-Former without text (paper 3.1; `PerceiverResampler`)."""

    num_queries: int
    hidden_size: int
    encoder_hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int = 3072
    cross_attention_frequency: int = 1
    qk_normalization: bool = False
    layer_norm_eps: float = 1e-12


@dataclass(frozen=True)
class MMFSConfig:
    """The MMFS layers of one block (paper 3.2; `MMFS`).

    Args:
        spatial_shapes: Side of each feature map that the layers attend to, finest first.
        base_spatial_shape: Side at which an offset of 1 is one cell; at the U-Net it is each block's own.
        d_model: Channels of the values; d_value: of the feature maps.
        max_num_image_per_seq: Rows of the table of relative image positions; row 0 stands for 'not visible'.
        cross_attention_frequency: In the LLM every how many layers one has MMFS.
        is_fused: Whether the weights are those after `MMFS.fuse_projections`, as `convert --quantize` writes them.
    """

    spatial_shapes: tuple[int, ...]
    base_spatial_shape: int = 16
    n_heads: int = 16
    n_points: int = 8
    d_model: int = 1024
    d_value: int = 1024
    max_num_image_per_seq: int = 50
    cross_attention_frequency: int = 1
    is_fused: bool = False


@dataclass(frozen=True)
class VisualTokenizerConfig:
    """CLIP's ViT with a ViT-Adapter, and the Perceiver that makes visual tokens (`VisualTokenizer`).

    Args:
        projector: "perceiver", or "linear" for one linear layer on the patches and neither adapter nor Perceiver
            (DreamLLM, LLaVA).
        select_layer: With "linear", the layer of the ViT whose output is projected, counted from the end.
    """

    perceiver: PerceiverConfig
    llm_hidden_size: int
    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pos_embed_grid: int = 16
    conv_inplane: int = 64
    n_points: int = 4
    deform_ratio: float = 0.5
    cffn_ratio: float = 0.25
    projector: str = "perceiver"
    select_layer: int = -2

    def __post_init__(self):
        if self.projector not in ("perceiver", "linear"):
            raise CheckpointError(f"The encoder's projector must be perceiver or linear, not {self.projector!r:.60}.")
        if self.image_size % self.patch_size or self.grid_size % 2:
            raise CheckpointError(
                f"The encoder's image size {self.image_size} and patch size {self.patch_size} give a grid of "
                f"{self.image_size / self.patch_size:g} patches; it must be a whole even number."
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def feature_map_sizes(self) -> tuple[int, ...]:
        """Side lengths of the four feature maps, finest first."""
        return self.grid_size * 4, self.grid_size * 2, self.grid_size, self.grid_size // 2


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that no text encodes to; an image is one `soi` and then `image` once per visual token.

    Args:
        eoi: Ends an image; None for models that end none.
        dream: With which the LLM asks for an image, and which stands before its dream queries; None if that is `soi`.
    """

    bos: int = 1
    eos: int = 2
    pad: int = 31999
    soi: int = 32000
    image: int = 32001
    eoi: int | None = None
    dream: int | None = None

    def all(self) -> frozenset[int]:
        return frozenset(self.to_dict().values())

    def to_dict(self) -> dict[str, int]:
        """Those that the model has."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def image_length(self) -> int:
        """Tokens of an image beside those that see it."""
        return 1 if self.eoi is None else 2


@dataclass(frozen=True)
class LlamaMMFSConfig:
    """Llama with gated MMFS in some of its layers (`modeling_llama_mmfs`, `TextDecoder`).

    Args:
        quantization: How attention and MLP weights are stored: a name in `models.quantization.FORMATS`, or None.
    """

    num_img_token: int
    mmfs: MMFSConfig
    vocab_size: int = 32002
    num_added_tokens: int = 2
    hidden_size: int = 5120
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int = 40
    intermediate_size: int = 13824
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    special_tokens: SpecialTokens = SpecialTokens()
    quantization: str | None = None


@dataclass(frozen=True)
class SynchronizerConfig:
    """From the LLM's hidden states to the U-Net: conditioning and MMFS blocks (`ImageDecoder`, `MMFSNet`).

    Args:
        block_channels, block_base_shapes: One entry per MMFS block: the U-Net's skips in the order they are made, then
            its middle block.
        num_context_images: Default number of previous images that the U-Net attends to.
    """

    llm_hidden_size: int
    perceiver: PerceiverConfig
    mmfs: MMFSConfig
    block_channels: tuple[int, ...]
    block_base_shapes: tuple[int, ...]
    image_size: int = 512
    pos_embed_grid: int = 64
    num_context_images: int = 1


# The reference's prompts (`collator.py`); {story} is where the story's own segments go.
PROMPTS = {
    "caption": "{story}a photo of",
    "ask": "Based on the image, please answer the question. {story}{question} "
    "Please provide an accurate answer within one word. The answer is:",
}


class SystemConfig:
    """Base of the configs of what stands beside a model, which are kept in the metadata of its file."""

    @classmethod
    def from_dict(cls, data: dict, label: str = "The config"):
        """Raises CheckpointError for keys that it does not have."""
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(f"{label} has settings that this release does not know: {', '.join(unknown)}.")
        return cls(**data)

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Config:
    """The whole model.

    `unet`, `vae` and `scheduler` are diffusers' own configurations, kept unchanged; `prompts` are the prompts that the
    model was trained with.
    """

    encoder: VisualTokenizerConfig
    llm: LlamaMMFSConfig
    synchronizer: SynchronizerConfig
    unet: dict = field(default_factory=dict)
    vae: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    prompts: dict = field(default_factory=lambda: dict(PROMPTS))

    def to_dict(self) -> dict:
        data = dataclasses.asdict(self)
        data["llm"]["special_tokens"] = self.llm.special_tokens.to_dict()
        if self.encoder.projector == "perceiver":  # newer settings only if used, so that older releases read the file
            del data["encoder"]["projector"], data["encoder"]["select_layer"]
        return {"format": "mm-interleaved", "version": VERSION, **data}

    @classmethod
    def from_dict(cls, data: dict) -> Config:
        """The inverse of `to_dict`; raises CheckpointError for a config that is not this project's."""
        if data.get("format") != "mm-interleaved":
            raise CheckpointError(
                "This config.json is not of an MM-Interleaved model: it has no format 'mm-interleaved'."
            )
        if data.get("version") == 1:
            raise CheckpointError(
                "This model was written before the first release (config.json, version 1); convert it again from the "
                "checkpoint it came from."
            )
        if data.get("version") != VERSION:
            raise CheckpointError(
                f"This config.json has version {data.get('version')}; this release reads version {VERSION}."
            )
        data = {key: value for key, value in data.items() if key not in ("format", "version")}
        return _build(cls, data, "config.json")


_NESTED = {
    Config: {"encoder": VisualTokenizerConfig, "llm": LlamaMMFSConfig, "synchronizer": SynchronizerConfig},
    VisualTokenizerConfig: {"perceiver": PerceiverConfig},
    LlamaMMFSConfig: {"special_tokens": SpecialTokens, "mmfs": MMFSConfig},
    SynchronizerConfig: {"perceiver": PerceiverConfig, "mmfs": MMFSConfig},
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


def skip_channels(block_out_channels, layers_per_block) -> tuple[int, ...]:
    """Channels of a U-Net's skips in the order they are made, then of its middle block (`MMFSNet.__init__`)."""
    counts = [layers_per_block] * len(block_out_channels) if isinstance(layers_per_block, int) else layers_per_block
    channels = [block_out_channels[0]]
    for level, (width, count) in enumerate(zip(block_out_channels, counts)):
        channels += [width] * (count + (level + 1 < len(block_out_channels)))
    return (*channels, block_out_channels[-1])
