"""Synchronize: the story becomes a stock sampler's conditioning, its pictures a patch of the U-Net."""

from __future__ import annotations

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.stories.story import Story
from .blocks import LLMBlock, SynchronizerBlock
from .native import skip_widths
from .sockets import CATEGORY, LLMSocket, StorySocket, SynchronizerSocket

KEY = "mm_interleaved"


def check_blocks(llm: LLMBlock, synchronizer: SynchronizerBlock, model) -> None:
    """One sentence for blocks that do not belong together; raises SettingError."""
    decoder = synchronizer.config.decoder
    if llm.config.llm.width != decoder.llm_width:
        raise SettingError(
            f"The LLM has width {llm.config.llm.width}, but the synchronizer was made for an LLM of width "
            f"{decoder.llm_width}; use an LLM and a synchronizer of the same model."
        )
    widths = skip_widths(model)
    if widths is None:
        raise SettingError(
            f"The MODEL is a {type(model.model).__name__}, which has no U-Net with skips; use Stable Diffusion 2.1, or "
            "the model that belongs to the synchronizer."
        )
    context = model.model.model_config.unet_config.get("context_dim")
    if widths != list(decoder.site_widths) or context != decoder.resampler.width:
        raise SettingError(
            f"The MODEL's U-Net has skips of widths {widths} and reads contexts of width {context}, but the synchronizer "
            f"was made for {list(decoder.site_widths)} and {decoder.resampler.width}; use the model that belongs to it."
        )


def look_at(
    model, synchronizer: SynchronizerBlock, story: Story, strength: float, start: float, end: float, pictures: int
):
    """A clone of MODEL whose skips and mid output look at the story's last `pictures` pictures."""
    if strength == 0 or start >= end:
        return model.clone()
    seen = story.pictures[-pictures:] if pictures else ()
    c = synchronizer.config.decoder
    # With no picture yet, too, the sites have something to add: so they were trained.
    maps = [torch.zeros(1, 0, c.feature_width, size, size) for size in c.levels]
    if seen:
        maps = [torch.stack(level).unsqueeze(0) for level in zip(*(picture.features.maps for picture in seen))]
    sampling = model.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    decoder = synchronizer.module
    skips = len(decoder.skip_sites)
    # Of one sampling: the pictures as the sites read them. Closures only, for a clone copies everything else.
    prepared = {}

    def patch(h, hsp, transformer_options):
        sigma = float(transformer_options["sigmas"].max())
        if not last < sigma <= first:
            return h, hsp
        if "sites" not in prepared:
            shown = torch.ones(1, len(seen), dtype=torch.bool, device=h.device)
            here = [level.to(h.device, synchronizer.dtype) for level in maps]
            prepared["sites"] = decoder.prepare(here, shown)
        number = transformer_options["block"][1]
        sites = prepared["sites"]
        if number == 0:
            h = decoder.site(skips, h, sites, strength)
        return h, decoder.site(skips - 1 - number, hsp, sites, strength)

    def around_sampling(executor, *args, **kwargs):
        try:
            return executor(*args, **kwargs)
        finally:
            prepared.clear()

    patched = model.clone()
    patched.set_model_output_block_patch(patch)
    patched.set_additional_models(KEY, [synchronizer.patcher])
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, around_sampling)
    return patched


class Synchronize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedSynchronize",
            display_name="Synchronize",
            category=CATEGORY,
            description="Prepares the next picture of a story for a stock KSampler: what the LLM has read becomes the "
            "conditioning, and the U-Net looks at the earlier pictures.",
            inputs=[
                LLMSocket.Input("llm", tooltip="Reads the story; its states are what the U-Net is told."),
                SynchronizerSocket.Input("synchronizer", tooltip="Shows the earlier pictures to the U-Net."),
                StorySocket.Input("story", optional=True, tooltip="The story up to the picture that is to be drawn."),
                io.Model.Input("model", tooltip="The U-Net that belongs to the synchronizer; with LoRAs if you like."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much the earlier pictures count in the U-Net; 0 draws from the text alone.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which part of the sampling on the U-Net looks at them.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Up to which part of the sampling the U-Net looks at them.",
                ),
                io.Int.Input(
                    "pictures",
                    default=-1,
                    min=-1,
                    max=64,
                    tooltip="How many of the last pictures are looked at; -1 for as many as the model is used to.",
                ),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="For any sampler."),
                io.Conditioning.Output("positive_out", display_name="positive"),
                io.Conditioning.Output("negative_out", display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, llm, synchronizer, model, strength, start, end, pictures, story=None) -> io.NodeOutput:
        check_blocks(llm, synchronizer, model)
        story = story or Story()
        c = synchronizer.config.decoder
        pictures = c.look_back if pictures < 0 else pictures
        if pictures > c.max_pictures - 1:
            raise SettingError(f"This synchronizer can look at {c.max_pictures - 1} pictures at most, not {pictures}.")
        llm.check(story)
        llm.model.fit(story, 1)
        llm.load(story)
        llm.read(story)
        context = llm.model.contexts([story])
        synchronizer.load(context[0].numel() * 64)
        context = [c.to(synchronizer.device, synchronizer.dtype) for c in context]
        keep = comfy.model_management.intermediate_device()
        positive = synchronizer.module.condition(context).to(keep)
        negative = synchronizer.module.negative.detach().to(keep).clone()
        patched = look_at(model, synchronizer, story, strength, start, end, pictures)
        return io.NodeOutput(patched, [[positive, {}]], [[negative, {}]])
