"""ImageGenerator: headless diffusion with diffusers' U-Net, VAE and schedulers, MMFS attached to the U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import Config
from ..errors import SettingError
from ..models.gmail_adapter import DRAWN
from ..models.unet_synchronizer import UNetImageValues, UNetSynchronizer
from ..stories.images import fit_image
from ..stories.story import ImageSegment, Story
from .config import ImageGenerationConfig, OnStep
from .latents import decode_latents, encode_latents, image_size_multiple, latents_to_rgb, vae_scale_factor
from .schedulers import make_scheduler, step_kwargs
from .unet_hooks import attach_mmfs


class ImageGenerator:
    """Draws images from LLM context and earlier images."""

    def __init__(self, config: Config, synchronizer: UNetSynchronizer, unet, vae):
        self.config, self.synchronizer, self.unet, self.vae = config, synchronizer, unet, vae

    def check(self, config: ImageGenerationConfig):
        """The scheduler and the size `(width, height)` of images to draw; raises SettingError."""
        max_images = self.config.synchronizer.mmfs.max_num_image_per_seq - 1
        if self.num_context_images(config) > max_images:
            raise SettingError(
                f"num_context_images must be at most {max_images} for this model, not {config.num_context_images}."
            )
        scheduler = make_scheduler(config.scheduler, self.config.scheduler, config.num_inference_steps)
        return scheduler, self.check_image_size(config.size)

    def num_context_images(self, config: ImageGenerationConfig) -> int:
        default = self.config.synchronizer.num_context_images
        return default if config.num_context_images is None else config.num_context_images

    def check_image_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """A checked `(width, height)`, the model's own for None; raises SettingError."""
        if size is None:
            return (self.config.synchronizer.image_size,) * 2
        unit = image_size_multiple(self.unet, self.vae)
        if min(size) < unit or any(side % unit for side in size) or max(size) > 4096:
            raise SettingError(f"The image size {size[0]} x {size[1]} must be in multiples of {unit} px, up to 4096.")
        return tuple(size)

    def context_feature_maps(self, stories: Sequence[Story], count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Feature maps `(N, P, C, h, w)` and mask `(N, P)` of the last `count` images of encoded stories."""
        images = [story.images[-count:] if count else () for story in stories]
        longest = max(map(len, images))
        c, sizes = self.config.synchronizer, self.config.encoder.feature_map_sizes
        like = self.synchronizer.conditioner.neg_prompt_embeds
        maps = [like.new_zeros(len(stories), longest, c.mmfs.d_value, size, size) for size in sizes]
        mask = torch.zeros(len(stories), longest, dtype=torch.bool, device=like.device)
        for i, row in enumerate(images):
            mask[i, : len(row)] = True
            for j, image in enumerate(row):
                for level, feature_map in zip(maps, image.features.feature_maps):
                    level[i, j] = feature_map
        return maps, mask

    @torch.no_grad()
    def generate(
        self,
        stories: Sequence[Story],
        context: Sequence[torch.Tensor] | None,
        config: ImageGenerationConfig,
        num_outputs: int = 1,
        init_images: Sequence[ImageSegment] | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 8,
        seeds: Sequence[int] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> list[list[ImageSegment]]:
        """Draws `num_outputs` images for each story, independent of the other stories.

        Args:
            stories: Their images carry features.
            context: LLM hidden states of each story (`TextGenerator.context_features`); None with `prompt_embeds`.
            init_images: An image to start from for each story, with `config.denoise`.
            on_step: Called with the step from 1, their number, and a function that returns a small preview.
            batch_size: How many images share a pass of the U-Net; memory grows with it, results do not change.
            seeds: Of each story's first image, instead of `config.seed` for all.
            prompt_embeds: `(N, num_queries, C)`, instead of those of the context.
            negative_prompt_embeds: `(1, num_queries, C)` for guidance, instead of those of the synchronizer.
        """
        seeds = [config.seed] * len(stories) if seeds is None else seeds
        scheduler, size = self.check(config)
        if prompt_embeds is None:
            prompt_embeds = self.synchronizer.conditioner.prompt_embeds(list(context))
        jobs = [(i, seed + k) for i, seed in enumerate(seeds) for k in range(num_outputs)]
        images = []
        for start in range(0, len(jobs), batch_size):
            rows, row_seeds = map(list, zip(*jobs[start : start + batch_size]))
            maps, mask = self.context_feature_maps([stories[i] for i in rows], self.num_context_images(config))
            pixels = denoise(
                self.unet,
                self.vae,
                scheduler,
                self.synchronizer,
                prompt_embeds[rows],
                self.synchronizer.mmfs_module.project_images(maps, mask),
                config,
                row_seeds,
                size,
                [init_images[i].pixels for i in rows] if init_images else None,
                on_step,
                negative_prompt_embeds,
            )
            images += [
                ImageSegment(image.cpu(), seed=seed % 2**63, origin=DRAWN) for image, seed in zip(pixels, row_seeds)
            ]
        return [images[i : i + num_outputs] for i in range(0, len(images), num_outputs)]


@torch.no_grad()
def denoise(
    unet,
    vae,
    scheduler,
    synchronizer: UNetSynchronizer,
    prompt_embeds,
    image_values: UNetImageValues,
    config: ImageGenerationConfig,
    seeds: Sequence[int],
    size: tuple[int, int],
    init_images: Sequence[torch.Tensor] | None = None,
    on_step: OnStep | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the diffusion loop for N images.

    Args:
        unet, vae, scheduler: diffusers'.
        prompt_embeds: `(N, num_queries, cross_attention_dim)`.
        image_values: From `MMFSNet.project_images`, N rows.
        seeds: Of each image's noise, drawn on the CPU so that it does not depend on the device or the batch.
        size: `(width, height)` in px.
        init_images: Images `(3, H, W)` to start from, with `config.denoise`.
        negative_prompt_embeds: `(1, num_queries, cross_attention_dim)`; None for the synchronizer's.

    Returns:
        `(N, 3, height, width)` float32 in [0, 1].
    """
    device, dtype, n = unet.device, unet.dtype, len(prompt_embeds)
    do_guidance = config.guidance_scale > 1
    if do_guidance:
        if negative_prompt_embeds is None:
            negative_prompt_embeds = synchronizer.conditioner.neg_prompt_embeds
        negative_prompt_embeds = negative_prompt_embeds.to(prompt_embeds).expand_as(prompt_embeds)
        prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
    prompt_embeds = prompt_embeds.to(device, dtype)
    generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]

    scheduler.set_timesteps(config.num_inference_steps, device=device)
    timesteps = scheduler.timesteps
    factor = vae_scale_factor(vae)
    shape = (unet.config.in_channels, size[1] // factor, size[0] // factor)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device, dtype)
    if init_images is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        skipped = config.num_inference_steps - max(1, round(config.num_inference_steps * config.denoise))
        timesteps = timesteps[skipped * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped * scheduler.order)
        clean = encode_latents(vae, torch.stack([fit_image(image, size) for image in init_images])).to(device, dtype)
        latents = scheduler.add_noise(clean, noise, timesteps[:1].repeat(n))

    kwargs = step_kwargs(scheduler, generators)
    with attach_mmfs(unet, synchronizer.mmfs_module, image_values, config.mmfs_scale) as mmfs:
        for step, t in enumerate(timesteps):
            mmfs.value = config.mmfs_scale != 0 and config.mmfs_start <= step / len(timesteps) < config.mmfs_end
            x = scheduler.scale_model_input(torch.cat([latents, latents]) if do_guidance else latents, t)
            pred = unet(x, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
            if do_guidance:
                negative, positive = pred.chunk(2)
                pred = negative + config.guidance_scale * (positive - negative)
            result = scheduler.step(pred, t, latents, **kwargs)
            latents = result.prev_sample
            if on_step is not None:
                clean = getattr(result, "pred_original_sample", None)
                on_step(step + 1, len(timesteps), lambda x=latents if clean is None else clean: latents_to_rgb(vae, x))
    return decode_latents(vae, latents)
