"""Dream queries at run time (DreamLLM, 2309.11499): conditioning from the LLM itself, and drawing in context."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..config import Config
from ..errors import CheckpointError, SettingError
from ..models.dream import DreamConfig, DreamQueries
from ..models.llama_mmfs import KVCache, LlamaMMFS
from ..models.lora import LoRA
from ..stories.story import ImageSegment, Story, TextSegment
from .embedders import read_system
from .text import TextGenerator

LORA_PREFIX = "lora."
NAMES = "ABCD"  # of the images of a text
REFERENCE = re.compile(r"\{([A-Za-z])\}")


class DreamConditioner:
    """Prompt embeddings of stories from the LLM's states at dream queries, instead of the Perceiver's.

    Args:
        lora: Of the LLM, on while it reads the queries; what it read before stays as it is.
    """

    def __init__(self, model: DreamQueries, lora: LoRA | None = None):
        self.model, self.lora = model, lora

    @torch.no_grad()
    def prompt_embeds(self, text: TextGenerator, stories: Sequence[Story]) -> torch.Tensor:
        """`(N, num_queries, cross_attention_dim)` of the image that comes next in each story.

        Raises:
            StoryTooLongError: If a story does not leave room for the queries.
        """
        reserve = self.model.config.num_queries + 1
        stories = [text.truncate_to_context(story, reserve, None) for story in stories]
        return self.read(text.llm, *text.fork(stories))

    @torch.no_grad()
    def negative_prompt_embeds(self, text: TextGenerator) -> torch.Tensor | None:
        """Of the queries behind nothing, `(1, num_queries, C)`; None for a model that has others for guidance."""
        if not self.model.config.has_own_negative:
            return None
        llm, cache = text.llm, KVCache(1)
        llm(llm.embed_inputs(torch.tensor([[llm.config.special_tokens.bos]], device=llm.device)), cache=cache)
        return self.read(llm, cache)

    def read(self, llm: LlamaMMFS, cache: KVCache, image_values=None, image_mask=None) -> torch.Tensor:
        """`DreamQueries.forward`, with the LoRA on while the LLM reads the queries."""
        with self.lora.attached(llm) if self.lora is not None else contextlib.nullcontext():
            return self.model(llm, cache, image_values, image_mask)


def in_context_story(text: str, images: Mapping[str, ImageSegment]) -> Story:
    """A text with images in it as a story: `{A} and {B} wave on the beach.`

    Args:
        images: By the letters that the text has in braces; all of them must be in it.

    Raises:
        SettingError: For a text without an image, for an image that the text does not name, or the other way round.
    """
    names = REFERENCE.findall(text)
    if not names:
        raise SettingError("The text names no image; write {A} where the first one belongs, as in '{A} in {B}.'")
    missing = [name for name in dict.fromkeys(names) if name not in images]
    if missing:
        raise SettingError(f"The text names {{{missing[0]}}}, but there is no image {missing[0]}; connect it.")
    unused = [name for name in images if name not in names]
    if unused:
        raise SettingError(f"The text does not name image {unused[0]}; write {{{unused[0]}}} where it belongs.")
    segments = []
    for i, part in enumerate(REFERENCE.split(text)):
        if i % 2:
            segments.append(images[part])
        elif part.strip():
            segments.append(TextSegment(part.strip()))
    return Story(tuple(segments))


def build_dream(
    tensors: dict[str, torch.Tensor], about: dict, label: str, operations=None
) -> tuple[DreamQueries, LoRA | None]:
    """DreamQueries with these weights, and the LLM's LoRA if there is one; raises CheckpointError.

    Args:
        about: From `embedders.parse_system_metadata`.
        operations: Layers of the host, None for `torch.nn`.
    """
    from ..models.build import check_shapes, param_shapes

    config = DreamConfig.from_dict(about["config"], label)
    try:
        model = DreamQueries(config, *(() if operations is None else (operations,)))
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{label} has settings that no dream queries can have.") from None
    own = {name: t for name, t in tensors.items() if not name.startswith(LORA_PREFIX)}
    check_shapes(param_shapes(model), {name: tuple(t.shape) for name, t in own.items()}, label)
    model.load_state_dict(own, assign=True)
    rest = {name.removeprefix(LORA_PREFIX): t for name, t in tensors.items() if name.startswith(LORA_PREFIX)}
    return model.eval().requires_grad_(False), LoRA(rest, label) if rest else None


def check_dream(model: DreamQueries, lora: LoRA | None, llm, config: Config, label: str) -> None:
    """Raises CheckpointError unless queries, LLM and U-Net belong together."""
    c = model.config
    if c.llm_hidden_size != config.llm.hidden_size:
        raise CheckpointError(
            f"{label} is for an LLM of width {c.llm_hidden_size}, but this one has {config.llm.hidden_size}; use those "
            "of one model."
        )
    width = config.synchronizer.perceiver.hidden_size
    if c.cross_attention_dim != width:
        raise CheckpointError(
            f"{label} gives conditioning of width {c.cross_attention_dim}, but the U-Net takes {width}; use those of "
            "one model."
        )
    if lora is not None:
        lora.check(llm, label)


def load_dream(path: Path, llm, config: Config, device="cpu", dtype: torch.dtype = torch.float32) -> DreamConditioner:
    """The dream queries of a system's file; raises CheckpointError."""
    tensors, about = read_system(path, "dream")
    model, lora = build_dream({name: t.to(device, dtype) for name, t in tensors.items()}, about, repr(path.name))
    check_dream(model, lora, llm, config, repr(path.name))
    return DreamConditioner(model, lora)
