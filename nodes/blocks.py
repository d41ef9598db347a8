"""The model's blocks as ComfyUI holds them: layers of comfy.ops in a ModelPatcher, loaded and unloaded by ComfyUI."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention_for_device

from ..comfy_mminterleaved.checkpoints.load import cast_tensors, default_dtype, is_large
from ..comfy_mminterleaved.config import Config
from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.generation.config import GenerationConfig
from ..comfy_mminterleaved.generation.memory import (
    continuation_bytes,
    dequantization_bytes,
    encoding_bytes,
    prefill_bytes,
)
from ..comfy_mminterleaved.generation.text import TextGenerator
from ..comfy_mminterleaved.models.attention import causal_lower_right
from ..comfy_mminterleaved.models.build import build, check_shapes, param_shapes
from ..comfy_mminterleaved.models.gmail_adapter import encode_image, features_id
from ..comfy_mminterleaved.models.image_processor import preprocess_image
from ..comfy_mminterleaved.models.lora import LoRA
from ..comfy_mminterleaved.models.mmfs import fuse_mmfs
from ..comfy_mminterleaved.models.visual_tokenizer import ImageFeatures
from ..comfy_mminterleaved.stories.story import ImageSegment, Story
from ..comfy_mminterleaved.tokenizer import Tokenizer
from .quantization import comfy_linears, for_core


def attention(q, k, v, mask=None, causal=False):
    """`comfy_mminterleaved.models.attention` with ComfyUI's choice of kernel; with a mask, one that obeys masks."""
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if causal:
        mask = causal_lower_right(q, k)[None, None]
    if mask is not None:
        hidden = torch.finfo(q.dtype).min / 2
        mask = torch.zeros(mask.shape, device=q.device, dtype=q.dtype).masked_fill(~mask, hidden)
        mask = mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])
    kernel = optimized_attention_for_device(q.device, mask=mask is not None, small_input=True)
    return kernel(q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True)


def compute_dtype(config: Config, tensors: dict[str, torch.Tensor], device: torch.device) -> torch.dtype:
    """Of a block's activations, and of its weights that are not quantized."""
    if comfy.model_management.is_device_cpu(device):
        return default_dtype(config, device)
    is_bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    return torch.bfloat16 if is_bfloat16 and comfy.model_management.should_use_bf16(device) else torch.float16


def progress(total: int) -> Callable[[int, int], None]:
    """A callback `(done, total)` that moves the node's progress bar and lets Cancel through."""
    bar = comfy.utils.ProgressBar(total)

    def on_progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return on_progress


def block_patcher(module: torch.nn.Module, load_device: torch.device, offload_device: torch.device):
    """ComfyUI's ModelPatcher for a block; it also counts and frees the LLM's prefix cache."""
    base = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)

    class BlockPatcher(base):
        generator: Callable[[], TextGenerator | None] = staticmethod(lambda: None)

        def cache_size(self) -> int:
            """Bytes of the generator's prefix cache."""
            generator = self.generator()
            return generator.cache.nbytes if generator is not None and generator.cache is not None else 0

        def model_size(self):
            return super().model_size() + self.cache_size()

        def loaded_size(self):
            return super().loaded_size() + self.cache_size()

        def partially_unload(self, device_to, memory_to_free=0, **options):
            freed = self.cache_size()
            if freed:  # it costs less to compute again than weights to load again
                self.generator().clear_cache()
            if freed >= memory_to_free:
                return freed
            return freed + super().partially_unload(device_to, memory_to_free - freed, **options)

    return BlockPatcher(module, load_device=load_device, offload_device=offload_device)


LAST_PATCHES = "mm_interleaved_patches"  # on a module: the patches that it was last loaded with


def detach_other_patches(patcher) -> None:
    """Takes LoRAs out of the weights that a clone with others left in them, before `patcher` is loaded.

    Some cores know only per clone which LoRAs are in the weights: a clone that never was loaded takes them for its own,
    and one that is gone leaves them. What all clones share is the backup of the weights.
    """
    module, uuid = patcher.model, patcher.patches_uuid
    others = [
        loaded
        for loaded in comfy.model_management.loaded_models()
        if loaded is not patcher and patcher.is_clone(loaded) and loaded.patches_uuid != uuid
    ]
    for each in others:
        each.detach()
    is_left = bool(patcher.backup) and (not patcher.patches or getattr(module, LAST_PATCHES, uuid) != uuid)
    if others or is_left:
        patcher.detach()  # what it remembers of the device is no longer so
    setattr(module, LAST_PATCHES, uuid)


def system_patcher(*modules: torch.nn.Module):
    """`block_patcher` of what stands beside a model's blocks: held where ComfyUI holds text encoders."""
    management = comfy.model_management
    devices = management.text_encoder_device(), management.text_encoder_offload_device()
    # In a list, because a model of transformers has a `device` that cannot be set.
    return block_patcher(torch.nn.ModuleList(modules), *devices)


def load_whole(patcher) -> None:
    """Loads a model of another library, whose layers cannot stay in the computer's memory while they compute."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)


class PatchedBlock:
    """One block: its module in a ModelPatcher, and the config it was made from."""

    name: str

    def __init__(self, config: Config, tensors: dict[str, torch.Tensor], label: str):
        management = comfy.model_management
        self.config = config
        load_device, offload_device = management.text_encoder_device(), management.text_encoder_offload_device()
        self.dtype = compute_dtype(config, tensors, load_device)
        expected = param_shapes(build(config, (self.name,))[self.name])
        check_shapes(expected, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, label)
        quantization = config.llm.quantization if self.name == "llm" else None
        linears = comfy_linears(quantization, self.dtype) if quantization else None
        host = {"operations": comfy.ops.manual_cast, "attention": attention, "linears": linears}
        module = build(config, (self.name,), **host)[self.name]
        is_mapped = management.is_device_cpu(load_device) and is_large(config)
        tensors = cast_tensors(self.name, tensors, self.dtype, offload_device, is_mapped)
        module.load_state_dict(for_core(tensors, quantization), assign=True)
        self.patcher = block_patcher(fuse_mmfs(module), load_device, offload_device)

    @property
    def module(self) -> torch.nn.Module:
        return self.patcher.model

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def itemsize(self) -> int:
        return torch.finfo(self.dtype).bits // 8

    def load(self, memory: float = 0) -> None:
        """Has ComfyUI load the block, with `memory` bytes free for its work."""
        detach_other_patches(self.patcher)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)


class PatchedEncoder(PatchedBlock):
    name = "encoder"
    drawn_adapter: LoRA | None = None  # for drawn images

    def encode(self, image: ImageSegment) -> ImageSegment:
        """Returns the image with this encoder's features, on ComfyUI's intermediate device."""
        size = self.config.encoder.image_size
        self.load(encoding_bytes(self.config.encoder, self.itemsize))
        pixels = preprocess_image(image.pixels, size).unsqueeze(0).to(self.device, self.dtype)
        features = encode_image(self.module, pixels, image.origin, self.drawn_adapter)
        device = comfy.model_management.intermediate_device()
        maps = tuple(m.to(device) for m in features.feature_maps)
        return image.with_features(ImageFeatures(features.visual_tokens.to(device), maps, features.encoder_id))

    def encode_images(self, story: Story, on_image=None) -> Story:
        """Returns the story with this encoder's features on every image; features that it already has are kept."""
        encoder_id, total = self.module.encoder_id, len(story.images)
        count = 0

        def encode(image: ImageSegment) -> ImageSegment:
            nonlocal count
            count += 1
            expected = features_id(encoder_id, image.origin, self.drawn_adapter)
            if image.features is None or image.features.encoder_id != expected:
                image = self.encode(image)
            if on_image is not None:
                on_image(count, total)
            return image

        return story.map_images(encode)


class PatchedLLM(PatchedBlock):
    """The LLM; `generator` generates text and context features with it."""

    name = "llm"

    def __init__(
        self,
        config: Config,
        tensors,
        label: str,
        tokenizer: str | None = None,
        known_words: frozenset[str] | None = None,
        generation_config: GenerationConfig = GenerationConfig(),
    ):
        super().__init__(config, tensors, label)
        c = config.llm
        limit = c.vocab_size - c.num_added_tokens
        if tokenizer is not None:
            tokenizer = Tokenizer.of_text(tokenizer, c.special_tokens, limit, label)
        self.generator = TextGenerator(self.module, config, tokenizer, known_words, generation_config)
        self.warned: set[str] = set()
        self._free_cache_with_weights()

    def clone(self) -> PatchedLLM:
        """The same weights in a patcher of their own, for patches, with a prefix cache of its own."""
        self.generator.clear_cache()  # nobody would count it while the clone is loaded
        other = copy.copy(self)
        other.patcher = self.patcher.clone()
        own = self.generator
        other.generator = TextGenerator(self.module, self.config, own.tokenizer, own.known_words, own.generation_config)
        other._free_cache_with_weights()
        return other

    def _free_cache_with_weights(self) -> None:
        # The cache is freed when the weights are unloaded; a load only detaches the patches for a moment. The patcher
        # must not reference the block: the cycle would keep both in memory until the garbage collector runs.
        self.patcher.generator = generator = weakref.ref(self.generator)

        def on_detach(_, unpatch_all: bool = True) -> None:
            if unpatch_all and generator() is not None:
                generator().clear_cache()

        self.patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_DETACH, on_detach)

    def prepare(
        self,
        story: Story,
        reserve_tokens: int = 1,
        num_rows: int = 1,
        are_given: bool = False,
        drop_oldest: bool | None = None,
    ) -> Story:
        """Checks a story, loads the LLM and prefills the story, with progress and Cancel.

        Args:
            reserve_tokens: Number of tokens that the LLM will process after the story, in each of `num_rows` rows.
            are_given: Whether these tokens are given, as options are, or generated.
            drop_oldest: `TextGenerator.truncate_to_context`'s.

        Returns:
            The story, without its oldest panels if they were dropped.
        """
        story = self.generator.truncate_to_context(story, reserve_tokens, drop_oldest)
        self.load(story, reserve_tokens, num_rows, are_given)
        self.generator.prefill(story, progress(len(self.generator.tokenize(story))))
        return story

    def load(self, story: Story, new_tokens: int = 1, num_rows: int = 1, are_given: bool = False) -> None:
        """Loads the LLM with the memory that `prepare` and what follows it need; raises for a story it cannot use."""
        self.check(story)
        self.warn_unknown_words(story)
        c, tokens, cache = self.config.llm, self.generator.tokenize(story), self.generator.cache
        longest = max((end - start for start, end in zip((0, *tokens.segment_ends), tokens.segment_ends)), default=1)
        needed = prefill_bytes(c, len(tokens), len(story.images), self.itemsize, longest)
        needed += continuation_bytes(c, len(tokens), new_tokens, num_rows, self.itemsize, are_given)
        needed += dequantization_bytes(c, self.itemsize)
        super().load(max(0, needed - (cache.nbytes if cache is not None else 0)))
        self.module.device = self.device  # in a partial load the weights are in several places

    def warn_unknown_words(self, story: Story) -> None:
        """One line in the log for words that the model was not taught, once for each word."""
        words = [word for word in self.generator.find_unknown_words(story) if word not in self.warned]
        if words:
            self.warned.update(words)
            unknown = ", ".join(words)
            logging.warning(
                "MM-Interleaved: this model does not know the words %s; it may continue with different words.",
                unknown,
            )

    def check(self, story: Story) -> None:
        """Raises StoryError for a story whose images this LLM cannot use."""
        check_features(story, self.config.llm.hidden_size)


def check_features(story: Story, width: int) -> None:
    """Raises StoryError for a story whose images are not encoded for an LLM of this width."""
    for image in story.images:
        if image.features is None:
            raise StoryError("An image of the story was not encoded; connect an encoder where it is added.")
        if image.features.visual_tokens.shape[-1] != width:
            raise StoryError(
                f"The encoder gives visual tokens of width {image.features.visual_tokens.shape[-1]}, but the LLM has width "
                f"{width}; use an encoder and an LLM of the same model."
            )


class PatchedSynchronizer(PatchedBlock):
    name = "synchronizer"
