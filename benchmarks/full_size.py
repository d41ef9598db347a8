"""The 13B model on this machine, with random weights: python -m benchmarks.full_size COMMAND --help

`fake` writes a folder like the published one, at full width and any depth; `convert` converts one and says how long
that took and how much memory; `accuracy` compares each quantized form with float32; `speed` times them on the CPU;
`peak` holds a story's memory against the plan.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from comfy_mminterleaved import (
    ImageGenerationConfig,
    ImageSegment,
    MMInterleavedPipeline,
    Story,
    TextGenerationConfig,
)
from comfy_mminterleaved.checkpoints import native
from comfy_mminterleaved.checkpoints.load import read
from comfy_mminterleaved.checkpoints.reference import from_reference, reference_shapes, to_reference
from comfy_mminterleaved.checkpoints.tensors import _safetensors_header
from comfy_mminterleaved.config import BLOCKS, Config
from comfy_mminterleaved.generation.peak_memory import PeakMemory
from comfy_mminterleaved.generation.placement import Placement, make_plan, parse_bytes
from comfy_mminterleaved.models.quantization import FORMATS
from comfy_mminterleaved.presets import STARTER_DIR
from comfy_mminterleaved.tokenizer import byte_level

from . import token

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD = 4 * 10**9  # bytes


def config_of(layers: int, width: int | None = None) -> Config:
    """The released model's config with fewer layers in the LLM, and if `width` is given a narrower LLM."""
    config = from_reference({})
    llm = replace(config.llm, num_hidden_layers=layers)
    if width is not None:
        llm = replace(
            llm, hidden_size=width, intermediate_size=width * 27 // 10 // 32 * 32, num_attention_heads=width // 128
        )
        llm = replace(llm, num_key_value_heads=llm.num_attention_heads)
        encoder = replace(config.encoder, llm_hidden_size=width)
        perceiver = replace(config.synchronizer.perceiver, encoder_hidden_size=width)
        synchronizer = replace(config.synchronizer, llm_hidden_size=width, perceiver=perceiver)
        config = replace(config, encoder=encoder, synchronizer=synchronizer)
    return replace(config, llm=llm)


def fake(folder: Path, config: Config, dtype: torch.dtype, sparse: bool = False) -> None:
    """Writes a folder as the reference's trainer leaves it: .bin shards with an index, and the LLM's config.

    Args:
        sparse: One .safetensors file of zeros instead, which takes no room on most disks.
    """
    folder.mkdir(parents=True)
    released = to_reference(from_reference({}))
    for file, settings in to_reference(config).items():
        if settings != released[file]:  # what is as in the released model is not beside it
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(settings), encoding="utf-8")
    (folder / "llm").mkdir(exist_ok=True)
    byte_level(config.llm.vocab_size - config.llm.num_added_tokens).save(str(folder / "llm" / "tokenizer.json"))
    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in reference_shapes(config).items()}
    if sparse:
        header, _, size = _safetensors_header(shapes, {})
        with open(folder / "model.safetensors", "wb") as file:
            file.write(header)
            file.truncate(size)
        return
    shards, size = [{}], 0
    for name, tensor in shapes.items():
        if size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, shard in enumerate(shards, 1):
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save({key: _random(key, tensor, generator) for key, tensor in shard.items()}, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in shapes.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights of the size that trained ones have: norms about 1, matrices as their width asks, all gates open."""
    if like.ndim == 1 and ("norm" in name.lower() or "ln" in name) and name.endswith("weight"):
        return torch.ones(like.shape, dtype=like.dtype)
    if like.ndim > 1:
        width = max(1, like[0].numel())
        return torch.empty(like.shape).normal_(0, min(0.5, width**-0.5), generator=generator).to(like.dtype)
    return torch.empty(like.shape).uniform_(-0.1, 0.1, generator=generator).to(like.dtype)


def measured(*arguments: str) -> dict:
    """Seconds and peak of anonymous memory of the command line; raises RuntimeError if it fails.

    What is mapped from files counts as nothing: the system takes it back when it needs room.
    """
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "comfy_mminterleaved", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(0.02)
    reader.join()
    if process.returncode:
        raise RuntimeError(f"mminterleaved {' '.join(arguments)} failed:\n{''.join(lines)[-2000:]}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_gb": round(peak / 1e9, 2), "output": "".join(lines)}


def _anonymous_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


FORMS = ("float32", "bfloat16", *FORMATS, "fp8 cache")


@torch.no_grad()
def accuracy(source: Path, stories, settings, folder: Path) -> dict[str, dict[str, float]]:
    """Each form of a float32 model against it, on stories that end where an image follows.

    Args:
        stories: Given the float32 model.
        folder: Where quantized models are written for a while.
    """
    found, reference = {}, []
    for form in FORMS:
        target, dtype = source, torch.bfloat16 if form == "bfloat16" else torch.float32
        if form in FORMATS:
            saved, target = read(source), folder / form
            parts = saved.blocks, saved.tokenizer, torch.float32, saved.generation, saved.words
            native.save(target, saved.config, *parts, quantization=form)
            del saved, parts
        cache_dtype = torch.float8_e4m3fn if form == "fp8 cache" else None
        pipeline = MMInterleavedPipeline.load(target, "cpu", dtype, cache_dtype=cache_dtype)
        if form == FORMS[0]:
            stories = stories(pipeline)
        measured = [_outputs(pipeline, story, settings, dtype) for story in stories]
        reference = reference or measured
        errors = [_errors(*pair) for pair in zip(measured, reference)]
        found[form] = {name: sum(each[name] for each in errors) / len(errors) for name in errors[0]}
        del pipeline
        if form in FORMATS:
            shutil.rmtree(target)
    return found


def _outputs(pipeline, story, settings, dtype) -> dict[str, torch.Tensor]:
    states = pipeline.context_features([story])[0].to(dtype)
    pipeline.clear_cache()
    return {
        "states": states.float(),
        "tokens": pipeline.llm.logits(states).float().argmax(-1),
        "synchronizer": pipeline.synchronizer.conditioner.prompt_embeds([states]).float(),
        "picture": pipeline.generate_image(story, settings).pixels,
    }


def _errors(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        "hidden states": _relative(found["states"], reference["states"]),
        "same likeliest token": (found["tokens"] == reference["tokens"]).float().mean().item(),
        "synchronizer": _relative(found["synchronizer"], reference["synchronizer"]),
        "picture": 255 * (found["picture"] - reference["picture"]).abs().mean().item(),
    }


def random_accuracy(layers: int) -> dict:
    """At full width, with random weights: one story of text, an image and text; pictures after 4 steps."""
    settings = ImageGenerationConfig(num_inference_steps=4, scheduler="ddim", size=(256, 256))
    text = "Once upon a time there was a fox in a red coat. " * 5
    image = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        fake(Path(folder) / "source", config_of(layers), torch.float32)
        return accuracy(
            Path(folder) / "source", lambda _: [Story.of(text, ImageSegment(image), text)], settings, Path(folder)
        )


def starter_accuracy(count: int = 8) -> dict:
    """On the starter: stories that it tells itself, by seed."""
    settings = ImageGenerationConfig(num_inference_steps=20, scheduler="dpm++")

    def tell(pipeline) -> list[Story]:
        opening = Story.of("Mia is a fox in a red coat with a crown. Mia jumps on the beach with a ball.")
        return [
            pipeline.generate_story(
                opening,
                3,
                text_config=replace(pipeline.generation_config.text, seed=100 * seed),
                image_config=replace(pipeline.generation_config.image, seed=100 * seed),
            ).add("Mia sleeps in the forest.")
            for seed in range(count)
        ]

    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        return accuracy(STARTER_DIR, tell, settings, Path(folder))


def peak(folder: Path, memory: str, size: int = 512) -> dict:
    """The plan of a short story for a card of `memory`, and what the story takes; the CPU is the card.

    It has an image to read, a text and an image to draw. Every copy to the card counts, and all that is computed on it.
    """
    pipeline = MMInterleavedPipeline.load(folder, "cpu", torch.bfloat16)
    capacity, dtype = parse_bytes(memory), torch.bfloat16
    plan = make_plan(pipeline.config, capacity, dtype, (size, size), num_tokens=256, num_images=2)
    if plan.mode != "resident":
        modules = {name: getattr(pipeline, name) for name in BLOCKS}
        pipeline.placement = Placement(plan, modules, torch.device("cpu"))
    story = Story.of("A fox in a red coat. " * 6, ImageSegment(torch.rand(3, 224, 224)))
    text = TextGenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    image = ImageGenerationConfig(num_inference_steps=1, scheduler="ddim", size=(size, size))
    resident = 0 if pipeline.placement else sum(plan.weights.values())
    with PeakMemory() as found:
        pipeline.generate_story(story, 1, text_config=text, image_config=image)
    found = found.peak + resident
    return {
        "mode": plan.mode,
        "planned GiB": plan.peak / 2**30,
        "measured GiB": found / 2**30,
        "ratio": found / plan.peak,
    }


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("fake")
    p.add_argument("folder", type=Path)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--width", type=int, help="of the LLM (default: the released model's)")
    p.add_argument("--dtype", choices=DTYPES, default="float16")
    p.add_argument("--sparse", action="store_true")
    p = commands.add_parser("convert", help="`mminterleaved convert`, measured")
    p.add_argument("arguments", nargs=argparse.REMAINDER)
    p = commands.add_parser("accuracy", help="each form against float32")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--starter", action="store_true", help="the starter instead of random weights at full width")
    p = commands.add_parser("speed", help="of the LLM on the CPU, by how its weights are stored")
    p.add_argument("--layers", type=int, default=2)
    p = commands.add_parser("peak", help="of a story on a card of some size, against the plan")
    p.add_argument("folder", type=Path)
    p.add_argument("--memory", required=True)
    p.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    if options.command == "fake":
        fake(options.folder, config_of(options.layers, options.width), DTYPES[options.dtype], options.sparse)
    elif options.command == "convert":
        sys.stdout.write(json.dumps(measured("convert", *options.arguments)) + "\n")
    elif options.command == "peak":
        sys.stdout.write(json.dumps(peak(options.folder, options.memory, options.size)) + "\n")
    elif options.command == "speed":
        for form, figures in token.forms(options.layers).items():
            sys.stdout.write(f"| {form} | {figures['token ratio']:.2f} | {figures['read ratio']:.2f} |\n")
    else:
        found = starter_accuracy() if options.starter else random_accuracy(options.layers)
        heading = list(found["float32"])
        sys.stdout.write("| form | " + " | ".join(heading) + " |\n" + "|---" * (len(heading) + 1) + "|\n")
        for form, errors in found.items():
            sys.stdout.write(f"| {form} | " + " | ".join(f"{value:.3g}" for value in errors.values()) + " |\n")


if __name__ == "__main__":
    main()
