"""The stages of training: for each its objective, its batches, and what it writes at the end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.config import Config
from comfy_mminterleaved.errors import CheckpointError
from comfy_mminterleaved.files import atomic_path, atomic_write
from comfy_mminterleaved.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from comfy_mminterleaved.models.build import diffusers_model
from comfy_mminterleaved.models.contrastive import ContrastiveConfig, ContrastiveModel, pad_ids
from comfy_mminterleaved.models.dream import DreamQueries
from comfy_mminterleaved.models.prior import DiffusionPrior, PriorConfig
from comfy_mminterleaved.models.refiner import Refiner, RefinerConfig
from comfy_mminterleaved.models.token_decoder import TokenDecoder
from comfy_mminterleaved.models.vqvae import VQVAE
from comfy_mminterleaved.pipeline import MMInterleavedPipeline

from . import samples, sounds
from .augmentation import augment, reconstruct_some
from .batches import StoryBatches, TextBatch
from .code_training import NUM_PERCEPTUAL, CodesObjective
from .contrastive_training import (
    ContrastiveBatches,
    ContrastiveObjective,
    ContrastiveSources,
    cached_features,
    features_of,
)
from .dataset import StoryDataset, error_weights
from .drawn_images import decoded_images, drawn_images, large_images, neighbour_images
from .drawn_training import LAYERS, DrawnObjective, with_lora
from .dream_training import LAYERS as DREAM_LAYERS
from .dream_training import DreamBatches, DreamObjective, DreamState
from .pretraining import EncoderObjective, UNetObjective, VAEDecoderObjective, VAEObjective
from .prior_training import PriorBatches, PriorObjective, embeds_of, look_variants, scene_embeds
from .refiner_training import RefinerBatches, RefinerObjective
from .run_dir import (
    DREAM_RANK,
    cached_latents,
    dream_config,
    export_padded_vae,
    latest_slim_vae,
    load_run,
    run_tokenizer,
    set_scaling_factor,
    token_decoder_config,
    vqvae_config,
)
from .slim_vae import slim_autoencoder
from .sound_training import SoundBatches, SoundObjective, class_means, phrase
from .story_features import StoryFeatures
from .story_training import MMFSObjective, StoryObjective
from .targets import ConditioningTargets
from .thumbnail_training import ThumbnailBatches, ThumbnailGenerator, ThumbnailObjective, thumbnail_latents
from .token_training import TokenBatches, TokenObjective, cached_cells, float32_attention, init_from_llm
from .trainer import StageConfig, device_of, train

HELD_OUT_STORIES = 200
VALIDATION_BATCHES = 8
NUM_DRAWN, NUM_DRAWN_HELD_OUT = 6144, 256  # images that the stage `drawn` draws again
TWO_CHARACTER_PROB = 0.3  # of the stories of `look` and `joint`: drawn only from those with two heroes
COREF_TWO_CHARACTER_PROB = 0.6  # the same, of the stories of `language`


@dataclass(frozen=True)
class Stage:
    """What a stage's function gets: its settings, the run, and the data."""

    config: StageConfig
    run_dir: Path
    model_config: Config
    blocks: dict[str, torch.nn.Module]
    train_set: StoryDataset
    held_out: StoryDataset

    @property
    def dir(self) -> Path:
        return self.run_dir / self.config.name

    def latents(self) -> dict[StoryDataset, np.ndarray]:
        """Returns the scaled latents of both datasets."""
        return {data: cached_latents(self.run_dir, data, self.model_config) for data in (self.train_set, self.held_out)}

    def sample_path(self, step: int, suffix: str = ".png") -> Path:
        return self.dir / f"samples-{step:06d}{suffix}"


@dataclass(frozen=True)
class TrainingSetup:
    """What a stage's function returns: the arguments of `train`."""

    objective: torch.nn.Module
    blocks: dict[str, torch.nn.Module]
    get_batch: Callable[[int], tuple]
    validation: list[tuple]
    on_sample: Callable[[int], None] | None = None


def run_stage(
    config: StageConfig,
    run_dir: Path,
    stories: int = 12000,
    precision: str = "no",
    minutes: float | None = None,
    first: int = 0,
) -> None:
    """Trains a stage to its last step or for some minutes, and writes its results."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    model_config, blocks = load_run(run_dir, config.needs)
    freeze(config, blocks)
    with state.main_process_first():  # it renders images and encodes latents; the other processes read them
        train_set = StoryDataset(run_dir, stories, first_seed=first)
        held_out = StoryDataset(run_dir, min(HELD_OUT_STORIES, stories), held_out=True)
        stage = Stage(config, run_dir, model_config, blocks, train_set, held_out)
        setup = STAGE_FUNCTIONS[config.name](stage)
    finished = train(
        config,
        setup.objective,
        setup.blocks,
        stage.dir,
        setup.get_batch,
        setup.validation,
        precision,
        minutes,
        setup.on_sample,
    )
    if not (finished and state.is_main_process):
        return
    if config.name == "vae":
        (run_dir / "detail" / "vae.safetensors").unlink(missing_ok=True)  # it decodes other latents
        set_scaling_factor(run_dir, model_config, held_out.images(range(min(64, len(held_out)))))
    if "thin" in setup.blocks:
        export_padded_vae(stage.dir, model_config)
    if config.name == "look":
        rescale_mmfs(stage.dir, setup.objective, [setup.get_batch(seed) for seed in range(VALIDATION_BATCHES)])


def freeze(config: StageConfig, blocks: dict[str, torch.nn.Module]) -> None:
    """Turns gradients off except for what the stage trains."""
    for name, block in blocks.items():
        block.requires_grad_(name in config.blocks)
    # The unused part of the synchronizer.
    is_unused = {"language": lambda key: "mmfs_module" in key, "look": lambda key: "mmfs_module" not in key}
    is_unused = is_unused.get(config.name, lambda key: False)
    for name in config.blocks:
        for key, parameter in blocks[name].named_parameters():
            if (name == "synchronizer" and is_unused(key)) or key.endswith(("pos_embed", "ignore_token")):
                parameter.requires_grad_(False)


def vae_stage(stage: Stage) -> TrainingSetup:
    vae = slim_autoencoder(diffusers_model(stage.model_config.vae))
    if (stage.run_dir / "vae" / "thin.safetensors").exists():
        vae.load_state_dict(read_tensors(stage.run_dir / "vae" / "thin.safetensors"))
    objective, data = VAEObjective(vae), stage.train_set

    def get_batch(seed: int) -> tuple:
        rng = random.Random(f"pictures {seed}")
        return (data.random_crops(data.random_indices(stage.config.batch, rng), rng).to(device_of(objective)),)

    def sample(step: int) -> None:
        samples.vae_sheet(vae, stage.held_out, stage.sample_path(step))

    images = stage.held_out.images([i % len(stage.held_out) for i in range(64)]).to(device_of(objective))
    return TrainingSetup(objective, {"thin": vae}, get_batch, [(part,) for part in images.split(16)], sample)


def encoder_stage(stage: Stage) -> TrainingSetup:
    encoder = stage.blocks["encoder"]
    objective = EncoderObjective(encoder)
    encoder.to(memory_format=torch.channels_last)  # a third faster on CPUs
    latents = cached_latents(stage.run_dir, stage.train_set, stage.model_config)
    vae = latest_slim_vae(stage.run_dir, stage.model_config).eval().requires_grad_(False)

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        device, training = device_of(objective), data is stage.train_set
        rng = random.Random(f"pictures {seed}")
        indices = (data.weighted_indices if training else data.random_indices)(stage.config.batch, rng)
        images = data.images(indices).to(device)
        if training:
            images = reconstruct_some(vae.to(device), images, torch.from_numpy(latents[indices]).float().to(device))
            images = augment(images, rng)
        return images.contiguous(memory_format=torch.channels_last), data.labels[indices].to(device)

    return TrainingSetup(objective, {"encoder": encoder}, get_batch, held_out_batches(get_batch, stage))


def vae_decoder_stage(stage: Stage) -> TrainingSetup:
    vae = latest_slim_vae(stage.run_dir, stage.model_config)
    vae.encoder.requires_grad_(False)
    objective = VAEDecoderObjective(vae, stage.blocks["encoder"].to(memory_format=torch.channels_last))
    latents = stage.latents()
    cum_weights = error_weights(vae, stage.train_set, latents[stage.train_set])

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        rng = random.Random(f"pictures {seed}")
        weights = cum_weights if data is stage.train_set else None
        indices = rng.choices(range(len(data)), cum_weights=weights, k=stage.config.batch)
        images = data.images(indices).contiguous(memory_format=torch.channels_last)
        mask = data.foreground_mask(indices, images.shape[-1])
        batch = torch.from_numpy(latents[data][indices]).float(), images, mask
        return tuple(x.to(device_of(objective)) for x in batch)

    def sample(step: int) -> None:
        samples.vae_sheet(vae, stage.held_out, stage.sample_path(step))

    return TrainingSetup(objective, {"thin": vae}, get_batch, held_out_batches(get_batch, stage), sample)


def unet_stage(stage: Stage) -> TrainingSetup:
    objective = UNetObjective(stage.blocks["unet"], stage.blocks["synchronizer"], stage.model_config.scheduler)
    latents = stage.latents()

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        rng = random.Random(f"pictures {seed}")
        draw_indices = data.weighted_indices if data is stage.train_set else data.random_indices
        indices = draw_indices(stage.config.batch, rng)
        x = torch.from_numpy(latents[data][indices]).float()
        batch = x, data.labels[indices], data.foreground_mask(indices, x.shape[-1])
        return tuple(x.to(device_of(objective)) for x in batch)

    def sample(step: int) -> None:
        path = stage.sample_path(step)
        samples.target_sheet(objective, stage.blocks, stage.model_config, stage.held_out, path)

    return TrainingSetup(
        objective, {"unet": stage.blocks["unet"]}, get_batch, held_out_batches(get_batch, stage), sample
    )


def story_stage(stage: Stage) -> TrainingSetup:
    """The stages `language`, `look` and `joint`."""
    name, blocks, model_config = stage.config.name, stage.blocks, stage.model_config
    tokenizer, has_images, mmfs_only = run_tokenizer(stage.run_dir), name != "language", name == "look"
    if mmfs_only:
        objective = MMFSObjective(blocks, model_config.scheduler)
    else:
        objective = StoryObjective(blocks, model_config.scheduler, has_images)
    blocks["encoder"].to(memory_format=torch.channels_last)
    trains_llm = "llm" in stage.config.blocks
    two_character_prob = COREF_TWO_CHARACTER_PROB if trains_llm else TWO_CHARACTER_PROB
    batches = {
        data: StoryBatches(
            data,
            model_config,
            tokenizer,
            stage.config.batch,
            image_loss_only=not trains_llm,
            with_coref=trains_llm and training,
            corrupt_history=trains_llm and training,
            two_character_prob=two_character_prob if training else 0.0,
        )
        for data, training in ((stage.train_set, True), (stage.held_out, False))
    }
    latents = stage.latents()
    vae = latest_slim_vae(stage.run_dir, model_config).eval().requires_grad_(False)

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        device = device_of(objective)
        batch = batches[data].build(seed).to(device)
        if isinstance(batch, TextBatch):
            return (batch,)
        indices = batch.image_indices.flatten().cpu()
        x = torch.from_numpy(latents[data][indices.numpy()]).float().to(device)
        if data is stage.train_set:
            images = reconstruct_some(vae.to(device), batch.images.flatten(0, 1), x)
            batch = replace(batch, images=images.view_as(batch.images))
        shape = tuple(batch.image_indices.shape)
        if not has_images:
            return (batch,)
        if mmfs_only:
            return batch, x.unflatten(0, shape)
        mask = data.foreground_mask(indices.tolist(), x.shape[-1]).to(device)
        return batch, x.unflatten(0, shape), mask.unflatten(0, shape)

    if mmfs_only and blocks["synchronizer"].mmfs_module.mmfs_mid_block.conv.weight.any():
        # Undoes the scale of the run before: the residuals are regressed to targets of scale 1.
        objective.rescale_to_targets([get_batch(seed) for seed in range(VALIDATION_BATCHES)], 1.0)

    def sample(step: int) -> None:
        model = MMInterleavedPipeline(model_config, {name: b.eval() for name, b in blocks.items()}, tokenizer)
        if has_images:
            samples.story_sheet(model, stage.held_out, stage.sample_path(step))
        else:
            captions = samples.captions(model, stage.held_out)
            atomic_write(stage.sample_path(step, ".txt"), captions.encode("utf-8"))

    saved = {name: blocks[name] for name in stage.config.blocks}
    validation = held_out_batches(get_batch, stage)
    return TrainingSetup(objective, saved, get_batch, validation, None if mmfs_only else sample)


def contrastive_stage(stage: Stage) -> TrainingSetup:
    tokenizer, encoder = run_tokenizer(stage.run_dir), stage.blocks["encoder"].eval()
    encoder.to(memory_format=torch.channels_last)
    model = ContrastiveModel(ContrastiveConfig())
    vae = latest_slim_vae(stage.run_dir, stage.model_config).eval().requires_grad_(False)
    latents, batches = stage.latents(), {}
    side, limit = model.config.grid_size, model.config.max_position_embeddings
    for data, count in ((stage.train_set, NUM_DRAWN), (stage.held_out, NUM_DRAWN_HELD_OUT)):
        indices = drawn_indices(data, count)
        pairs = indices[: max(1, len(indices) // 2)]
        rest = stage.blocks, vae, stage.model_config
        forms = {
            "drawn": drawn_images(stage.run_dir, data, latents[data], *rest, indices),
            **{
                f"neighbours{'-drawn' * is_drawn}": neighbour_images(stage.run_dir, data, *rest, pairs, is_drawn)
                for is_drawn in (False, True)
            },
        }
        features = {
            form: features_of(stage.run_dir / f"{form}-{data.name}", pixels, encoder, side)
            for form, pixels in forms.items()
        }
        painted, changed = (
            cached_features(stage.run_dir, data, encoder, vae, latents[data], side, is_changed)
            for is_changed in (False, True)
        )
        neighbours = {False: features["neighbours"], True: features["neighbours-drawn"]}
        sources = ContrastiveSources(painted, changed, indices, features["drawn"], neighbours)
        batches[data] = ContrastiveBatches(data, sources, tokenizer, stage.config.batch, limit)
    objective = ContrastiveObjective(model)

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        return tuple(x.to(device_of(objective)) for x in batches[data].build(seed))

    return TrainingSetup(objective, {"contrastive": model}, get_batch, held_out_batches(get_batch, stage))


def load_contrastive(run_dir: Path) -> ContrastiveModel:
    """What the stage `contrastive` made."""
    model = ContrastiveModel(ContrastiveConfig())
    model.load_state_dict(read_tensors(run_dir / "contrastive" / "contrastive.safetensors"))
    return model


def drawn_indices(data: StoryDataset, count: int) -> list[int]:
    """The images that are drawn again."""
    return random.Random("drawn").sample(range(len(data)), min(count, len(data)))


def drawn_stage(stage: Stage) -> TrainingSetup:
    """The stages `drawn` and `drawn-both`."""
    encoder, config = stage.blocks["encoder"].eval(), stage.model_config
    contrastive = load_contrastive(stage.run_dir)
    vae = latest_slim_vae(stage.run_dir, config).eval().requires_grad_(False)
    latents, drawn = stage.latents(), {}
    for data, count in ((stage.train_set, NUM_DRAWN), (stage.held_out, NUM_DRAWN_HELD_OUT)):
        indices = drawn_indices(data, count)
        images = drawn_images(stage.run_dir, data, latents[data], stage.blocks, vae, config, indices)
        drawn[data] = indices, images
    lora = with_lora(encoder, LAYERS)
    encoder.to(memory_format=torch.channels_last)
    objective = DrawnObjective(encoder, lora, contrastive, stage.config.name == "drawn-both")

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        rng, (indices, images) = random.Random(f"drawn {seed}"), drawn[data]
        rows = sorted(rng.sample(range(len(indices)), min(stage.config.batch, len(indices))))
        pixels = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255
        painted = data.images([indices[row] for row in rows])
        pair = (x.contiguous(memory_format=torch.channels_last) for x in (pixels, painted))
        return tuple(x.to(device_of(objective)) for x in pair)

    return TrainingSetup(objective, {"lora": lora}, get_batch, held_out_batches(get_batch, stage))


def prior_stage(stage: Stage) -> TrainingSetup:
    config, tokenizer, encoder = stage.model_config, run_tokenizer(stage.run_dir), stage.blocks["encoder"].eval()
    encoder.to(memory_format=torch.channels_last)
    contrastive = load_contrastive(stage.run_dir).eval()
    vae = latest_slim_vae(stage.run_dir, config).eval().requires_grad_(False)
    c, perceiver, latents = contrastive.config, config.synchronizer.perceiver, stage.latents()
    model = DiffusionPrior(
        PriorConfig(c.projection_dim, num_queries=perceiver.num_queries, cross_attention_dim=perceiver.hidden_size)
    )
    targets, batches = ConditioningTargets(perceiver.num_queries, perceiver.hidden_size), {}
    for data, count in ((stage.train_set, NUM_DRAWN), (stage.held_out, NUM_DRAWN_HELD_OUT)):
        indices = drawn_indices(data, count)
        drawn = drawn_images(stage.run_dir, data, latents[data], stage.blocks, vae, config, indices)
        features = (
            cached_features(stage.run_dir, data, encoder, vae, latents[data], c.grid_size, False),
            features_of(stage.run_dir / f"drawn-{data.name}", drawn, encoder, c.grid_size),
        )
        embeds, drawn_embeds = (embeds_of(contrastive, *each) for each in features)
        scenes = [panel.scene for story in data.stories for panel in story]
        if data is stage.train_set:
            model.set_statistics(embeds)
            variants = look_variants(scenes)
            version = int((stage.run_dir / "contrastive" / "contrastive.safetensors").stat().st_mtime)
            path = stage.run_dir / f"variant-embeds-{data.name}-{version}.npy"
            embeds = torch.cat([embeds, scene_embeds(path, variants, encoder, contrastive)])
            scenes += variants
        batches[data] = PriorBatches(
            scenes, embeds, indices, drawn_embeds, tokenizer, stage.config.batch, model.config.num_embeddings
        )
    objective = PriorObjective(model, contrastive, targets)

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        return (batches[data].build(seed).to(device_of(objective)),)

    return TrainingSetup(objective, {"prior": model}, get_batch, held_out_batches(get_batch, stage))


def sound_stage(stage: Stage) -> TrainingSetup:
    contrastive, tokenizer = load_contrastive(stage.run_dir).eval(), run_tokenizer(stage.run_dir)
    encoder = stage.blocks["encoder"].eval().to(memory_format=torch.channels_last)
    side, data = contrastive.config.grid_size, stage.train_set
    features = cached_features(stage.run_dir, data, encoder, None, None, side, False)
    scenes = [panel.scene for story in data.stories for panel in story]
    means = class_means(scenes, embeds_of(contrastive, *features))
    with torch.no_grad():
        ids = [tokenizer.encode(phrase(*name)) for name in sounds.NAMES]
        phrases = contrastive.encode_text(*pad_ids(ids, contrastive.config.max_position_embeddings))
    model = AudioEncoder(AudioEncoderConfig(embedding_dim=contrastive.config.projection_dim))
    objective = SoundObjective(model, phrases, means)
    batches = {data: SoundBatches(False), stage.held_out: SoundBatches(True, 8)}

    def get_batch(seed: int, data: StoryDataset = data) -> tuple:
        return (batches[data].build(seed).to(device_of(objective)),)

    return TrainingSetup(objective, {"sound": model}, get_batch, held_out_batches(get_batch, stage))


def refiner_stage(stage: Stage) -> TrainingSetup:
    config, tokenizer = stage.model_config, run_tokenizer(stage.run_dir)
    contrastive = load_contrastive(stage.run_dir)
    vae = latest_slim_vae(stage.run_dir, config).eval().requires_grad_(False)
    perceiver = config.synchronizer.perceiver
    # Channels last and --precision bf16 are three times as fast on processors with bfloat16 units.
    refiner = Refiner(RefinerConfig(word_dim=contrastive.config.hidden_size, prompt_dim=perceiver.hidden_size))
    refiner.to(memory_format=torch.channels_last)
    objective = RefinerObjective(refiner, contrastive, stage.blocks["encoder"].to(memory_format=torch.channels_last))
    targets = ConditioningTargets(perceiver.num_queries, perceiver.hidden_size)
    latents, batches = stage.latents(), {}
    for data, count in ((stage.train_set, NUM_DRAWN), (stage.held_out, NUM_DRAWN_HELD_OUT)):
        indices = drawn_indices(data, count)
        batches[data] = RefinerBatches(
            data,
            indices,
            decoded_images(stage.run_dir, data, latents[data], vae, indices),
            drawn_images(stage.run_dir, data, latents[data], stage.blocks, vae, config, indices),
            large_images(stage.run_dir, data, indices),
            tokenizer,
            targets,
            stage.config.batch,
            contrastive.config.max_position_embeddings,
        )

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        return (batches[data].build(seed).to(device_of(objective)),)

    def sample(step: int) -> None:
        samples.refiner_sheet(objective, batches[stage.held_out], stage.sample_path(step))

    return TrainingSetup(objective, {"refiner": refiner}, get_batch, held_out_batches(get_batch, stage), sample)


def story_features(stage: Stage) -> dict[StoryDataset, StoryFeatures]:
    """The encoder's features of both datasets."""
    encoder = stage.blocks["encoder"].eval().to(memory_format=torch.channels_last)
    vae = latest_slim_vae(stage.run_dir, stage.model_config).eval().requires_grad_(False)
    latents = stage.latents()
    return {
        data: StoryFeatures(stage.run_dir, data, encoder, vae, latents[data], stage.blocks["llm"])
        for data in (stage.train_set, stage.held_out)
    }


def dream_stage(stage: Stage) -> TrainingSetup:
    config, llm, tokenizer = stage.model_config, stage.blocks["llm"], run_tokenizer(stage.run_dir)
    perceiver = config.synchronizer.perceiver
    batches = {
        data: DreamBatches(data, features, config, tokenizer, stage.config.batch, data is stage.held_out)
        for data, features in story_features(stage).items()
    }
    model = DreamQueries(dream_config(config))
    lora = with_lora(llm, DREAM_LAYERS, DREAM_RANK)
    targets = ConditioningTargets(perceiver.num_queries, perceiver.hidden_size)
    objective = DreamObjective(model, llm, lora, targets)

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        is_story = None if data is stage.train_set else seed % 2 == 0
        return (batches[data].build(seed, is_story).to(device_of(objective)),)

    return TrainingSetup(objective, {"dream": DreamState(model, lora)}, get_batch, held_out_batches(get_batch, stage))


def codes_stage(stage: Stage) -> TrainingSetup:
    vae = latest_slim_vae(stage.run_dir, stage.model_config).eval().requires_grad_(False)
    encoder = stage.blocks["encoder"].eval().to(memory_format=torch.channels_last)
    model = VQVAE(vqvae_config(stage.model_config))
    if (path := stage.dir / "vqvae.safetensors").exists():
        model.load_state_dict(read_tensors(path))  # the codebooks, which are no parameters
    objective, latents = CodesObjective(model, vae, encoder), stage.latents()

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        rng = random.Random(f"pictures {seed}")
        draw_indices = data.weighted_indices if data is stage.train_set else data.random_indices
        indices = draw_indices(stage.config.batch, rng)
        rng.shuffle(indices)
        x = torch.from_numpy(latents[data][indices]).float()
        images = data.images(indices[:NUM_PERCEPTUAL]).contiguous(memory_format=torch.channels_last)
        batch = x, data.foreground_mask(indices, x.shape[-1]), images, torch.tensor(seed / stage.config.steps)
        return tuple(each.to(device_of(objective)) for each in batch)

    return TrainingSetup(objective, {"vqvae": model}, get_batch, held_out_batches(get_batch, stage))


def tokens_stage(stage: Stage) -> TrainingSetup:
    config, llm, tokenizer = stage.model_config, stage.blocks["llm"], run_tokenizer(stage.run_dir)
    path, latents, batches = stage.run_dir / "codes" / "vqvae.safetensors", stage.latents(), {}
    if not path.exists():
        raise CheckpointError(f"The run {str(stage.run_dir)!r} has no image codes yet; run its stage 'codes' first.")
    codes = VQVAE(vqvae_config(config)).eval()
    codes.load_state_dict(read_tensors(path))
    for data, features in story_features(stage).items():
        cells = cached_cells(stage.run_dir / f"cells-{data.name}-{int(path.stat().st_mtime)}.npy", latents[data], codes)
        stories = StoryBatches(data, config, tokenizer, stage.config.batch, True, two_character_prob=TWO_CHARACTER_PROB)
        batches[data] = TokenBatches(stories, features, cells)
    model = TokenDecoder(token_decoder_config(config), config.llm, attention=float32_attention)
    init_from_llm(model, llm, codes)
    perceiver = config.synchronizer.perceiver
    objective = TokenObjective(model, ConditioningTargets(perceiver.num_queries, perceiver.hidden_size))

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        return (batches[data].build(seed).to(device_of(objective)),)

    return TrainingSetup(objective, {"tokens": model}, get_batch, held_out_batches(get_batch, stage))


def thumbnails_stage(stage: Stage) -> TrainingSetup:
    tokenizer, contrastive = run_tokenizer(stage.run_dir), load_contrastive(stage.run_dir)
    vae = latest_slim_vae(stage.run_dir, stage.model_config).eval()
    version, batches = int((stage.run_dir / "vae" / "vae.safetensors").stat().st_mtime), {}
    for data in (stage.train_set, stage.held_out):
        latents = thumbnail_latents(stage.run_dir / f"thumbnails-{data.name}-{version}.npy", data, vae)
        limit = contrastive.config.max_position_embeddings
        batches[data] = ThumbnailBatches(data, latents, tokenizer, stage.config.batch, limit)
    generator = ThumbnailGenerator()
    objective = ThumbnailObjective(generator, contrastive)

    def get_batch(seed: int, data: StoryDataset = stage.train_set) -> tuple:
        return (batches[data].build(seed).to(device_of(objective)),)

    return TrainingSetup(objective, {"generator": generator}, get_batch, held_out_batches(get_batch, stage))


STAGE_FUNCTIONS = {
    "vae": vae_stage,
    "encoder": encoder_stage,
    "detail": vae_decoder_stage,
    "language": story_stage,
    "decoder": unet_stage,
    "look": story_stage,
    "joint": story_stage,
    "contrastive": contrastive_stage,
    "drawn": drawn_stage,
    "drawn-both": drawn_stage,
    "refine": refiner_stage,
    "prior": prior_stage,
    "sound": sound_stage,
    "dream": dream_stage,
    "codes": codes_stage,
    "tokens": tokens_stage,
    "thumbnails": thumbnails_stage,
}


def held_out_batches(get_batch, stage: Stage) -> list[tuple]:
    return [get_batch(seed, stage.held_out) for seed in range(VALIDATION_BATCHES)]


def rescale_mmfs(stage_dir: Path, objective: MMFSObjective, batches: list[tuple]) -> None:
    """Rescales the MMFS blocks in the averaged weights of a stage's synchronizer; idempotent."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = stage_dir / "synchronizer.safetensors"
    objective.synchronizer.load_state_dict(read_tensors(path))
    objective.eval().rescale_to_targets(batches)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in objective.synchronizer.state_dict().items()}
    with atomic_path(path) as temp_path:
        save_file(tensors, temp_path)
