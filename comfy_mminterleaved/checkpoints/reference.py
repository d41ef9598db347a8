"""The reference's layout: names, component configurations, and folders as trainers leave them.

Shards (.bin or .safetensors) with the reference's names; beside them config.json (the model's own settings),
llm/config.json, clip/config.json and sd/{unet,vae,scheduler}, or the reference's `assets/`. What is missing is as in
the released model.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..config import (
    BLOCKS,
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
from ..files import atomic_dir, resumable_dir, write_json
from ..models.build import build, check_shapes, param_shapes
from ..models.quantization import stored_dtype
from ..presets import RELEASED_13B
from .tensors import (
    MAX_LISTED,
    Progress,
    is_folder,
    plain_items,
    read_json,
    read_tensors,
    write_beside,
    write_tensors,
)

# Reference prefix -> (block, native prefix); the first match counts.
PREFIXES = (
    ("visual_tokenizer.encoder.vision_model.encoder.layers.", "encoder", "vision_model.layers."),
    ("visual_tokenizer.encoder.vision_model.", "encoder", "vision_model."),
    ("visual_tokenizer.", "encoder", ""),
    ("soi_token", "llm", "soi_token"),
    ("text_decoder.", "llm", ""),
    ("mm_decoder.", "llm", ""),
    ("context_feat_proj.", "synchronizer", "conditioner.context_feat_proj."),
    ("image_decoder.neg_prompt_embeds", "synchronizer", "conditioner.neg_prompt_embeds"),
    ("image_decoder.perceiver_resampler.", "synchronizer", "conditioner.perceiver_resampler."),
    ("image_decoder.decoder.mmfs_module.", "synchronizer", "mmfs_module."),
    ("image_decoder.decoder.unet.", "unet", ""),
    ("image_decoder.decoder.vae.", "vae", ""),
)
# Inside a block: the Q-Former's names, and the adapter's doubled one.
INNER = (
    ("perceiver_resampler.blip2qformer.encoder.layer.", "perceiver_resampler.layers."),
    ("perceiver_resampler.blip2qformer.layernorm.", "perceiver_resampler.layernorm."),
    (".intermediate_query.dense.", ".mlp.fc1."),
    (".output_query.dense.", ".mlp.fc2."),
    (".output_query.LayerNorm.", ".mlp.norm."),
    (".dwconv.dwconv.", ".dwconv."),
)
_HEADS = ("head.", "head_new.")  # of the LLM; the rest of it is the reference's `mm_decoder`
# Buffers of the reference that hold nothing: position numbers and rotary frequencies.
_CONSTANT = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)$")


def native_name(name: str) -> tuple[str, str]:
    """(block, native name) of a reference name; raises KeyError for a name of no block."""
    for prefix, block, native in PREFIXES:
        if name.startswith(prefix):
            name = native + name[len(prefix) :]
            if block in ("encoder", "synchronizer"):
                for reference, inner in INNER:
                    name = name.replace(reference, inner)
            return block, name
    raise KeyError(name)


def reference_name(block: str, name: str) -> str:
    """The inverse of `native_name`."""
    if block in ("encoder", "synchronizer"):
        for reference, native in INNER:
            is_dwconv = native == ".dwconv."
            if (native in name) and ("perceiver_resampler" in name or is_dwconv):
                name = name.replace(native, reference)
    for prefix, of, native in PREFIXES:
        is_head = prefix == "text_decoder."
        if of == block and name.startswith(native) and (block != "llm" or native or is_head == name.startswith(_HEADS)):
            return prefix + name[len(native) :]
    raise KeyError(name)


# ---- configurations ----


def from_reference(parts: dict[str, dict]) -> Config:
    """The Config of a reference checkpoint, from its component configurations.

    Args:
        parts: Any of model, llm, clip, unet, vae, scheduler; missing settings are those of the released model.
    """
    model, llm, clip, unet, vae, scheduler = ({**RELEASED_13B[name], **parts.get(name, {})} for name in RELEASED_13B)
    d_value, hidden_size = clip["hidden_size"], llm["hidden_size"]

    shrink = 512 // model["image_size"]  # the reference's `downsample_factor`
    shapes = (64, 32, 16, 8)
    channels = skip_channels(unet["block_out_channels"], unet["layers_per_block"])
    # The reference counts every three skips as one resolution; with two layers per block, as in SD, they are.
    bases = [shape // shrink for shape in shapes]
    base_shapes = (*(bases[min(i // 3, len(bases) - 1)] for i in range(len(channels) - 1)), bases[-1])
    return Config(
        encoder=VisualTokenizerConfig(
            perceiver=_perceiver(model["visual_perceiver"]),
            llm_hidden_size=hidden_size,
            image_size=clip["image_size"],
            patch_size=clip["patch_size"],
            hidden_size=d_value,
            num_hidden_layers=clip["num_hidden_layers"],
            num_attention_heads=clip["num_attention_heads"],
            intermediate_size=clip["intermediate_size"],
            hidden_act=clip["hidden_act"],
            layer_norm_eps=clip["layer_norm_eps"],
        ),
        llm=LlamaMMFSConfig(
            num_img_token=model["num_img_token"],
            mmfs=MMFSConfig(
                spatial_shapes=tuple(model["spatial_shapes"]),
                d_model=int(hidden_size * (model["image_embed_dim"] / hidden_size)),
                d_value=d_value,
                cross_attention_frequency=model["cross_attention_frequency"],
            ),
            vocab_size=model["txt_vocab_size"],
            num_added_tokens=model["txt_vocab_size"] - llm["vocab_size"],
            hidden_size=hidden_size,
            num_hidden_layers=llm["num_hidden_layers"],
            num_attention_heads=llm["num_attention_heads"],
            num_key_value_heads=llm.get("num_key_value_heads") or llm["num_attention_heads"],
            intermediate_size=llm["intermediate_size"],
            rms_norm_eps=llm["rms_norm_eps"],
            rope_theta=llm.get("rope_theta") or 10000.0,
            max_position_embeddings=min(model["seq_len"], llm["max_position_embeddings"]),
            special_tokens=SpecialTokens(**model["special_tokens"]),
        ),
        synchronizer=SynchronizerConfig(
            llm_hidden_size=hidden_size,
            perceiver=_perceiver(model["image_perceiver"]),
            mmfs=MMFSConfig(spatial_shapes=shapes, d_value=d_value, max_num_image_per_seq=10),
            block_channels=channels,
            block_base_shapes=base_shapes,
            image_size=model["image_size"],
            pos_embed_grid=64 // shrink,
        ),
        unet=unet,
        vae=vae,
        scheduler=scheduler,
    )


def _perceiver(data: dict) -> PerceiverConfig:
    names = {f.name for f in dataclasses.fields(PerceiverConfig)}
    return PerceiverConfig(**{name: value for name, value in data.items() if name in names})


def to_reference(config: Config) -> dict[str, dict]:
    """The inverse of `from_reference`: the component configurations by file name."""
    e, m, s = config.encoder, config.llm, config.synchronizer

    def perceiver(c: PerceiverConfig) -> dict:
        return {name: value for name, value in dataclasses.asdict(c).items() if name != "layer_norm_eps"}

    return {
        "config.json": {
            "txt_vocab_size": m.vocab_size,
            "num_img_token": m.num_img_token,
            "seq_len": m.max_position_embeddings,
            "image_embed_dim": m.mmfs.d_model,
            "cross_attention_frequency": m.mmfs.cross_attention_frequency,
            "spatial_shapes": list(m.mmfs.spatial_shapes),
            "special_tokens": m.special_tokens.to_dict(),
            "visual_perceiver": perceiver(e.perceiver),
            "image_perceiver": perceiver(s.perceiver),
            "image_size": s.image_size,
        },
        "llm/config.json": {
            "model_type": "llama",
            "vocab_size": m.vocab_size - m.num_added_tokens,
            "hidden_size": m.hidden_size,
            "num_hidden_layers": m.num_hidden_layers,
            "num_attention_heads": m.num_attention_heads,
            "num_key_value_heads": m.num_key_value_heads,
            "intermediate_size": m.intermediate_size,
            "rms_norm_eps": m.rms_norm_eps,
            "rope_theta": m.rope_theta,
            "max_position_embeddings": m.max_position_embeddings,
        },
        "clip/config.json": {
            "model_type": "clip_vision_model",
            "hidden_size": e.hidden_size,
            "num_hidden_layers": e.num_hidden_layers,
            "num_attention_heads": e.num_attention_heads,
            "intermediate_size": e.intermediate_size,
            "patch_size": e.patch_size,
            "image_size": e.image_size,
            "hidden_act": e.hidden_act,
            "layer_norm_eps": e.layer_norm_eps,
        },
        "sd/unet/config.json": config.unet,
        "sd/vae/config.json": config.vae,
        "sd/scheduler/scheduler_config.json": config.scheduler,
    }


# ---- reading ----


def is_reference_layout(folder: Path) -> bool:
    """Whether a folder is in the reference layout; raises CheckpointError if it is no checkpoint at all."""
    if not is_folder(folder):
        raise CheckpointError(f"There is no checkpoint folder {str(folder)!r}.")
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("format") == "mm-interleaved":
        return False
    if not _shards(folder):
        raise CheckpointError(
            f"{str(folder)!r} is no checkpoint: it has neither this project's config.json nor the reference's shards."
        )
    return True


# What trainers leave beside the weights.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state.*|random_states.*|adapter_model.*)\.\w+$")


def _shards(folder: Path) -> list[Path]:
    """The weight files: those that an index lists, else all that look like weights.

    Raises CheckpointError if files that the index lists are missing.
    """
    for pattern in ("*.safetensors.index.json", "*.index.json"):
        for index in sorted(folder.glob(pattern)):
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing and not _has_other_weights(folder, names):
                lacks = f"{len(missing)} shard{'s' * (len(missing) > 1)}: {', '.join(missing[:MAX_LISTED])}"
                raise CheckpointError(f"The checkpoint {str(folder)!r} lacks {lacks}.")
            if names and not missing:
                return [folder / name for name in names]
    named = sorted(folder.glob("model*.safetensors"))
    pickles = sorted(p for p in folder.glob("*.bin") if not _NOT_WEIGHTS.match(p.name))
    others = [p for p in folder.glob("*.safetensors") if not _NOT_WEIGHTS.match(p.name) and p.stem not in BLOCKS]
    return named or pickles or (others if len(others) == 1 else [])


def _has_other_weights(folder: Path, names: list[str]) -> bool:
    """Whether a folder with an outdated index has a single weight file that the index does not list."""
    return any((folder / name).is_file() and name not in names for name in ("model.safetensors", "pytorch_model.bin"))


# Prefixes that wrappers put before every name: DDP and DeepSpeed, torch.compile, Lightning, accelerate's FSDP.
_PREFIXES = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.")


def _without_prefix(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors under their own names, and the prefix that all of them had."""
    removed = ""
    while prefix := next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), ""):
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
        removed += prefix
    return tensors, removed


def _is_known(name: str) -> bool:
    try:
        native_name(name)
    except KeyError:
        return False
    return True


# Where the reference's `download_hf_models.py` and its README's `OUTPUT/` put the components, from the weights' folder.
_ASSETS = ("assets", "../assets", "../../assets")
_COMPONENTS = {
    "llm": "lmsys/vicuna-13b-v1.3/config.json",
    "clip": "openai/clip-vit-large-patch14/config.json",
    "unet": "stabilityai/stable-diffusion-2-1-base/unet/config.json",
    "vae": "stabilityai/stable-diffusion-2-1-base/vae/config.json",
    "scheduler": "stabilityai/stable-diffusion-2-1-base/scheduler/scheduler_config.json",
}


def asset_folders(folder: Path, name: str) -> list[Path]:
    """Folders of one of the reference's components that are there, like lmsys/vicuna-13b-v1.3."""
    return [path for assets in _ASSETS if is_folder(path := folder / assets / name)]


def _component_config(folder: Path, part: str, file: str) -> dict | None:
    """Settings of one component: in the checkpoint's own folder, else among the reference's assets."""
    if (folder / file).is_file():
        return read_json(folder / file)
    if part not in _COMPONENTS:
        return None
    name, _, rest = _COMPONENTS[part].partition("/")
    name, rest = f"{name}/{rest.partition('/')[0]}", rest.partition("/")[2]
    for path in asset_folders(folder, name):
        if (path / rest).is_file():
            settings = read_json(path / rest)
            return settings.get("vision_config", settings)  # CLIP's text half is not used
    return None


def read_reference(folder: Path) -> tuple[Config, dict[str, dict[str, torch.Tensor]]]:
    """Config and tensors, by block and native name, of a reference checkpoint; one CheckpointError names all faults."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in _shards(folder):
        tensors |= read_tensors(shard)
    bare, prefix = _without_prefix(tensors)
    if prefix and any(map(_is_known, bare)):
        tensors = bare
        logging.getLogger(__name__).warning(
            "The names in %s all begin with %r, which is left out.", str(folder), prefix
        )
    tensors = {name: tensor for name, tensor in tensors.items() if not _CONSTANT.match(name)}

    files = {
        "model": "config.json",
        "llm": "llm/config.json",
        "clip": "clip/config.json",
        "unet": "sd/unet/config.json",
        "vae": "sd/vae/config.json",
        "scheduler": "sd/scheduler/scheduler_config.json",
    }
    parts = {part: _component_config(folder, part, file) for part, file in files.items()}
    config = from_reference({part: settings for part, settings in parts.items() if settings is not None})
    positions = tensors.get("visual_tokenizer.encoder.vision_model.embeddings.position_embedding.weight")
    if positions is not None:  # the reference resizes them at load, so CLIP's config need not say the true size
        side = math.isqrt(len(positions) - 1) * config.encoder.patch_size
        config = replace(config, encoder=replace(config.encoder, image_size=side))

    check_shapes(
        reference_shapes(config),
        {name: tuple(t.shape) for name, t in tensors.items()},
        f"The checkpoint {str(folder)!r}",
    )
    blocks: dict[str, dict] = {name: {} for name in BLOCKS}
    for name, tensor in tensors.items():
        block, native = native_name(name)
        blocks[block][native] = tensor
    return config, blocks


def reference_shapes(config: Config) -> dict[str, tuple]:
    """Every name and shape that a reference checkpoint of this config holds, constants aside."""
    return {
        reference_name(block, name): shape
        for block, module in build(config).items()
        for name, shape in param_shapes(module).items()
    }


# ---- writing ----


def save_reference(
    folder: str | Path,
    config: Config,
    blocks: dict[str, dict],
    tokenizer=None,
    dtype=None,
    generation=None,
    words: frozenset[str] | None = None,
    max_shard_size: int | str = "5GB",
    fingerprint: str | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes a checkpoint in the reference's layout: model.safetensors, and the component configs beside it.

    A larger model is written in shards with an index, as transformers writes it.

    Args:
        fingerprint, on_progress: See `native.save`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    files = to_reference(config)
    parts = dict(zip(("model", "llm", "clip", "unet", "vae", "scheduler"), files.values()))
    if replace(from_reference(parts), prompts=config.prompts) != config:
        raise CheckpointError(
            "This model cannot be saved in the reference layout because that format has no field for some of its "
            "settings; use --to native."
        )
    named = {reference_name(block, key): t for block, tensors in blocks.items() for key, t in tensors.items()}
    sizes = {key: torch.empty(t.shape, dtype=stored_dtype(key, t, dtype), device="meta") for key, t in named.items()}
    shards = split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    size = sum(t.nbytes for t in sizes.values())
    written = Progress(size, on_progress)
    with resumable_dir(folder, fingerprint, size) if fingerprint else atomic_dir(folder) as temp_path:
        for file, settings in files.items():
            (temp_path / file).parent.mkdir(parents=True, exist_ok=True)
            write_json(temp_path / file, settings)
        write_beside(temp_path, generation, words)
        if tokenizer is not None:
            tokenizer.save(temp_path / "llm" / "tokenizer.json")
        for file, keys in shards.filename_to_tensors.items():
            tensors = {key: named[key] for key in keys}
            write_tensors(temp_path / file, plain_items(tensors, dtype), None, fingerprint is not None, written)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_json(temp_path / "model.safetensors.index.json", index)
