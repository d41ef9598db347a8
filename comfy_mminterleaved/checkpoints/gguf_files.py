"""GGUF: the file of an LLM with 4-bit weights, read and laid out with the `gguf` package (an extra)."""

from __future__ import annotations

import errno
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from ..errors import CheckpointError

ARCHITECTURE = METADATA = "mm-interleaved"  # llama.cpp has no such model: names and rotary order are this project's


def import_gguf():
    """The `gguf` package; raises CheckpointError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("q4_0 needs the package gguf; install it with `pip install gguf`.") from None
    return gguf


def read_gguf(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, memory-mapped, and metadata as a safetensors file has it; raises CheckpointError.

    Quantized weights are uint8, `(out, bytes of a row)`.
    """
    gguf = import_gguf()
    try:
        reader = _open(gguf, path)
        names = {key: _text(reader, key) for key in ("general.architecture", "general.name", METADATA)}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as GGUF, it may be cut short: {error}.") from None
    if names["general.architecture"] != ARCHITECTURE:
        name = f", {names['general.name']!r}" if names["general.name"] else ""
        raise CheckpointError(
            f"{str(path)!r} is a GGUF of the architecture {names['general.architecture']!r}{name}; it must be an "
            f"MM-Interleaved LLM, as `convert --quantize q4_0` writes it."
        )
    types = gguf.GGMLQuantizationType
    dtypes = {types.F32: torch.float32, types.F16: torch.float16, types.BF16: torch.bfloat16, types.Q4_0: torch.uint8}
    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type not in dtypes:
            raise CheckpointError(f"{str(path)!r} stores {tensor.name} as {tensor.tensor_type.name}; this reads Q4_0.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file that is mapped read-only
            data, dtype = torch.from_numpy(np.atleast_1d(tensor.data)), dtypes[tensor.tensor_type]
        shape = [int(side) for side in reversed(tensor.shape)]
        tensors[tensor.name] = data if dtype == torch.uint8 else data.view(dtype).reshape(shape)
    return tensors, {METADATA: names[METADATA] or "{}"}


def _open(gguf, path: Path):
    try:
        return gguf.GGUFReader(path, mode="c")  # copy on write: PyTorch knows no read-only memory
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return gguf.GGUFReader(path, mode="r")  # larger than the memory: its tensors are never written to


def gguf_header(outputs: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a file, where each tensor's bytes go, and the file's size.

    Args:
        outputs: Meta tensors; uint8 ones are Q4_0.
    """
    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    kinds = {torch.float32: types.F32, torch.float16: types.F16, torch.bfloat16: types.BF16, torch.uint8: types.Q4_0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        for key, value in metadata.items():
            writer.add_string(key, value)
        for name, tensor in outputs.items():
            stored = np.dtype(np.uint8 if tensor.dtype == torch.uint8 else np.float32)  # with raw_dtype no more is read
            writer.add_tensor_info(name, tuple(tensor.shape), stored, tensor.nbytes, kinds[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    pad = gguf.GGUFWriter.ggml_pad
    header += bytes(pad(len(header), gguf.GGUF_DEFAULT_ALIGNMENT) - len(header))
    places, end = {}, len(header)
    for name, tensor in outputs.items():
        places[name] = end
        end += pad(tensor.nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)
    return header, places, end


def _text(reader, key: str) -> str:
    field = reader.get_field(key)
    return str(field.contents()) if field is not None else ""
