"""A custom node of the tests: models of ComfyUI's own classes at toy width, with random weights, made in memory.

Stock nodes run on them as on the real ones.
"""

import contextlib
import json
import tempfile
from pathlib import Path

import comfy.clip_vision
import comfy.ldm.flux.model
import comfy.ldm.wan.vae
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.text_encoders.flux
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import torch

WIDTH = 64  # of every text encoder
CLIP = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 2 * WIDTH}
T5 = {"d_model": WIDTH, "d_ff": 2 * WIDTH, "d_kv": 32, "num_heads": 2, "num_layers": 1}
QWEN = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@torch.no_grad()
def randomize(module, seed: int):
    """Seeded weights of a scale that keeps activations alive and finite."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(values / max(1, parameter[0].numel()) ** 0.5)
        else:
            is_norm = name.endswith(("weight", "scale", "gamma"))
            parameter.copy_(float(is_norm) + 0.02 * values)
    return module


@contextlib.contextmanager
def replaced(owner, name: str, value):
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def unet_settings(**changes) -> dict:
    """Of a U-Net with two levels."""
    return {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "use_linear_in_transformer": False,
        "context_dim": WIDTH,
        **changes,
    }


@torch.no_grad()
def make_model(settings_class, settings: dict):
    config = settings_class(settings)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    randomize(model.diffusion_model, 3)
    if hasattr(model.diffusion_model, "out"):  # a U-Net's last layer, so that steps stay of the noise's size
        model.diffusion_model.out[2].weight.mul_(0.3)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return patcher(model.eval(), *devices)


def make_clip(model_class, tokenizer, options: dict):
    target = comfy.supported_models_base.ClipTarget(tokenizer, model_class)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **options}, parameters=1)
    randomize(clip.cond_stage_model, 1)
    return clip


@torch.no_grad()
def make_vae(channels: int):
    vae = randomize(comfy.taesd.taesd.TAESD(latent_channels=channels), 2)
    vae.vae_scale.fill_(1.0)
    vae.vae_shift.fill_(0.0)
    return comfy.sd.VAE(sd={name: tensor.clone() for name, tensor in vae.state_dict().items()})


def sd15():
    model = make_model(comfy.supported_models.SD15, unet_settings())
    sd1 = comfy.sd1_clip
    return model, make_clip(sd1.SD1ClipModel, sd1.SD1Tokenizer, {"clip_l_model_config": CLIP}), make_vae(4)


def sdxl():
    settings = unet_settings(
        num_classes="sequential",
        adm_in_channels=WIDTH + 6 * 256,
        context_dim=2 * WIDTH,
        use_linear_in_transformer=True,
        transformer_depth=[0, 1],
        transformer_depth_output=[0, 0, 1, 1],
    )
    options = {"clip_l_model_config": CLIP, "clip_g_model_config": dict(CLIP)}
    clip = make_clip(comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, options)
    return make_model(comfy.supported_models.SDXL, settings), clip, make_vae(4)


def flux():
    settings = {
        "image_model": "flux",
        "guidance_embed": True,
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": WIDTH,
        "context_in_dim": WIDTH,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
    }
    fields = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
    newer = {"txt_ids_dims": []}  # of newer cores
    settings |= {name: value for name, value in newer.items() if name in fields}
    encoders = comfy.text_encoders.flux
    options = {"clip_l_model_config": CLIP, "t5xxl_model_config": T5}
    clip = make_clip(encoders.flux_clip(), encoders.FluxTokenizer, options)
    return make_model(comfy.supported_models.Flux, settings), clip, make_vae(16)


def qwen():
    settings = {
        "image_model": "qwen_image",
        "in_channels": 64,
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (8, 12, 12),
    }
    vision, wan = comfy.text_encoders.qwen_vl, comfy.ldm.wan.vae
    whole_vision, whole_vae = vision.Qwen2VLVisionTransformer, wan.WanVAE

    def narrow_vision(*args, **kwargs):
        return whole_vision(
            *args, **{**kwargs, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_layers": 1}
        )

    with replaced(vision, "Qwen2VLVisionTransformer", narrow_vision):
        encoders = comfy.text_encoders.qwen_image
        clip = make_clip(encoders.te(), encoders.QwenImageTokenizer, {"qwen25_7b_model_config": QWEN})
    sizes = {
        "dim": 4,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
    }
    weights = randomize(whole_vae(**sizes), 4).state_dict()
    with replaced(wan, "WanVAE", lambda **kwargs: whole_vae(**{**kwargs, "dim": 4})):
        vae = comfy.sd.VAE(sd=weights)
    return make_model(comfy.supported_models.QwenImage, settings), clip, vae


FAMILIES = {"sd15": sd15, "sdxl": sdxl, "flux": flux, "qwen": qwen}


class TinyModel:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (list(FAMILIES),)}}

    def make(self, family):
        return FAMILIES[family]()


class TinyClipVision:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP_VISION",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        config = {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": WIDTH,
            "image_size": 32,
            "intermediate_size": 2 * WIDTH,
            "layer_norm_eps": 1e-5,
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 3,
            "patch_size": 8,
            "projection_dim": 32,
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip_vision.json"
            path.write_text(json.dumps(config))
            clip_vision = comfy.clip_vision.ClipVisionModel(str(path))
        randomize(clip_vision.model, 5)
        return (clip_vision,)


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel, "TinyClipVision": TinyClipVision}
