"""python -m benchmarks.gpu: the CUDA paths against the plain version, then what they cost. One card, ten minutes.

Writes benchmarks/results/gpu.json after every part, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

from comfy_mminterleaved import MMInterleavedPipeline, Story
from comfy_mminterleaved.generation.config import ImageGenerationConfig, TextGenerationConfig
from comfy_mminterleaved.generation.image import denoise
from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.models import deform_attn
from comfy_mminterleaved.models.quantization import FORMATS

from . import gather, token, unet
from .__main__ import RESULTS
from .models import random_blocks, random_maps, released_13b

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@torch.no_grad()
def check(device: str = "cuda", cases=((1, 1), (3, 64), (8, 1024))) -> dict:
    """How far each backend is off the eager one in float32, of its largest value; raises if it is too far."""
    ways = ("triton", "xformers") if device != "cpu" else ("embedding_bag",)
    found, generator = {}, torch.Generator().manual_seed(0)
    heads, points, depth, sizes = gather.HEADS, gather.POINTS, gather.DEPTH, gather.SIZES
    cells, e = sum(h * w for h, w in sizes), heads * points * (2 + len(sizes))
    for pictures, queries in cases:
        values = deform_attn.pad_levels(torch.randn(1, pictures, cells, heads, depth, generator=generator), sizes)
        said = torch.randn(1, queries, e, generator=generator) * 2
        tables, sink = torch.randn(10, e, generator=generator), torch.randn(heads, depth, generator=generator)
        order = torch.arange(pictures, 0, -1).view(1, 1, pictures).repeat(1, queries, 1)
        order[:, ::3, 0] = 0
        reference = torch.rand(queries, 2, generator=generator)
        full = [t.to(device) for t in (values, said, tables, order, reference, sink)]

        def run(way, dtype):
            values, said, tables, order, reference, sink = full  # noqa: B023, called within the turn
            half = [t.to(dtype) for t in (values, said, tables, sink)]
            scales = [1.0, 0.5, 0.25, 0.125]
            return deform_attn.mmfs_attention(
                half[0], sizes, scales, half[1], half[2], order, reference, half[3], backend=way
            )

        want = run("eager", torch.float32)
        for way in ways:
            for dtype, bar in TOLERANCE.items():
                off = ((run(way, dtype).float() - want).abs().max() / want.abs().max()).item()
                found[f"{way} {str(dtype)[6:]}, {pictures} pictures, {queries} queries"] = off
                if not off < bar:
                    raise AssertionError(f"{way} in {dtype} is off by {off:.2e} of the largest value, over {bar}.")
    return found


@torch.no_grad()
def bandwidth(device: str = "cuda", size: int = 2**30) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size / statistics.median(seconds[1:])


def decoding(device: str = "cuda") -> dict:
    """Tokens a second at 13B width and depth in float16, and the share of what memory allows."""
    found = token.measure(pictures=(1, 8), rounds=30, layers=40, device=device, dtype=torch.float16)
    c = released_13b().llm
    weights = 2 * c.num_hidden_layers * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size)
    torch.cuda.empty_cache()
    limit = bandwidth(device) / weights
    tokens = 1 / found["seconds"]["8 pictures"]
    return {**found, "tokens a second": tokens, "limit of memory": limit, "share of the limit": tokens / limit}


def stored(device: str = "cuda", layers: int = 40) -> dict:
    """Tokens a second at 13B width and depth by how the weights are stored, with the share of what memory allows.

    One form after the other, because not all fit together; `peak MB` is of the card.
    """
    speed, found = bandwidth(device), {}
    for name in ("float16", *FORMATS):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            figures = token.forms(layers, 10, device, (name,))[name]
        except torch.OutOfMemoryError:
            found[name] = "does not fit this card"
            continue
        limit = speed / figures["bytes"]
        found[name] = {
            "tokens a second": 1 / figures["token seconds"],
            "share of the limit": 1 / figures["token seconds"] / limit,
            "256 tokens read, seconds": figures["read seconds"],
            "peak MB": torch.cuda.max_memory_allocated() / 2**20,
        }
    return found


def stories(folders, device: str = "cuda", num_tokens: int = 64, steps: int = 30) -> dict:
    """A text and a picture of each converted model: tokens a second, seconds of the picture, peak of the card.

    Args:
        folders: One for each form, as `convert --quantize` writes them.
    """
    found = {}
    for folder in folders:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        pipeline = MMInterleavedPipeline.load(folder, device)
        story = Story.of("A fox in a red coat finds a letter in the snow.")
        text = TextGenerationConfig(max_new_tokens=num_tokens, min_new_tokens=num_tokens)
        image = ImageGenerationConfig(num_inference_steps=steps)
        pipeline.generate_text(story, TextGenerationConfig(max_new_tokens=2, min_new_tokens=2))  # compiles, allocates
        began = time.perf_counter()
        generated = pipeline.generate_text(story, text)
        written = time.perf_counter()
        pipeline.generate_image(story.add(generated.text), image)
        drawn = time.perf_counter()
        found[str(folder)] = {
            "form": pipeline.config.llm.quantization or str(pipeline.llm.soi_token.dtype)[6:],
            "plan": pipeline.placement.plan.mode if pipeline.placement else "resident",
            "tokens a second": len(generated.tokens) / (written - began),
            "picture, seconds": drawn - written,
            "peak MB": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None,
        }
        del pipeline
    return found


@torch.no_grad()
def picture(device: str = "cuda", rounds: int = 3, steps: int = 30) -> dict:
    """A 512 px picture in 30 steps against diffusers' StableDiffusionPipeline of the same weights, and peak memory."""
    import diffusers

    config = released_13b()
    blocks = random_blocks(config, ("unet", "synchronizer"), device, torch.float16)
    vae = random_blocks(config, ("vae",), device, torch.float32)["vae"]
    decoder, states = blocks["synchronizer"], torch.randn(1, 77, 1024).to(device, torch.float16)
    scheduler = make_scheduler("ddim", config.scheduler)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=blocks["unet"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    image_mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    maps = random_maps(config, 1, device, torch.float16)
    prepared = decoder.mmfs_module.project_images(maps, image_mask)

    def ours():
        settings = ImageGenerationConfig(num_inference_steps=steps, guidance_scale=7.5)
        return denoise(blocks["unet"], vae, scheduler, decoder, states, prepared, settings, [0], (512, 512))

    def theirs():
        latents = pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=states,
            num_inference_steps=steps,
            output_type="latent",
            height=512,
            width=512,
        ).images
        return vae.decode(latents.float() / vae.config.scaling_factor).sample

    from .timing import interleaved

    peaks = {}
    for name, run in (("ours", ours), ("pipeline", theirs)):
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    seconds = interleaved({"ours": ours, "pipeline": theirs}, rounds)
    return {"seconds": seconds, "ratio": seconds["ours"] / seconds["pipeline"], "peak MB": peaks}


def main(argv=None) -> int:
    parts = {
        "check": check,
        "gather": lambda: gather.measure(
            10, "cuda", (torch.float32, torch.float16, torch.bfloat16), (1, 1024, 8192), (1, 3)
        ),
        "unet": lambda: unet.measure((1, 3), 10, "cuda", torch.float16),
        "picture": picture,
        "token": decoding,
        "stored": stored,
    }
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--model", type=Path, action="append", help="a converted folder to tell with; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.model:
        parts["stories"] = lambda: stories(args.model)
    if not torch.cuda.is_available():
        sys.stderr.write("Error: this needs a CUDA card; `python -m benchmarks` measures on the CPU.\n")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"date": date.today().isoformat(), "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in args.only or parts:
        began = time.perf_counter()
        found[name] = parts[name]()
        torch.cuda.empty_cache()
        sys.stdout.write(f"{name} ({time.perf_counter() - began:.0f} s): {json.dumps(found[name], default=str)}\n")
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
