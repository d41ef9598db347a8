"""Checkpoints of either layout by any name: config, tensors, tokenizer, defaults, or ready modules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import BLOCKS, Config, LlamaMMFSConfig
from ..errors import CheckpointError
from ..models.build import build
from ..models.mmfs import fuse_mmfs
from ..models.quantization import is_quantized_weight, stored_dtype, stored_linears
from ..presets import STARTER_DIR
from .dreamllm import is_dreamllm_layout, read_dreamllm
from .native import read_native
from .reference import asset_folders, is_reference_layout, read_reference
from .tensors import VOCABULARY_FILE, is_folder, read_json

if TYPE_CHECKING:
    from ..generation.config import GenerationConfig
    from ..tokenizer import Tokenizer


def model_folder(name: str | Path) -> Path | None:
    """The folder of a model by any of its names: "starter", a folder, or None for "tiny-random", which has no files."""
    if str(name) in ("tiny-random", "untrained") and not is_folder(name):
        return None
    return STARTER_DIR if str(name) == "starter" and not is_folder(name) else Path(name)


def read_config(folder: str | Path) -> Config:
    """The Config of a checkpoint folder of either layout."""
    folder = Path(folder)
    _refuse_dreamllm(folder)
    return (
        read_reference(folder)[0]
        if is_reference_layout(folder)
        else Config.from_dict(read_json(folder / "config.json"))
    )


def read_state_dicts(folder: str | Path, blocks=BLOCKS) -> tuple[Config, dict[str, dict[str, torch.Tensor]]]:
    """Config and checked tensors, by block and native name, of a checkpoint of either layout."""
    folder = Path(folder)
    _refuse_dreamllm(folder)
    if is_reference_layout(folder):
        config, tensors = read_reference(folder)
        return config, {name: tensors[name] for name in blocks}
    return read_native(folder, blocks)


def _refuse_dreamllm(folder: Path) -> None:
    if is_dreamllm_layout(folder):
        raise CheckpointError(
            f"{str(folder)!r} is a DreamLLM; convert it first: mminterleaved convert {str(folder)!r} NEW_FOLDER."
        )


LARGE = 5 * 10**8  # parameters of an LLM from which on it is not held in float32


def num_llm_parameters(c: LlamaMMFSConfig) -> int:
    """Of attention, MLP, embeddings and head: all but MMFS."""
    attention = 2 * c.hidden_size**2 * (1 + c.num_key_value_heads / c.num_attention_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    return round(c.num_hidden_layers * (attention + mlp) + 2 * c.vocab_size * c.hidden_size)


def default_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What a model computes in: CUDA float16; the CPU float32, or if it is large and there are units, bfloat16."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if is_large(config) and has_bfloat16_units() else torch.float32


def is_large(config: Config) -> bool:
    return num_llm_parameters(config.llm) >= LARGE


def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware."""
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe is not None and probe() for probe in probes)


def cast_tensors(block: str, tensors: dict[str, torch.Tensor], dtype, device, keep_linears: bool) -> dict:
    """A block's tensors in `dtype`, one after the other, quantized weights as they are; empties `tensors`.

    Args:
        keep_linears: Leave the dtype of the LLM's attention and MLP weights.
    """
    cast = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        is_kept = keep_linears and block == "llm" and is_quantized_weight(name)
        cast[name] = tensor.to(device, tensor.dtype if is_kept else stored_dtype(name, tensor, dtype))
    return cast


def load_blocks(
    folder, dtype: torch.dtype | None = torch.float32, device="cpu", blocks=BLOCKS, keep_linears: bool | None = None
) -> tuple[Config, dict[str, torch.nn.Module]]:
    """The blocks of a checkpoint of either layout, in `dtype`; the VAE always in float32, as the reference runs it.

    Quantized weights stay as they are stored, and so do on the CPU the attention and MLP weights of a large LLM, which
    are then not copied from the file into memory. MMFS projections are fused, so parameters differ from those in the
    files. Raises CheckpointError.

    Args:
        dtype: None for `default_dtype`.
        keep_linears: Whether attention and MLP weights stay as in the file; None for a large LLM on the CPU.
    """
    folder, device = Path(folder), torch.device(device)
    if is_reference_layout(folder):
        config, tensors = read_state_dicts(folder, blocks)
    else:
        config, tensors = read_config(folder), None
    is_mapped = keep_linears
    if is_mapped is None:
        is_mapped = device.type == "cpu" and is_large(config)
    is_mapped = is_mapped and not config.llm.quantization
    modules = build(config, blocks, linears=stored_linears() if is_mapped else None)
    if tensors is None:
        config, tensors = read_native(folder, blocks, modules)
    dtype = dtype or default_dtype(config, device)
    for name, module in modules.items():
        to = torch.float32 if name == "vae" else dtype
        module.load_state_dict(cast_tensors(name, tensors.pop(name), to, device, is_mapped), assign=True)
        fuse_mmfs(module)
    return config, modules


def known_words(folder: str | Path) -> frozenset[str] | None:
    """The words that a model of a small world was taught, in lower case; None for a model of open vocabulary."""
    path = Path(folder) / VOCABULARY_FILE
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else None


def read_tokenizer(folder: str | Path, config: Config):
    """The Tokenizer of a checkpoint: tokenizer.json or tokenizer.model, beside it or in llm/; None if it has none."""
    from ..tokenizer import Tokenizer

    folder, limit = Path(folder), config.llm.vocab_size - config.llm.num_added_tokens
    for path in (folder / "tokenizer.json", folder / "llm" / "tokenizer.json"):
        if path.is_file():
            return Tokenizer.load(path, config.llm.special_tokens, limit)
    for place in (folder / "llm", folder, *asset_folders(folder, "lmsys/vicuna-13b-v1.3")):
        if (place / "tokenizer.model").is_file():
            return Tokenizer(_convert_sentencepiece(place), config.llm.special_tokens, limit)
    return None


def _convert_sentencepiece(folder: Path):
    """The `tokenizers.Tokenizer` of a folder's tokenizer.model, Llama's."""
    from transformers import LlamaTokenizerFast

    try:
        fast = LlamaTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # sentencepiece, protobuf and transformers raise errors of any type
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{str(folder / 'tokenizer.model')!r} cannot be converted; install sentencepiece and protobuf, or put the "
            f"model's tokenizer.json beside it: {reason}."
        ) from None
    return fast.backend_tokenizer


@dataclass(frozen=True)
class Saved:
    """Everything that a checkpoint holds; `blocks` has the tensors by block and native name."""

    layout: str
    config: Config
    blocks: dict[str, dict[str, torch.Tensor]]
    tokenizer: Tokenizer | None
    generation: GenerationConfig
    words: frozenset[str] | None
    systems: dict[str, tuple[dict[str, torch.Tensor], dict]] = field(default_factory=dict)  # name -> tensors, config


def fingerprint(source: str | Path, lora: str | Path | None = None) -> str | None:
    """Changes when a file of a checkpoint folder does, or that of a LoRA; None for a model without files."""
    folder = model_folder(source)
    if folder is None:
        return None
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".unfinished" not in str(path)]
    files = [(path, path.stat()) for path in [*paths, *([] if lora is None else [Path(lora)])]]
    return repr([(str(path.resolve()), about.st_size, about.st_mtime_ns) for path, about in files])


def _read_dreamllm(folder: Path) -> Saved:
    from ..generation.config import GenerationConfig, ImageGenerationConfig

    config, blocks, dream_config, dream = read_dreamllm(folder)
    image = ImageGenerationConfig(conditioner="dream", mmfs_scale=0.0)
    generation = replace(GenerationConfig(), image=image)
    systems = {"dream": (dream, dream_config.to_dict())}
    return Saved("dreamllm", config, blocks, read_tokenizer(folder, config), generation, None, systems)


def read(source: str | Path) -> Saved:
    """A checkpoint by any name that `MMInterleavedPipeline.load` takes."""
    from ..generation.config import GenerationConfig, read_generation_config

    folder = model_folder(source)
    if folder is None:
        from ..loading import tiny_random_blocks

        config, modules, tokenizer = tiny_random_blocks()
        blocks = {name: module.state_dict() for name, module in modules.items()}
        return Saved("none", config, blocks, tokenizer, GenerationConfig(), None)
    if is_dreamllm_layout(folder):
        return _read_dreamllm(folder)
    config, blocks = read_state_dicts(folder)
    layout = "reference" if is_reference_layout(folder) else "native"
    tokenizer = read_tokenizer(folder, config)
    return Saved(layout, config, blocks, tokenizer, read_generation_config(folder), known_words(folder))
