"""Which blocks are on the card when: a plan made before anything is loaded, and what carries it out.

Encoder, LLM and the blocks that draw do not work at the same time. With room for all they stay on the card; else each
is loaded when its turn comes and those that waited longest make room; if not even the LLM fits, some of its attention
and MLP weights stay in the computer's memory and are copied for each layer's turn.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import torch

from ..config import BLOCKS, Config
from ..errors import SettingError
from ..files import format_memory
from ..models.build import build, diffusers_model
from ..models.mmfs import fuse_mmfs
from ..models.quantization import is_quantized_weight, stored_dtype
from . import memory
from .latents import vae_scale_factor
from .peak_memory import PeakMemory

PHASES = {"encode": ("encoder",), "text": ("llm",), "draw": ("synchronizer", "unet", "vae")}
RESERVED = 10**9  # bytes of a card for CUDA's context, what its libraries take, and MMFS where Triton is missing
MAX_IMAGES = 8  # of a story that a plan leaves room for, if the context has
MAX_BATCH = 8  # stories that share passes; more are hardly faster


@dataclass(frozen=True)
class Plan:
    """Where weights are, in bytes.

    Args:
        memory: Of the card.
        weights: Of each block, on the card.
        work: What each phase needs beside weights, the story's cache included.
        streamed: Of the LLM's weights, how much stays in the computer's memory.
        largest_linear: Of the weights that are streamed, which need a place one at a time.
    """

    memory: int
    weights: dict[str, int]
    work: dict[str, int]
    streamed: int = 0
    largest_linear: int = 0

    @property
    def room(self) -> int:
        return self.memory - RESERVED

    def resident(self, phase: str) -> int:
        """Weights of a phase's blocks that are on the card."""
        size = sum(self.weights[block] for block in PHASES[phase])
        return size - (self.streamed if phase == "text" else 0)

    def needed(self, phase: str) -> int:
        """Peak of a phase, nothing else on the card but the story's cache."""
        buffer = self.largest_linear if phase == "text" and self.streamed else 0
        return self.resident(phase) + self.work[phase] + buffer

    @property
    def mode(self) -> str:
        """resident, swapped or streamed."""
        if self.streamed:
            return "streamed"
        everything = sum(self.weights.values()) + max(self.work.values())
        return "resident" if everything <= self.room else "swapped"

    @property
    def peak(self) -> int:
        """Of the card, without what CUDA itself takes."""
        if self.mode == "resident":
            return sum(self.weights.values()) + max(self.work.values())
        return max(self.room if self._leaves_blocks() else 0, *(self.needed(phase) for phase in PHASES))

    def _leaves_blocks(self) -> bool:
        """Whether blocks of one phase may still be there in the next."""
        sizes = sorted(self.needed(phase) for phase in PHASES)
        return sizes[0] + sizes[1] <= self.room

    def table(self) -> str:
        """For people: each block and each phase, and what the card holds."""
        lines = [f"{block:13}{format_memory(size):>10} of weights" for block, size in self.weights.items()]
        for phase, blocks in PHASES.items():
            lines.append(f"{phase:13}{format_memory(self.needed(phase)):>10} with {', '.join(blocks)} at work")
        how = {
            "resident": "everything stays on the card",
            "swapped": "each block is on the card when it works",
            "streamed": "each block is on the card when it works, and "
            f"{format_memory(self.streamed)} of the LLM are copied for every token",
        }
        lines.append(f"{'plan':13}{self.mode:>10}: {how[self.mode]}")
        return "\n".join(lines)


def make_plan(
    config: Config,
    capacity: int,
    dtype: torch.dtype = torch.float16,
    size: tuple[int, int] | None = None,
    num_tokens: int | None = None,
    num_images: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Plan:
    """Plans a story of `num_tokens` with `num_images` on a card of `capacity` bytes; raises SettingError if none fits.

    Args:
        dtype: Of what is computed and of the weights that are not quantized; the VAE is in float32.
        size: `(width, height)` in px; None for the model's own.
        num_tokens: None for the model's whole context.
        num_images: None for as many as fit the context, eight at most.
        cache_dtype: Of keys and values; None for `dtype`.
    """
    c, itemsize = config.llm, dtype.itemsize
    num_tokens = num_tokens or c.max_position_embeddings
    num_images = min(MAX_IMAGES, num_tokens // (c.num_img_token + 1)) if num_images is None else num_images
    width, height = size or (config.synchronizer.image_size,) * 2
    cache_itemsize = (cache_dtype or dtype).itemsize
    cache = memory.cache_bytes(c, num_tokens, num_images, itemsize, cache_itemsize)
    cells = sum(side * side for side in config.encoder.feature_map_sizes)
    features = num_images * (cells * config.encoder.hidden_size + c.num_img_token * c.hidden_size) * itemsize
    text = memory.prefill_bytes(c, num_tokens, num_images, itemsize, cache_itemsize=cache_itemsize)
    unet, vae, latents = drawing_bytes(config, width, height)
    looked_at = min(num_images, config.synchronizer.num_context_images)
    draw = memory.sampling_bytes(config.synchronizer, looked_at, 2, latents, itemsize) + unet * itemsize // 4
    weights = block_bytes(config, dtype)
    plan = Plan(
        capacity,
        weights,
        {
            "encode": cache + features + memory.encoding_bytes(config.encoder, itemsize),
            "text": features + text + memory.dequantization_bytes(c, itemsize),
            "draw": cache + features + max(draw, vae),
        },
    )
    missing = plan.needed("text") - plan.room
    if missing > 0:
        linears = _linear_sizes(config, dtype)
        largest = max(linears)
        plan = replace(plan, streamed=min(sum(linears), missing + 2 * largest), largest_linear=largest)
    short = max(plan.needed(phase) for phase in PHASES) - plan.room
    if short > 0:
        raise SettingError(
            f"{format_memory(capacity)} of memory are too little for this model, which needs "
            f"{format_memory(capacity + short)}; draw smaller images, or convert it with --quantize q4_0 if it is not."
        )
    return plan


def choose_batch_size(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, int] | None = None,
    cache_dtype: torch.dtype | None = None,
    free: int | None = None,
) -> int:
    """How many stories of the whole context, each with its cache and its images at work, fit the memory that is free.

    Args:
        size, cache_dtype: As in `make_plan`.
        free: Bytes; None asks the device.

    Returns:
        From 1 to MAX_BATCH.
    """
    free = free_bytes(device) if free is None else free
    work = make_plan(config, 2**60, dtype, size, cache_dtype=cache_dtype).work
    return max(1, min(MAX_BATCH, int(0.8 * free) // max(work.values())))


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows and macOS do not say
        return 4 * 1024**3


def block_bytes(config: Config, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each block's weights as they are loaded."""
    sizes = {}
    for block in BLOCKS:
        to = torch.float32 if block == "vae" else dtype
        shapes = fuse_mmfs(build(config, (block,))[block]).state_dict()
        sizes[block] = sum(t.numel() * stored_dtype(name, t, to).itemsize for name, t in shapes.items())
    return sizes


def _linear_sizes(config: Config, dtype: torch.dtype) -> list[int]:
    shapes = build(config, ("llm",))["llm"].state_dict()
    names = filter(is_quantized_weight, shapes)
    return [shapes[name].numel() * stored_dtype(name, shapes[name], dtype).itemsize for name in names]


def drawing_bytes(config: Config, width: int, height: int) -> tuple[int, int, tuple[int, int]]:
    """Peaks in float32 of one guided step of the U-Net and of decoding its image, beside weights; size of the latents.

    Both run on tensors without content, which takes a second and no memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        unet, vae = diffusers_model(config.unet), diffusers_model(config.vae)
        factor = vae_scale_factor(vae)
        latents = torch.empty(2, unet.config.in_channels, height // factor, width // factor)
        states = torch.empty(2, config.synchronizer.perceiver.num_queries, unet.config.cross_attention_dim)
        with PeakMemory() as step:
            unet(latents, 1, encoder_hidden_states=states, return_dict=False)
        with PeakMemory() as decoding:
            vae.decode(latents[:1])
    return step.peak, decoding.peak, tuple(latents.shape[2:])


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size like 12GB, 7.5 GiB or 800M, in powers of 1024 as makers of cards count; raises SettingError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SettingError(f"A memory size must be like 12GB, not {text!r:.40}.")
    number, prefix = match.groups()
    return int(float(number) * 1024 ** " kmgt".index(prefix.lower() or " "))


class Placement:
    """Carries out a plan: `place` before each phase.

    Args:
        modules: By block, on the CPU.
        device: Where blocks work. Weights are copied to it, also if it is the CPU, which tests use as their card.
    """

    def __init__(self, plan: Plan, modules: dict[str, torch.nn.Module], device: torch.device):
        self.plan, self.device = plan, device
        self._hosts = {name: _host_tensors(module) for name, module in modules.items()}
        self._on_device: list[str] = []  # the one that worked last is the last
        self._streamed = self._stream(modules["llm"]) if plan.streamed else set()
        modules["llm"].device = device

    def place(self, phase: str) -> None:
        """Has the blocks of a phase on the device, and others only if there is room."""
        blocks = PHASES[phase]
        for block in [b for b in self._on_device if b not in blocks]:
            sizes = sum(self._size(b) for b in {*blocks, *self._on_device})
            buffer = self.plan.largest_linear if phase == "text" else 0
            if sizes + buffer + self.plan.work[phase] <= self.plan.room:
                break
            self._unload(block)
        for block in blocks:
            if block in self._on_device:
                continue
            self._on_device.append(block)
            try:
                for tensor, host in self._hosts[block]:
                    if id(tensor) not in self._streamed:
                        tensor.data = _copy_to(host, self.device)
            except BaseException:  # out of memory: what was copied must go
                self._unload(block)
                raise
        self._on_device = [b for b in self._on_device if b not in blocks] + list(blocks)

    def _size(self, block: str) -> int:
        return self.plan.weights[block] - (self.plan.streamed if block == "llm" else 0)

    def _unload(self, block: str) -> None:
        for tensor, host in self._hosts[block]:
            tensor.data = host
        self._on_device.remove(block)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for what others use of the card

    def _stream(self, llm: torch.nn.Module) -> set[int]:
        """Keeps weights of the last layers where they are, and copies each when its layer runs."""
        streamed, size = set(), 0
        linears = [part for name, part in llm.named_modules() if is_quantized_weight(f"{name}.weight")]
        for linear in reversed(linears):
            if size >= self.plan.streamed:
                break
            weight, host = linear.weight, linear.weight.data
            streamed.add(id(weight))
            size += host.nbytes

            def copy_in(_, __, weight=weight, host=host):
                weight.data = _copy_to(host, self.device)

            def let_go(_, __, ___, weight=weight, host=host):
                weight.data = host

            linear.register_forward_pre_hook(copy_in)
            linear.register_forward_hook(let_go, always_call=True)
        return streamed


def _host_tensors(module: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters and buffers, each with its content on the CPU."""
    return [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]


def _copy_to(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.to(device, copy=True)
