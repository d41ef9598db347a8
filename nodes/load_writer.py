"""Load Writer: a language model of the user's own, held and unloaded by ComfyUI."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.model_management
import comfy.ops
import folder_paths
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import CheckpointError, SettingError
from ..comfy_mminterleaved.writers.chat import ChatWriter
from ..comfy_mminterleaved.writers.local import LocalChat, is_model, load_chat_model
from ..comfy_mminterleaved.writers.prompts import STORY, load_prompts, prompt_names
from .blocks import block_patcher
from .load import FOLDER
from .types import CATEGORY, WriterSocket

LLM_FOLDER = "LLM"
NOTHING = "(no model in models/LLM yet)"
folder_paths.add_model_folder_path(LLM_FOLDER, str(Path(folder_paths.models_dir) / LLM_FOLDER))


def prompt_folders() -> list[Path]:
    """Where users keep prompts of their own: models/mm_interleaved/prompts."""
    return [Path(folder) / "prompts" for folder in folder_paths.get_folder_paths(FOLDER)]


def prompts_fingerprint(name: str) -> str:
    """What a set of prompts says, or why it cannot be read: edited ones are read again."""
    try:
        return repr(sorted(load_prompts(name, prompt_folders()).texts.items()))
    except SettingError as error:
        return str(error)


def prompts_input():
    return io.Combo.Input(
        "prompts",
        options=prompt_names(prompt_folders()),
        default=STORY,
        tooltip=f"What it is asked for; yours are folders of text files in models/{FOLDER}/prompts.",
    )


def chat_models() -> dict[str, Path]:
    """Folders of transformers and GGUF files in models/LLM, by the names that the list has."""
    models = {}
    for folder in map(Path, folder_paths.get_folder_paths(LLM_FOLDER)):
        for path, _, files in sorted(os.walk(folder, followlinks=True)):
            if "config.json" in files and is_model(Path(path)):
                models.setdefault(Path(path).relative_to(folder).as_posix(), Path(path))
            for file in sorted(files):
                if file.lower().endswith(".gguf") and not file.lower().startswith("mmproj"):
                    models.setdefault((Path(path) / file).relative_to(folder).as_posix(), Path(path) / file)
    return models


class PatchedChat(LocalChat):
    """A language model in a ModelPatcher: ComfyUI loads it, partly if need be, and unloads it."""

    def __init__(self, chat: LocalChat, load_device: torch.device, offload_device: torch.device):
        super().__init__(chat.model, chat.processor, "")
        self.label = chat.label
        use_comfy_layers(self.model)
        holder = torch.nn.Module()  # ComfyUI sets `device`, which a model of transformers does not let it
        holder.language_model = self.model
        self.patcher = block_patcher(holder, load_device, offload_device)

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @device.setter
    def device(self, device) -> None:
        pass  # ComfyUI's to say

    def reserve(self, num_tokens: int) -> None:
        """Has ComfyUI load the model, with memory for its keys and values."""
        uncast = sum(tensor.nbytes for _, _, tensor in uncast_tensors(self.model) if tensor.device != self.device)
        needed = self.cache_bytes(num_tokens) + uncast
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        move_uncast(self.model, self.device)  # a partial load leaves some of them behind


LAYERS = ("Linear", "Embedding", "LayerNorm", "GroupNorm", "Conv1d", "Conv2d", "Conv3d")


def use_comfy_layers(model: torch.nn.Module) -> None:
    """Turns layers into those of `comfy.ops`, which can stay on the CPU and be cast for each use."""
    kinds = {getattr(torch.nn, name): getattr(comfy.ops.manual_cast, name) for name in LAYERS}
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
        elif isinstance(module, torch.nn.Embedding):  # one that scales what it finds (Gemma)
            module.__class__ = type(type(module).__name__, (type(module), comfy.ops.manual_cast.Embedding), {})
        if isinstance(module, torch.nn.Embedding):
            module.bias = None


def uncast_tensors(model: torch.nn.Module) -> list[tuple[dict, str, torch.Tensor]]:
    """What no layer of `comfy.ops` casts (weights of norms, positions, classes): where each is kept, its name, it."""
    return [
        (kept, name, tensor)
        for module in model.modules()
        if not hasattr(module, "comfy_cast_weights")
        for kept in (module._parameters, module._buffers)
        for name, tensor in kept.items()
        if tensor is not None
    ]


def move_uncast(model: torch.nn.Module, device: torch.device) -> None:
    for kept, name, tensor in uncast_tensors(model):
        if tensor.device != device:
            moved = tensor.detach().to(device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            kept[name] = torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved


def chat_dtype(device: torch.device) -> torch.dtype:
    if comfy.model_management.is_device_cpu(device):
        return torch.float32
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float16


class LoadWriter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadWriter",
            display_name="Load Writer",
            category=CATEGORY,
            description="Loads a language model that writes stories, describes images if it sees, and answers questions: a folder "
            "of transformers or a GGUF file of yours. Nothing is downloaded.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(chat_models()) or [NOTHING],
                    tooltip="A folder with config.json, weights and tokenizer, or a .gguf file, in models/LLM. GGUF takes the "
                    "package gguf, and is expanded to 16 bits.",
                ),
                prompts_input(),
            ],
            outputs=[WriterSocket.Output("writer_out", display_name="writer")],
        )

    @classmethod
    def validate_inputs(cls, model, prompts):
        return True  # files come and go; `execute` says which are there

    @classmethod
    def fingerprint_inputs(cls, model, prompts):
        return prompts_fingerprint(prompts)

    @classmethod
    def execute(cls, model, prompts) -> io.NodeOutput:
        path = chat_models().get(model)
        if path is None:
            raise CheckpointError(
                f"There is no language model {model!r:.80} in models/LLM; put a folder with config.json, or a .gguf file, there."
            )
        management = comfy.model_management
        load_device, offload_device = management.text_encoder_device(), management.text_encoder_offload_device()
        texts = load_prompts(prompts, prompt_folders())
        chat = load_chat_model(path, chat_dtype(load_device))
        return io.NodeOutput(ChatWriter(PatchedChat(chat, load_device, offload_device), texts))
