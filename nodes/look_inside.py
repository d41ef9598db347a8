"""Look Inside: what a panel took from which earlier image."""

from __future__ import annotations

import copy

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.generation.attention_maps import gradient_maps, record_attention, record_calls
from ..comfy_mminterleaved.generation.insight import CAVEAT, check_inspectable, compare, contact_sheet, variants
from ..comfy_mminterleaved.models.gmail_adapter import DRAWN
from ..comfy_mminterleaved.stories.story import ImageSegment, Story
from .blocks import progress
from .drawing import Drawing, drawing_inputs
from .preview import is_inside, pictures_ui
from .segments import encode_story, images_from_batch
from .synchronize import ApplySynchronizer, apply_mmfs, check_blocks
from .types import CATEGORY, DEFAULTS, EncoderSocket, LLMSocket, StorySocket

LEAVE_OUT, GRADIENT, WEIGHTS = "leave out", "gradient", "attention weights"
QUESTIONS = "Who is it?\nWhich colour is the coat?\nWhat is worn?"


def outputs():
    return [
        io.Image.Output("images_out", display_name="images", tooltip="The drawings beside the earlier images."),
        io.String.Output("report_out", display_name="report", tooltip="What the panel took from which image."),
        io.Int.Output("source_out", display_name="source", tooltip="The image that it took most from, from 1."),
    ]


class LookInside(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLookInside",
            display_name="Look Inside",
            category=CATEGORY,
            description="Says which earlier image a panel takes its heroes from: the panel is drawn again without each image and "
            "with each alone, and the model is asked what changed.",
            enable_expand=True,
            is_output_node=True,
            inputs=[
                StorySocket.Input(
                    "story", tooltip="A story with images, up to the text of the panel to look inside of."
                ),
                io.String.Input(
                    "questions",
                    multiline=True,
                    default=QUESTIONS,
                    dynamic_prompts=False,
                    tooltip="What to ask about the drawings, one question a line.",
                ),
                io.Combo.Input(
                    "method",
                    options=[LEAVE_OUT, GRADIENT, WEIGHTS],
                    default=LEAVE_OUT,
                    tooltip="'leave out' measures what each image causes; 'gradient' shows what the drawing is sensitive "
                    "to; 'attention weights' show where the U-Net samples, which explains little.",
                ),
                *drawing_inputs(DEFAULTS.image.num_inference_steps),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls,
        story,
        questions,
        method,
        encoder,
        llm,
        synchronizer,
        model,
        vae,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
    ) -> io.NodeOutput:
        check_blocks(llm, synchronizer, model)
        check_inspectable(story, questions.splitlines())
        sampling = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        if method != LEAVE_OUT:
            return cls.look(story, method, encoder, llm, synchronizer, model, seed, **sampling)
        drawing, drawn = Drawing(cls.hidden, synchronizer, **sampling), []
        for number, _ in enumerate(variants(story)):
            given = drawing.graph.node(
                "MMInterleavedVariantInside", f"story {number}", number=number, **drawing.given("story", "encoder")
            )
            drawn.append(drawing.draw(number, given.out(0), seed))
        compared = drawing.graph.node(
            "MMInterleavedInspectInside",
            "compared",
            drawn=drawing.batch(drawn),
            questions=questions,
            **drawing.given("story", "encoder", "llm"),
        )
        return drawing.output(compared, 3)

    @classmethod
    def look(cls, story, method, encoder, llm, synchronizer, model, seed, steps, cfg, sampler_name, scheduler):
        """Maps of one drawing: where the blocks sample, or what they are sensitive to."""
        story = encode_story(encoder, story)
        conditioned = ApplySynchronizer.execute(llm, synchronizer, model, 1.0, 0.0, 1.0, -1, story)
        _, positive, negative = conditioned.result
        c = synchronizer.config.synchronizer
        patched = apply_mmfs(model, synchronizer, story, 1.0, 0.0, 1.0, c.num_context_images)
        factor = 2 ** (len(synchronizer.config.vae.get("block_out_channels", [1] * 4)) - 1)
        channels = model.get_model_object("latent_format").latent_channels
        latent = torch.zeros(1, channels, c.image_size // factor, c.image_size // factor)
        net, on_progress = synchronizer.module.mmfs_module, progress(steps)

        def callback(step, *_):
            on_progress(step + 1, steps)

        with record_attention(net) as attention, record_calls(net) as calls:
            comfy.sample.sample(
                patched,
                comfy.sample.prepare_noise(latent, seed),
                steps,
                cfg,
                sampler_name,
                scheduler,
                positive,
                negative,
                latent,
                callback=callback,
                seed=seed,
            )
        images = story.images[-c.num_context_images :]
        maps = attention.maps
        if method == GRADIENT:
            maps = _gradients(net, calls, images)
        shares = maps.sum((1, 2)) / maps.sum()
        first = len(story.images) - len(images)
        lines = [f"image {first + n + 1}: {share:.0%}" for n, share in enumerate(shares.tolist())]
        note = f"{CAVEAT} Leave images out to see what they cause." if method == WEIGHTS else CAVEAT
        overlays = torch.stack([heat(image.pixels, each) for image, each in zip(images, maps)])
        report = "\n".join([*lines, note])
        pictured = images_from_batch(overlays)
        captions = [*lines[:-1], f"{lines[-1]}\n{note}"]
        pictures = pictures_ui(*zip(pictured, captions))
        return io.NodeOutput(overlays, report, first + int(shares.argmax()) + 1, ui=pictures)


def _gradients(net, calls, images) -> torch.Tensor:
    """`gradient_maps`, on copies: what ComfyUI makes in inference mode has no gradients."""
    with torch.inference_mode(False):
        net = copy.deepcopy(net).float().cpu()

        def plain(value):
            return value.detach().float().cpu().clone() if torch.is_floating_point(value) else value.cpu().clone()

        for index, (x, _, mask, positions, points) in calls.calls.items():
            count = len(mask[0]) if mask.ndim == 2 else mask.shape[-1]
            rows = torch.ones(1, count, dtype=torch.bool)
            calls.calls[index] = plain(x)[-1:], None, rows, plain(positions), plain(points)
        maps = [plain(torch.stack(level).unsqueeze(0)) for level in zip(*(i.features.feature_maps for i in images))]
        return gradient_maps(net, calls, maps, torch.ones(1, len(images), dtype=torch.bool))


def heat(pixels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """An image `(3, H, W)` with a map over it, `(H, W, 3)`: red where it is high."""
    size = tuple(pixels.shape[-2:])
    strength = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    strength = (strength / strength.max().clamp(min=1e-9))[..., None]
    grey = pixels.mean(0)[..., None].expand(-1, -1, 3) * 0.7 + 0.15
    return grey * (1 - 0.8 * strength) + torch.tensor([0.95, 0.2, 0.1]) * 0.8 * strength


class VariantInside(io.ComfyNode):
    """One of the stories that Look Inside draws."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedVariantInside",
            display_name="Variant (inside Look Inside)",
            category=f"{CATEGORY}/internal",
            description="A part of Look Inside.",
            inputs=[
                StorySocket.Input("story", tooltip="The whole story."),
                EncoderSocket.Input("encoder", tooltip="Encodes its images."),
                io.Int.Input("number", default=0, min=0, max=1000, tooltip="Which variant of it."),
            ],
            outputs=[StorySocket.Output("story_out", display_name="story")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, story, encoder, number) -> io.NodeOutput:
        if not is_inside(cls.hidden):
            raise StoryError("This node is a part of Look Inside; use that instead.")
        return io.NodeOutput(variants(encode_story(encoder, story))[number])


class InspectInside(io.ComfyNode):
    """Last node of Look Inside's expansion: asks the model about the drawings."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedInspectInside",
            display_name="Compared (inside Look Inside)",
            category=f"{CATEGORY}/internal",
            description="A part of Look Inside.",
            is_output_node=True,
            inputs=[
                StorySocket.Input("story", tooltip="The whole story."),
                io.Image.Input("drawn", tooltip="A drawing of each variant."),
                EncoderSocket.Input("encoder", tooltip="Encodes the drawings."),
                LLMSocket.Input("llm", tooltip="Answers the questions."),
                io.String.Input("questions", default="", dynamic_prompts=False, tooltip="One question a line."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, story, drawn, encoder, llm, questions) -> io.NodeOutput:
        if not is_inside(cls.hidden):
            raise StoryError("This node is a part of Look Inside; use that instead.")
        images = encode_story(encoder, Story.of(*images_from_batch(drawn, DRAWN))).images
        lines = [line for line in questions.splitlines() if line.strip()]
        llm.load(llm.generator.question_story(Story.of(images[0]), max(lines, key=len)), 40)
        inspection = compare(llm.generator, images, lines)
        sheet = ImageSegment.of(contact_sheet(story, inspection))
        report = inspection.to_text()
        pixels = sheet.pixels.movedim(0, -1)[None]
        return io.NodeOutput(pixels, report, inspection.source.index + 1, ui=pictures_ui((sheet, report)))
