"""Quantized weights in ComfyUI: core's own layers where it has the format, else one that dequantizes like GGUF's nodes."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import torch

from ..comfy_mminterleaved.models.quantization import Format, comfy_quant, format_of, init_quantized, quantized_linear


def core_has(format: Format) -> bool:
    """Whether this core's `mixed_precision_ops` reads a format."""
    if format.core_name is None or not hasattr(comfy.ops, "mixed_precision_ops"):
        return False
    try:
        from comfy.quant_ops import QUANT_ALGOS, get_layout_class
    except ImportError:
        return False
    layout = QUANT_ALGOS.get(format.core_name, {}).get("comfy_tensor_layout")
    return layout is not None and get_layout_class(layout) is not None


def comfy_linears(quantization: str, dtype: torch.dtype):
    """An `operations` namespace for the LLM's attention and MLP, whose weights ComfyUI moves as they are stored.

    Args:
        quantization: A name in `models.quantization.FORMATS`.
        dtype: Of what is computed.
    """
    format = format_of(quantization)
    if core_has(format):
        return comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=True)

    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=False):
            super().__init__(in_features, out_features, bias)
            init_quantized(self, format)

        def forward_comfy_cast_weights(self, x):
            weight = comfy.model_management.cast_to_device(self.weight, x.device, None)
            scale = self.weight_scale.to(x.device) if self.weight_scale is not None else None
            if not self.weight_function:
                return quantized_linear(format, x, weight, scale)
            weight = format.dequantize(weight, scale, x.dtype)
            for patch in self.weight_function:  # a LoRA
                weight = patch(weight)
            return torch.nn.functional.linear(x, weight)

    return SimpleNamespace(Linear=Linear)


def for_core(tensors: dict[str, torch.Tensor], quantization: str | None) -> dict[str, torch.Tensor]:
    """An LLM's tensors with ComfyUI's descriptions of the formats, if core's own layers will read them."""
    if quantization is None or not core_has(format_of(quantization)):
        return tensors
    scales = [name for name in tensors if name.endswith(".weight_scale")]
    return tensors | {
        name.removesuffix("weight_scale") + "comfy_quant": comfy_quant(format_of(quantization)) for name in scales
    }
