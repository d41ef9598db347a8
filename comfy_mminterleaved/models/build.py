"""Block name -> module: build on the meta device, check names and shapes, or start with fresh weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import BLOCKS, Config
from ..errors import CheckpointError

MAX_LISTED = 20  # entries that an error names


def block_makers(config: Config, linears=None, **host):
    """Block name -> function that builds it; `host` may give `operations` and `attention` for all but U-Net and VAE.

    Args:
        linears: `LlamaMMFS`'s.
    """
    from .clip_projector import CLIPProjector
    from .llama_mmfs import LlamaMMFS
    from .unet_synchronizer import UNetSynchronizer
    from .visual_tokenizer import VisualTokenizer

    encoder = CLIPProjector if config.encoder.projector == "linear" else VisualTokenizer
    return {
        "encoder": lambda: encoder(config.encoder, **host),
        "llm": lambda: LlamaMMFS(config.llm, linears=linears, **host),
        "synchronizer": lambda: UNetSynchronizer(config.synchronizer, **host),
        "unet": lambda: diffusers_model(config.unet),
        "vae": lambda: diffusers_model(config.vae),
    }


def init_modules(config: Config, seed: int = 0) -> dict[str, torch.nn.Module]:
    """All blocks with fresh weights, on the CPU in float32.

    Gates, the injectors' gammas and the last convolutions of the MMFS blocks start at zero: MMFS adds nothing before it
    is trained (`zero_module`, `init_values=0.`).
    """
    from .init_weights import init_weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = {name: make() for name, make in block_makers(config).items()}
        for name in ("encoder", "llm", "synchronizer"):
            init_weights(modules[name])
    return modules


def build(config: Config, blocks=BLOCKS, **host) -> dict[str, torch.nn.Module]:
    """The blocks of a config, without weights: on the meta device.

    Args:
        host: `operations` and `attention` for encoder, llm and synchronizer; by default PyTorch's. `linears` for the
            LLM's attention and MLP.

    Raises:
        CheckpointError: For a config that describes no model.
    """
    makers = block_makers(config, **host)
    try:
        with torch.device("meta"):
            return {name: makers[name]().eval().requires_grad_(False) for name in blocks}
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"The checkpoint's config describes no model that can be built: {error}.") from None


def diffusers_model(settings: dict):
    import diffusers

    name = settings.get("_class_name", "")
    if name not in ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"):
        raise CheckpointError(
            f"The U-Net or VAE class {name!r} must be UNet2DConditionModel, AutoencoderKL or AutoencoderTiny."
        )
    return getattr(diffusers, name).from_config(dict(settings))


def check_shapes(expected: dict[str, tuple], actual: dict[str, tuple], label: str) -> None:
    """Compares names and shapes; raises one CheckpointError that lists every difference by name."""
    problems = [
        f"wrong shape: {name} is {tuple(actual[name])}, must be {tuple(expected[name])}"
        for name in expected
        if name in actual and tuple(actual[name]) != tuple(expected[name])
    ]
    unexpected = [f"unexpected: {name}" for name in actual if name not in expected]
    missing = [f"missing: {name}" for name in expected if name not in actual]
    count = len(problems) + len(unexpected) + len(missing)
    if not count:
        return
    half = MAX_LISTED // 2  # of either kind, so that neither hides the other
    problems += unexpected[: max(half, MAX_LISTED - len(problems) - len(missing))]
    problems = (problems + missing)[:MAX_LISTED]
    more = [f"... and {count - len(problems)} more"] if count > len(problems) else []
    raise CheckpointError(f"{label} does not fit its config in {count} entries.\n  " + "\n  ".join(problems + more))


def num_parameters(config: Config) -> dict[str, int]:
    """Weights of each block, however many bits each is stored in."""
    llm = replace(config.llm, quantization=None)
    modules = build(replace(config, llm=llm))
    return {name: sum(tensor.numel() for tensor in module.state_dict().values()) for name, module in modules.items()}


def param_shapes(module: torch.nn.Module) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
