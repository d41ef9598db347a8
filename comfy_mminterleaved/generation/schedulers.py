"""diffusers' schedulers by name, tried before anything is drawn."""

from __future__ import annotations

import inspect

import torch

from ..errors import SettingError

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def make_scheduler(name: str, settings: dict, num_inference_steps: int | None = None):
    """A diffusers scheduler by short name or class name, with the noise schedule of `settings`.

    Args:
        num_inference_steps: If given, runs that many steps on a tiny latent first, to reject a class that needs other
            arguments, other noise or more steps before anything is drawn.

    Raises:
        SettingError: For a class that is not known or does not fit.
    """
    import diffusers

    cls = getattr(diffusers, SCHEDULERS.get(name, name), None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
        raise SettingError(f"The scheduler {name!r} is not known; use {', '.join(SCHEDULERS)} or a class of diffusers.")
    try:
        scheduler = cls.from_config(settings)
        _dry_run(cls.from_config(settings), num_inference_steps)
    except Exception:  # the classes raise errors of any type
        detail, other = "", ""
        if num_inference_steps is not None:
            detail = f" in {num_inference_steps} step{'s' * (num_inference_steps > 1)}"
            other = ", or another number of steps"
        raise SettingError(
            f"The scheduler {name!r} does not fit this model's noise{detail}; use {', '.join(SCHEDULERS)}{other}."
        ) from None
    return scheduler


def _dry_run(scheduler, num_inference_steps: int | None) -> None:
    """Runs all steps on a tiny latent; raises what the scheduler raises."""
    latents = torch.zeros(1, 1, 2, 2) * scheduler.init_noise_sigma
    if num_inference_steps is None:
        return
    scheduler.set_timesteps(num_inference_steps)
    kwargs = step_kwargs(scheduler, torch.Generator())  # of its own, so that nobody else's advances
    for t in scheduler.timesteps:
        latents = scheduler.step(scheduler.scale_model_input(latents, t), t, latents, **kwargs).prev_sample


def step_kwargs(scheduler, generators) -> dict:
    """The argument by which a scheduler's step draws noise from generators, if it draws any."""
    return {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
