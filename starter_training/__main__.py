"""Training, stage by stage: python -m starter_training STAGE.

Each stage can be stopped at any time and goes on from its last checkpoint when called again. Everything is kept in one
folder: the pictures, a folder a stage with its log, curves, samples and weights, and config.json. `export` then makes
the checkpoint, and `sheet` draws held-out stories with it. `begin` makes a run of a checkpoint, to train it on.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.config import Config
from comfy_mminterleaved.errors import MMInterleavedError, SettingError
from comfy_mminterleaved.files import atomic_path, atomic_write, ensure_writable_dir, write_json
from comfy_mminterleaved.generation.config import ImageGenerationConfig, TextGenerationConfig
from comfy_mminterleaved.generation.image import denoise
from comfy_mminterleaved.generation.latents import decode_latents, encode_latents
from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.models.build import diffusers_model
from comfy_mminterleaved.models.unet_synchronizer import UNetImageValues
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.presets import STARTER_DIR
from comfy_mminterleaved.stories.images import encode_png
from comfy_mminterleaved.stories.story import ImageSegment, Story

from . import renderer, world
from .classifier import random_blur
from .dataset import StoryBatches, StoryDataset, TextBatch
from .pretraining import EncoderObjective, UNetObjective, VAEDecoderObjective, VAEObjective
from .run_dir import STAGES, begin, export, latents_of, load_run, newest_thin_vae, tokenizer_of
from .slim_vae import pad_to_stock, slim_autoencoder
from .story_training import MMFSObjective, StoryObjective
from .trainer import StageConfig, train

HELD_OUT_STORIES = 200
TWO_CHARACTER_PROB = 0.3  # of the stories that U-Net and sites learn from, only such as have two heroes
COREF_TWO_CHARACTER_PROB = 0.6  # of the stories that teach the LLM whom a name means
# Augmentation of the encoder's images: px, share of a colour, share of the images that are blurred.
MAX_TRANSLATE, MAX_TINT, BLUR_PROB = 4, 0.08, 0.4
# Share of the images that are encoded as the VAE reconstructs them, and the noise on their latents.
RECONSTRUCT_PROB, RECONSTRUCT_NOISE = 0.2, 0.4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=(*STAGES, "begin", "export", "sheet"))
    parser.add_argument("--out", default="runs/starter", help="the folder of the run (default: %(default)s)")
    begins = parser.add_argument_group("begin")
    begins.add_argument(
        "--model",
        action="append",
        help="a checkpoint of a run's `export`; the mean of their weights if repeated (default: the starter)",
    )
    stages = parser.add_argument_group("stages")
    stages.add_argument("--stories", type=int, help="painted once and kept (default: 12000)")
    stages.add_argument("--first", type=int, help="the seed of the first story (default: 0)")
    stages.add_argument("--minutes", type=float, help="stop after so long, at a checkpoint")
    stages.add_argument("--precision", choices=("no", "bf16", "fp16"), help="(default: no)")
    stages.add_argument("--steps", type=int), stages.add_argument("--batch", type=int)
    stages.add_argument("--learning-rate", type=float, dest="learning_rate")
    args = parser.parse_args(argv)
    options, out = {k: v for k, v in vars(args).items() if k not in ("stage", "out") and v is not None}, Path(args.out)
    try:
        taken = {"begin": {"model"}, "export": set(), "sheet": set()}.get(args.stage, set(vars(args)) - {"model"})
        for name in sorted(options.keys() - taken):
            raise SettingError(f"--{name.replace('_', '-')} is of no use to {args.stage!r}; leave it away.")
        if args.stage == "begin":
            begin(out, *(STARTER_DIR if m == "starter" else Path(m) for m in options.get("model", ["starter"])))
        elif args.stage == "export":
            export(out)
        elif args.stage == "sheet":
            contact_sheet(out)
        else:
            changes = {name: options.pop(name, None) for name in ("steps", "batch", "learning_rate")}
            stage = StageConfig.read(Path(__file__).parent / "stages" / f"{args.stage}.json", **changes)
            run(stage, ensure_writable_dir(out), **options)
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


def run(
    stage: StageConfig,
    out: Path,
    stories: int = 12000,
    precision: str = "no",
    minutes: float | None = None,
    first: int = 0,
) -> None:
    """One run of a stage: to its end, or for some minutes."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    config, blocks = load_run(out, stage.needs)
    for name, block in blocks.items():
        block.requires_grad_(name in stage.blocks)
    # What is fixed stays fixed; of the synchronizer, what has nothing to do in a stage stands still.
    idle = {"language": lambda key: "mmfs_module" in key, "look": lambda key: "mmfs_module" not in key}.get(stage.name)
    for name in stage.blocks:
        for key, parameter in blocks[name].named_parameters():
            unused = name == "synchronizer" and idle is not None and idle(key)
            if unused or key.endswith(("pos_embed", "ignore_token")):
                parameter.requires_grad_(False)
    own = {"vae": vae_stage, "encoder": encoder_stage, "detail": vae_decoder_stage, "decoder": unet_stage}
    learn = own.get(stage.name, story_stage)
    with state.main_process_first():  # it paints pictures and makes latents, the others find them
        book = StoryDataset(out, stories, first=first)
        held_out = StoryDataset(out, min(HELD_OUT_STORIES, stories), held_out=True)
        learner, blocks, get_batch, validation, sample = learn(stage, out, config, blocks, book, held_out)
    folder = out / stage.name
    done = train(stage, learner, blocks, folder, get_batch, validation, precision, minutes, sample)
    done = done and state.is_main_process  # one of several writes what is left to write
    if done and stage.name == "vae":
        (out / "detail" / "vae.safetensors").unlink(missing_ok=True)  # it decodes other latents
        set_scale(out, config, held_out.pictures(range(min(64, len(held_out)))))
    if done and "thin" in blocks:
        export_padded_vae(folder, config)
    if done and stage.name == "look":
        rescale_mmfs(folder, learner, [get_batch(seed) for seed in range(8)])


# Each gives what `train` takes: the learner, the blocks to keep, (seed) -> a batch, batches for validation, on_sample.


def vae_stage(stage: StageConfig, out: Path, config: Config, blocks, book: StoryDataset, held_out: StoryDataset):
    vae = slim_autoencoder(diffusers_model(config.vae))
    if (out / "vae" / "thin.safetensors").exists():
        vae.load_state_dict(read_tensors(out / "vae" / "thin.safetensors"))
    learner = VAEObjective(vae)

    def get_batch(seed: int) -> tuple:
        rng = random.Random(f"pictures {seed}")
        return (book.random_crops(book.random_rows(stage.batch, rng), rng).to(device_of(learner)),)

    def sample(step: int) -> None:
        vae_sheet(vae, held_out, out / stage.name / f"samples-{step:06d}.png")

    some = held_out.pictures([row % len(held_out) for row in range(64)]).to(device_of(learner))
    validation = [(part,) for part in some.split(16)]
    return learner, {"thin": vae}, get_batch, validation, sample


def encoder_stage(stage: StageConfig, out: Path, config: Config, blocks, book: StoryDataset, held_out: StoryDataset):
    learner = EncoderObjective(blocks["encoder"])
    blocks["encoder"].to(memory_format=torch.channels_last)  # a third faster on CPUs
    latents, vae = latents_of(out, book, config), newest_thin_vae(out, config).eval().requires_grad_(False)

    def get_batch(seed: int, source: StoryDataset = book) -> tuple:
        device = device_of(learner)
        rng = random.Random(f"pictures {seed}")
        rows = (source.weighted_indices if source is book else source.random_rows)(stage.batch, rng)
        pictures = source.pictures(rows).to(device)
        if source is book:
            pictures = reconstruct_some(vae.to(device), pictures, torch.from_numpy(latents[rows]).float().to(device))
            pictures = augment(pictures, rng)
        return pictures.contiguous(memory_format=torch.channels_last), source.labels[rows].to(device)

    return learner, {"encoder": blocks["encoder"]}, get_batch, [get_batch(seed, held_out) for seed in range(8)], None


def vae_decoder_stage(
    stage: StageConfig, out: Path, config: Config, blocks, book: StoryDataset, held_out: StoryDataset
):
    vae = newest_thin_vae(out, config)
    vae.encoder.requires_grad_(False)
    learner = VAEDecoderObjective(vae, blocks["encoder"].to(memory_format=torch.channels_last))
    latents = {source: latents_of(out, source, config) for source in (book, held_out)}
    often = error_weights(vae, book, latents[book])

    def get_batch(seed: int, source: StoryDataset = book) -> tuple:
        rng = random.Random(f"pictures {seed}")
        weights = often if source is book else None
        rows = rng.choices(range(len(source)), cum_weights=weights, k=stage.batch)
        pictures = source.pictures(rows).contiguous(memory_format=torch.channels_last)
        made = torch.from_numpy(latents[source][rows]).float(), pictures, source.emphasis(rows, pictures.shape[-1])
        return tuple(part.to(device_of(learner)) for part in made)

    def sample(step: int) -> None:
        vae_sheet(vae, held_out, out / stage.name / f"samples-{step:06d}.png")

    return learner, {"thin": vae}, get_batch, [get_batch(seed, held_out) for seed in range(8)], sample


@torch.no_grad()
def error_weights(vae, book: StoryDataset, latents: np.ndarray, count: int = 256) -> list[float]:
    """Summed weights of a book's pictures: what a VAE decodes badly is to be met more often.

    Weights go with the squared error in the place of the prop, by kind of prop: of a bicycle a bad decoder leaves a
    smudge. Pictures of two heroes, whose faces are the smallest, weigh twice as much.
    """
    errors: dict[str, list[float]] = {}
    for row in book.evenly_spaced(count):
        found = decode_latents(vae, torch.from_numpy(latents[[row]]).float().to(device_of(vae))).cpu()
        scene, unit = book.page(row).scene, found.shape[-1] / renderer.SIDE
        left, top, right, bottom = (max(0, int(edge * unit)) for edge in renderer.boxes(scene)[0])  # the prop's
        error = (found - book.pictures([row]))[..., top : bottom + 1, left : right + 1].abs().mean()
        errors.setdefault(scene.prop, []).append(float(error))
    mean = {prop: sum(found) / len(found) for prop, found in errors.items()}
    usual = sum(mean.values()) / len(mean)
    scenes = (page.scene for story in book.stories for page in story)
    return list(accumulate((mean.get(scene.prop, usual) / usual) ** 2 * len(scene.heroes) for scene in scenes))


def unet_stage(stage: StageConfig, out: Path, config: Config, blocks, book: StoryDataset, held_out: StoryDataset):
    learner = UNetObjective(blocks["unet"], blocks["synchronizer"], config.scheduler)
    latents = {source: latents_of(out, source, config) for source in (book, held_out)}

    def get_batch(seed: int, source: StoryDataset = book) -> tuple:
        rng = random.Random(f"pictures {seed}")
        rows = (source.weighted_indices if source is book else source.random_rows)(stage.batch, rng)
        known = torch.from_numpy(latents[source][rows]).float()
        made = known, source.labels[rows], source.emphasis(rows, known.shape[-1])
        return tuple(part.to(device_of(learner)) for part in made)

    def sample(step: int) -> None:
        code_sheet(learner, blocks, config, held_out, out / stage.name / f"samples-{step:06d}.png")

    return learner, {"unet": blocks["unet"]}, get_batch, [get_batch(seed, held_out) for seed in range(8)], sample


def story_stage(stage: StageConfig, out: Path, config: Config, blocks, book: StoryDataset, held_out: StoryDataset):
    tokenizer, draws = tokenizer_of(out), stage.name != "language"
    look = stage.name == "look"
    learner = MMFSObjective(blocks, config.scheduler) if look else StoryObjective(blocks, config.scheduler, draws)
    blocks["encoder"].to(memory_format=torch.channels_last)
    only = "llm" not in stage.blocks  # what teaches nothing but the LLM is left out
    batches = {
        source: StoryBatches(
            source,
            config,
            tokenizer,
            stage.batch,
            drawn_only=only,
            names=not only and source is book,
            slips=source is book and not only,
            of_two=(TWO_CHARACTER_PROB if only else COREF_TWO_CHARACTER_PROB) if source is book else 0.0,
        )
        for source in (book, held_out)
    }
    latents = {source: latents_of(out, source, config) for source in (book, held_out)}
    vae = newest_thin_vae(out, config).eval().requires_grad_(False)

    def get_batch(seed: int, source: StoryDataset = book) -> tuple:
        device = device_of(learner)
        made = batches[source].make(seed).to(device)
        if isinstance(made, TextBatch):
            return (made,)
        known = torch.from_numpy(latents[source][made.rows.flatten().cpu().numpy()]).float().to(device)
        if source is book:
            pixels = reconstruct_some(vae.to(device), made.pixels.flatten(0, 1), known)
            made = replace(made, pixels=pixels.view_as(made.pixels))
        if not draws:
            return (made,)
        size = tuple(made.rows.shape)
        if look:
            return made, known.unflatten(0, size)
        emphasis = source.emphasis(made.rows.flatten().tolist(), known.shape[-1]).to(device)
        return made, known.unflatten(0, size), emphasis.unflatten(0, size)

    if look and blocks["synchronizer"].mmfs_module.mmfs_mid_block.conv.weight.any():
        learner.rescale_to_targets([get_batch(seed) for seed in range(8)], 1.0)  # it learns at the codes' own size

    def sample(step: int) -> None:
        model = MMInterleavedPipeline(config, {name: block.eval() for name, block in blocks.items()}, tokenizer)
        path = out / stage.name / f"samples-{step:06d}"
        if draws:
            story_sheet(model, held_out, path.with_suffix(".png"))
        else:
            atomic_write(path.with_suffix(".txt"), captions(model, held_out).encode("utf-8"))

    kept = {name: blocks[name] for name in stage.blocks}
    return learner, kept, get_batch, [get_batch(seed, held_out) for seed in range(8)], None if look else sample


@torch.no_grad()
def set_scale(out: Path, config: Config, pictures: torch.Tensor) -> None:
    """Sets the factor that brings the trained VAE's latents of `pictures` to size 1, in the run's config."""
    scale = 1 / float(newest_thin_vae(out, config).encode(pictures * 2 - 1).latents.std())
    config = replace(config, vae={**config.vae, "scaling_factor": round(scale, 4)})
    write_json(out / "config.json", config.to_dict())


def export_padded_vae(folder: Path, config: Config) -> None:
    """Writes the stock form of a stage's thin VAE."""
    from safetensors.torch import save_file

    vae = diffusers_model(config.vae)
    vae.load_state_dict(pad_to_stock(vae, read_tensors(folder / "thin.safetensors")))
    with atomic_path(folder / "vae.safetensors") as temp_path:
        save_file(vae.state_dict(), temp_path)


def rescale_mmfs(folder: Path, learner: MMFSObjective, batches: list[tuple]) -> None:
    """Writes the averaged weights of a stage's synchronizer again, with its sites scaled; twice is as once."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = folder / "synchronizer.safetensors"
    learner.decoder.load_state_dict(read_tensors(path))
    learner.eval().rescale_to_targets(batches)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in learner.decoder.state_dict().items()}
    with atomic_path(path) as temp_path:
        save_file(tensors, temp_path)


@torch.no_grad()
def reconstruct_some(vae, pictures: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, side, side), some of them as a decoder that is not quite right would draw them.

    A told story is read back from its own drawings, so what reads pictures must have met such.
    """
    chosen = torch.rand(len(pictures), device=pictures.device) < RECONSTRUCT_PROB
    noise = torch.randn_like(latents) * torch.rand_like(latents[:, :1, :1, :1]) * RECONSTRUCT_NOISE
    drawn = pictures.clone()
    drawn[chosen] = decode_latents(vae, (latents + noise)[chosen])
    return drawn


def augment(pictures: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Pictures (N, 3, side, side) in [0, 1] of the same scenes: moved a little, tinted, some of them softened.

    An encoder that never met such knows a hero by a few pixels, which something else can hide.
    """
    side, room, made = pictures.shape[-1], F.pad(pictures, (MAX_TRANSLATE,) * 4, mode="replicate"), []
    for picture in room:
        x, y = (rng.randint(0, 2 * MAX_TRANSLATE) for _ in range(2))
        gains = torch.tensor([1 + rng.uniform(-MAX_TINT, MAX_TINT) for _ in range(3)]).to(picture)
        made.append((picture[:, y : y + side, x : x + side] * gains[:, None, None]).clamp(0, 1))
    return random_blur(torch.stack(made), rng, BLUR_PROB)


def device_of(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


# ---- samples ----


def _grid(rows: list[torch.Tensor], path: Path) -> None:
    """Rows of pictures (count, 3, h, w) as one PNG."""
    widest = max(len(row) for row in rows)
    padded = [torch.cat([row, row.new_ones(widest - len(row), *row.shape[1:])]) for row in rows]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in padded], dim=1)
    atomic_write(path, encode_png(sheet))


@torch.no_grad()
def vae_sheet(vae, book: StoryDataset, path: Path, count: int = 16) -> None:
    """Pictures over their reconstructions."""
    vae = vae.eval()
    pictures = book.pictures(book.evenly_spaced(count)).to(device_of(vae))
    _grid([row.cpu() for row in (pictures, decode_latents(vae, encode_latents(vae, pictures)))], path)


def code_sheet(learner: UNetObjective, blocks, config: Config, book: StoryDataset, path: Path, count: int = 12) -> None:
    """Held-out pictures over what the U-Net draws when told what they show, without any synchronizer."""
    rows = book.evenly_spaced(count)
    labels = book.labels[rows].to(device_of(learner))
    drawn = denoise(
        learner.unet,
        blocks["vae"],
        make_scheduler("ddim", config.scheduler),
        blocks["synchronizer"],
        learner.codes(labels),
        UNetImageValues((), labels.new_zeros(count, 0, dtype=torch.bool)),
        ImageGenerationConfig(num_inference_steps=20, guidance_scale=3.0, mmfs_scale=0.0),
        list(range(count)),
        (config.synchronizer.image_size,) * 2,
    )
    _grid([book.pictures(rows), drawn.cpu()], path)


@torch.no_grad()
def story_sheet(model: MMInterleavedPipeline, book: StoryDataset, path: Path, stories: int = 4) -> None:
    """Held-out stories: the true pictures over the model's, of which the first is given."""
    rows = []
    for number in range(min(stories, len(book.stories))):
        rows += drawn_over(model, book, number)
    model.clear_cache()
    _grid(rows, path)


def drawn_over(model: MMInterleavedPipeline, book: StoryDataset, number: int) -> list[torch.Tensor]:
    """A story's true pictures, and the model's: the first is given, each other drawn from the true text before it."""
    pages, first = book.stories[number], int(book.first[number])
    true = book.pictures(range(first, first + len(pages)))
    story, drawn = Story.of(pages[0].text, ImageSegment(true[0])), [true[0]]
    for page in pages[1:]:
        story = model.encode_images(story.add(page.text))
        picture = model.generate_image(
            story, ImageGenerationConfig(num_inference_steps=20, scheduler="dpm++", guidance_scale=3.0, seed=number)
        )
        drawn.append(picture.pixels)
        story = story.add(picture)
    return [true, torch.stack(drawn)]


def contact_sheet(out: Path, stories: int = 20) -> Path:
    """The exported model's drawings of held-out stories: the true ones on the left, its own on the right."""
    model, book = MMInterleavedPipeline.load(out / "model", "cpu"), StoryDataset(out, stories, held_out=True)
    longest = max(len(story) for story in book.stories)
    rows = []
    for number in range(stories):
        true, drawn = drawn_over(model, book, number)
        space = true.new_ones(longest - len(true) + 1, *true.shape[1:])
        rows.append(torch.cat([true, space, drawn]))
    _grid(rows, out / "sheet.png")
    return out / "sheet.png"


@torch.no_grad()
def captions(model: MMInterleavedPipeline, book: StoryDataset, count: int = 12) -> str:
    """True captions over the model's."""
    greedy = TextGenerationConfig(max_new_tokens=40, min_new_tokens=1, do_sample=False, repetition_penalty=1.0)
    lines: list[str] = []
    for story in range(min(count, len(book.stories))):
        picture = ImageSegment(book.pictures([int(book.first[story])])[0])
        lines += [world.caption(book.stories[story][0].scene), model.caption(picture, greedy)[0].text, ""]
    model.clear_cache()
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
