"""The model's blocks as ComfyUI holds them: layers of comfy.ops in a ModelPatcher, loaded and unloaded by ComfyUI."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention

from ..comfy_mminterleaved.checkpoints import load as checkpoint
from ..comfy_mminterleaved.config import Config
from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.models.attention import lower_right
from ..comfy_mminterleaved.models.mmfs import fold
from ..comfy_mminterleaved.pipeline import MMInterleaved
from ..comfy_mminterleaved.stories.images import preprocess
from ..comfy_mminterleaved.stories.story import Picture, Story
from ..comfy_mminterleaved.tokenizer import Tokenizer


def attention(q, k, v, mask=None, causal=False):
    """`comfy_mminterleaved.models.attention` by ComfyUI's choice of kernel and its flags."""
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if causal:
        mask = lower_right(q, k)[None, None]
    if mask is not None:
        hidden = torch.finfo(q.dtype).min / 2
        mask = torch.zeros(mask.shape, device=q.device, dtype=q.dtype).masked_fill(~mask, hidden)
        mask = mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])
    return optimized_attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True)


class Block:
    """One block: its module in a ModelPatcher, and the config it was made from."""

    name: str

    def __init__(self, config: Config, tensors: dict[str, torch.Tensor], what: str):
        management = comfy.model_management
        self.config = config
        load_device, offload_device = management.text_encoder_device(), management.text_encoder_offload_device()
        self.dtype = torch.float32 if management.is_device_cpu(load_device) else torch.float16
        module = checkpoint.build(config, (self.name,), operations=comfy.ops.manual_cast, attention=attention)[
            self.name
        ]
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        checkpoint.check(checkpoint.shapes(module), found, what)
        module.load_state_dict({k: t.to(offload_device, self.dtype) for k, t in tensors.items()}, assign=True)
        make = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = make(fold(module), load_device=load_device, offload_device=offload_device)

    @property
    def module(self) -> torch.nn.Module:
        return self.patcher.model

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def load(self, memory: float = 0) -> None:
        """Has ComfyUI load the block, with `memory` bytes to spare for its work."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)


class EncoderBlock(Block):
    name = "encoder"

    def encode(self, picture: Picture) -> Picture:
        """The picture with this encoder's features, kept where ComfyUI keeps what nodes hand on."""
        size = self.config.encoder.image_size
        self.load(64 * size**2 * self.config.encoder.width)
        pixels = preprocess(picture.pixels, size).unsqueeze(0).to(self.device, self.dtype)
        features = self.module(pixels)[0]
        keep = comfy.model_management.intermediate_device()
        moved = type(features)(features.tokens.to(keep), tuple(m.to(keep) for m in features.maps), features.made_by)
        return Picture(picture.pixels, moved)

    def encode_all(self, story: Story, on_picture=None) -> Story:
        """The story with this encoder's features in all its pictures; those that have them keep them."""
        known, found = self.module.identity, []
        for number, picture in enumerate(story.pictures):
            has = picture.features is not None and picture.features.made_by is known
            found.append(picture.features if has else self.encode(picture).features)
            if on_picture is not None:
                on_picture(number + 1, len(story.pictures))
        return story.with_features(found)


class LLMBlock(Block):
    """The LLM; `model` has the library's methods that need no other block."""

    name = "llm"

    def __init__(self, config: Config, tensors, what: str, tokenizer: str | None):
        super().__init__(config, tensors, what)
        limit = config.llm.vocab_size - config.llm.new_tokens
        self.tokenizer = None if tokenizer is None else Tokenizer.of_text(tokenizer, config.llm.tokens, limit, what)
        self.model = GraphModel(config, {"llm": self.module}, self.tokenizer)
        self.noticed: set[str] = set()
        # What was read last lies beside the weights: it goes when they go.
        callback = comfy.patcher_extension.CallbacksMP.ON_DETACH
        self.patcher.add_callback(callback, lambda *_: self.model.forget())

    def load(self, story: Story, new_tokens: int = 1) -> None:
        """Loads the LLM with room to read a story and `new_tokens` more; raises if it cannot read it."""
        self.check(story)
        self.notice(story)
        c = self.config.llm
        tokens = len(self.model.layout(story)) + new_tokens
        size = torch.finfo(self.dtype).bits // 8
        cache = 2 * c.layers * c.width * tokens * size
        cells = sum(side * side for side in c.sync_levels)
        pictures = len(story.pictures) * cells * c.sync_width * size * -(-c.layers // c.sync_every)
        super().load(3 * (cache + pictures))
        self.module.device = self.device  # in a partial load the weights are in several places

    def read(self, story: Story) -> None:
        """Reads a story, with progress and Cancel after each of its segments; call `load` before."""
        bar = comfy.utils.ProgressBar(len(story))

        def on_segment(count: int, segments: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(count, segments)

        self.model.read(story, on_segment)

    def notice(self, story: Story) -> None:
        """One line in the log for words that the model was not taught, once for each word."""
        words = [word for word in self.model.unknown_words(story) if word not in self.noticed]
        if words:
            self.noticed.update(words)
            unknown = ", ".join(words)
            logging.warning("MM-Interleaved: this model does not know the words %s; it does its best.", unknown)

    def check(self, story: Story) -> None:
        """One sentence for a story whose pictures this LLM cannot see."""
        width = self.config.llm.width
        for picture in story.pictures:
            if picture.features is None:
                raise StoryError("A picture of the story was not encoded; connect an encoder where it is added.")
            if picture.features.tokens.shape[-1] != width:
                raise StoryError(
                    f"The encoder makes tokens of width {picture.features.tokens.shape[-1]}, but the LLM has width "
                    f"{width}; use an encoder and an LLM of the same model."
                )


class SynchronizerBlock(Block):
    name = "synchronizer"


class GraphModel(MMInterleaved):
    """The library's model with the LLM alone: pictures come with their features."""

    def encode(self, story: Story) -> Story:
        return story
