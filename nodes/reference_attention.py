"""Self-attention that also attends to reference images: for U-Nets that take no reference latents (SD 1.5, SDXL).

Known as reference-only control. At each step the U-Net also runs on the references, noised as far as the image is, and its
self-attentions then have the references' hidden states among their keys and values. No weights; each reference costs one
more pass.
"""

from __future__ import annotations

import comfy.patcher_extension
import torch

KEY = "mm_interleaved_references"


def has_self_attention(model) -> bool:
    """Whether a MODEL's self-attentions can be patched with `set_model_attn1_patch`."""
    modules = model.model.diffusion_model.modules()
    return any(hasattr(module, "attn1") and hasattr(module, "attn2") for module in modules)


def attend_to_references(model, latents: list[torch.Tensor], strength: float, start: float, end: float):
    """A clone of MODEL that attends to references.

    Each row of the batch attends to references that were run with its own conditioning, so it does not matter which half
    of guidance comes first, or whether they come together.

    Args:
        latents: `(1, C, h, w)` each, as the VAE encodes them; their sizes may differ from the image's.
        strength: Share of a reference's positions that are attended to, evenly spaced, up to 1; 0 for the plain model.
        start, end: When it begins and ends, as fractions of the sampling.
    """
    patched = model.clone()
    if strength <= 0 or start >= end or not latents:
        return patched
    sampling = model.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    clean = [model.model.process_latent_in(latent) for latent in latents]
    noise = [torch.randn(latent.shape, generator=torch.Generator().manual_seed(n)) for n, latent in enumerate(clean)]

    def patch(hidden, context, value, options):
        state = options.get(KEY)
        if state is None:
            return hidden, context, value
        place = options["block"], options["block_index"]
        if state["is_recording"]:
            count = max(1, round(strength * hidden.shape[1]))
            chosen = torch.linspace(0, hidden.shape[1] - 1, count, device=hidden.device).round().long()
            state["hidden"].setdefault(place, []).append(hidden[:, chosen])
            return hidden, context, value
        seen = state["hidden"].get(place, [])
        return hidden, torch.cat([context, *seen], dim=1), torch.cat([value, *seen], dim=1)

    def around_model(executor, x, timesteps, context=None, y=None, control=None, transformer_options=None, **kwargs):
        sigma = transformer_options["sigmas"].max()
        if not last < float(sigma) <= first:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        state = {"is_recording": True, "hidden": {}}
        options = {**transformer_options, KEY: state}
        for latent, seed_noise in zip(clean, noise):
            latent, seed_noise = latent.to(sigma), seed_noise.to(sigma)
            noised = sampling.noise_scaling(sigma.reshape(1, 1, 1, 1), seed_noise, latent)
            scaled = sampling.calculate_input(sigma.reshape(1), noised).to(x.dtype)
            executor(scaled.expand(x.shape[0], -1, -1, -1), timesteps, context, y, None, options, **kwargs)
        state["is_recording"] = False
        return executor(x, timesteps, context, y, control, options, **kwargs)

    patched.set_model_attn1_patch(patch)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, around_model)
    return patched
