"""Apply Story References: any image model draws the next panel, with the story's images as references."""

from __future__ import annotations

import math

import comfy.utils
import node_helpers
import torch
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.stories.story import ImageSegment, Story, join_texts
from .reference_attention import attend_to_references, has_self_attention
from .types import CATEGORY, StorySocket, advanced

IMAGE_TOKEN = "<|vision_start|><|image_pad|><|vision_end|>"  # where a text encoder that sees has an image
SEEN_PIXELS = 384 * 384  # of an image for a text encoder that sees, as core's nodes have it
METHODS = {"the model's own": None, "offset": "offset", "index": "index", "uxo": "uxo"}


def panel_prompt(story: Story, style: str = "") -> str:
    """The style and the text after the story's last image; raises StoryError if there is none."""
    text = ""
    for segment in reversed(story.segments):
        if isinstance(segment, ImageSegment):
            break
        text = join_texts(segment.text, text)
    if not text:
        raise StoryError("The story does not end with a text; add the text of the panel to draw.")
    return join_texts(style, text)


def scale_to_pixels(image: torch.Tensor, pixels: float, multiple: int) -> torch.Tensor:
    """An IMAGE `(1, H, W, 3)` scaled to about this many pixels, its sides multiples of `multiple`."""
    samples = image.movedim(-1, 1)
    factor = math.sqrt(pixels / (samples.shape[3] * samples.shape[2]))
    width, height = (
        max(multiple, round(side * factor / multiple) * multiple) for side in (samples.shape[3], samples.shape[2])
    )
    return comfy.utils.common_upscale(samples, width, height, "area", "disabled").movedim(1, -1)


def encode_prompt(clip, text: str, images: list[torch.Tensor]):
    """CONDITIONING of a text, with images where the tokenizer has a template for them (Qwen-Image-Edit)."""
    template = getattr(clip.tokenizer, "llama_template_images", None)
    if not images or template is None or IMAGE_TOKEN not in template:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))
    text = "".join(f"Picture {n}: {IMAGE_TOKEN}" for n in range(1, len(images) + 1)) + text
    tokens = clip.tokenize(
        text,
        images=[scale_to_pixels(image, SEEN_PIXELS, 1) for image in images],
        llama_template=template.replace(IMAGE_TOKEN, ""),
    )
    return clip.encode_from_tokens_scheduled(tokens)


def takes_reference_latents(model) -> bool:
    """Whether a MODEL uses the conditioning's reference latents; one that does not ignores them silently."""
    return bool(model.model.extra_conds_shapes(reference_latents=[torch.zeros(1, 16, 8, 8)]))


class ApplyStoryReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedReferences",
            display_name="Apply Story References",
            category=CATEGORY,
            description="Prepares the next image of a story for a stock KSampler and any image model: its text becomes the prompt, "
            "and its images the references, in the way that the model takes them.",
            inputs=[
                io.Model.Input("model", tooltip="Any image model, with LoRAs if you like."),
                io.Clip.Input("clip", tooltip="The model's text encoder; it sees the references if it can."),
                io.Vae.Input("vae", tooltip="Encodes the references."),
                StorySocket.Input("story", tooltip="The images to refer to, then the text of the panel to draw."),
                io.String.Input(
                    "style",
                    multiline=True,
                    default="",
                    tooltip="Stands before each panel's text, such as 'A watercolour of'.",
                ),
                io.String.Input("negative", multiline=True, default="", tooltip="What the images must not show."),
                io.Int.Input(
                    "references", default=3, min=0, max=16, tooltip="How many of the story's last images to refer to."
                ),
                megapixels_input(),
                *advanced(
                    io.Combo.Input(
                        "method",
                        options=list(METHODS),
                        default="the model's own",
                        tooltip="How several reference latents are placed, for models that know more than one way.",
                    ),
                    guidance_input(),
                    *attention_inputs(),
                ),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="For any sampler."),
                io.Conditioning.Output("positive_out", display_name="positive"),
                io.Conditioning.Output("negative_out", display_name="negative"),
                io.Image.Output(
                    "references_out",
                    display_name="references",
                    tooltip="The references as one batch, for IPAdapter, Redux or CLIP vision; a black image if there are none.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        story,
        style,
        negative,
        references,
        megapixels,
        method,
        guidance,
        strength,
        fidelity,
        start,
        end,
    ) -> io.NodeOutput:
        prompt = panel_prompt(story, style)
        segments = story.images[-references:] if references else ()
        images = [segment.pixels.movedim(0, -1).unsqueeze(0) for segment in segments]
        positive, negative = encode_prompt(clip, prompt, images), encode_prompt(clip, negative, images)
        takes_latents = takes_reference_latents(model)
        attends = not takes_latents and strength > 0 and has_self_attention(model)
        latents = []
        if images and (takes_latents or attends):
            latents = [vae.encode(scale_to_pixels(image, megapixels * 1024 * 1024, 8)) for image in images]
        if takes_latents and latents:
            positive, negative = (
                node_helpers.conditioning_set_values(each, {"reference_latents": latents}, append=True)
                for each in (positive, negative)
            )
            if METHODS[method] is not None:
                positive, negative = (
                    node_helpers.conditioning_set_values(each, {"reference_latents_method": METHODS[method]})
                    for each in (positive, negative)
                )
        if guidance:
            positive = node_helpers.conditioning_set_values(positive, {"guidance": guidance})
        patched = attend_to_references(model, latents if attends else [], strength, fidelity, start, end)
        return io.NodeOutput(patched, positive, negative, as_batch(images))


def megapixels_input():
    return io.Float.Input(
        "megapixels", default=1.0, min=0.01, max=4.0, step=0.01, tooltip="Size that references are scaled to."
    )


def guidance_input():
    return io.Float.Input(
        "guidance",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="Distilled guidance, as FluxGuidance sets it; 0 leaves the model's own.",
    )


def attention_inputs():
    """Settings of `attend_to_references`."""
    return (
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="For models that take no reference latents (SD 1.5, SDXL): how much of the references their "
            "self-attention attends to; 0 is the plain model. Each reference costs one more pass a step.",
        ),
        io.Float.Input(
            "fidelity",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="How much guidance amplifies the references: at 1 only the positive half attends to them, at 0 both do. "
            "Between, each step costs one more pass.",
        ),
        io.Float.Input(
            "start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="When it begins, as a fraction of the sampling."
        ),
        io.Float.Input(
            "end", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="When it ends, as a fraction of the sampling."
        ),
    )


def as_batch(images: list[torch.Tensor]) -> torch.Tensor:
    """IMAGEs of any sizes as one batch, in the size of the first."""
    if not images:
        return torch.zeros(1, 64, 64, 3)
    height, width = images[0].shape[1:3]
    scaled = [
        comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "lanczos", "center").movedim(1, -1)
        for image in images
    ]
    return torch.cat(scaled)
