"""This project's layout: config.json, tokenizer.json, and one .safetensors file per block (llm.gguf with 4 bits).

Each file carries the config in its metadata (the LLM's also its tokenizer), so that a block can be loaded alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import BLOCKS, Config
from ..errors import CheckpointError
from ..files import atomic_dir, resumable_dir, write_json
from ..models.build import build, check_shapes, param_shapes
from ..models.quantization import FORMATS, comfy_quant, format_of, is_quantized_weight
from .gguf_files import read_gguf
from .quantize import quantized_config, quantized_items
from .tensors import Item, Progress, plain_items, read_json, read_tensors, write_beside, write_tensors

METADATA = "mm-interleaved"


def read_native(
    folder: Path, blocks=BLOCKS, modules: dict[str, torch.nn.Module] | None = None
) -> tuple[Config, dict[str, dict[str, torch.Tensor]]]:
    """Config and checked tensors, by block and name.

    Args:
        modules: Result of `build` for this config, if already built.
    """
    config = Config.from_dict(read_json(folder / "config.json"))
    files = {name: folder / block_file(config, name) for name in blocks}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise CheckpointError(f"The checkpoint {str(folder)!r} lacks {', '.join(missing)}.")
    tensors = {name: read_block(path, config, name) for name, path in files.items()}
    for name, module in (modules or build(config, blocks)).items():
        actual = {key: tuple(t.shape) for key, t in tensors[name].items()}
        check_shapes(param_shapes(module), actual, repr(str(files[name])))
    return config, tensors


def block_file(config: Config, block: str) -> str:
    """Name of the file that holds a block."""
    return "llm.gguf" if block == "llm" and config.llm.quantization == "q4_0" else f"{block}.safetensors"


def read_block(path: Path, config: Config, block: str) -> dict[str, torch.Tensor]:
    """Tensors of one block's file; ComfyUI's descriptions of formats are checked and left out."""
    tensors = read_gguf(path)[0] if path.suffix == ".gguf" else read_tensors(path)
    if block == "llm":
        check_formats(tensors, config, repr(str(path)))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
    return tensors


def check_formats(tensors: dict[str, torch.Tensor], config: Config, label: str) -> None:
    """Raises CheckpointError if the weights of an LLM are not stored as its config says."""
    expected, formats = config.llm.quantization, set()
    if expected is not None:
        format_of(expected)
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant"):
            try:
                formats.add(json.loads(bytes(tensor.tolist()))["format"])
            except (ValueError, KeyError, TypeError):
                formats.add("unknown")
    names = {format.core_name: name for name, format in FORMATS.items()}
    formats = {names.get(each, each) for each in formats}
    if formats - {expected}:
        settings = f"say {expected}" if expected else "have no quantization"
        raise CheckpointError(
            f"{label} stores weights as {', '.join(sorted(formats))}, but its settings {settings}; take all files from "
            "one `convert`."
        )


def parse_block_metadata(metadata: dict | None, block: str, label: str) -> tuple[Config, dict]:
    """Reads the metadata that lets a block's file be loaded alone; raises CheckpointError.

    Returns:
        Its config, and for the LLM `tokenizer` (JSON), `words` and `generation_config`, if it has them.

    Args:
        metadata: the safetensors file's.
        block: the name of the block that is wanted.
        label: how to call the file in an error.
    """
    try:
        about = json.loads((metadata or {})[METADATA])
        name, config = about["block"], about["config"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{label} is not an MM-Interleaved block; use a file that `convert` wrote.") from None
    if name != block:
        raise CheckpointError(f"{label} holds the block {name!r}, not {block!r}.")
    return Config.from_dict(config), about


def save(
    folder: str | Path,
    config: Config,
    blocks: dict[str, dict[str, torch.Tensor]],
    tokenizer=None,
    dtype=None,
    generation=None,
    words: frozenset[str] | None = None,
    quantization: str | None = None,
    fingerprint: str | None = None,
    on_progress: Callable[[int, int], object] | None = None,
    systems: dict[str, tuple[dict[str, torch.Tensor], dict]] | None = None,
) -> None:
    """Writes a checkpoint in this project's layout; raises OutputError if the folder is not empty.

    Args:
        dtype: Of the weights that are not quantized; None leaves them, but of a float32 model that is quantized it is
            float16, except for the VAE.
        quantization: Store the LLM's attention and MLP weights so (`models.quantization.FORMATS`); None leaves them.
        fingerprint: Of the source; if given, the next call of the same goes on where one was killed.
        on_progress: Called with the bytes written so far and their number in all.
        systems: What stands beside the blocks: tensors and config by name.
    """

    from ..generation.embedders import SYSTEMS, system_metadata

    def items_of(name: str, tensors: dict[str, torch.Tensor]) -> list[Item]:
        if quantization is None:
            return [*plain_items(tensors, dtype), *_descriptions(config, name)]
        is_float32 = all(t.dtype == torch.float32 for t in tensors.values())
        to = torch.float16 if dtype is None and is_float32 and name != "vae" else dtype
        return quantized_items(config, name, tensors, to, quantization)

    made = {name: items_of(name, tensors) for name, tensors in blocks.items()}
    new = quantized_config(config, quantization) if quantization else config
    size = sum(t.nbytes for items in made.values() for item in items for t in item.outputs.values())
    written = Progress(size, on_progress)
    with resumable_dir(folder, fingerprint, size) if fingerprint else atomic_dir(folder) as temp_path:
        write_json(temp_path / "config.json", new.to_dict())
        write_beside(temp_path, generation, words)
        if tokenizer is not None:
            tokenizer.save(temp_path / "tokenizer.json")
        for name, items in made.items():
            about = {"block": name, "config": new.to_dict()}
            if name == "llm":
                about["tokenizer"] = tokenizer.to_text() if tokenizer is not None else None
                about["words"] = sorted(words) if words is not None else None
                about["generation_config"] = generation.to_dict() if generation is not None else None
            path = temp_path / block_file(new, name)
            write_tensors(path, items, {METADATA: json.dumps(about)}, fingerprint is not None, written)
        for name, (tensors, about) in (systems or {}).items():
            path = temp_path / SYSTEMS / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            items = plain_items(tensors, dtype)
            write_tensors(path, items, system_metadata(about, name), fingerprint is not None)


def _descriptions(config: Config, block: str) -> list[Item]:
    """ComfyUI's descriptions of an LLM's formats, which `read_block` leaves out."""
    format = FORMATS.get(config.llm.quantization)
    if block != "llm" or format is None or format.core_name is None:
        return []
    names = [name for name in param_shapes(build(config, ("llm",))["llm"]) if is_quantized_weight(name)]
    keys = [name.removesuffix("weight") + "comfy_quant" for name in names]
    return [Item({key: comfy_quant(format).to("meta")}, lambda key=key: {key: comfy_quant(format)}) for key in keys]
