"""`convert --quantize`: the LLM's attention and MLP weights in fewer bits, every MMFS with its projections fused."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from ..config import Config
from ..errors import CheckpointError
from ..models.build import build
from ..models.mmfs import MMFS
from ..models.quantization import comfy_quant, format_of, is_quantized_weight
from ..models.unet_synchronizer import MMFSBlock
from .tensors import Item, plain_items


def quantized_config(config: Config, quantization: str) -> Config:
    """The config of a model after `quantized_items`; raises CheckpointError if it was quantized before."""
    if config.llm.quantization or config.llm.mmfs.is_fused:
        raise CheckpointError(
            f"The model is stored as {config.llm.quantization} already; quantize the one that it was converted from."
        )
    llm, synchronizer = config.llm, config.synchronizer
    return replace(
        config,
        llm=replace(llm, quantization=quantization, mmfs=replace(llm.mmfs, is_fused=True)),
        synchronizer=replace(synchronizer, mmfs=replace(synchronizer.mmfs, is_fused=True)),
    )


def quantized_items(
    config: Config, block: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None, quantization: str
) -> list[Item]:
    """What to write of one block.

    Args:
        config: Of the model that `tensors` are of.
        dtype: Of everything that is not quantized; None leaves it.
    """
    if block not in ("llm", "synchronizer"):
        return plain_items(tensors, dtype)
    plain, fused = dict(tensors), []
    module = build(config, (block,))[block]
    for path, part in module.named_modules():
        if isinstance(part, (MMFS, MMFSBlock)):
            names = [name for name in plain if name.startswith(f"{path}.")]
            if names:  # none of the MMFS within an MMFSBlock, which fuses its convolution too
                fused.append(_fused_item(path, part, {name: plain.pop(name) for name in names}, dtype))
    if block == "llm":
        weights = {name: plain.pop(name) for name in list(plain) if is_quantized_weight(name)}
        fused += [_quantized_item(name, weight, quantization) for name, weight in weights.items()]
    return plain_items(plain, dtype) + fused


def _fused_item(path: str, part: torch.nn.Module, tensors: dict[str, torch.Tensor], dtype) -> Item:
    """The tensors of one MMFS, or of a block around one, after `fuse_projections`."""
    inner = {name[len(path) + 1 :]: tensor for name, tensor in tensors.items()}
    to = dtype or next(iter(inner.values())).dtype

    def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        module = copy.deepcopy(part, {id(torch.nn): torch.nn})  # MMFS holds its `operations`, a Python module
        module.load_state_dict(tensors, assign=True)
        module.fuse_projections()
        return {f"{path}.{name}": tensor.to(to) for name, tensor in module.state_dict().items()}

    # In float64 the result does not depend on the order of the sums, which is another on each machine.
    outputs = fused({name: torch.empty_like(tensor, device="meta") for name, tensor in inner.items()})
    return Item(outputs, lambda: fused({name: tensor.double() for name, tensor in inner.items()}))


def _quantized_item(name: str, weight: torch.Tensor, quantization: str) -> Item:
    """One weight in a format, with its scale and ComfyUI's description."""
    format, prefix = format_of(quantization), name.removesuffix("weight")
    shape, scale_shape = format.weight_shape(*weight.shape), format.scale_shape(len(weight))
    outputs = {name: torch.empty(shape, dtype=format.dtype, device="meta")}
    if scale_shape is not None:
        outputs[f"{prefix}weight_scale"] = torch.empty(scale_shape, device="meta")
    if format.core_name:
        outputs[f"{prefix}comfy_quant"] = comfy_quant(format).to("meta")

    def make() -> dict[str, torch.Tensor]:
        stored, scale = format.quantize(weight)
        made = {name: stored, f"{prefix}weight_scale": scale, f"{prefix}comfy_quant": comfy_quant(format)}
        return {key: made[key] for key in outputs}

    return Item(outputs, make)
