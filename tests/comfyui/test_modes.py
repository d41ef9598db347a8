"""ComfyUI started in other ways: an fp16 U-Net beside a float32 synchronizer, a kernel that ignores masks."""

import shutil
from pathlib import Path

import pytest
from conftest import COMFYUI, PYTHON
from prompt import TEMPLATES, to_prompt
from server import Failed, Server
from test_behaviour import tell

pytestmark = pytest.mark.skipif(not COMFYUI, reason="no ComfyUI to test in: set COMFYUI_PATH (and COMFYUI_PYTHON)")

HALF_UNET = """
import torch
import comfy.model_management as management

management.unet_dtype = lambda *args, **kwargs: torch.float16
management.unet_manual_cast = lambda *args, **kwargs: None
NODE_CLASS_MAPPINGS = {}
"""

# SageAttention's signature: the mask lands among the other arguments and is ignored.
SAGE = """
import torch


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    if tensor_layout == "NHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return out.transpose(1, 2) if tensor_layout == "NHD" else out
"""


def start(folder: Path, *arguments, nodes: str = "", python_path: str = "") -> Server:
    (folder / "input").mkdir(parents=True)
    shutil.copy(Path(COMFYUI) / "input" / "example.png", folder / "input")
    if nodes:
        (folder / "custom_nodes").mkdir()
        (folder / "custom_nodes" / "a_mode.py").write_text(nodes)
    return Server(folder, COMFYUI, PYTHON, ("--cpu", *arguments), python_path=python_path)


def test_a_half_precision_unet_beside_a_float32_synchronizer(tmp_path):
    """As --lowvram and --novram leave them on a card."""
    server = start(tmp_path / "server", nodes=HALF_UNET)
    try:
        assert server.run(tell(panels=2, steps=2))["outputs"]
    finally:
        server.stop()


@pytest.mark.parametrize("template", ["1 ", "2 "])
def test_without_a_cache_it_runs_or_says_what_would_help(tmp_path, template):
    """0.3.64 loses outputs with --cache-none, newer cores do not."""
    server = start(tmp_path / "server", "--cache-none")
    try:
        prompt = to_prompt(next(p for p in TEMPLATES if p.stem.startswith(template)), server.get("/object_info"))
        for entry in prompt.values():
            if isinstance(entry["inputs"].get("steps"), int):
                entry["inputs"]["steps"] = 2
        try:
            assert server.run(prompt)["outputs"]
        except Failed as failed:
            assert failed.sentence.endswith("start it without, or with --cache-lru 10.")
    finally:
        server.stop()


def test_a_kernel_that_ignores_masks_changes_no_text(tmp_path):
    (tmp_path / "packages" / "sageattention").mkdir(parents=True)
    (tmp_path / "packages" / "sageattention" / "__init__.py").write_text(SAGE)
    texts = []
    for number, arguments in enumerate([(), ("--use-sage-attention",)]):
        server = start(tmp_path / str(number), *arguments, python_path=str(tmp_path / "packages") if arguments else "")
        try:
            prompt = to_prompt(next(p for p in TEMPLATES if p.stem.startswith("4 ")), server.get("/object_info"))
            outputs = server.run(prompt)["outputs"]
            texts.append({name: shown["text"] for name, shown in outputs.items() if "text" in shown})
            assert ("Using sage attention" in server.text()) == bool(arguments)
        finally:
            server.stop()
    assert texts[0] and texts[0] == texts[1]
