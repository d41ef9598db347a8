"""Describe for Redrawing, Round Trip: what the model understood of an image is what it can draw again."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError, StoryError
from ..comfy_mminterleaved.generation.reconstruction import (
    GREEDY,
    SAMPLED,
    distinct_captions,
    retell,
    token_similarity,
)
from ..comfy_mminterleaved.models.gmail_adapter import DRAWN
from ..comfy_mminterleaved.stories.story import ImageSegment, Story, TextSegment
from ..comfy_mminterleaved.stories.storyboard import Step
from .blocks import PatchedLLM, progress
from .drawing import Drawing, drawing_inputs
from .preview import is_inside, panels_ui, pictures_ui
from .segments import encode_story, images_from_batch
from .synchronize import check_blocks
from .types import (
    CATEGORY,
    DEFAULTS,
    EncoderSocket,
    StorySocket,
)


def captions_of(llm: PatchedLLM, image: ImageSegment, count: int, seed: int) -> list[str]:
    """The likeliest caption of an encoded image, and sampled ones, each once."""
    generator = llm.generator
    story = llm.prepare(generator.caption_story(Story.of(image)), GREEDY.max_new_tokens, count)
    texts = [text.text for text in generator.generate([story], GREEDY, drop_oldest=None)[0]]
    if count > 1:
        sampled = SAMPLED.with_seed_offset(seed % 2**62)
        texts += [text.text for text in generator.generate([story], sampled, count - 1, drop_oldest=None)[0]]
    return distinct_captions(texts)


class DescribeForRedrawing(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedDescribe",
            display_name="Describe for Redrawing",
            category=CATEGORY,
            description="Writes several captions of an image, draws each, and keeps the caption whose drawing is most alike to the "
            "image. Where all captions agree, one is drawn.",
            enable_expand=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The image to describe; of a batch, the first."),
                io.Int.Input(
                    "captions",
                    default=7,
                    min=1,
                    max=32,
                    tooltip="How many are written: the likeliest, and others by chance. Each that differs is drawn.",
                ),
                io.Int.Input(
                    "drawings",
                    default=3,
                    min=1,
                    max=16,
                    tooltip="How often each caption is drawn; the drawing that is most alike to the image counts.",
                ),
                *drawing_inputs(8),
            ],
            outputs=[
                io.String.Output("text_out", display_name="text", tooltip="The caption that redraws the image best."),
                io.Image.Output("redrawn_out", display_name="redrawn", tooltip="The drawing from that caption."),
                io.String.Output(
                    "story_out", display_name="story text", tooltip="The caption told as a story's opening."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls,
        image,
        captions,
        drawings,
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
        original = encode_story(encoder, Story.of(images_from_batch(image)[0])).images[0]
        texts = captions_of(llm, original, captions, seed)
        openings = [retell([text], llm.generator.generation_config.introduction)[0] for text in texts]
        sampling = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        drawing, drawn = Drawing(cls.hidden, synchronizer, drawings, **sampling), []
        for number, opening in enumerate(openings, 1):
            story = drawing.graph.node("MMInterleavedStoryText", f"text {number}", text=opening).out(0)
            drawn.append(drawing.draw(number, story, seed))
        chosen = drawing.graph.node(
            "MMInterleavedDescribedInside",
            "described",
            drawn=drawing.batch(drawn),
            texts=json.dumps([texts, openings]),
            **drawing.given("image", "encoder"),
        )
        return drawing.output(chosen, 3)


class DescribedInside(io.ComfyNode):
    """Last node of Describe for Redrawing's expansion."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedDescribedInside",
            display_name="Described (inside Describe for Redrawing)",
            category=f"{CATEGORY}/internal",
            description="A part of Describe for Redrawing.",
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The image that was described."),
                io.Image.Input("drawn", tooltip="A drawing of each caption."),
                EncoderSocket.Input("encoder", tooltip="Compares them."),
                io.String.Input("texts", default="", dynamic_prompts=False, tooltip="The captions."),
            ],
            outputs=[
                io.String.Output("text_out", display_name="text"),
                io.Image.Output("redrawn_out", display_name="redrawn"),
                io.String.Output("story_out", display_name="story text"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, image, drawn, encoder, texts) -> io.NodeOutput:
        if not is_inside(cls.hidden):
            raise StoryError("This node is a part of Describe for Redrawing; use that instead.")
        captions, openings = json.loads(texts)
        drawings = images_from_batch(drawn, DRAWN)
        original, *others = encode_story(encoder, Story.of(images_from_batch(image)[0], *drawings)).images
        scores = [token_similarity(original.features, other.features) for other in others]
        each = len(scores) // len(captions)  # drawings of a caption
        best_of = [max(range(n, n + each), key=lambda k: scores[k]) for n in range(0, len(scores), each)]
        order = sorted(range(len(captions)), key=lambda n: -scores[best_of[n]])
        lines = "\n".join(f"{scores[best_of[n]]:6.3f}  {captions[n]}" for n in order)
        first, number = order[0], best_of[order[0]]
        pictures = pictures_ui((others[number], lines))
        return io.NodeOutput(captions[first], drawn[number : number + 1], openings[first], ui=pictures)


class RoundTrip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedRoundTrip",
            display_name="Round Trip",
            category=CATEGORY,
            description="Tells a story again from its images alone: each is captioned, the captions become a story, and that is "
            "drawn. What is lost was not understood.",
            enable_expand=True,
            is_output_node=True,
            inputs=[
                StorySocket.Input("story", tooltip="A story with images."),
                *drawing_inputs(DEFAULTS.image.num_inference_steps),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story", tooltip="The story told again."),
                io.Float.Output(
                    "mean_out",
                    display_name="mean similarity",
                    tooltip="Of the drawings to the images that they stand for; 1 for the same image.",
                ),
                io.String.Output("report_out", display_name="report", tooltip="A line for each panel."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls, story, encoder, llm, synchronizer, model, vae, seed, steps, cfg, sampler_name, scheduler
    ) -> io.NodeOutput:
        check_blocks(llm, synchronizer, model)
        if not story.images:
            raise SettingError("The story has no images to tell again; add one.")
        images = encode_story(encoder, story).images
        on_progress, captions = progress(len(images)), []
        for number, image in enumerate(images):
            captions.append(captions_of(llm, image, 1, seed)[0])
            on_progress(number + 1, len(images))
        sampling = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        drawing = Drawing(cls.hidden, synchronizer, **sampling)
        again, texts = {}, retell(captions, llm.generator.generation_config.introduction)
        llm.generator.check_context_length(Story(), [[TextSegment(text), Step.IMAGE] for text in texts])
        for number, text in enumerate(texts, 1):
            begun = drawing.graph.node("MMInterleavedStoryText", f"text {number}", text=text, **again).out(0)
            panel_seed = (seed + number - 1) % 2**63
            added = drawing.graph.node(
                "MMInterleavedStoryPicture",
                f"add {number}",
                story=begun,
                image=drawing.draw(number, begun, panel_seed),
                **drawing.given("encoder"),
                seed=panel_seed,
                origin="drawn",
            )
            again = {"story": added.out(0)}
        compared = drawing.graph.node(
            "MMInterleavedRoundTripInside",
            "compared",
            first=drawing.links["story"],
            **drawing.given("encoder"),
            **again,
        )
        return drawing.output(compared, 3)


class RoundTripInside(io.ComfyNode):
    """Last node of Round Trip's expansion."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedRoundTripInside",
            display_name="Compared (inside Round Trip)",
            category=f"{CATEGORY}/internal",
            description="A part of Round Trip.",
            is_output_node=True,
            inputs=[
                StorySocket.Input("first", tooltip="The story as it was."),
                StorySocket.Input("story", tooltip="The story told again."),
                EncoderSocket.Input("encoder", tooltip="Compares their images."),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story"),
                io.Float.Output("mean_out", display_name="mean similarity"),
                io.String.Output("report_out", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, first, story, encoder) -> io.NodeOutput:
        if not is_inside(cls.hidden):
            raise StoryError("This node is a part of Round Trip; use that instead.")
        pairs = zip(encode_story(encoder, first).images, encode_story(encoder, story).images)
        scores = [token_similarity(a.features, b.features) for a, b in pairs]
        panels = [panel for panel in story.panels() if panel.image is not None]
        report = "\n".join(f"{score:6.3f}  {panel.text}" for score, panel in zip(scores, panels))
        return io.NodeOutput(story, sum(scores) / len(scores), report, ui=panels_ui(story))
