"""Apply Story LoRA: what fine-tuning wrote, added to the U-Net and the LLM by ComfyUI's own LoRA code."""

from __future__ import annotations

from pathlib import Path

import comfy.lora
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..comfy_mminterleaved.checkpoints.tensors import read_tensors
from ..comfy_mminterleaved.errors import CheckpointError
from ..comfy_mminterleaved.models.lora import kohya_name
from .blocks import PatchedLLM
from .load import native_path, sentence
from .types import CATEGORY, LLMSocket


def _patches(tensors: dict, key_map: dict[str, str], module, label: str) -> dict:
    """ComfyUI's patches by weight; raises CheckpointError for a layer that the model has not, or of another size."""
    names = dict.fromkeys(key.partition(".")[0] for key in tensors)
    for name in names:
        if name not in key_map:
            raise CheckpointError(f"{label} is for another model: this one has no layer {name!r:.80}.")
        weight = comfy.utils.get_attr(module, key_map[name])
        up, down = tensors.get(f"{name}.lora_up.weight"), tensors.get(f"{name}.lora_down.weight")
        if up is None or down is None or (up.shape[0], down[0].numel()) != (weight.shape[0], weight[0].numel()):
            raise CheckpointError(f"{label} does not fit this model: its layer {name!r:.80} has another size.")
    return comfy.lora.load_lora(tensors, key_map)


def llm_with_lora(llm: PatchedLLM, tensors: dict, strength: float, label: str) -> PatchedLLM:
    """The same weights in a patcher of their own, with a prefix cache of its own."""
    if llm.config.llm.quantization is not None:
        raise CheckpointError(
            f"{label} cannot be added to an LLM that is stored as {llm.config.llm.quantization}; load the model in 16 "
            "bits, or set strength_llm to 0."
        )
    names = {name for name, layer in llm.module.named_modules() if hasattr(layer, "in_features")}
    key_map = {kohya_name("llm", name): f"{name}.weight" for name in names}
    patches = _patches(tensors, key_map, llm.module, label)
    patched = llm.clone()
    patched.patcher.add_patches(patches, strength)
    return patched


class ApplyStoryLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        return io.Schema(
            node_id="MMInterleavedApplyLoRA",
            display_name="Apply Story LoRA",
            category=CATEGORY,
            description="Adds what `mminterleaved finetune` learned from stories of your own to the U-Net, which draws, and to the LLM, "
            "which reads and writes.",
            inputs=[
                io.Model.Input("model", tooltip="The U-Net of Load MM-Interleaved."),
                LLMSocket.Input("llm", display_name="LLM", tooltip="The LLM of the same model."),
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file in models/loras, written by `mminterleaved finetune`.",
                ),
                io.Float.Input("strength_model", tooltip="How much of it the U-Net gets.", **strength),
                io.Float.Input("strength_llm", tooltip="How much of it the LLM gets.", **strength),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL"),
                LLMSocket.Output("llm_out", display_name="LLM"),
            ],
        )

    @classmethod
    def validate_inputs(cls, file):
        return file is None or sentence(lambda: native_path("loras", file))

    @classmethod
    def execute(cls, model, llm, file, strength_model, strength_llm) -> io.NodeOutput:
        tensors, label = read_tensors(Path(native_path("loras", file))), repr(file)
        parts = {
            block: {key: t for key, t in tensors.items() if key.startswith(f"lora_{block}_")}
            for block in ("unet", "llm")
        }
        if len(tensors) != sum(map(len, parts.values())) or not tensors:
            raise CheckpointError(f"{label} also holds LoRA weights for other models; use Load LoRA for it.")
        if parts["unet"] and strength_model:
            key_map = comfy.lora.model_lora_keys_unet(model.model, {})
            patches = _patches(parts["unet"], key_map, model.model, label)
            model = model.clone()
            model.add_patches(patches, strength_model)
        if parts["llm"] and strength_llm:
            llm = llm_with_lora(llm, parts["llm"], strength_llm, label)
        return io.NodeOutput(model, llm)
