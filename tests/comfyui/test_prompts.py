"""Prompts that once ended in something else than an image or one clear sentence."""

import json
from pathlib import Path

import pytest
from server import Failed

from comfy_mminterleaved import errors

PROMPTS = sorted((Path(__file__).parent / "prompts").glob("*.json"))
OURS = {name for name in vars(errors) if name.endswith("Error")}


def case(path: Path):
    return pytest.param(path, id=path.stem, marks=[pytest.mark.long] if path.stem.startswith("random") else [])


@pytest.mark.parametrize("path", map(case, PROMPTS))
def test_an_image_or_one_sentence(comfyui, path):
    prompt = json.loads(path.read_text(encoding="utf-8"))
    try:
        prompt_id = comfyui.queue(prompt)
        assert comfyui.wait(prompt_id, timeout=60)["outputs"] is not None
    except Failed as failed:
        if failed.node == "validation":  # ComfyUI refused it before anything ran
            return
        assert failed.kind.rpartition(".")[2] in OURS, f"{failed.node}: {failed.kind}: {failed.sentence}"
        assert failed.sentence and "\n" not in failed.sentence.strip() and len(failed.sentence) < 600
