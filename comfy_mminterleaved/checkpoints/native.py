"""This project's layout: config.json, tokenizer.json, and one .safetensors file per block.

Each file carries the config in its metadata (the LLM's also its tokenizer), so that a block can be loaded alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..config import BLOCKS, Config
from ..errors import CheckpointError
from ..files import atomic_dir, write_json
from ..models.build import build, check_shapes, param_shapes
from .tensors import read_json, read_tensors, write_beside, write_tensors

METADATA = "mm-interleaved"


def read_native(
    folder: Path, blocks=BLOCKS, modules: dict[str, torch.nn.Module] | None = None
) -> tuple[Config, dict[str, dict[str, torch.Tensor]]]:
    """Config and checked tensors, by block and name.

    Args:
        modules: Result of `build` for this config, if already built.
    """
    config = Config.from_dict(read_json(folder / "config.json"))
    missing = [f"{name}.safetensors" for name in blocks if not (folder / f"{name}.safetensors").is_file()]
    if missing:
        raise CheckpointError(f"The checkpoint {str(folder)!r} lacks {', '.join(missing)}.")
    tensors = {name: read_tensors(folder / f"{name}.safetensors") for name in blocks}
    for name, module in (modules or build(config, blocks)).items():
        actual = {key: tuple(t.shape) for key, t in tensors[name].items()}
        check_shapes(param_shapes(module), actual, repr(str(folder / f"{name}.safetensors")))
    return config, tensors


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
) -> None:
    """Writes a checkpoint in this project's layout; raises OutputError if the folder is not empty."""
    with atomic_dir(folder) as temp_path:
        write_json(temp_path / "config.json", config.to_dict())
        write_beside(temp_path, generation, words)
        if tokenizer is not None:
            tokenizer.save(temp_path / "tokenizer.json")
        for name, tensors in blocks.items():
            about = {"block": name, "config": config.to_dict()}
            if name == "llm":
                about["tokenizer"] = tokenizer.to_text() if tokenizer is not None else None
                about["words"] = sorted(words) if words is not None else None
                about["generation_config"] = generation.to_dict() if generation is not None else None
            write_tensors(temp_path / f"{name}.safetensors", tensors, dtype, {METADATA: json.dumps(about)})
