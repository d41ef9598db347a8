"""Headless diffusion: diffusers' U-Net, VAE and schedulers, with the synchronizer at the U-Net's sites.

The U-Net is not changed: hooks on its up blocks replace, for the time of a drawing, what these are given.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageOps

from ..errors import SettingError
from ..models.unet_synchronizer import Decoder, PreparedSites
from ..stories.images import to_pil, to_pixels

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}

OnStep = Callable[[int, int, Callable[[], torch.Tensor]], object]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; the defaults are those of the reference's inference.

    steps: of the scheduler. guidance: classifier-free, 1 for none. scheduler: a name in SCHEDULERS or a class of
    diffusers. seed: of the first picture; a story's k-th picture has seed + k. size: (width, height) in px, None for
    the size the model was trained at. look_back: how many of the pictures before are looked at, None for as many as
    the model is used to.
    strength: of the synchronizer, between the steps `start` and `end` (fractions of the steps).
    denoise: with a picture to start from, how much of the noising is done over; 1 forgets it.
    """

    steps: int = 30
    guidance: float = 7.5
    scheduler: str = "ddpm"
    seed: int = 0
    size: tuple[int, int] | None = None
    look_back: int | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    denoise: float = 1.0

    def __post_init__(self):
        for name, low, high in (
            ("steps", 1, 1000),
            ("guidance", 1.0, 100.0),
            ("seed", 0, 2**63 - 1),
            ("look_back", 0, 1000),
            ("strength", -10.0, 10.0),
            ("start", 0.0, 1.0),
            ("end", 0.0, 1.0),
        ):
            if getattr(self, name) is not None and not low <= getattr(self, name) <= high:
                raise SettingError(f"{name} must be at least {low} and at most {high}, not {getattr(self, name)}.")
        if not 0 < self.denoise <= 1:
            raise SettingError(f"denoise must be over 0 and at most 1, not {self.denoise}.")

    def plus(self, seed: int) -> Drawing:
        """The same settings with `seed` added to their own."""
        return replace(self, seed=self.seed + seed)


def make_scheduler(name: str, settings: dict, steps: int | None = None):
    """A diffusers scheduler by short name or class name, over the noise schedule of `settings`.

    Args:
        steps: if given, so many are tried first, on a latent of a few values: classes that need other arguments, other
            noise or more steps are found before anything is drawn.

    Raises SettingError for a class that is not known or does not fit.
    """
    import diffusers

    cls = getattr(diffusers, SCHEDULERS.get(name, name), None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
        raise SettingError(f"The scheduler {name!r} is not known; use {', '.join(SCHEDULERS)} or a class of diffusers.")
    try:
        scheduler = cls.from_config(settings)
        _try(cls.from_config(settings), steps)
    except Exception:  # whatever it is that a class of diffusers says, and of whatever type
        tried, other = "", ""
        if steps is not None:
            tried, other = f" in {steps} step{'s' * (steps > 1)}", ", or another number of steps"
        raise SettingError(
            f"The scheduler {name!r} does not fit this model's noise{tried}; use {', '.join(SCHEDULERS)}{other}."
        ) from None
    return scheduler


def _try(scheduler, steps: int | None) -> None:
    """Goes through a drawing's steps with next to nothing to draw; raises what the scheduler raises."""
    latents = torch.zeros(1, 1, 2, 2) * scheduler.init_noise_sigma
    if steps is None:
        return
    scheduler.set_timesteps(steps)
    chance = _chance(scheduler, torch.Generator())  # of its own, so that nobody else's goes on
    for t in scheduler.timesteps:
        latents = scheduler.step(scheduler.scale_model_input(latents, t), t, latents, **chance).prev_sample


def _chance(scheduler, generators) -> dict:
    """The argument by which a scheduler's step draws noise from generators, if it draws any."""
    return {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}


def picture_multiple(unet, vae) -> int:
    """What both sides of a picture must be a multiple of, so that every skip has a whole size."""
    return vae_factor(vae) * 2 ** (len(unet.config.block_out_channels) - 1)


def vae_factor(vae) -> int:
    widths = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(widths) - 1)


@contextlib.contextmanager
def sites_attached(unet, decoder: Decoder, prepared: PreparedSites, strength: float = 1.0):
    """Within it, the U-Net's mid output and skips pass through the sites; `active` on the yielded object switches it.

    Raises SettingError if the U-Net has another number of skips than the decoder has sites for.
    """
    switch = _Switch()
    counts = [len(block.resnets) for block in unet.up_blocks]
    if sum(counts) != len(decoder.skip_sites):
        raise SettingError(
            f"The U-Net has {sum(counts)} skips, but the synchronizer has sites for {len(decoder.skip_sites)}."
        )

    def hook(index: int, first_skip: int):
        def before_up_block(_, args, kwargs):
            if not switch.active:
                return None
            kwargs = dict(kwargs)
            if index == 0:  # what comes in is the mid output
                kwargs["hidden_states"] = decoder.site(
                    len(decoder.skip_sites), kwargs["hidden_states"], prepared, strength
                )
            skips = enumerate(kwargs["res_hidden_states_tuple"], first_skip)
            kwargs["res_hidden_states_tuple"] = tuple(decoder.site(i, skip, prepared, strength) for i, skip in skips)
            return args, kwargs

        return before_up_block

    handles, left = [], sum(counts)
    for index, (block, count) in enumerate(zip(unet.up_blocks, counts)):
        left -= count
        handles.append(block.register_forward_pre_hook(hook(index, left), with_kwargs=True))
    try:
        yield switch
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Switch:
    active: bool = True


@torch.no_grad()
def draw(
    unet,
    vae,
    scheduler,
    decoder: Decoder,
    states,
    prepared: PreparedSites,
    settings: Drawing,
    seeds: list[int],
    size: tuple[int, int],
    begin: list[torch.Tensor] | None = None,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Denoises pictures.

    Args:
        unet, vae, scheduler: diffusers'.
        states: (N, queries, width), from `Decoder.condition`.
        prepared: from `Decoder.prepare`, N rows.
        seeds: of each picture's noise, drawn on the CPU so that it does not depend on the device or the batch.
        size: (width, height) in px.
        begin: pictures (3, H, W) to start from, with `settings.denoise`.
        on_step: called with the step, from 1, their number, and a function that gives cheap previews (N, 3, h, w).

    Returns:
        (N, 3, height, width) float32 in [0, 1].
    """
    device, dtype, n = unet.device, unet.dtype, len(states)
    guided = settings.guidance > 1
    if guided:
        states = torch.cat([decoder.negative.expand_as(states), states])
    states = states.to(device, dtype)
    generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]

    scheduler.set_timesteps(settings.steps, device=device)
    timesteps = scheduler.timesteps
    factor = vae_factor(vae)
    shape = (unet.config.in_channels, size[1] // factor, size[0] // factor)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device, dtype)
    if begin is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        skipped = settings.steps - max(1, round(settings.steps * settings.denoise))
        timesteps = timesteps[skipped * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped * scheduler.order)
        known = encode_latents(vae, torch.stack([_fit(picture, size) for picture in begin])).to(device, dtype)
        latents = scheduler.add_noise(known, noise, timesteps[:1].repeat(n))

    chance = _chance(scheduler, generators)
    with sites_attached(unet, decoder, prepared, settings.strength) as sites:
        for step, t in enumerate(timesteps):
            sites.active = settings.strength != 0 and settings.start <= step / len(timesteps) < settings.end
            x = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
            predicted = unet(x, t, encoder_hidden_states=states, return_dict=False)[0]
            if guided:
                negative, positive = predicted.chunk(2)
                predicted = negative + settings.guidance * (positive - negative)
            result = scheduler.step(predicted, t, latents, **chance)
            latents = result.prev_sample
            if on_step is not None:
                clean = getattr(result, "pred_original_sample", None)
                on_step(step + 1, len(timesteps), lambda x=latents if clean is None else clean: preview(vae, x))
    return decode_latents(vae, latents)


def encode_latents(vae, pictures) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1] -> latents as the U-Net takes them."""
    encoded = vae.encode(pictures.to(vae.device, vae.dtype) * 2 - 1)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents * vae.config.scaling_factor


def decode_latents(vae, latents) -> torch.Tensor:
    """The inverse: (N, 3, H, W) float32 in [0, 1]."""
    pictures = vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample
    return (pictures / 2 + 0.5).clamp(0, 1).float()


def _fit(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of a picture in another size."""
    return to_pixels(ImageOps.fit(to_pil(picture), size, Image.Resampling.LANCZOS))


@torch.no_grad()
def preview(vae, latents) -> torch.Tensor:
    """Latents -> small pictures (N, 3, h, w) in [0, 1], one pixel a latent, by a linear map.

    The map is fitted to the VAE once, on a picture of colour patches, and kept with it: no table of any one VAE.
    """
    fitted = getattr(vae, "_preview_map", None)
    if fitted is None:
        colours = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
        patches = colours.repeat_interleave(vae_factor(vae), 1).repeat_interleave(vae_factor(vae), 2)
        known = encode_latents(vae, patches.unsqueeze(0))[0].flatten(1).T.float().cpu()
        known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
        fitted = vae._preview_map = torch.linalg.lstsq(known, colours.flatten(1).T).solution
    weight, bias = fitted[:-1].to(latents.device), fitted[-1].to(latents.device)
    return (latents.float().movedim(1, -1) @ weight + bias).movedim(-1, 1).clamp(0, 1)
