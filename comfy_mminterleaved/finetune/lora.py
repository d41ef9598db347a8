"""LoRA for fine-tuning: peft trains it; the file has the names that ComfyUI's LoRA loader reads."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import SettingError
from ..models.lora import kohya_tensors

# The LLM's values and outputs, and the keys and values with which the U-Net reads the prompt embeddings.
LAYERS = {
    "llm": re.compile(r"layers\.\d+\.self_attn\.[vo]_proj"),
    "unet": re.compile(r".*\.attn2\.to_[kv]"),
}


def import_peft():
    try:
        import peft
    except ImportError:
        raise SettingError("Fine-tuning needs peft; run: pip install peft") from None
    return peft


class TrainableLoRA:
    """peft's LoRA in the linear layers of a module whose whole name matches; everything else is frozen.

    Raises:
        SettingError: If no layer matches, if layers are quantized, or if peft is missing.
    """

    def __init__(self, module: nn.Module, pattern: re.Pattern, rank: int, label: str = "The module"):
        peft = import_peft()
        layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and pattern.fullmatch(n)}
        if not layers:
            raise SettingError(f"{label} has no layer that LoRA can train.")
        if any(type(layer) is not nn.Linear or not is_plain(layer.weight) for layer in layers.values()):
            raise SettingError(f"{label} has quantized layers, which LoRA cannot train here; use a model in 16 bits.")
        module.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[*layers]), module)
        self.module = module
        for p in self.parameters.values():  # AdamW's averages need 32 bits; peft casts what goes in
            p.data = p.data.float()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA's weights, under peft's names."""
        named = self.module.named_parameters()
        return {name.replace(".default.", "."): p for name, p in named if ".lora_" in name}

    def remove(self) -> None:
        """Takes the LoRA out again; the module is what it was."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        wrapped = [(name, layer) for name, layer in self.module.named_modules() if isinstance(layer, BaseTunerLayer)]
        for name, layer in wrapped:
            parent, _, child = name.rpartition(".")
            setattr(self.module.get_submodule(parent), child, layer.get_base_layer())
        vars(self.module).pop("peft_config", None)


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is of floating-point numbers of at least 16 bits, not of a quantized kind."""
    is_tensor = type(weight) in (torch.Tensor, nn.Parameter)
    return is_tensor and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)


def story_lora_tensors(parts: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Tensors of one file from each block's name and its LoRA under peft's names."""
    return {key: tensor for block, tensors in parts for key, tensor in kohya_tensors(block, tensors).items()}
