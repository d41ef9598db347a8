"""Apply Synchronizer: the story becomes a stock sampler's conditioning, its images a patch of the U-Net."""

from __future__ import annotations

import math

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.memory import sampling_bytes
from ..comfy_mminterleaved.stories.story import Story
from .blocks import PatchedLLM, PatchedSynchronizer, detach_other_patches
from .native import skip_channels_of
from .types import (
    CATEGORY,
    CONTEXT_IMAGES,
    DreamSocket,
    LLMSocket,
    StorySocket,
    SynchronizerSocket,
    advanced,
    drop_oldest_input,
    former,
    model_default_input,
    search_aliases,
    strength_input,
)

KEY = "mm_interleaved"


def check_blocks(llm: PatchedLLM, synchronizer: PatchedSynchronizer, model) -> None:
    """Raises SettingError for blocks that do not belong together."""
    c = synchronizer.config.synchronizer
    if llm.config.llm.hidden_size != c.llm_hidden_size:
        raise SettingError(
            f"The LLM has width {llm.config.llm.hidden_size}, but the synchronizer was made for an LLM of width "
            f"{c.llm_hidden_size}; use an LLM and a synchronizer of the same model."
        )
    check_unet(synchronizer, model)


def check_unet(synchronizer: PatchedSynchronizer, model) -> None:
    """Raises SettingError for a U-Net that the synchronizer was not made for."""
    c = synchronizer.config.synchronizer
    channels = skip_channels_of(model)
    if channels is None:
        raise SettingError(
            f"The MODEL is a {type(model.model).__name__}, which has no U-Net with skips; use Stable Diffusion 2.1, or "
            "the model that belongs to the synchronizer."
        )
    context_dim = model.model.model_config.unet_config.get("context_dim")
    if channels != list(c.block_channels) or context_dim != c.perceiver.hidden_size:
        raise SettingError(
            f"The MODEL's U-Net has skips of widths {channels} and takes conditioning of width {context_dim}, but the "
            f"synchronizer was made for {list(c.block_channels)} and {c.perceiver.hidden_size}; use the model that "
            "belongs to it."
        )


def apply_mmfs(
    model, synchronizer: PatchedSynchronizer, story: Story, strength: float, start: float, end: float, num_images: int
):
    """A clone of MODEL with MMFS at its skips and middle block, attending to the story's last `num_images` images."""
    if strength == 0 or start >= end:
        return model.clone()
    images = story.images[-num_images:] if num_images else ()
    c = synchronizer.config.synchronizer
    # MMFS adds a residual even without images, as in training.
    maps = [torch.zeros(1, 0, c.mmfs.d_value, size, size) for size in c.mmfs.spatial_shapes]
    if images:
        maps = [torch.stack(level).unsqueeze(0) for level in zip(*(image.features.feature_maps for image in images))]
    sampling = model.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    mmfs = synchronizer.module.mmfs_module
    num_skips = len(mmfs.mmfs_down_blocks)
    # The projected images of one sampling, by dtype. Held by closures only, because a clone copies everything else.
    projected = {}

    def patch(h, hsp, transformer_options):
        sigma = float(transformer_options["sigmas"].max())
        if not last < sigma <= first:
            return h, hsp
        if h.dtype not in projected:
            mask = torch.ones(1, len(images), dtype=torch.bool, device=h.device)
            projected[h.dtype] = mmfs.project_images([level.to(h.device, h.dtype) for level in maps], mask, h.dtype)
        number, values = transformer_options["block"][1], projected[h.dtype]
        if number == 0:
            h = mmfs.add_residual(num_skips, h, values, strength)
        return h, mmfs.add_residual(num_skips - 1 - number, hsp, values, strength)

    def around_sampling(executor, *args, **kwargs):
        try:
            return executor(*args, **kwargs)
        finally:
            projected.clear()

    def around_loading(executor, model, noise_shape, *args, **kwargs):
        detach_other_patches(model)
        # ComfyUI derives the memory to free from the noise's area alone, so that is enlarged.
        height, width = noise_shape[-2:]
        itemsize = comfy.model_management.dtype_size(model.model_dtype())
        extra = sampling_bytes(c, len(images), 2 * noise_shape[0], (height, width), itemsize)
        needed = model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
        area = math.ceil(height * width * (1 + extra / needed))
        return executor(model, [*noise_shape[:-2], area, 1], *args, **kwargs)

    patched = model.clone()
    patched.set_model_output_block_patch(patch)
    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING,
        KEY,
        around_loading,
        patched.model_options,
        is_model_options=True,
    )
    patched.set_additional_models(KEY, [synchronizer.patcher])
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, around_sampling)
    return patched


class ApplySynchronizer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedSynchronize",
            **search_aliases("Synchronize"),
            display_name="Apply Synchronizer",
            category=CATEGORY,
            description="Prepares the next image of a story for a stock KSampler: the LLM's context becomes the conditioning, and "
            "the U-Net attends to the earlier images.",
            inputs=[
                LLMSocket.Input("llm", tooltip="Its hidden states of the story become the conditioning."),
                SynchronizerSocket.Input("synchronizer", tooltip="Lets the U-Net attend to the earlier images."),
                StorySocket.Input("story", optional=True, tooltip="The story up to the image to draw."),
                io.Model.Input("model", tooltip="The U-Net that belongs to the synchronizer; with LoRAs if you like."),
                strength_input(),
                *advanced(
                    io.Float.Input(
                        "start",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="When the U-Net starts to attend to them, as a fraction of the sampling.",
                    ),
                    io.Float.Input(
                        "end",
                        default=1.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="When the U-Net stops attending to them, as a fraction of the sampling.",
                    ),
                    former(CONTEXT_IMAGES, "pictures", -1, -1, 64),
                    drop_oldest_input(),
                ),
                model_default_input(CONTEXT_IMAGES, "context_images", 0, 64),
                DreamSocket.Input(
                    "dream",
                    optional=True,
                    tooltip="From Load Dream Queries: they make the conditioning, in the place of the synchronizer's "
                    "Perceiver.",
                ),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="For any sampler."),
                io.Conditioning.Output("positive_out", display_name="positive"),
                io.Conditioning.Output("negative_out", display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        llm,
        synchronizer,
        model,
        strength,
        start,
        end,
        pictures,
        story=None,
        drop_oldest=False,
        context_images=None,
        dream=None,
    ) -> io.NodeOutput:
        check_blocks(llm, synchronizer, model)
        story = story or Story()
        c = synchronizer.config.synchronizer
        num_images = pictures if context_images is None else context_images
        num_images = c.num_context_images if num_images < 0 else num_images
        max_images = c.mmfs.max_num_image_per_seq - 1
        if num_images > max_images:
            raise SettingError(f"This synchronizer can attend to {max_images} images at most, not {num_images}.")
        device, conditioner = comfy.model_management.intermediate_device(), synchronizer.module.conditioner
        if dream is not None:
            positive, story = dream.condition(llm, story, drop_oldest)
            negative = dream.negative(llm, synchronizer)
        else:
            story = llm.prepare(story, drop_oldest=drop_oldest)
            context = llm.generator.context_features([story])
            synchronizer.load(context[0].numel() * 64)
            context = [states.to(synchronizer.device, synchronizer.dtype) for states in context]
            positive = conditioner.prompt_embeds(context)
            negative = conditioner.neg_prompt_embeds.detach().to(device).clone()
        positive = positive.to(device)
        patched = apply_mmfs(model, synchronizer, story, strength, start, end, num_images)
        return io.NodeOutput(patched, [[positive, {}]], [[negative, {}]])
