"""LoRA (2106.09685): low-rank additions to linear layers, which are there only while they are attached; its files."""

from __future__ import annotations

import contextlib
import functools
import hashlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import CheckpointError


class LoRA(nn.Module):
    """Pairs of matrices by the name of the linear layer that they add to; peft trains them, this applies them.

    Args:
        tensors: `NAME.lora_A.weight` `(rank, in)` and `NAME.lora_B.weight` `(out, rank)`, as peft names them, with or
            without its prefix. The scale is part of B.
    """

    PREFIX = "base_model.model."

    def __init__(self, tensors: dict[str, torch.Tensor], label: str = "The LoRA"):
        super().__init__()
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.removeprefix(self.PREFIX).rpartition(".lora_")
            if part not in ("A.weight", "B.weight") or tensor.ndim != 2:
                raise CheckpointError(f"{label} holds {key!r:.80}, which is no matrix of a LoRA.")
            pairs.setdefault(name, {})[part[0]] = tensor
        for name, pair in pairs.items():
            if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise CheckpointError(f"{label} has no matching pair of matrices for the layer {name!r:.80}.")
        self.names = tuple(sorted(pairs))
        self.down, self.up = (
            nn.ParameterList(nn.Parameter(pairs[name][part], requires_grad=False) for name in self.names)
            for part in ("A", "B")
        )

    @functools.cached_property
    def lora_id(self) -> str:
        """Digest of the weights."""
        data = b"".join(up.detach().float().cpu().numpy().tobytes() for up in self.up)
        return hashlib.blake2b(data, digest_size=6).hexdigest()

    def check(self, module: nn.Module, label: str = "The LoRA") -> None:
        """Raises CheckpointError if a layer is missing in `module` or has other sizes."""
        layers = dict(module.named_modules())
        for name, down, up in zip(self.names, self.down, self.up):
            layer = layers.get(name)
            sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
            if sizes != (down.shape[1], up.shape[0]):
                raise CheckpointError(f"{label} does not fit this model: its layer {name!r} is {sizes}.")

    @contextlib.contextmanager
    def attached(self, module: nn.Module, scale: float = 1.0):
        """Adds the products to the layers of `module` within a `with`; its weights stay as they are."""
        handles = self.attach(module, scale)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, module: nn.Module, scale: float = 1.0) -> list[RemovableHandle]:
        """Adds the products to the layers of `module` until the handles are removed."""
        layers = dict(module.named_modules())

        def hook(down, up):
            def add(_, args, output):
                x = args[0]
                return output + scale * F.linear(F.linear(x, down.to(x)), up.to(x))

            return add

        return [
            layers[name].register_forward_hook(hook(down, up)) for name, down, up in zip(self.names, self.down, self.up)
        ]


def kohya_name(block: str, layer: str) -> str:
    """A layer's name in LoRA files of kohya's format, which ComfyUI reads: `lora_unet_down_blocks_0_...`."""
    return f"lora_{block}_{layer.replace('.', '_')}"


def kohya_tensors(block: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block's LoRA in kohya's format, from peft's names; the scale is 1."""
    out: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".lora_")
        name = kohya_name(block, layer)
        out[f"{name}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = tensor
        if part == "A.weight":
            out[f"{name}.alpha"] = torch.tensor(float(len(tensor)))
    return out


def read_kohya(tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module], label: str) -> dict[str, LoRA]:
    """The LoRA of each block in a file of kohya's format, each fitted to its module; blocks without one are left out.

    Args:
        modules: By the block's name in the file.

    Raises:
        CheckpointError: If the file has no LoRA for any of them, a layer that none has, or other sizes.
    """
    layers = {
        kohya_name(block, name): (block, name)
        for block, module in modules.items()
        for name, layer in module.named_modules()
        if hasattr(layer, "in_features")
    }
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        if part == "alpha":
            continue
        if part not in ("lora_down.weight", "lora_up.weight"):
            raise CheckpointError(f"{label} holds {key!r:.80}, which is no LoRA of a linear layer.")
        if name not in layers:
            raise CheckpointError(f"{label} is for another model: this one has no layer {name!r:.80}.")
        block, layer = layers[name]
        if part == "lora_up.weight":
            rank = tensor.shape[-1]
            tensor = tensor * (float(tensors.get(f"{name}.alpha", rank)) / rank)
        side = "A" if part == "lora_down.weight" else "B"
        parts.setdefault(block, {})[f"{layer}.lora_{side}.weight"] = tensor
    if not parts:
        raise CheckpointError(f"{label} holds no LoRA.")
    loras = {block: LoRA(each, label) for block, each in parts.items()}
    for block, lora in loras.items():
        lora.check(modules[block], label)
    return loras
