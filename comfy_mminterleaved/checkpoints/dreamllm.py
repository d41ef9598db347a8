"""DreamLLM's layout (2309.11499; github.com/RunpeiDong/DreamLLM): a Llama, and three parts in files of their own.

Beside the LLM's shards and config.json there are `dream_embedding.bin` (the queries), `clip_vision_embedding.bin` (CLIP
and its projector) and `stable_diffusion_head.bin` (U-Net, VAE and the projector to them), or their tensors under those
names among the LLM's. Such a model has no synchronizer: ours is there, at strength 0.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from ..config import (
    Config,
    LlamaMMFSConfig,
    MMFSConfig,
    PerceiverConfig,
    SpecialTokens,
    SynchronizerConfig,
    VisualTokenizerConfig,
    skip_channels,
)
from ..errors import CheckpointError
from ..models.build import build, check_shapes, param_shapes
from ..models.clip_projector import MAP_CHANNELS
from ..models.dream import DreamConfig
from ..models.visual_tokenizer import CLIP_MEAN, CLIP_STD
from ..presets import RELEASED_13B
from .tensors import is_folder, read_json, read_tensors

MODEL_TYPE = "dreamllm"
PARTS = ("dream_embedding", "clip_vision_embedding", "stable_diffusion_head")
SPECIAL_TOKENS = {"soi": "<im_start>", "image": "<im_patch>", "eoi": "<im_end>", "dream": "<dream_start>"}
HEAD_DIM = 64  # of every CLIP
MAX_IMAGES = 33  # in a story; with 257 tokens each the context is full long before
_CONSTANT = re.compile(r".*\.(position_ids|rotary_emb\.\w+)$")
# What no such model has: zeros stand for it.
_ADDED = re.compile(r"soi_token|layers\.\d+\.llama_cross_attn\..*|head\.bias|head_new\..*")


def is_dreamllm_layout(folder: Path) -> bool:
    """Whether a folder holds a DreamLLM."""
    path = Path(folder) / "config.json"
    return is_folder(folder) and path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def read_dreamllm(folder: Path) -> tuple[Config, dict[str, dict[str, torch.Tensor]], DreamConfig, dict]:
    """Config, tensors by block and native name, and config and tensors of the dream queries.

    Raises:
        CheckpointError: That lists every tensor that is missing, unexpected or of the wrong shape.
    """
    settings, label = read_json(folder / "config.json"), f"The checkpoint {str(folder)!r}"
    parts = _read_parts(folder, label)
    llm, dream, clip, head = (parts[name] for name in ("llm", *PARTS))
    for part, name in ((dream, "dream_queries"), (clip, "projector.projector.weight"), (head, _UNET_PROJECTOR)):
        if name not in part:
            raise CheckpointError(f"{label} lacks {name!r}; it must hold all of {', '.join(PARTS)}.")
    config = _config(settings, clip, head, folder, label)
    blocks = {
        "encoder": _encoder(clip, config),
        "llm": {**_zeros(config, "llm", _ADDED), **llm},
        "synchronizer": _zeros(config, "synchronizer", re.compile(".*")),
        "unet": _under(head, "unet."),
        "vae": _under(head, "vae."),
    }
    for name, module in build(config).items():
        actual = {key: tuple(t.shape) for key, t in blocks[name].items()}
        check_shapes(param_shapes(module), actual, f"{label} ({name})")
    queries, projector = dream["dream_queries"], head[_UNET_PROJECTOR]
    dream_config = DreamConfig(queries.shape[1], queries.shape[2], projector.shape[0], has_own_negative=True)
    return config, blocks, dream_config, {"dream_queries": queries, "projector.weight": projector}


_UNET_PROJECTOR = "projector.projector.weight"


def _read_parts(folder: Path, label: str) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of the LLM, under native names, and of the three parts, under their own."""
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("llm", *PARTS)}
    files = [
        path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin") and path.stem not in PARTS
    ]
    indexed = {
        name for index in folder.glob("*.index.json") for name in read_json(index).get("weight_map", {}).values()
    }
    missing = sorted(name for name in indexed if not (folder / name).is_file())
    if missing:
        raise CheckpointError(f"{label} lacks {', '.join(missing)}.")
    for path in [path for path in files if path.name in indexed] or files:
        for name, tensor in read_tensors(path).items():
            bare = name.removeprefix("model.")
            part = next((part for part in PARTS if bare.startswith(f"{part}.")), "llm")
            own = bare.removeprefix(f"{part}.").replace("lm_head.", "head.") if part == "llm" else bare[len(part) + 1 :]
            parts[part][own] = tensor
    for part in PARTS:
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{part}{suffix}").is_file():
                parts[part] |= read_tensors(folder / f"{part}{suffix}")
                break
    return {
        part: {name: tensor for name, tensor in tensors.items() if not _CONSTANT.match(name)}
        for part, tensors in parts.items()
    }


def _config(settings: dict, clip: dict, head: dict, folder: Path, label: str) -> Config:
    try:
        unet, vae, scheduler = (
            read_json(path) if path.is_file() else RELEASED_13B[name]
            for name, path in (
                ("unet", folder / "sd" / "unet" / "config.json"),
                ("vae", folder / "sd" / "vae" / "config.json"),
                ("scheduler", folder / "sd" / "scheduler" / "scheduler_config.json"),
            )
        )
        width, layers = settings["hidden_size"], settings["num_hidden_layers"]
        encoder = _encoder_config(settings, clip, width)
        empty = {"n_heads": 1, "n_points": 1, "d_model": MAP_CHANNELS, "d_value": MAP_CHANNELS}
        maps = (encoder.grid_size // 2,)
        channels = skip_channels(unet["block_out_channels"], unet["layers_per_block"])
        llm = LlamaMMFSConfig(
            num_img_token=encoder.grid_size**2,
            mmfs=MMFSConfig(maps, **empty, max_num_image_per_seq=MAX_IMAGES, cross_attention_frequency=layers),
            vocab_size=settings["vocab_size"],
            num_added_tokens=max(1, settings["vocab_size"] - min(_special_ids(settings).values())),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=settings["num_attention_heads"],
            num_key_value_heads=settings.get("num_key_value_heads") or settings["num_attention_heads"],
            intermediate_size=settings["intermediate_size"],
            rms_norm_eps=settings["rms_norm_eps"],
            rope_theta=settings.get("rope_theta") or 10000.0,
            max_position_embeddings=settings["max_position_embeddings"],
            special_tokens=SpecialTokens(
                bos=settings.get("bos_token_id", 1),
                eos=settings.get("eos_token_id", 2),
                pad=settings.get("pad_token_id") or 0,
                **_special_ids(settings),
            ),
        )
        synchronizer = SynchronizerConfig(
            llm_hidden_size=width,
            perceiver=PerceiverConfig(1, unet["cross_attention_dim"], unet["cross_attention_dim"], 0, 1, 1, 1),
            mmfs=MMFSConfig(maps, **empty, max_num_image_per_seq=2),
            block_channels=channels,
            block_base_shapes=(1,) * len(channels),
            image_size=unet["sample_size"] * 2 ** (len(_vae_channels(vae)) - 1),
            pos_embed_grid=1,
            num_context_images=0,
        )
    except KeyError as error:
        raise CheckpointError(f"{label} lacks the setting or tensor {error}.") from None
    return Config(encoder, llm, synchronizer, unet, vae, scheduler)


def _vae_channels(vae: dict) -> list[int]:
    return vae.get("encoder_block_out_channels") or vae["block_out_channels"]


def _special_ids(settings: dict) -> dict[str, int]:
    ids = settings["special_tokens2ids_dict"]["additional_special_tokens"]
    return {field: ids[name] for field, name in SPECIAL_TOKENS.items()}


def _encoder_config(settings: dict, clip: dict, llm_hidden_size: int) -> VisualTokenizerConfig:
    """From the shapes of CLIP's tensors; its config need not be there."""
    vision = _under(clip, "clip_vision_model.vision_model.")
    patches = vision["embeddings.patch_embedding.weight"]
    grid = math.isqrt(len(vision["embeddings.position_embedding.weight"]) - 1)
    width, patch_size = patches.shape[0], patches.shape[-1]
    numbers = [int(match[1]) for name in vision if (match := re.match(r"encoder\.layers\.(\d+)\.", name))]
    plugin = settings.get("plugins_init_kwargs", {}).get("clip_vision_embedding", {})
    select_layer = plugin.get("select_layer", -2) if isinstance(plugin, dict) else -2
    return VisualTokenizerConfig(
        PerceiverConfig(grid**2, width, width, 0, 1, 1, 1),
        llm_hidden_size=llm_hidden_size,
        image_size=grid * patch_size,
        patch_size=patch_size,
        hidden_size=width,
        num_hidden_layers=max(numbers) + 1,
        num_attention_heads=max(1, width // HEAD_DIM),
        intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
        projector="linear",
        select_layer=select_layer,
    )


def _encoder(clip: dict, config: Config) -> dict[str, torch.Tensor]:
    """CLIP up to the layer that is projected, and the projector."""
    c = config.encoder
    count, tensors = c.num_hidden_layers + 1 + c.select_layer, {}
    for name, tensor in _under(clip, "clip_vision_model.vision_model.").items():
        match = re.match(r"encoder\.layers\.(\d+)\.", name)
        if name.startswith("post_layernorm.") or (match and int(match[1]) >= count):
            continue
        tensors["vision_model." + name.removeprefix("encoder.")] = tensor
    constants = {"clip_mean": CLIP_MEAN, "clip_std": CLIP_STD}
    tensors |= {name: torch.tensor(values).view(1, 3, 1, 1) for name, values in constants.items()}
    return {**tensors, **{f"proj.{part}": clip[f"projector.projector.{part}"] for part in ("weight", "bias")}}


def _zeros(config: Config, block: str, pattern: re.Pattern) -> dict[str, torch.Tensor]:
    shapes = param_shapes(build(config, (block,))[block])
    return {name: torch.zeros(shape) for name, shape in shapes.items() if pattern.fullmatch(name)}


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
