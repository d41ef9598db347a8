"""How often the same hero comes back in the starter's world when the U-Net looks back by attention alone.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python -m benchmarks.look_back --stories 40 --seed 0

Draws held-out stories in ComfyUI, panel by panel from their true texts and the images before: with the synchronizer in
the U-Net, without it, and without it but with self-attention that looks at the first and the last image. The judge of
`starter_training.evaluate` counts; it chooses nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WAYS = {  # strength of the synchronizer in the U-Net, and of self-attention to references
    "synchronizer": (1.0, 0.0),
    "neither": (0.0, 0.0),
    "look back by attention": (0.0, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.look_back", description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the held-out stories, and of the noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--strength", type=float, default=1.0, help="of the attention to references")
    parser.add_argument("--fidelity", type=float, default=0.5, help="of the attention to references")
    parser.add_argument("--end", type=float, default=1.0, help="when it ends, as a fraction of the sampling")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="(default: all)")
    parser.add_argument("--sheet", help="a PNG to draw the first stories to")
    args = parser.parse_args()
    if not os.environ.get("COMFYUI_PATH"):
        raise SystemExit("Set COMFYUI_PATH (and COMFYUI_PYTHON) to a ComfyUI.")
    from comfy_mminterleaved.stories.images import encode_png, to_tensor
    from starter_training import evaluate
    from starter_training.classifier import load

    stories = evaluate.held_out_stories(args.seed, args.stories)
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "stories": [[panel.text for panel in panels] for panels in stories],
            "openings": torch.stack([evaluate.render_scene(panels[0].scene) for panels in stories]),
            "ways": {name: WAYS[name] for name in args.way or WAYS},
            **{name: getattr(args, name) for name in ("seed", "steps", "strength", "fidelity", "end")},
        }
        torch.save(job, Path(folder) / "job.pt")
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        subprocess.run([python, "-m", "benchmarks.look_back", "--draw", folder], check=True, cwd=ROOT)
        generated = torch.load(Path(folder) / "images.pt")
    judge = load()
    result = {name: evaluate.evaluate_images(judge, stories, images) for name, images in generated.items()}
    if args.sheet:
        sheet = evaluate.comparison_sheet(stories, generated, 3)
        Path(args.sheet).write_bytes(encode_png(to_tensor(sheet)))
    sys.stdout.write(json.dumps({"stories": args.stories, "seed": args.seed, **result}, indent=1) + "\n")


def draw(folder: Path) -> None:
    """In ComfyUI's own process: draws the job's stories in every way."""
    path = os.environ["COMFYUI_PATH"]
    os.chdir(path)
    sys.path.insert(0, path)
    sys.argv = ["main.py", "--cpu"]
    import importlib
    import importlib.util

    importlib.import_module("utils.install_util")  # before a package of the same name elsewhere
    import comfy.options

    comfy.options.enable_args_parsing()
    spec = importlib.util.spec_from_file_location("mmi", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["mmi"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    job, images = torch.load(folder / "job.pt"), {}
    with torch.inference_mode():
        for name, strengths in job["ways"].items():
            images[name] = draw_stories(job, *strengths)
            sys.stderr.write(f"{name}: drawn\n")
    torch.save(images, folder / "images.pt")


def draw_stories(job: dict, synchronizer_strength: float, attention: float) -> list[list[torch.Tensor]]:
    import comfy.sample
    import comfy.samplers
    from mmi.comfy_mminterleaved.stories.story import ImageSegment, Story
    from mmi.nodes.load import LoadMMInterleaved
    from mmi.nodes.reference_attention import attend_to_references
    from mmi.nodes.synchronize import ApplySynchronizer

    encoder, llm, synchronizer, unet, vae = LoadMMInterleaved.execute("starter").result
    sampler, generated = comfy.samplers.sampler_object("dpmpp_2m"), []
    for number, (texts, opening) in enumerate(zip(job["stories"], job["openings"])):
        story = encoder.encode_images(Story.of(texts[0], ImageSegment(opening)))
        for k, text in enumerate(texts[1:], 1):
            settings = synchronizer_strength, 0.0, 1.0, -1, story.add(text)
            model, positive, negative = ApplySynchronizer.execute(llm, synchronizer, unet, *settings).result
            chosen = [story.images[0], *story.images[1:][-1:]]
            latents = [vae.encode(image.pixels.movedim(0, -1).unsqueeze(0)) for image in chosen] if attention else []
            settings = attention * job["strength"], job["fidelity"], 0.0, job["end"]
            model = attend_to_references(model, latents, *settings)
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", job["steps"])
            generator = torch.Generator().manual_seed(1_000_000 * job["seed"] + 1000 * number + k)
            noise = torch.randn(1, model.model.latent_format.latent_channels, 16, 16, generator=generator)
            parts = sampler, sigmas, positive, negative, torch.zeros_like(noise)
            samples = comfy.sample.sample_custom(model, noise, 3.0, *parts, disable_pbar=True)
            pixels = vae.decode(samples)[0].movedim(-1, 0).clamp(0, 1).clone()
            story = encoder.encode_images(story.add(text, ImageSegment(pixels)))
        generated.append([image.pixels.clone() for image in story.images[1:]])
    return generated


if __name__ == "__main__":
    if sys.argv[1:2] == ["--draw"]:
        draw(Path(sys.argv[2]))
    else:
        main()
