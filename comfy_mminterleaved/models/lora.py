"""LoRA (2106.09685): low-rank additions to linear layers, which are there only while they are attached."""

from __future__ import annotations

import contextlib
import functools
import hashlib

import torch
import torch.nn.functional as F
from torch import nn

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
        layers = dict(module.named_modules())

        def hook(down, up):
            def add(_, args, output):
                x = args[0]
                return output + scale * F.linear(F.linear(x, down.to(x)), up.to(x))

            return add

        handles = [
            layers[name].register_forward_hook(hook(down, up)) for name, down, up in zip(self.names, self.down, self.up)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
