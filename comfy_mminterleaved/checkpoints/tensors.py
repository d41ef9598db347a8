"""Reads and writes checkpoint files: tensors in .safetensors, .gguf and .bin, JSON, and a model's defaults."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files import PROGRESS_SUFFIX, atomic_write, write_json
from ..models.quantization import ALIGNMENT, stored_dtype

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
            try:
                return load_file(path)
            except RuntimeError:
                if path.stat().st_size < MAPPED_READ_ONLY:
                    raise
                return _map_read_only(path)
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


MAPPED_READ_ONLY = 4 * 10**9  # bytes of a file that may be larger than the memory that the system lets a process write


def _map_read_only(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file that are never written to, so that the system promises no memory for them."""
    import warnings

    import numpy as np

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    data, start = np.memmap(path, np.uint8, "r"), 8 + length
    dtypes, tensors = {name: dtype for dtype, name in _DTYPE_NAMES.items()}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch has no read-only tensors
        for name, entry in entries.items():
            if name != "__metadata__":
                first, last = (start + offset for offset in entry["data_offsets"])
                flat = torch.from_numpy(data[first:last])
                tensors[name] = flat.view(dtypes[entry["dtype"]]).reshape(entry["shape"])
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


@dataclass(frozen=True)
class Item:
    """Tensors of a file that are made together, when their turn comes.

    Args:
        outputs: Meta tensors, by name.
        make: Makes tensors of these shapes and dtypes.
    """

    outputs: dict[str, torch.Tensor]
    make: Callable[[], dict[str, torch.Tensor]]


def plain_items(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> list[Item]:
    """Tensors as they are, floating-point ones in `dtype`; those of quantized weights keep theirs."""

    def item(name: str, tensor: torch.Tensor) -> Item:
        to = stored_dtype(name, tensor, dtype)
        return Item({name: torch.empty(tensor.shape, dtype=to, device="meta")}, lambda: {name: tensor.to(to)})

    return [item(name, tensor) for name, tensor in tensors.items()]


SYNC_EVERY = 2**28  # bytes between two syncs of a file to the disk


class Progress:
    """Counts the bytes that are written."""

    def __init__(self, total: int, on_progress: Callable[[int, int], object] | None = None):
        self.total, self.done, self.on_progress = total, 0, on_progress

    def add(self, size: int) -> None:
        self.done += size
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def write_tensors(
    path: Path,
    items: list[Item],
    metadata: dict[str, str] | None = None,
    resume: bool = False,
    written: Progress | None = None,
) -> None:
    """Writes a .safetensors or .gguf file, one item at a time, so that no more than that is in memory.

    Args:
        resume: Go on where an earlier call for the same items stopped; its progress is kept in a file beside it.
    """
    from .gguf_files import gguf_header

    outputs = {name: tensor for item in items for name, tensor in item.outputs.items()}
    make_header = gguf_header if path.suffix == ".gguf" else _safetensors_header
    header, places, size = make_header(outputs, metadata or {})
    progress = path.with_name(path.name + PROGRESS_SUFFIX)
    done = _read_progress(progress) if resume and path.is_file() and path.stat().st_size == size else 0
    if not done:
        with open(path, "wb") as file:
            _allocate(file, size)
            file.write(header)
    written = written or Progress(size)
    written.add(sum(t.nbytes for item in items[:done] for t in item.outputs.values()))
    with open(path, "r+b") as file:
        unsynced = 0
        for number, item in enumerate(items[done:], done + 1):
            for name, tensor in item.make().items():
                expected = item.outputs[name]
                assert tensor.shape == expected.shape and tensor.dtype == expected.dtype, name
                file.seek(places[name])
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                unsynced += tensor.nbytes
                written.add(tensor.nbytes)
            if unsynced > SYNC_EVERY or number == len(items):
                file.flush()
                os.fsync(file.fileno())
                if resume:
                    progress.write_text(str(number), encoding="ascii")
                unsynced = 0


def _read_progress(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _allocate(file, size: int) -> None:
    """Has the system set the file's room aside, so that a full disk shows at once, where it can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
    file.truncate(size)


_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _safetensors_header(
    outputs: dict[str, torch.Tensor], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a .safetensors file, where each tensor's bytes go, and the file's size.

    The safetensors package writes only tensors that are all in memory.
    """
    entries, ends, end = {"__metadata__": {"format": "pt", **metadata}}, {}, 0
    # Whole multiples first, then wide elements before narrow ones: all are aligned, without gaps, which are forbidden.
    for name in sorted(outputs, key=lambda n: (outputs[n].nbytes % ALIGNMENT > 0, -outputs[n].itemsize, n)):
        tensor = outputs[name]
        ends[name], start = end + tensor.nbytes, end
        end = ends[name]
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {n: len(header) + e - outputs[n].nbytes for n, e in ends.items()}, len(header) + end
