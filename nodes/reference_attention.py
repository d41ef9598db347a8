"""Self-attention that also attends to reference images: for U-Nets that take no reference latents (SD 1.5, SDXL).

Known as reference-only control. At each step the U-Net also runs on the references, noised as far as the image is, and its
self-attentions then have the references' hidden states among their keys and values. No weights; each reference costs one
more pass.
"""

from __future__ import annotations

import comfy.patcher_extension
import torch

KEY = "mm_interleaved_references"
POSITIVE, NEGATIVE = 0, 1  # in `cond_or_uncond`, which says what the rows of a batch are


def has_self_attention(model) -> bool:
    """Whether a MODEL's self-attentions can be patched with `set_model_attn1_patch`."""
    modules = model.model.diffusion_model.modules()
    return any(hasattr(module, "attn1") and hasattr(module, "attn2") for module in modules)


def attend_to_references(
    model, latents: list[torch.Tensor], strength: float, fidelity: float, start: float, end: float
):
    """A clone of MODEL that attends to references.

    Each row of the batch attends to references that were run with its own conditioning, so it does not matter which half
    of guidance comes first, or whether they come together.

    Args:
        latents: `(1, C, h, w)` each, as the VAE encodes them; their sizes may differ from the image's.
        strength: Share of a reference's positions that are attended to, evenly spaced, up to 1; 0 for the plain model.
        fidelity: How much of the negative half of guidance is the plain model's, up to 1; guidance amplifies the
            references by what the halves differ in. Between 0 and 1 it costs one more pass. Known as style fidelity.
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

    def attending(executor, sigma, x, timesteps, context, y, control, options, **kwargs):
        """The model's output with the references among the keys and values."""
        state = {"is_recording": True, "hidden": {}}
        options = {**options, KEY: state}
        for latent, seed_noise in zip(clean, noise):
            latent, seed_noise = latent.to(sigma), seed_noise.to(sigma)
            noised = sampling.noise_scaling(sigma.reshape(1, 1, 1, 1), seed_noise, latent)
            scaled = sampling.calculate_input(sigma.reshape(1), noised).to(x.dtype)
            executor(scaled.expand(x.shape[0], -1, -1, -1), timesteps, context, y, None, options, **kwargs)
        state["is_recording"] = False
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def around_model(executor, x, timesteps, context=None, y=None, control=None, transformer_options=None, **kwargs):
        sigma = transformer_options["sigmas"].max()
        inputs = {"timesteps": timesteps, "context": context, "y": y, "control": control, **kwargs}
        halves = transformer_options.get("cond_or_uncond") or [POSITIVE]
        if not last < float(sigma) <= first:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        if fidelity <= 0 or NEGATIVE not in halves:
            return attending(executor, sigma, x, options=transformer_options, **inputs)
        outputs, size = [], x.shape[0] // len(halves)
        for number, half in enumerate(halves):
            rows = slice(number * size, (number + 1) * size)
            options = dict(transformer_options)
            options |= {"cond_or_uncond": [half], "sigmas": of_rows(options["sigmas"], rows, x.shape[0])}
            if "uuids" in options:
                options["uuids"] = options["uuids"][number : number + 1]
            out = 0.0
            if half != NEGATIVE or fidelity < 1:
                out = attending(executor, sigma, x[rows], options=options, **of_rows(inputs, rows, x.shape[0]))
            if half == NEGATIVE:
                part = of_rows(inputs, rows, x.shape[0])  # anew: the U-Net empties ControlNet's lists
                names = ("timesteps", "context", "y", "control")
                others = {name: value for name, value in part.items() if name not in names}
                plain = executor(x[rows], *(part[name] for name in names), options, **others)
                out = fidelity * plain + (1 - fidelity) * out
            outputs.append(out)
        return torch.cat(outputs)

    patched.set_model_attn1_patch(patch)
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, around_model)
    return patched


def of_rows(value, rows: slice, batch_size: int):
    """Some rows of everything in a structure of tensors that has one for each row of the batch."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch_size else value
    if isinstance(value, dict):
        return {key: of_rows(each, rows, batch_size) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(of_rows(each, rows, batch_size) for each in value)
    return value
