"""Loading a whole model: its blocks in a dtype on a device, or planned for a card that does not hold them all."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoints import load as checkpoints
from .config import Config
from .errors import CheckpointError, SettingError
from .generation.config import GenerationConfig, usable_generation_config
from .generation.placement import Plan, make_plan, parse_bytes
from .models.mmfs import fuse_mmfs
from .models.quantization import quantize_with_torchao


@dataclass(frozen=True)
class LoadedModel:
    """What a pipeline is made of.

    Args:
        folder: None for a model that has none.
        plan: For a card that does not hold all blocks; they are in the computer's memory then.
    """

    config: Config
    modules: dict[str, torch.nn.Module]
    tokenizer: object
    known_words: frozenset[str] | None = None
    generation_config: GenerationConfig = GenerationConfig()
    folder: Path | None = None
    plan: Plan | None = None


def load_model(
    source, device: torch.device, dtype, compile: bool, memory, cache_dtype, quantize: str | None, image_size
) -> LoadedModel:
    """The blocks of a checkpoint or of a model that comes with the package (`MMInterleavedPipeline.load`)."""
    folder = checkpoints.model_folder(source)
    if folder is None:
        config, modules, tokenizer = tiny_random_blocks()
        modules = {name: fuse_mmfs(block) for name, block in modules.items()}
        dtype = dtype or checkpoints.default_dtype(config, device)
        for name, block in modules.items():  # diffusers' own `to` warns of every cast
            torch.nn.Module.to(block, device, *((dtype,) if name != "vae" else ()))
        return LoadedModel(config, modules, tokenizer)
    config = checkpoints.read_config(folder)
    if quantize is not None:
        _check_quantize(config, memory, quantize)
    dtype = dtype or checkpoints.default_dtype(config, device)
    plan = None
    if quantize is None and (memory is not None or device.type == "cuda"):
        plan = _plan(config, memory, device, dtype, cache_dtype, image_size)
    if plan is not None and compile:
        raise SettingError(
            "Compiled blocks must stay on the card, but the model does not fit it; omit --compile, or give a "
            "model of `convert --quantize q4_0`."
        )
    options = {"device": str(device)}
    if plan is not None or quantize is not None:
        options = {"device": "cpu", "keep_linears": False}
    config, modules = checkpoints.load_blocks(folder, dtype, **options)
    if quantize is not None:
        quantize_with_torchao(modules["llm"], quantize)
        for module in modules.values():
            torch.nn.Module.to(module, device)
    return LoadedModel(
        config,
        modules,
        checkpoints.read_tokenizer(folder, config),
        checkpoints.known_words(folder),
        usable_generation_config(folder),
        folder,
        plan,
    )


def _check_quantize(config: Config, memory, quantize: str) -> None:
    if memory is not None:
        raise SettingError(
            "A model that is quantized while it loads must fit the card; omit --memory, or write it with "
            f"`convert --quantize {quantize}`."
        )
    if config.llm.quantization is not None:
        raise CheckpointError(f"The model is stored as {config.llm.quantization} already; omit --quantize.")


def _plan(config: Config, memory, device: torch.device, dtype: torch.dtype, cache_dtype, image_size) -> Plan | None:
    """The plan for a card; None if everything fits, which a small model is taken to do unless `memory` is given."""
    if memory is None and not checkpoints.is_large(config):
        return None
    if isinstance(memory, str):
        memory = parse_bytes(memory)
    capacity = memory
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        capacity = free if memory is None else min(memory, free)
    plan = make_plan(config, capacity, dtype, image_size, cache_dtype=cache_dtype)
    return None if plan.mode == "resident" else plan


def resolve_device(device: str) -> torch.device:
    """The device of a name; "auto" takes CUDA if there is one. Raises CheckpointError for one that cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _friendly_errors(device):
        return torch.empty(0, device=device).device


@contextlib.contextmanager
def _friendly_errors(device: str):
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CheckpointError(f"The device {device!r} cannot be used: {reason}.") from None


def tiny_random_blocks(seed: int = 0):
    """Config, unfused modules and tokenizer of `pipeline.tiny_random_pipeline`.

    Biases give letters their frequency in English, and images colours that are not all black.
    """
    from .models.build import init_modules
    from .presets import tiny_config
    from .tokenizer import Tokenizer, byte_level

    config = tiny_config()
    modules = {name: block.eval().requires_grad_(False) for name, block in init_modules(config, seed).items()}
    limit = config.llm.vocab_size - config.llm.num_added_tokens
    tokenizer = Tokenizer(byte_level(limit), config.llm.special_tokens, limit)
    ids = tokenizer.encode(
        "once there was a small bear who lived near the sea. every morning it went out to see what the tide had left: "
        "a shell, some wood, and one day a letter in a bottle, which it could not read but kept for good, of course."
    )
    counts = torch.bincount(torch.tensor(ids), minlength=config.llm.vocab_size)
    modules["llm"].head.bias.copy_((counts + 1e-3).log())
    last = [layer for layer in modules["vae"].decoder.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    last.weight.mul_(8.0)
    last.bias.fill_(0.5)
    return config, modules, tokenizer
