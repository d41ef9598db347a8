"""Reads and writes checkpoint files: tensors in .safetensors and .bin, JSON, and a model's defaults."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files import apply_umask, atomic_write, flush_to_disk, write_json

VOCABULARY_FILE = "words.txt"  # the words that a model of a small world was taught
MAX_LISTED = 20  # entries that an error names


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

    A .bin is a pickle and is read with `weights_only=True`, which refuses one that would run code. Tensors under a
    single key ("module", "state_dict", "model") are taken from there.
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
    """Loads a .bin. Files written before PyTorch 1.6 are not ZIP archives and cannot be memory-mapped."""
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


def is_folder(path) -> bool:
    try:
        return os.path.isdir(path)
    except ValueError:  # a NUL in the name
        return False


def write_beside(folder: Path, generation, words: frozenset[str] | None) -> None:
    """Writes a model's generation config and vocabulary beside its weights, if it has them."""
    from ..generation.config import GENERATION_CONFIG_FILE, GenerationConfig

    if generation not in (None, GenerationConfig()):
        write_json(folder / GENERATION_CONFIG_FILE, generation.to_dict())
    if words is not None:
        atomic_write(folder / VOCABULARY_FILE, "".join(f"{word}\n" for word in sorted(words)).encode("utf-8"))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    stored, unique = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.to(dtype or tensor.dtype).contiguous()
        if tensor.untyped_storage().data_ptr() in stored:  # safetensors refuses what shares memory
            tensor = tensor.clone()
        stored.add(tensor.untyped_storage().data_ptr())
        unique[key] = tensor
    save_file(unique, path, {"format": "pt", **(metadata or {})})
    flush_to_disk(path)
    apply_umask(path)
