"""Writer from Server: a language model behind a local server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.writers.chat import ChatWriter
from ..comfy_mminterleaved.writers.prompts import load_prompts
from ..comfy_mminterleaved.writers.server import KEY_VARIABLE, ChatServer
from .load_writer import prompt_folders, prompts_fingerprint, prompts_input
from .types import CATEGORY, WriterSocket, advanced


class WriterFromServer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedWriterFromServer",
            display_name="Writer from Server",
            category=CATEGORY,
            description="Lets a language model write that a local server runs: llama.cpp, Ollama, LM Studio, or any other that speaks "
            "OpenAI's chat protocol.",
            inputs=[
                io.String.Input(
                    "url",
                    default="http://127.0.0.1:8080/v1",
                    tooltip="llama.cpp: http://127.0.0.1:8080/v1, Ollama: http://127.0.0.1:11434/v1, LM Studio: "
                    f"http://127.0.0.1:1234/v1. A key is read from the environment variable {KEY_VARIABLE}.",
                ),
                io.String.Input(
                    "model", default="", tooltip="The model's name on the server; llama.cpp, which has one, needs none."
                ),
                io.Boolean.Input(
                    "sees_images", default=False, tooltip="On, if the model sees: the images go into its prompt."
                ),
                prompts_input(),
                *advanced(
                    io.Int.Input(
                        "timeout",
                        default=120,
                        min=1,
                        max=3600,
                        tooltip="Seconds that the server may be silent, while it loads its model for example.",
                    ),
                    io.Boolean.Input(
                        "any_host",
                        default=False,
                        tooltip="On: another computer may be asked, which is then sent the story and its images.",
                    ),
                    io.String.Input(
                        "options",
                        default="",
                        multiline=True,
                        dynamic_prompts=False,
                        tooltip='Further fields of each request, as JSON: {"chat_template_kwargs": {"enable_thinking": false}}',
                    ),
                ),
            ],
            outputs=[WriterSocket.Output("writer_out", display_name="writer")],
        )

    @classmethod
    def validate_inputs(cls, prompts):
        return True  # files come and go; `execute` says which are there

    @classmethod
    def fingerprint_inputs(cls, prompts, **inputs):
        return prompts_fingerprint(prompts)

    @classmethod
    def execute(cls, url, model, sees_images, prompts, timeout, any_host, options) -> io.NodeOutput:
        server = ChatServer(
            url,
            model,
            sees_images=sees_images,
            options=parse_options(options),
            timeout=timeout,
            any_host=any_host,
        )
        return io.NodeOutput(ChatWriter(server, load_prompts(prompts, prompt_folders())))


def parse_options(options: str) -> dict:
    """Raises SettingError for text that is no JSON object."""
    try:
        fields = json.loads(options) if options.strip() else {}
    except (ValueError, RecursionError) as error:
        raise SettingError(f"The options {options!r:.60} are not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise SettingError(f"The options must be a JSON object, {{...}}, not {options!r:.60}.")
    return fields
