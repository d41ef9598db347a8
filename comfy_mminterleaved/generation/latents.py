"""Images <-> latents of diffusers' VAEs, and cheap previews."""

from __future__ import annotations

import torch


def vae_scale_factor(vae) -> int:
    channels = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(channels) - 1)


def image_size_multiple(unet, vae) -> int:
    """What both sides of an image must be a multiple of, so that every skip has a whole size."""
    return vae_scale_factor(vae) * 2 ** (len(unet.config.block_out_channels) - 1)


def encode_latents(vae, images) -> torch.Tensor:
    """`(N, 3, H, W)` in [0, 1] -> latents as the U-Net takes them."""
    encoded = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents * vae.config.scaling_factor


def decode_latents(vae, latents) -> torch.Tensor:
    """The inverse, one image after the other, so that memory does not grow: `(N, 3, H, W)` float32 in [0, 1]."""
    latents = (latents / vae.config.scaling_factor).to(vae.device, vae.dtype)
    if latents.device.type == "cpu":  # convolutions are faster there with channels last
        latents = latents.contiguous(memory_format=torch.channels_last)
    return torch.cat([(vae.decode(x).sample / 2 + 0.5).clamp(0, 1).float() for x in latents.split(1)]).contiguous()


def fit_latent_rgb(encode, scale_factor: int) -> torch.Tensor:
    """Linear map `(latent_channels + 1, 3)` from latents and a one to RGB in [0, 1], fitted on colour patches.

    Args:
        encode: `(1, 3, H, W)` in [0, 1] -> latents `(1, C, h, w)`.
        scale_factor: H / h.
    """
    colours = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    patches = colours.repeat_interleave(scale_factor, 1).repeat_interleave(scale_factor, 2)
    latents = encode(patches.unsqueeze(0))[0].flatten(1).T.float().cpu()
    latents = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    return torch.linalg.lstsq(latents, colours.flatten(1).T).solution


@torch.no_grad()
def latents_to_rgb(vae, latents) -> torch.Tensor:
    """Latents -> small images `(N, 3, h, w)` in [0, 1], one pixel per latent; the map is fitted to the VAE once."""
    factors = getattr(vae, "_latent_rgb", None)
    if factors is None:
        factors = vae._latent_rgb = fit_latent_rgb(lambda x: encode_latents(vae, x), vae_scale_factor(vae))
    weight, bias = factors[:-1].to(latents.device), factors[-1].to(latents.device)
    return (latents.float().movedim(1, -1) @ weight + bias).movedim(-1, 1).clamp(0, 1)
