"""Checkpoints: the reference's layout and this project's own, read, checked and converted.

Own layout: config.json, tokenizer.json, and encoder, llm, synchronizer, unet and vae .safetensors.
Reference layout: .bin or .safetensors shards with the reference's names, beside them config.json (the model's own
settings), llm/config.json, clip/config.json and sd/{unet,vae,scheduler}; what is missing is as in the released model.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import Config, from_reference, to_reference
from ..errors import CheckpointError
from ..files import new_folder, readable, write_bytes, write_json
from ..models.mmfs import fold

if TYPE_CHECKING:
    from ..generation.config import GenerationConfig
    from ..tokenizer import Tokenizer

BLOCKS = ("encoder", "llm", "synchronizer", "unet", "vae")
METADATA = "mm-interleaved"  # of the safetensors files: the block's name, the config, the LLM's tokenizer
WORDS = "words.txt"  # beside a checkpoint that knows a small world: the words it was taught
STARTER = Path(__file__).parents[1] / "starter"
MAX_LISTED = 20  # entries that an error names

# Reference name -> (block, own name). A {} stands for what both have in common there; the first match counts.
_VIT = "visual_tokenizer.encoder.vision_model."
_QFORMER = "perceiver_resampler.blip2qformer."


def _resampler(prefix: str, block: str):
    layer = prefix + _QFORMER + "encoder.layer.{}."
    for theirs, ours in (("attention", "attention"), ("crossattention", "cross_attention")):
        yield layer + theirs + ".attention.query.{}", block, "resampler.layers.{}." + ours + ".q.{}"
        yield layer + theirs + ".attention.key.{}", block, "resampler.layers.{}." + ours + ".k.{}"
        yield layer + theirs + ".attention.value.{}", block, "resampler.layers.{}." + ours + ".v.{}"
        yield layer + theirs + ".attention.q_norm.{}", block, "resampler.layers.{}." + ours + ".q_norm.{}"
        yield layer + theirs + ".attention.k_norm.{}", block, "resampler.layers.{}." + ours + ".k_norm.{}"
        yield layer + theirs + ".output.dense.{}", block, "resampler.layers.{}." + ours + ".out.{}"
        yield layer + theirs + ".output.LayerNorm.{}", block, "resampler.layers.{}." + ours + ".norm.{}"
    yield layer + "intermediate_query.dense.{}", block, "resampler.layers.{}.ffn.fc1.{}"
    yield layer + "output_query.dense.{}", block, "resampler.layers.{}.ffn.fc2.{}"
    yield layer + "output_query.LayerNorm.{}", block, "resampler.layers.{}.ffn.norm.{}"
    yield prefix + _QFORMER + "layernorm.{}", block, "resampler.norm.{}"
    yield prefix + "perceiver_resampler.queries", block, "resampler.queries"


def _mmfs(theirs: str, block: str, ours: str):
    yield theirs + "ignore_token", block, ours + "sink"
    yield theirs + "sampling_offsets.{}", block, ours + "offsets.{}"
    yield theirs + "dynamic_offset_mask.{}", block, ours + "query_proj.{}"
    yield theirs + "attention_weights.{}", block, ours + "logits.{}"
    yield theirs + "value_proj.{}", block, ours + "value_proj.{}"
    yield theirs + "output_proj.{}", block, ours + "out_proj.{}"
    yield theirs + "query_relpos.{}", block, ours + "relative_position.{}"


def _adapter_attention(theirs: str, ours: str):
    yield theirs + "sampling_offsets.{}", "encoder", ours + "offsets.{}"
    yield theirs + "attention_weights.{}", "encoder", ours + "weights.{}"
    yield theirs + "value_proj.{}", "encoder", ours + "value_proj.{}"
    yield theirs + "output_proj.{}", "encoder", ours + "out_proj.{}"


def _names():
    yield "visual_tokenizer.clip_mean", "encoder", "mean"
    yield "visual_tokenizer.clip_std", "encoder", "std"
    yield "visual_tokenizer.pos_embed", "encoder", "position_map"
    yield "visual_tokenizer.pos_proj.{}", "encoder", "token_proj.{}"
    yield "visual_tokenizer.pos_ln.{}", "encoder", "token_norm.{}"
    yield "visual_tokenizer.post_ln.{}", "encoder", "post_norm.{}"
    yield "visual_tokenizer.proj.{}", "encoder", "out_proj.{}"
    yield from _resampler("visual_tokenizer.", "encoder")
    yield _VIT + "embeddings.class_embedding", "encoder", "class_embedding"
    yield _VIT + "embeddings.patch_embedding.{}", "encoder", "patch_embedding.{}"
    yield _VIT + "embeddings.position_embedding.{}", "encoder", "position_embedding.{}"
    yield _VIT + "pre_layrnorm.{}", "encoder", "pre_norm.{}"
    for q in "qkv":
        yield _VIT + "encoder.layers.{}.self_attn." + q + "_proj.{}", "encoder", "layers.{}.attention." + q + ".{}"
    yield _VIT + "encoder.layers.{}.self_attn.out_proj.{}", "encoder", "layers.{}.attention.out.{}"
    yield _VIT + "encoder.layers.{}.layer_norm{}", "encoder", "layers.{}.norm{}"
    yield _VIT + "encoder.layers.{}.mlp.{}", "encoder", "layers.{}.{}"
    yield _VIT + "adapter_level_embed", "encoder", "level_embedding"
    yield _VIT + "adapter_spm.{}", "encoder", "spatial_prior.{}"
    yield _VIT + "adapter_up.{}", "encoder", "up.{}"
    yield from _adapter_attention(_VIT + "adapter_interactions.{}.attn.", "interactions.{}.attn.")
    yield _VIT + "adapter_interactions.{}.dwconv.dwconv.{}", "encoder", "interactions.{}.dwconv.{}"
    yield _VIT + "adapter_interactions.{}", "encoder", "interactions.{}"

    yield "soi_token", "llm", "soi"
    yield "text_decoder.head.{}", "llm", "head.{}"
    yield "text_decoder.head_new.{}", "llm", "head_new.{}"
    cross = "mm_decoder.layers.{}.llama_cross_attn."
    yield from _mmfs(cross + "attn.", "llm", "layers.{}.synchronizer.mmfs.")
    yield cross + "norm1.{}", "llm", "layers.{}.synchronizer.norm.{}"
    yield cross + "norm2.{}", "llm", "layers.{}.synchronizer.feature_norm.{}"
    yield cross + "gate", "llm", "layers.{}.synchronizer.gate"
    yield "mm_decoder.{}", "llm", "{}"

    yield "context_feat_proj.{}", "synchronizer", "context_proj.{}"
    yield "image_decoder.neg_prompt_embeds", "synchronizer", "negative"
    yield from _resampler("image_decoder.", "synchronizer")
    module = "image_decoder.decoder.mmfs_module."
    for theirs, ours in (("mmfs_down_blocks.{}.", "skip_sites.{}."), ("mmfs_mid_block.", "mid_site.")):
        theirs = module + theirs
        yield theirs + "pos_embed", "synchronizer", ours + "positions"
        yield theirs + "query_norm.{}", "synchronizer", ours + "query_norm.{}"
        yield theirs + "feat_norm.{}", "synchronizer", ours + "feature_norm.{}"
        yield theirs + "conv.{}", "synchronizer", ours + "conv.{}"
        yield from _mmfs(theirs + "mmfs.", "synchronizer", ours + "mmfs.")
    yield "image_decoder.decoder.unet.{}", "unet", "{}"
    yield "image_decoder.decoder.vae.{}", "vae", "{}"


_NAMES = tuple(_names())
# Buffers of the reference that hold nothing: position numbers and rotary frequencies.
_CONSTANT = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)$")


def _pattern(template: str) -> re.Pattern:
    return re.compile("(.+?)".join(map(re.escape, template.split("{}"))) + "$")


_FROM_REFERENCE = tuple((_pattern(theirs), block, ours) for theirs, block, ours in _NAMES)
_TO_REFERENCE = tuple((_pattern(ours), block, theirs) for theirs, block, ours in _NAMES)


def own_name(name: str) -> tuple[str, str]:
    """(block, own name) of a reference name; raises KeyError for a name of no block."""
    for pattern, block, ours in _FROM_REFERENCE:
        if match := pattern.match(name):
            return block, ours.format(*match.groups())
    raise KeyError(name)


def reference_name(block: str, name: str) -> str:
    """The inverse of `own_name`."""
    for pattern, of, theirs in _TO_REFERENCE:
        if of == block and (match := pattern.match(name)):
            return theirs.format(*match.groups())
    raise KeyError(name)


# ---- building and checking ----


def build(config: Config, blocks=BLOCKS, **host) -> dict[str, torch.nn.Module]:
    """The blocks of a config, without weights: on the meta device.

    Args:
        host: `operations` and `attention` of whoever runs them, for encoder, llm and synchronizer.
    """
    from ..models.llama_mmfs import StoryLLM
    from ..models.unet_synchronizer import Decoder
    from ..models.visual_tokenizer import Encoder

    makers = {
        "encoder": lambda: Encoder(config.encoder, **host),
        "llm": lambda: StoryLLM(config.llm, **host),
        "synchronizer": lambda: Decoder(config.decoder, **host),
        "unet": lambda: diffusers_model(config.unet),
        "vae": lambda: diffusers_model(config.vae),
    }
    try:
        with torch.device("meta"):
            return {name: makers[name]().eval().requires_grad_(False) for name in blocks}
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"The checkpoint's config describes no model that can be built: {error}.") from None


def diffusers_model(settings: dict):
    import diffusers

    name = settings.get("_class_name", "")
    if name not in ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"):
        raise CheckpointError(
            f"The decoder's class {name!r} must be UNet2DConditionModel, AutoencoderKL or AutoencoderTiny."
        )
    return getattr(diffusers, name).from_config(dict(settings))


def check(expected: dict[str, tuple], found: dict[str, tuple], what: str) -> None:
    """Compares names and shapes; raises one CheckpointError that lists every difference by name."""
    problems = [
        f"wrong shape: {name} is {tuple(found[name])}, must be {tuple(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    unexpected = [f"unexpected: {name}" for name in found if name not in expected]
    missing = [f"missing: {name}" for name in expected if name not in found]
    count = len(problems) + len(unexpected) + len(missing)
    if not count:
        return
    half = MAX_LISTED // 2  # of either kind, so that neither hides the other
    problems += unexpected[: max(half, MAX_LISTED - len(problems) - len(missing))]
    problems = (problems + missing)[:MAX_LISTED]
    more = [f"... and {count - len(problems)} more"] if count > len(problems) else []
    raise CheckpointError(f"{what} does not fit its config in {count} entries.\n  " + "\n  ".join(problems + more))


def shapes(module: torch.nn.Module) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


# ---- reading files ----


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{str(path)!r} must hold an object, not a {type(data).__name__}.")
    return data


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one .safetensors or .bin file, memory-mapped where its format allows; raises CheckpointError.

    A .bin is a pickle: it is read with `weights_only=True`, which refuses one that would run code. One that holds its
    tensors under a single key ("module", "state_dict", "model") is taken as that.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _refuse_lfs_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = _load_pickle(path)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{str(path)!r} is refused: it holds more than tensors, and loading it could run code."
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise CheckpointError(f"{str(path)!r} cannot be read, it may be cut short: {reason}.") from None
    if isinstance(tensors, dict):
        inner = [tensors[key] for key in ("module", "state_dict", "model") if isinstance(tensors.get(key), dict)]
        tensors = inner[0] if len(inner) == 1 else tensors
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{str(path)!r} does not hold a dict of tensors.")
    return tensors


def _load_pickle(path: Path):
    """What a .bin holds. Files older than PyTorch 1.6 are no ZIP archives and cannot be mapped into memory."""
    import zipfile

    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _refuse_lfs_pointer(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs.github.com/spec/")
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from None
    if is_pointer:
        raise CheckpointError(
            f"{str(path)!r} is a Git LFS pointer, not the weights; run `git lfs pull` where it came from."
        )


def model_folder(name: str | Path) -> Path | None:
    """The folder of a model by any of its names: "starter", a folder, or None for "untrained", which has no files."""
    if str(name) == "untrained" and not _is_folder(name):
        return None
    return STARTER if str(name) == "starter" and not _is_folder(name) else Path(name)


def _is_folder(path) -> bool:
    try:
        return os.path.isdir(path)
    except ValueError:  # a NUL in the name
        return False


def is_reference(folder: Path) -> bool:
    """Whether a folder is in the reference layout; raises CheckpointError if it is no checkpoint at all."""
    if not _is_folder(folder):
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
    """The files of the weights: those that an index names, else all that look like them.

    Raises CheckpointError if the index names some that are not there.
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
    """Whether there is a single file of weights of which an index, left from before, does not speak."""
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
        own_name(name)
    except KeyError:
        return False
    return True


def read_reference(folder: Path) -> tuple[Config, dict[str, dict[str, torch.Tensor]]]:
    """Config and tensors, by block and own name, of a reference checkpoint; one CheckpointError names all faults."""
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
    config = from_reference({k: read_json(folder / f) for k, f in files.items() if (folder / f).is_file()})
    positions = tensors.get(_VIT + "embeddings.position_embedding.weight")
    if positions is not None:  # the reference resizes them at load, so CLIP's config need not say the true size
        side = math.isqrt(len(positions) - 1) * config.encoder.patch_size
        config = replace(config, encoder=replace(config.encoder, image_size=side))

    check(
        reference_shapes(config),
        {name: tuple(t.shape) for name, t in tensors.items()},
        f"The checkpoint {str(folder)!r}",
    )
    blocks: dict[str, dict] = {name: {} for name in BLOCKS}
    for name, tensor in tensors.items():
        block, own = own_name(name)
        blocks[block][own] = tensor
    return config, blocks


def reference_shapes(config: Config) -> dict[str, tuple]:
    """Every name and shape that a reference checkpoint of this config holds, constants aside."""
    return {
        reference_name(block, name): shape
        for block, module in build(config).items()
        for name, shape in shapes(module).items()
    }


def read_config(folder: str | Path) -> Config:
    """The Config of a checkpoint folder of either layout."""
    folder = Path(folder)
    return read_reference(folder)[0] if is_reference(folder) else Config.from_dict(read_json(folder / "config.json"))


def read_blocks(folder: str | Path, blocks=BLOCKS) -> tuple[Config, dict[str, dict[str, torch.Tensor]]]:
    """Config and checked tensors, by block and own name, of a checkpoint of either layout."""
    folder = Path(folder)
    if is_reference(folder):
        config, tensors = read_reference(folder)
        return config, {name: tensors[name] for name in blocks}
    config = Config.from_dict(read_json(folder / "config.json"))
    missing = [f"{name}.safetensors" for name in blocks if not (folder / f"{name}.safetensors").is_file()]
    if missing:
        raise CheckpointError(f"The checkpoint {str(folder)!r} lacks {', '.join(missing)}.")
    tensors = {name: read_tensors(folder / f"{name}.safetensors") for name in blocks}
    for name, module in build(config, blocks).items():
        found = {key: tuple(t.shape) for key, t in tensors[name].items()}
        check(shapes(module), found, repr(str(folder / f"{name}.safetensors")))
    return config, tensors


def about_block(metadata: dict | None, block: str, what: str) -> tuple[Config, str | None]:
    """Config and tokenizer (JSON) that a block's own file carries, so that it can be loaded alone.

    Args:
        metadata: the safetensors file's.
        block: the name of the block that is wanted.
        what: how to call the file in an error.
    """
    try:
        about = json.loads((metadata or {})[METADATA])
        found, config, tokenizer = about["block"], about["config"], about.get("tokenizer")
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{what} is no block of MM-Interleaved; it must be a file written by `convert` or the training's `export`."
        ) from None
    if found != block:
        raise CheckpointError(f"{what} holds the block {found!r}, not {block!r}.")
    return Config.from_dict(config), tokenizer


def load_blocks(folder, dtype=torch.float32, device="cpu", blocks=BLOCKS) -> tuple[Config, dict[str, torch.nn.Module]]:
    """The blocks of a checkpoint of either layout, in `dtype`; the VAE always in float32, as the reference runs it.

    Their synchronizers are in their form for running (`synchronizer.fold`): they have other parameters than the files.
    """
    config, tensors = read_blocks(folder, blocks)
    modules = build(config, blocks)
    for name, module in modules.items():
        to = torch.float32 if name == "vae" else dtype
        module.load_state_dict({key: t.to(device, to) for key, t in tensors.pop(name).items()}, assign=True)
        fold(module)
    return config, modules


def read_words(folder: str | Path) -> frozenset[str] | None:
    """The words that a model of a small world was taught, in lower case; None for a model of open vocabulary."""
    path = Path(folder) / WORDS
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else None


def read_tokenizer(folder: str | Path, config: Config):
    """The Tokenizer beside a checkpoint, or None: tokenizer.json, or llm/ in any form that transformers reads."""
    from ..tokenizer import Tokenizer

    folder, limit = Path(folder), config.llm.vocab_size - config.llm.new_tokens
    for path in (folder / "tokenizer.json", folder / "llm" / "tokenizer.json"):
        if path.is_file():
            return Tokenizer.load(path, config.llm.tokens, limit)
    for place in (folder / "llm", folder):
        if (place / "tokenizer.model").is_file():
            return Tokenizer(_convert_sentencepiece(place), config.llm.tokens, limit)
    return None


def _convert_sentencepiece(folder: Path):
    """The `tokenizers.Tokenizer` of a folder's tokenizer.model, Llama's."""
    from transformers import LlamaTokenizerFast

    try:
        fast = LlamaTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # sentencepiece, protobuf and transformers raise what they like
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{str(folder / 'tokenizer.model')!r} cannot be converted; install sentencepiece and protobuf, or put the "
            f"model's tokenizer.json beside it: {reason}."
        ) from None
    return fast.backend_tokenizer


@dataclass(frozen=True)
class Saved:
    """Everything that a checkpoint holds; `blocks` has the tensors by block and own name."""

    layout: str
    config: Config
    blocks: dict[str, dict[str, torch.Tensor]]
    tokenizer: Tokenizer | None
    generation: GenerationConfig
    words: frozenset[str] | None


def read(source: str | Path) -> Saved:
    """A checkpoint by any name that `MMInterleaved.load` takes."""
    from ..generation.config import GenerationConfig, read_generation_config

    folder = model_folder(source)
    if folder is None:
        from ..pipeline import untrained_blocks

        config, modules, tokenizer = untrained_blocks()
        blocks = {name: module.state_dict() for name, module in modules.items()}
        return Saved("none", config, blocks, tokenizer, GenerationConfig(), None)
    config, blocks = read_blocks(folder)
    layout = "reference" if is_reference(folder) else "own"
    tokenizer = read_tokenizer(folder, config)
    return Saved(layout, config, blocks, tokenizer, read_generation_config(folder), read_words(folder))


# ---- writing ----


def save(
    folder: str | Path,
    config: Config,
    blocks: dict[str, dict[str, torch.Tensor]],
    tokenizer=None,
    dtype=None,
    generation=None,
    words: frozenset[str] | None = None,
) -> None:
    """Writes a checkpoint in this project's layout; a folder that is there already is refused, a failed one removed."""
    with new_folder(folder) as aside:
        write_json(aside / "config.json", config.to_dict())
        _write_beside(aside, generation, words)
        if tokenizer is not None:
            tokenizer.save(aside / "tokenizer.json")
        for name, tensors in blocks.items():
            about = {"block": name, "config": config.to_dict()}
            if name == "llm" and tokenizer is not None:
                about["tokenizer"] = tokenizer.to_text()
            _write_tensors(aside / f"{name}.safetensors", tensors, dtype, {METADATA: json.dumps(about)})


def save_reference(
    folder: str | Path,
    config: Config,
    blocks: dict[str, dict],
    tokenizer=None,
    dtype=None,
    generation=None,
    words: frozenset[str] | None = None,
) -> None:
    """Writes a checkpoint in the reference's layout: one model.safetensors, and the component configs beside it."""
    files = to_reference(config)
    parts = dict(zip(("model", "llm", "clip", "unet", "vae", "scheduler"), files.values()))
    if replace(from_reference(parts), prompts=config.prompts) != config:
        raise CheckpointError(
            "This model has settings that the reference's layout cannot say; keep it in its own layout (--to own)."
        )
    named = {reference_name(block, key): t for block, tensors in blocks.items() for key, t in tensors.items()}
    with new_folder(folder) as aside:
        for file, settings in files.items():
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            write_json(aside / file, settings)
        _write_beside(aside, generation, words)
        if tokenizer is not None:
            tokenizer.save(aside / "llm" / "tokenizer.json")
        _write_tensors(aside / "model.safetensors", named, dtype)


def _write_beside(folder: Path, generation, words: frozenset[str] | None) -> None:
    """What a model says of itself beside its weights, if it says anything."""
    from ..generation.config import FILE, GenerationConfig

    if generation not in (None, GenerationConfig()):
        write_json(folder / FILE, generation.to_dict())
    if words is not None:
        write_bytes(folder / WORDS, "".join(f"{word}\n" for word in sorted(words)).encode("utf-8"))


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    seen, whole = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.to(dtype or tensor.dtype).contiguous()
        if tensor.untyped_storage().data_ptr() in seen:  # safetensors refuses what shares memory
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        whole[key] = tensor
    save_file(whole, path, {"format": "pt", **(metadata or {})})
    readable(path)
