"""What a training run keeps in its folder: the blocks as each stage left them, tokenizer, latents, model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.checkpoints import native
from comfy_mminterleaved.checkpoints.load import read_state_dicts, read_tokenizer
from comfy_mminterleaved.checkpoints.tensors import read_json, read_tensors
from comfy_mminterleaved.config import Config
from comfy_mminterleaved.errors import CheckpointError, SettingError
from comfy_mminterleaved.files import atomic_path, ensure_writable_dir, write_json
from comfy_mminterleaved.generation.latents import encode_latents
from comfy_mminterleaved.models.build import check_shapes, diffusers_model, init_modules, param_shapes

from . import world
from .dataset import StoryDataset
from .slim_vae import crop_to_slim, pad_to_stock, slim_autoencoder
from .starter_config import GENERATION, TEXT_VOCAB_SIZE, make_tokenizer, starter

STAGES = ("vae", "encoder", "detail", "language", "decoder", "look", "joint")
TRAINED_BY = {"vae": "vae", "encoder": "encoder", "llm": "language", "synchronizer": "look", "unet": "decoder"}


def load_run(out: Path, needs=()) -> tuple[Config, dict[str, torch.nn.Module]]:
    """The config and blocks of a run as they are now: each from the last stage that trained it, else fresh."""
    config = starter()
    if (out / "config.json").exists():
        config = Config.from_dict(read_json(out / "config.json"))
    blocks = init_modules(config)
    for name, block in blocks.items():
        if path := latest_weights(out, name):
            tensors = read_tensors(path)
            expected, shapes = param_shapes(block), {key: tuple(t.shape) for key, t in tensors.items()}
            check_shapes(expected, shapes, repr(str(path)))
            block.load_state_dict(tensors)
        elif name in needs:
            raise CheckpointError(f"The run {str(out)!r} has no trained {name} yet; run its stage first.")
    return config, blocks


def latest_weights(out: Path, name: str) -> Path | None:
    """The file of a block in a run, from the last stage that trained it: the one written last, whatever its stage."""
    found = [path for stage in STAGES if (path := out / stage / f"{name}.safetensors").exists()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def tokenizer_of(out: Path):
    """The run's tokenizer, made when first asked for."""
    from comfy_mminterleaved.tokenizer import Tokenizer

    path = out / "tokenizer.json"
    if not path.exists():
        make_tokenizer().save(path)
    return Tokenizer.load(path, starter().llm.special_tokens, TEXT_VOCAB_SIZE)


def newest_thin_vae(out: Path, config: Config):
    """The run's VAE in its thin form, with the decoder half of the detail stage if that is done."""
    stage = "detail" if (out / "detail" / "vae.safetensors").exists() else "vae"
    thin = slim_autoencoder(diffusers_model(config.vae)).to(memory_format=torch.channels_last)
    thin.load_state_dict(read_tensors(out / stage / "thin.safetensors"))
    return thin


@torch.no_grad()
def latents_of(out: Path, book: StoryDataset, config: Config) -> np.ndarray:
    """Scaled latents of all pictures of a book, float16, made once for a VAE, by its thin form, which is the same."""
    made = int((out / "vae" / "vae.safetensors").stat().st_mtime)
    path = out / f"latents-{book.name}-{made}.npy"
    if not path.exists():
        thin = newest_thin_vae(out, config).eval()
        parts = [encode_latents(thin, book.pictures(range(i, min(i + 64, len(book))))) for i in range(0, len(book), 64)]
        with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
            np.save(file, torch.cat(parts).half().numpy())
    return np.load(path, mmap_mode="r")


def begin(out: Path, *models: Path) -> None:
    """Makes a run of a checkpoint, as if its stages were done: each then goes on from its weights, at step 0.

    Of several checkpoints it is the mean of their weights (Wortsman et al. 2022, uniform soup). Raises SettingError for
    a folder that holds a run, CheckpointError if the VAE was not made by this training or checkpoints do not fit.
    """
    from safetensors.torch import save_file

    if (out / "config.json").exists():
        raise SettingError(f"The folder {str(out)!r} holds a run already; name another with --out.")
    model, *others = models
    config, tensors = read_state_dicts(model)
    tokenizer = read_tokenizer(model, config)
    tensors = _mean(config, tensors, others)
    if tokenizer is None:
        raise CheckpointError(f"The checkpoint {str(model)!r} has no tokenizer.")
    thin_vae = slim_autoencoder(diffusers_model(config.vae))
    thin = crop_to_slim(thin_vae, tensors["vae"])
    again, sizes = pad_to_stock(diffusers_model(config.vae), thin), {name: tuple(t.shape) for name, t in thin.items()}
    same = all(torch.equal(again[name], tensor) for name, tensor in tensors["vae"].items())
    if not same or sizes != param_shapes(thin_vae):
        raise CheckpointError(f"The VAE of {str(model)!r} was not made by this training; it has no thin form.")
    for name, stage in TRAINED_BY.items():
        ensure_writable_dir(out / stage)
        save_file({key: t.float() for key, t in tensors[name].items()}, out / stage / f"{name}.safetensors")
    save_file({key: t.float() for key, t in thin.items()}, out / "vae" / "thin.safetensors")
    tokenizer.save(out / "tokenizer.json")
    write_json(out / "config.json", config.to_dict())


def _mean(config: Config, tensors: dict[str, dict[str, torch.Tensor]], others) -> dict[str, dict[str, torch.Tensor]]:
    """The mean of the blocks' tensors and those of other checkpoints, in the tensors' own types."""
    every = [tensors]
    for path in others:
        other, found = read_state_dicts(path)
        if other != config:
            raise CheckpointError(f"The checkpoint {str(path)!r} has another config; a mean needs all of one config.")
        every.append(found)

    def mean(name: str, key: str) -> torch.Tensor:
        return torch.stack([found[name][key].float() for found in every]).mean(0).to(tensors[name][key].dtype)

    return {name: {key: mean(name, key) for key in block} for name, block in tensors.items()}


def export(out: Path) -> Path:
    """Writes the run's model as a checkpoint of this project's layout, float16: `out`/model."""
    config, blocks = load_run(out, ("vae", "encoder", "llm", "synchronizer", "unet"))
    tensors = {name: block.state_dict() for name, block in blocks.items()}
    native.save(out / "model", config, tensors, tokenizer_of(out), torch.float16, GENERATION, frozenset(world.words()))
    return out / "model"
