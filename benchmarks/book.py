"""The starter model: a book of five panels from a sentence, end to end as a user runs it, and where its time goes."""

from __future__ import annotations

import json
import tempfile
import time

import torch

from .timing import in_a_process

OPENING = "Mia is on the beach with a ball. Mia is a fox in a red coat and she wears a crown."


def measure(rounds: int = 3) -> dict:
    """Medians of whole processes: imports, loading, five panels at the default settings, saving."""
    runs = [json.loads(in_a_process("benchmarks.book")) for _ in range(rounds)]
    runs.sort(key=lambda run: run["whole"])
    return {**runs[len(runs) // 2], "rounds": rounds}


def main() -> dict:
    began = time.perf_counter()
    from comfy_mminterleaved import ImageGenerationConfig, MMInterleavedPipeline, Story, TextGenerationConfig
    from comfy_mminterleaved.stories.page import save_story

    spent = {"imports": time.perf_counter() - began}

    def clocked(name: str, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        return run

    with torch.no_grad():
        model = clocked("load", MMInterleavedPipeline.load)("starter", "cpu")
        for name in ("encode_images", "generate_text", "generate_image"):
            setattr(model, name, clocked(name, getattr(model, name)))
        told = model.generate_story(
            Story.of(OPENING),
            5,
            text_config=TextGenerationConfig(max_new_tokens=60),
            image_config=ImageGenerationConfig(num_inference_steps=20, scheduler="dpm++", guidance_scale=4.0),
        )
    with tempfile.TemporaryDirectory() as folder:
        clocked("save", save_story)(folder, told)
    return {"whole": time.perf_counter() - began, **spent}


if __name__ == "__main__":
    import sys

    sys.stdout.write(json.dumps(main()))
