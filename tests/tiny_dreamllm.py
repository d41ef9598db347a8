"""A DreamLLM of toy width with random weights, in the files and under the names of the official one."""

import json
from pathlib import Path

import torch

IDS = {"<im_patch>": 61, "<im_start>": 62, "<im_end>": 63, "<dream>": 64, "<dream_start>": 65, "<dream_end>": 66}
NUM_QUERIES = 5


def make_dreamllm(folder: Path, unet: dict, vae: dict, scheduler: dict, as_bins: bool = True) -> dict:
    """Writes the folder; returns transformers' Llama and CLIP, and the parts of its own.

    Args:
        unet, vae, scheduler: Configurations of diffusers.
        as_bins: Whether the three parts have files of their own; else they are among the LLM's tensors.
    """
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from comfy_mminterleaved.models.build import diffusers_model

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
        )
    ).eval()
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=4,
            num_attention_heads=1,
            image_size=16,
            patch_size=4,
            hidden_act="quick_gelu",
        )
    ).eval()
    for module in (llama, clip):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    blocks = diffusers_model(unet), diffusers_model(vae)
    parts = {
        "dream_embedding": {"dream_queries": torch.randn(1, NUM_QUERIES, 32)},
        "clip_vision_embedding": {
            **{f"clip_vision_model.{_official(name)}": tensor for name, tensor in clip.state_dict().items()},
            "projector.projector.weight": torch.randn(32, 64) * 0.2,
            "projector.projector.bias": torch.randn(32),
        },
        "stable_diffusion_head": {
            **{
                f"{name}.{key}": t
                for name, block in zip(("unet", "vae"), blocks)
                for key, t in block.state_dict().items()
            },
            "projector.projector.weight": torch.randn(unet["cross_attention_dim"], 32) * 0.5,
        },
    }
    folder.mkdir(parents=True)
    config = {
        "model_type": "dreamllm",
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 60,
        "special_tokens2ids_dict": {"additional_special_tokens": IDS},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: tensor.clone() for name, tensor in llama.state_dict().items() if "rotary" not in name}
    if as_bins:
        for name, part in parts.items():
            torch.save(part, folder / f"{name}.bin")
    else:
        tensors |= {f"{name}.{key}": t for name, part in parts.items() for key, t in part.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    for name, settings in (("unet/config", unet), ("vae/config", vae), ("scheduler/scheduler_config", scheduler)):
        path = folder / "sd" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    return {"llama": llama, "clip": clip, **parts}


def _official(name: str) -> str:
    """A tensor's name in the transformers that DreamLLM was made with; newer ones have no `vision_model` before it."""
    return name if name.startswith("vision_model.") else f"vision_model.{name}"
