"""Writer from CLIP: a text encoder that can write, with ComfyUI's own `generate`."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.config import GeneratedText
from ..comfy_mminterleaved.stories.story import ImageSegment
from ..comfy_mminterleaved.writers.chat import ChatWriter
from ..comfy_mminterleaved.writers.prompts import load_prompts
from .load_writer import prompt_folders, prompts_fingerprint, prompts_input
from .types import CATEGORY, WriterSocket


class ClipChat:
    """A `chat.ChatModel` over a CLIP. It is shown the last image of a prompt: ComfyUI's `generate` takes one."""

    label = "The text encoder"

    def __init__(self, clip):
        self.clip = clip
        self.sees_images = getattr(clip.tokenizer, "llama_template_images", None) is not None

    def chat(self, parts, config, on_text=None) -> GeneratedText:
        text = "".join(part for part in parts if isinstance(part, str))
        images = [part.pixels.movedim(0, -1).unsqueeze(0) for part in parts if isinstance(part, ImageSegment)]
        arguments = {"image": images[-1]} if images else {}
        tokens = self.clip.tokenize(text, **arguments, min_length=1, thinking=False)
        ids = self.clip.generate(
            tokens,
            do_sample=config.do_sample,
            max_length=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k or 100000,
            top_p=config.top_p,
            min_p=0.0,
            repetition_penalty=config.repetition_penalty,
            seed=config.seed,
        )
        answer = self.clip.decode(ids)
        answer = answer if isinstance(answer, str) else answer[0]
        if on_text is not None:
            on_text(answer)
        return GeneratedText((), "length" if _count(ids) >= config.max_new_tokens else "eos", answer)


def _count(ids) -> int:
    """How many tokens: of a list, a list of one list, or a tensor."""
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return len(ids[0]) if ids and isinstance(ids[0], (list, tuple)) else len(ids)


class WriterFromClip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedWriterFromClip",
            display_name="Writer from CLIP",
            category=CATEGORY,
            description="Lets a text encoder write that ComfyUI can generate text with (Gemma 3, Qwen3, in newer releases).",
            inputs=[io.Clip.Input("clip", tooltip="From Load CLIP."), prompts_input()],
            outputs=[WriterSocket.Output("writer_out", display_name="writer")],
        )

    @classmethod
    def validate_inputs(cls, prompts):
        return True  # files come and go; `execute` says which are there

    @classmethod
    def fingerprint_inputs(cls, clip, prompts):
        return prompts_fingerprint(prompts)

    @classmethod
    def execute(cls, clip, prompts) -> io.NodeOutput:
        if not (hasattr(clip, "generate") and hasattr(clip, "decode")):
            raise SettingError(
                "This ComfyUI cannot generate text with a CLIP; update it, or use Load Writer or Writer from Server."
            )
        return io.NodeOutput(ChatWriter(ClipChat(clip), load_prompts(prompts, prompt_folders())))
