"""Write: the LLM goes on with the story, and shows the text as it grows."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui
from server import PromptServer

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.text import Sampling
from ..comfy_mminterleaved.stories.story import Story, Text
from .sockets import CATEGORY, LLMSocket, StorySocket, sampling_inputs, seed_input


def live(node_id: str | None, most: int):
    """A callback for each token: progress, the text so far on the node, and an end as soon as Cancel was pressed."""
    bar, count = comfy.utils.ProgressBar(most), 0
    send = getattr(PromptServer.instance, "send_progress_text", None)

    def on_token(text) -> None:
        nonlocal count
        comfy.model_management.throw_exception_if_processing_interrupted()
        count += 1
        bar.update_absolute(count, most)
        if send is not None and node_id is not None:
            send(str(text), node_id)

    return on_token


def sampling_of(seed, max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty) -> Sampling:
    if min_tokens > max_tokens:
        raise SettingError(f"min_tokens, {min_tokens}, must not be over max_tokens, {max_tokens}.")
    return Sampling(
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


class WriteText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedWrite",
            display_name="Write",
            category=CATEGORY,
            description="Goes on with the story in words, up to where the model ends the text or asks for a picture.",
            inputs=[
                LLMSocket.Input("llm", tooltip="Reads the story and writes."),
                StorySocket.Input(
                    "story",
                    optional=True,
                    tooltip="The story so far; what was read before is not read again. It may be left out.",
                ),
                seed_input("the text"),
                *sampling_inputs(),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story", tooltip="The story with the new text."),
                io.String.Output("text_out", display_name="text", tooltip="The new text alone."),
                io.Boolean.Output(
                    "wants_picture_out",
                    display_name="wants picture",
                    tooltip="Whether the model ended the text by asking for a picture.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, llm, seed, story=None, **settings) -> io.NodeOutput:
        sampling, story = sampling_of(seed, **settings), story or Story()
        llm.check(story)
        llm.model.fit(story, sampling.max_new_tokens)
        llm.load(story, sampling.max_new_tokens)
        llm.read(story)
        written = llm.model.write(story, sampling, live(cls.hidden.unique_id, sampling.max_new_tokens))
        told = story.add(Text(written.text, written.tokens))
        return io.NodeOutput(told, written.text, written.wants_picture, ui=ui.PreviewText(written.text))
