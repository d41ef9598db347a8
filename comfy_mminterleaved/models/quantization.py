"""Weights of linear layers stored in 8 or 4 bits and computed in 16 or 32.

Only the attention and MLP projections of the LLM are stored so: they are nine tenths of the 13B model. The formats are
those that others read: `fp8` and `int8` are ComfyUI's `comfy_quant` tensors, `q4_0` is llama.cpp's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import linear

from ..errors import CheckpointError

BLOCK = 32  # weights that share a scale in q4_0
BLOCK_BYTES = 18  # of them: a float16 scale, and 4 bits each
ALIGNMENT = 64  # bytes at which weights begin in memory, and in files
MAX_PACKED_ROWS = 16  # of the input, up to which the CPU multiplies int8 weights as they are


@dataclass(frozen=True)
class Format:
    """How one format stores a weight `(out, in)`.

    Args:
        dtype: Of the stored weight.
        core_name: ComfyUI's name of the format in `comfy_quant`; None if its core has none.
    """

    dtype: torch.dtype
    core_name: str | None

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, in_features

    def scale_shape(self, out_features: int) -> tuple[int, ...] | None:
        """Of `weight_scale`, float32; None if the weight holds its scales itself."""
        return None


class Fp8(Format):
    """float8_e4m3fn with one scale for the whole weight."""

    def scale_shape(self, out_features):
        return ()

    def quantize(self, weight):
        weight = weight.float()
        scale = (weight.abs().amax() / torch.finfo(self.dtype).max).clamp(min=1e-12)
        return (weight / scale).to(self.dtype), scale

    def dequantize(self, weight, scale, dtype):
        return weight.to(dtype).mul_(scale.to(dtype))


class Int8(Format):
    """int8 with one scale for each output."""

    def scale_shape(self, out_features):
        return out_features, 1

    def quantize(self, weight):
        weight = weight.float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
        return (weight / scale).round().to(self.dtype), scale

    def dequantize(self, weight, scale, dtype):
        return weight.to(dtype).mul_(scale.to(dtype))


class Q4(Format):
    """Blocks of 32 weights along the input, each a float16 scale and 32 numbers of 4 bits (GGUF's Q4_0)."""

    def weight_shape(self, out_features, in_features):
        if in_features % BLOCK:
            raise CheckpointError(f"q4_0 needs layers whose width is a multiple of {BLOCK}, not {in_features}.")
        return out_features, in_features // BLOCK * BLOCK_BYTES

    def quantize(self, weight):
        from ..checkpoints.gguf_files import import_gguf

        gguf = import_gguf()
        packed = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q4_0)
        return torch.from_numpy(packed), None

    def dequantize(self, weight, scale, dtype):
        blocks = weight.unflatten(-1, (-1, BLOCK_BYTES))
        scale = blocks[..., :2].contiguous().view(torch.float16).to(dtype)
        pairs = blocks[..., 2:]
        numbers = torch.cat([pairs & 15, pairs >> 4], dim=-1).to(dtype)
        return numbers.sub_(8).mul_(scale).flatten(-2)


FORMATS: dict[str, Format] = {
    "fp8": Fp8(torch.float8_e4m3fn, "float8_e4m3fn"),
    "int8": Int8(torch.int8, "int8_tensorwise"),
    "q4_0": Q4(torch.uint8, None),
}
STORED_DTYPES = tuple(each.dtype for each in FORMATS.values())  # tensors of these keep their dtype when a model is cast


def format_of(name: str) -> Format:
    """Raises CheckpointError for a name that is not in FORMATS."""
    if name not in FORMATS:
        raise CheckpointError(f"The weights are stored as {name!r:.40}; this release reads {', '.join(FORMATS)}.")
    return FORMATS[name]


def is_quantized_weight(name: str) -> bool:
    """Whether a parameter of the LLM is one of those that `convert --quantize` stores in fewer bits."""
    return name.endswith("_proj.weight") and (".self_attn." in name or ".mlp." in name)


def stored_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a tensor in a model that is cast to `dtype`; None leaves it."""
    is_kept = dtype is None or tensor.dtype in STORED_DTYPES or name.endswith("weight_scale")
    return tensor.dtype if is_kept or not tensor.is_floating_point() else dtype


def comfy_quant(format: Format) -> torch.Tensor:
    """ComfyUI's description of a layer's format, JSON as uint8; activations are not quantized."""
    text = json.dumps({"format": format.core_name, "full_precision_matrix_mult": True})
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8)


def init_quantized(layer: nn.Module, format: Format) -> None:
    """Gives a linear layer an empty quantized weight, and its scale, instead of its own."""
    out_features, in_features = layer.out_features, layer.in_features
    shape = format.weight_shape(out_features, in_features)
    device = layer.weight.device
    layer.weight = nn.Parameter(torch.empty(shape, dtype=format.dtype, device=device), requires_grad=False)
    if format.scale_shape(out_features) is None:
        layer.weight_scale = None
        return
    scale = torch.empty(format.scale_shape(out_features), device=device)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)


def quantized_linear(format: Format, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None):
    """`x` times a stored weight, in the dtype of `x`."""
    if isinstance(format, Int8) and _has_packed_kernel(x, weight):
        rows = x.flatten(0, -2)
        return torch._weight_int8pack_mm(rows, weight, scale.flatten().to(x.dtype)).unflatten(0, x.shape[:-1])
    return linear(x, format.dequantize(weight, scale, x.dtype))


def quantized_linears(name: str) -> SimpleNamespace:
    """An `operations` namespace whose Linear stores its weight in a format and computes in its input's dtype."""
    format = format_of(name)

    class Linear(nn.Linear):
        def __init__(self, in_features, out_features, bias=False):
            super().__init__(in_features, out_features, bias)
            init_quantized(self, format)

        def reset_parameters(self):
            pass

        def forward(self, x):
            return quantized_linear(format, x, self.weight, self.weight_scale)

    return SimpleNamespace(Linear=Linear)


def stored_linears() -> SimpleNamespace:
    """An `operations` namespace whose Linear keeps the dtype of its weight, whatever its input's."""

    class Linear(nn.Linear):
        def forward(self, x):
            return linear(x, self.weight.to(x.dtype), self.bias)

    return SimpleNamespace(Linear=Linear)


def _has_packed_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch multiplies `x` with int8 weights without writing them out in its dtype first.

    Its kernel crashes on weights that are not aligned, as in a mapped file that was not written with that in mind.
    """
    is_fit = x.device.type == weight.device.type == "cpu" and x.dtype == torch.bfloat16
    return is_fit and x.numel() // x.shape[-1] <= MAX_PACKED_ROWS and weight.data_ptr() % ALIGNMENT == 0


TORCHAO_CONFIGS = {"fp8": "Float8WeightOnlyConfig", "int8": "Int8WeightOnlyConfig"}


def quantize_with_torchao(llm: nn.Module, name: str) -> None:
    """Quantizes attention and MLP of a loaded LLM in place; raises CheckpointError if torchao is not installed.

    Args:
        name: A name in TORCHAO_CONFIGS.
    """
    try:
        from torchao import quantization
    except ImportError:
        raise CheckpointError(
            "Quantizing a model while it loads needs torchao; install it with `pip install torchao`, or write the "
            f"model with `convert --quantize {name}`."
        ) from None

    def is_chosen(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and is_quantized_weight(f"{path}.weight")

    quantization.quantize_(llm, getattr(quantization, TORCHAO_CONFIGS[name])(), filter_fn=is_chosen)
