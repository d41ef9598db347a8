"""Probe Story: what a panel keeps when its story is changed a little."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.generation.insight import check_inspectable
from ..comfy_mminterleaved.generation.probes import CHANGES, changed_story, compare_drawings
from ..comfy_mminterleaved.models.gmail_adapter import DRAWN
from ..comfy_mminterleaved.stories.story import Story
from .drawing import Drawing, drawing_inputs
from .look_inside import QUESTIONS
from .preview import is_inside, pictures_ui
from .segments import encode_story, images_from_batch
from .synchronize import check_blocks
from .types import CATEGORY, DEFAULTS, EncoderSocket, LLMSocket, StorySocket


def outputs():
    return [
        io.Image.Output("images_out", display_name="images", tooltip="The panel as it is, and from the changed story."),
        io.String.Output("report_out", display_name="report", tooltip="What the model says of both."),
    ]


class ProbeStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedProbeStory",
            display_name="Probe Story",
            category=CATEGORY,
            description="Draws a panel from its story and from a changed one, from the same noise, and asks the model what has "
            "become of it: does the hero survive a tint, a blur, a typo?",
            enable_expand=True,
            is_output_node=True,
            inputs=[
                StorySocket.Input("story", tooltip="A story with images, up to the text of the panel to draw."),
                io.Combo.Input(
                    "change", options=list(CHANGES), tooltip="What is changed: all earlier images, or the panel's text."
                ),
                io.String.Input(
                    "questions",
                    multiline=True,
                    default=QUESTIONS,
                    dynamic_prompts=False,
                    tooltip="What to ask about the drawings, one question a line.",
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
        change,
        questions,
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
        changed_story(story, change)
        sampling = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        drawing = Drawing(cls.hidden, synchronizer, **sampling)
        story_and_encoder = drawing.given("story", "encoder")
        plain = drawing.graph.node("MMInterleavedVariantInside", "story", number=0, **story_and_encoder)
        changed = drawing.graph.node("MMInterleavedChangedInside", "changed", change=change, **story_and_encoder)
        drawn = [drawing.draw(number, each.out(0), seed) for number, each in enumerate((plain, changed))]
        compared = drawing.graph.node(
            "MMInterleavedProbedInside",
            "compared",
            drawn=drawing.batch(drawn),
            questions=questions,
            **drawing.given("encoder", "llm"),
        )
        return drawing.output(compared, 2)


class ChangedInside(io.ComfyNode):
    """The changed story of Probe Story."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedChangedInside",
            display_name="Changed (inside Probe Story)",
            category=f"{CATEGORY}/internal",
            description="A part of Probe Story.",
            inputs=[
                StorySocket.Input("story", tooltip="The story as it is."),
                EncoderSocket.Input("encoder", tooltip="Encodes the changed images."),
                io.Combo.Input("change", options=list(CHANGES), tooltip="What is changed."),
            ],
            outputs=[StorySocket.Output("story_out", display_name="story")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, story, encoder, change) -> io.NodeOutput:
        if not is_inside(cls.hidden):
            raise StoryError("This node is a part of Probe Story; use that instead.")
        return io.NodeOutput(encode_story(encoder, changed_story(story, change)))


class ProbedInside(io.ComfyNode):
    """Last node of Probe Story's expansion."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedProbedInside",
            display_name="Compared (inside Probe Story)",
            category=f"{CATEGORY}/internal",
            description="A part of Probe Story.",
            is_output_node=True,
            inputs=[
                io.Image.Input("drawn", tooltip="The two drawings."),
                EncoderSocket.Input("encoder", tooltip="Encodes them."),
                LLMSocket.Input("llm", tooltip="Answers the questions."),
                io.String.Input("questions", default="", dynamic_prompts=False, tooltip="One question a line."),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, drawn, encoder, llm, questions) -> io.NodeOutput:
        if not is_inside(cls.hidden):
            raise StoryError("This node is a part of Probe Story; use that instead.")
        first, second = encode_story(encoder, Story.of(*images_from_batch(drawn, DRAWN))).images
        lines = [line for line in questions.splitlines() if line.strip()]
        llm.load(llm.generator.question_story(Story.of(first), max(lines, key=len)), 40)
        report = compare_drawings(llm.generator, first, second, lines).to_text()
        return io.NodeOutput(drawn, report, ui=pictures_ui((first, "as it is"), (second, report)))
