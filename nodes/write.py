"""Write Story Text: the LLM continues the story, and shows the text as it grows."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.config import TextGenerationConfig
from ..comfy_mminterleaved.stories.story import Story, TextSegment
from .preview import send_live_text, text_or_panels
from .types import (
    CATEGORY,
    LLMSocket,
    StorySocket,
    advanced,
    drop_oldest_input,
    sampling_inputs,
    search_aliases,
    seed_input,
    writer_input,
)


def progress_callback(hidden, limit: int):
    """A callback for each token: progress, the text so far on the node, and Cancel."""
    bar, count = comfy.utils.ProgressBar(limit), 0

    def on_token(text) -> None:
        nonlocal count
        comfy.model_management.throw_exception_if_processing_interrupted()
        count += 1
        bar.update_absolute(count, limit)
        send_live_text(hidden, str(text))

    return on_token


def text_callback(hidden, limit: int):
    """A callback for a writer's text as it grows, also while it does not: progress, the text on the node, and Cancel."""
    bar, last = comfy.utils.ProgressBar(limit), None

    def on_text(text: str) -> None:
        nonlocal last
        comfy.model_management.throw_exception_if_processing_interrupted()
        if text != last:
            last = text
            bar.update_absolute(min(limit, len(text.split()) * 4 // 3), limit)  # a word is about 4/3 tokens
            send_live_text(hidden, text)

    return on_text


def require_llm(llm) -> None:
    """Raises SettingError for a node that has neither an LLM nor a writer."""
    if llm is None:
        raise SettingError("Nothing is connected that could answer; connect an LLM or a writer.")


def text_config_from_inputs(
    seed, max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty
) -> TextGenerationConfig:
    if min_tokens > max_tokens:
        raise SettingError(f"min_tokens, {min_tokens}, must not be over max_tokens, {max_tokens}.")
    return TextGenerationConfig(
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


class WriteStoryText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedWrite",
            **search_aliases("Write"),
            display_name="Write Story Text",
            category=CATEGORY,
            description="Continues the story with text, up to where the model ends it or requests an image.",
            inputs=[
                LLMSocket.Input("llm", optional=True, tooltip="Continues the story; a writer can do it instead."),
                StorySocket.Input(
                    "story",
                    optional=True,
                    tooltip="The story so far; only its new tokens are computed. May be left out.",
                ),
                seed_input("the text"),
                *advanced(*sampling_inputs(), drop_oldest_input()),
                writer_input(),
                StorySocket.Input("heroes", optional=True, tooltip="For a writer: who is in the story, with images."),
                io.String.Input(
                    "idea", optional=True, force_input=True, tooltip="For a writer: what the story is about."
                ),
                io.String.Input("style", optional=True, force_input=True, tooltip="For a writer: how the images look."),
                io.Int.Input(
                    "panels",
                    optional=True,
                    force_input=True,
                    min=1,
                    max=200,
                    tooltip="For a writer: how many panels the whole story has, so that it ends in time.",
                ),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story", tooltip="The story with the new text."),
                io.String.Output("text_out", display_name="text", tooltip="The new text alone."),
                io.Boolean.Output(
                    "wants_picture_out",
                    display_name="wants picture",
                    tooltip="Whether the model ended the text by requesting an image.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls,
        seed,
        llm=None,
        story=None,
        drop_oldest=False,
        writer=None,
        heroes=None,
        idea="",
        style="",
        panels=None,
        **settings,
    ) -> io.NodeOutput:
        config, story = text_config_from_inputs(seed, **settings), story or Story()
        if writer is not None:
            given = {"config": config, "heroes": heroes, "idea": idea or "", "style": style or "", "panels": panels}
            on_text = text_callback(cls.hidden, config.max_new_tokens)
            segment, requests_image = replace(writer, **given).write(story, seed, on_text), True
        else:
            require_llm(llm)
            on_token = progress_callback(cls.hidden, config.max_new_tokens)
            context = llm.prepare(story, config.max_new_tokens, drop_oldest=drop_oldest)
            text = llm.generator.generate_text(context, config, on_token)
            segment, requests_image = TextSegment(text.text, text.tokens), text.requests_image
        story = story.add(segment)
        return io.NodeOutput(story, segment.text, requests_image, ui=text_or_panels(cls.hidden, segment.text, story))
