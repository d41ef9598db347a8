"""The files of a training run: the blocks as each stage left them, tokenizer, latents, exported model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.checkpoints import native
from comfy_mminterleaved.checkpoints.load import read_state_dicts, read_tokenizer
from comfy_mminterleaved.checkpoints.tensors import read_json, read_tensors
from comfy_mminterleaved.config import Config
from comfy_mminterleaved.errors import CheckpointError, SettingError
from comfy_mminterleaved.files import atomic_path, ensure_writable_dir, write_json
from comfy_mminterleaved.generation.embedders import SYSTEMS, system_metadata
from comfy_mminterleaved.generation.latents import encode_latents
from comfy_mminterleaved.generation.sound import PHRASES
from comfy_mminterleaved.models.audio_encoder import AudioEncoderConfig
from comfy_mminterleaved.models.build import check_shapes, diffusers_model, init_modules, param_shapes
from comfy_mminterleaved.models.contrastive import ContrastiveConfig
from comfy_mminterleaved.models.dream import DreamConfig
from comfy_mminterleaved.models.prior import PriorConfig
from comfy_mminterleaved.models.refiner import RefinerConfig
from comfy_mminterleaved.models.token_decoder import TokenDecoderConfig
from comfy_mminterleaved.models.vqvae import FACTOR, VQVAEConfig

from . import sounds, world
from .dataset import StoryDataset
from .slim_vae import crop_to_slim, pad_to_stock, slim_autoencoder
from .sound_training import phrase
from .starter_config import GENERATION, TEXT_VOCAB_SIZE, make_tokenizer, starter_config

STAGES = (
    "vae",
    "encoder",
    "detail",
    "language",
    "decoder",
    "look",
    "joint",
    "contrastive",
    "drawn",
    "drawn-both",
    "refine",
    "prior",
    "sound",
    "dream",
    "codes",
    "tokens",
    "thumbnails",
)
DREAM_RANK = 12  # of the LoRA with which the LLM reads dream queries
# The stage folder in which `begin` puts each block.
TRAINED_BY = {"vae": "vae", "encoder": "encoder", "llm": "language", "synchronizer": "look", "unet": "decoder"}


def load_run(run_dir: Path, required=()) -> tuple[Config, dict[str, torch.nn.Module]]:
    """Returns a run's config and blocks, each as its last stage left it, or initialized if no stage trained it."""
    config = starter_config()
    if (run_dir / "config.json").exists():
        config = Config.from_dict(read_json(run_dir / "config.json"))
    blocks = init_modules(config)
    for name, block in blocks.items():
        if path := latest_weights(run_dir, name):
            tensors = read_tensors(path)
            expected, shapes = param_shapes(block), {key: tuple(t.shape) for key, t in tensors.items()}
            check_shapes(expected, shapes, repr(str(path)))
            block.load_state_dict(tensors)
        elif name in required:
            raise CheckpointError(f"The run {str(run_dir)!r} has no trained {name} yet; run its stage first.")
    return config, blocks


def latest_weights(run_dir: Path, block: str) -> Path | None:
    """Returns a block's newest file, by modification time, whichever stage wrote it."""
    paths = [path for stage in STAGES if (path := run_dir / stage / f"{block}.safetensors").exists()]
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


def run_tokenizer(run_dir: Path):
    """Returns the run's tokenizer; the first call makes it."""
    from comfy_mminterleaved.tokenizer import Tokenizer

    path = run_dir / "tokenizer.json"
    if not path.exists():
        make_tokenizer().save(path)
    return Tokenizer.load(path, starter_config().llm.special_tokens, TEXT_VOCAB_SIZE)


def latest_slim_vae(run_dir: Path, config: Config):
    """Returns the run's VAE in its slim form, with the decoder half of the stage `detail` if there is one."""
    stage = "detail" if (run_dir / "detail" / "vae.safetensors").exists() else "vae"
    vae = slim_autoencoder(diffusers_model(config.vae)).to(memory_format=torch.channels_last)
    vae.load_state_dict(read_tensors(run_dir / stage / "thin.safetensors"))
    return vae


@torch.no_grad()
def cached_latents(run_dir: Path, dataset: StoryDataset, config: Config) -> np.ndarray:
    """Returns the scaled latents of all images, float16; computed once per VAE, with its slim form."""
    version = int((run_dir / "vae" / "vae.safetensors").stat().st_mtime)
    path = run_dir / f"latents-{dataset.name}-{version}.npy"
    if not path.exists():
        vae, size = latest_slim_vae(run_dir, config).eval(), len(dataset)
        parts = [encode_latents(vae, dataset.images(range(i, min(i + 64, size)))) for i in range(0, size, 64)]
        with atomic_path(path) as temp_path, open(temp_path, "wb") as file:
            np.save(file, torch.cat(parts).half().numpy())
    return np.load(path, mmap_mode="r")


def begin(run_dir: Path, *checkpoints: Path) -> None:
    """Makes a run from a checkpoint; each stage then starts from its weights at step 0.

    Several checkpoints are averaged (uniform soup, Wortsman et al. 2022).

    Raises:
        SettingError: If the folder already holds a run.
        CheckpointError: If this training did not make the VAE, or the checkpoints have different configs.
    """
    from safetensors.torch import save_file

    if (run_dir / "config.json").exists():
        raise SettingError(f"The folder {str(run_dir)!r} already holds a run; choose another with --out.")
    checkpoint, *others = checkpoints
    config, tensors = read_state_dicts(checkpoint)
    tokenizer = read_tokenizer(checkpoint, config)
    tensors = _average(config, tensors, others)
    if tokenizer is None:
        raise CheckpointError(f"The checkpoint {str(checkpoint)!r} has no tokenizer.")
    slim_vae = slim_autoencoder(diffusers_model(config.vae))
    slim = crop_to_slim(slim_vae, tensors["vae"])
    padded, shapes = pad_to_stock(diffusers_model(config.vae), slim), {name: tuple(t.shape) for name, t in slim.items()}
    is_padded = all(torch.equal(padded[name], tensor) for name, tensor in tensors["vae"].items())
    if not is_padded or shapes != param_shapes(slim_vae):
        raise CheckpointError(f"The VAE of {str(checkpoint)!r} was not made by this training; it has no slim form.")
    for name, stage in TRAINED_BY.items():
        ensure_writable_dir(run_dir / stage)
        save_file({key: t.float() for key, t in tensors[name].items()}, run_dir / stage / f"{name}.safetensors")
    save_file({key: t.float() for key, t in slim.items()}, run_dir / "vae" / "thin.safetensors")
    tokenizer.save(run_dir / "tokenizer.json")
    write_json(run_dir / "config.json", config.to_dict())


def _average(config: Config, tensors: dict[str, dict[str, torch.Tensor]], others) -> dict[str, dict[str, torch.Tensor]]:
    """Averages the blocks' tensors with those of other checkpoints, in the tensors' own dtypes."""
    soup = [tensors]
    for path in others:
        other_config, other_tensors = read_state_dicts(path)
        if other_config != config:
            raise CheckpointError(
                f"The checkpoint {str(path)!r} has another config; only equal configs can be averaged."
            )
        soup.append(other_tensors)

    def mean(block: str, key: str) -> torch.Tensor:
        return (
            torch.stack([ingredient[block][key].float() for ingredient in soup]).mean(0).to(tensors[block][key].dtype)
        )

    return {block: {key: mean(block, key) for key in keys} for block, keys in tensors.items()}


@torch.no_grad()
def set_scaling_factor(run_dir: Path, config: Config, images: torch.Tensor) -> None:
    """Sets the VAE's scaling factor in the run's config so that the latents of `images` have unit variance."""
    scale = 1 / float(latest_slim_vae(run_dir, config).encode(images * 2 - 1).latents.std())
    config = replace(config, vae={**config.vae, "scaling_factor": round(scale, 4)})
    write_json(run_dir / "config.json", config.to_dict())


def export_padded_vae(stage_dir: Path, config: Config) -> None:
    """Writes the stock form of a stage's slim VAE."""
    from safetensors.torch import save_file

    vae = diffusers_model(config.vae)
    vae.load_state_dict(pad_to_stock(vae, read_tensors(stage_dir / "thin.safetensors")))
    with atomic_path(stage_dir / "vae.safetensors") as temp_path:
        save_file(vae.state_dict(), temp_path)


def export(run_dir: Path) -> Path:
    """Writes the run's model as a float16 checkpoint in the native layout, with its systems: `run_dir`/model."""
    config, blocks = load_run(run_dir, ("vae", "encoder", "llm", "synchronizer", "unet"))
    tensors = {name: block.state_dict() for name, block in blocks.items()}
    vocabulary = frozenset(world.words())
    has_refiner = (run_dir / "refine" / "refiner.safetensors").exists()
    generation = replace(GENERATION, image=replace(GENERATION.image, refine=has_refiner))
    native.save(run_dir / "model", config, tensors, run_tokenizer(run_dir), torch.float16, generation, vocabulary)
    export_systems(run_dir, run_dir / "model")
    return run_dir / "model"


def sound_config() -> dict:
    """Of the audio encoder, with the phrases that it was trained on."""
    return {**AudioEncoderConfig().to_dict(), PHRASES: [phrase(*name) for name in sounds.NAMES]}


def dream_config(config: Config) -> DreamConfig:
    perceiver = config.synchronizer.perceiver
    return DreamConfig(
        perceiver.num_queries, config.llm.hidden_size, perceiver.hidden_size, DREAM_RANK, is_normalized=True
    )


def vqvae_config(config: Config) -> VQVAEConfig:
    return VQVAEConfig(config.vae["latent_channels"], config.vae["scaling_factor"])


def token_decoder_config(config: Config) -> TokenDecoderConfig:
    perceiver = config.synchronizer.perceiver
    grid_size = config.unet["sample_size"] // FACTOR
    num_layers = min(TokenDecoderConfig.num_hidden_layers, config.llm.num_hidden_layers)
    return TokenDecoderConfig(
        perceiver.num_queries, perceiver.hidden_size, VQVAEConfig().num_codes, grid_size, num_layers
    )


def export_systems(run_dir: Path, folder: Path) -> None:
    """Writes what the run has beside the model into a checkpoint's folder, in float16."""
    from safetensors.torch import save_file

    config, blocks = load_run(run_dir)
    systems = {
        "contrastive": (run_dir / "contrastive" / "contrastive.safetensors", ContrastiveConfig().to_dict()),
        "drawn": (run_dir / "drawn" / "lora.safetensors", {}),
        "refiner": (run_dir / "refine" / "refiner.safetensors", RefinerConfig().to_dict()),
        "prior": (run_dir / "prior" / "prior.safetensors", PriorConfig().to_dict()),
        "sound": (run_dir / "sound" / "sound.safetensors", sound_config()),
        "dream": (run_dir / "dream" / "dream.safetensors", dream_config(config).to_dict()),
        "codes": (run_dir / "codes" / "vqvae.safetensors", vqvae_config(config).to_dict()),
        "tokens": (run_dir / "tokens" / "tokens.safetensors", token_decoder_config(config).to_dict()),
    }
    encoder = blocks["encoder"].half().float()  # as the checkpoint has it
    for name, (path, about) in systems.items():
        if path.exists():
            tensors = {key: tensor.half().contiguous() for key, tensor in read_tensors(path).items()}
            tokenizer = run_tokenizer(run_dir) if name == "contrastive" else None
            ensure_writable_dir(folder / SYSTEMS)
            with atomic_path(folder / SYSTEMS / f"{name}.safetensors") as temp_path:
                save_file(tensors, temp_path, system_metadata(about, name, tokenizer, encoder.encoder_id))
