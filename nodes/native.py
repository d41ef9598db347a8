"""The diffusion decoder as ComfyUI's own MODEL and VAE, from diffusers' weights of any width."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch

from ..comfy_mminterleaved.config import Config, skip_channels
from ..comfy_mminterleaved.errors import CheckpointError
from ..comfy_mminterleaved.generation.latents import fit_latent_rgb

MODEL_TYPES = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
}


def unet_config_from_diffusers(unet: dict) -> dict:
    """ComfyUI's settings of a diffusers UNet2DConditionModel; raises CheckpointError for one that it cannot hold."""
    widths, heads = unet["block_out_channels"], unet.get("attention_head_dim", 8)
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    head_widths = {width // count for width, count in zip(widths, heads)}
    per_block = unet.get("layers_per_block", 2)
    per_block = [per_block] * len(widths) if isinstance(per_block, int) else list(per_block)
    if len(head_widths) != 1 or unet.get("norm_num_groups", 32) != 32 or any(w % widths[0] for w in widths):
        raise CheckpointError(
            "ComfyUI's U-Net has 32 norm groups, one head width and widths that are multiples of the first; this has "
            f"{unet.get('norm_num_groups', 32)} groups, head widths {sorted(head_widths)} and widths {list(widths)}."
        )
    down = [int("CrossAttn" in kind) for kind in unet["down_block_types"]]
    up = [int("CrossAttn" in kind) for kind in reversed(unet["up_block_types"])]
    return {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "in_channels": unet.get("in_channels", 4),
        "out_channels": unet.get("out_channels", 4),
        "model_channels": widths[0],
        "num_res_blocks": per_block,
        "channel_mult": [w // widths[0] for w in widths],
        "transformer_depth": [depth for depth, count in zip(down, per_block) for _ in range(count)],
        "transformer_depth_output": [depth for depth, count in zip(up, per_block) for _ in range(count + 1)],
        "transformer_depth_middle": 1,
        "context_dim": unet["cross_attention_dim"],
        "adm_in_channels": None,
        "use_linear_in_transformer": unet.get("use_linear_projection", False),
        "use_temporal_attention": False,
        "num_heads": -1,
        "num_head_channels": head_widths.pop(),
    }


def load_unet(config: Config, tensors: dict[str, torch.Tensor]):
    """A MODEL of the config's U-Net."""
    management = comfy.model_management
    settings = unet_config_from_diffusers(config.unet)
    scale = config.vae.get("scaling_factor", 0.18215)

    class Settings(comfy.supported_models.SD20):
        unet_config = {}
        unet_extra_config = {"attn_precision": torch.float32}

    # Noise schedule and latents of its own; the rest is Stable Diffusion 2.
    model_config = Settings(settings)
    model_config.latent_format = comfy.latent_formats.SD15(scale)
    model_config.latent_format.latent_channels = settings["in_channels"]
    model_config.sampling_settings = {
        "linear_start": config.scheduler.get("beta_start", 0.00085),
        "linear_end": config.scheduler.get("beta_end", 0.012),
    }
    device = management.get_torch_device()
    parameters = comfy.utils.calculate_parameters(tensors)
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=model_config.supported_inference_dtypes)
    cast = management.unet_manual_cast(dtype, device, model_config.supported_inference_dtypes)
    model_config.set_inference_dtype(dtype, cast)
    names = comfy.utils.unet_to_diffusers(settings)
    missing = sorted(set(tensors) - set(names))
    if missing:
        raise CheckpointError(f"ComfyUI's U-Net has no place for {len(missing)} weights, the first {missing[0]!r}.")
    predicts = MODEL_TYPES[config.scheduler.get("prediction_type", "epsilon")]
    model = comfy.model_base.BaseModel(model_config, predicts, device=None)
    model.diffusion_model.load_state_dict({names[k]: t.to(dtype) for k, t in tensors.items()}, strict=True)
    offload = management.unet_offload_device()
    make = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return make(model.to(offload).eval(), load_device=device, offload_device=offload)


def load_vae(config: Config, tensors: dict[str, torch.Tensor]):
    """A VAE of the config's kind: AutoencoderKL, or AutoencoderTiny as ComfyUI's TAESD."""
    if config.vae.get("_class_name") == "AutoencoderTiny":
        # TAESD's decoder has one layer more in front, the clamp.
        tensors = {_taesd_name(name): tensor for name, tensor in tensors.items()}
        tensors |= {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    vae = comfy.sd.VAE(sd={name: tensor.float() for name, tensor in tensors.items()})
    vae.throw_exception_if_invalid()
    return vae


def set_preview_factors(model, vae) -> None:
    """Fits a linear map from latents to colours, for live previews of a MODEL whose VAE is not Stable Diffusion's."""
    latent_format = model.model.latent_format
    factors = fit_latent_rgb(lambda x: latent_format.process_in(vae.encode(x.movedim(1, -1))), 8)
    factors[-1] -= 0.5
    latent_format.latent_rgb_factors = (2 * factors[:-1]).tolist()
    latent_format.latent_rgb_factors_bias = (2 * factors[-1]).tolist()


def _taesd_name(name: str) -> str:
    side, _, number, suffix = name.split(".", 3)
    return f"taesd_{side}.{int(number) + (side == 'decoder')}.{suffix}"


def skip_channels_of(model) -> list[int] | None:
    """Channels of the skips of a MODEL's U-Net in the order they are made, then of its middle block; None without."""
    settings = getattr(model.model.model_config, "unet_config", {})
    if not hasattr(model.model.diffusion_model, "output_blocks") or "channel_mult" not in settings:
        return None
    channels = [settings["model_channels"] * multiple for multiple in settings["channel_mult"]]
    return list(skip_channels(channels, settings["num_res_blocks"]))
