"""Write Script: all texts of a story at once, by a writer."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io, ui

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.stories.story import Story
from ..comfy_mminterleaved.stories.storyboard import split_script
from ..comfy_mminterleaved.writers.chat import WRITING
from .preview import is_inside
from .types import CATEGORY, StorySocket, WriterSocket, advanced, seed_input
from .write import text_callback


def idea_input():
    return io.String.Input(
        "idea",
        multiline=True,
        default="",
        dynamic_prompts=False,
        tooltip="What the story is about, for the writer; it does not stand on the page.",
    )


def writing_inputs():
    """Settings of a writer."""
    return (
        io.Int.Input(
            "max_tokens",
            default=WRITING.max_new_tokens,
            min=8,
            max=16384,
            tooltip="Longest text of a panel, in tokens of about three quarters of a word.",
        ),
        io.Float.Input(
            "temperature",
            default=WRITING.temperature,
            min=0.0,
            max=5.0,
            step=0.05,
            tooltip="How freely the writer chooses words: 0 always takes the likeliest.",
        ),
    )


def writing_config(max_tokens: int, temperature: float):
    return replace(
        WRITING, max_new_tokens=max_tokens, do_sample=temperature > 0, temperature=temperature or WRITING.temperature
    )


class WriteScript(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedWriteScript",
            display_name="Write Script",
            category=CATEGORY,
            description="Has a writer write all texts of a story at once, one paragraph per panel, exactly as many as asked for. "
            "It leaves the card before drawing begins.",
            inputs=[
                WriterSocket.Input("writer", tooltip="From Load Writer, Writer from CLIP or Writer from Server."),
                StorySocket.Input("story", optional=True, tooltip="The story so far, which it continues."),
                StorySocket.Input("heroes", optional=True, tooltip="Who is in the story, with images."),
                idea_input(),
                io.String.Input(
                    "style", multiline=True, default="", dynamic_prompts=False, tooltip="How the images will look."
                ),
                io.Int.Input("panels", default=4, min=1, max=200, tooltip="How many panels to write, exactly."),
                seed_input("the script"),
                *advanced(*writing_inputs()),
            ],
            outputs=[
                io.String.Output("script_out", display_name="script", tooltip="For Tell Story (any model)."),
                io.String.Output("texts_out", display_name="texts", is_output_list=True, tooltip="Panel by panel."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls, writer, idea, style, panels, seed, max_tokens, temperature, story=None, heroes=None
    ) -> io.NodeOutput:
        config = writing_config(max_tokens, temperature)
        writer = replace(writer, config=config, idea=idea, style=style, heroes=heroes)
        on_text = text_callback(cls.hidden, max_tokens * panels)
        texts = writer.write_script(story or Story(), panels, seed, on_text)
        script = "\n\n".join(texts)
        return io.NodeOutput(script, texts, ui=None if is_inside(cls.hidden) else ui.PreviewText(script))


class ScriptPanel(io.ComfyNode):
    """A part of Tell Story (any model): the panels that a writer writes are links before they are texts."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedScriptPanel",
            display_name="Script Panel",
            category=f"{CATEGORY}/internal",
            description="The text of one panel of a script, which blank lines divide.",
            inputs=[
                io.String.Input("script", force_input=True, tooltip="One paragraph per panel."),
                io.Int.Input("number", default=1, min=1, max=200, tooltip="Number of the panel, from 1."),
            ],
            outputs=[io.String.Output("text_out", display_name="text")],
        )

    @classmethod
    def execute(cls, script, number) -> io.NodeOutput:
        panels = split_script(script)
        if number > len(panels):
            raise StoryError(f"The script has {len(panels)} panels; there is no panel {number}.")
        return io.NodeOutput(panels[number - 1])
