"""Beside other node packages the templates give the same bytes.

COMFYUI_PACKS names a folder that holds them (nine popular ones: GGUF, IPAdapter_plus, AnimateDiff-Evolved, rgthree,
KJNodes, Custom-Scripts, essentials, TiledDiffusion, TeaCache); COMFYUI_PACKS_LIBRARIES the libraries that they need.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import COMFYUI, PYTHON
from prompt import TEMPLATES, to_prompt
from server import Server

PACKS = os.environ.get("COMFYUI_PACKS", "")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not COMFYUI, reason="no ComfyUI to test in: set COMFYUI_PATH (and COMFYUI_PYTHON)"),
    pytest.mark.skipif(not PACKS, reason="no other node packages to test beside: set COMFYUI_PACKS"),
]


def start(folder: Path, packs: list[Path]) -> Server:
    (folder / "input").mkdir(parents=True)
    shutil.copy(Path(COMFYUI) / "input" / "example.png", folder / "input")
    (folder / "custom_nodes").mkdir()
    for pack in packs:
        (folder / "custom_nodes" / pack.name).symlink_to(pack, target_is_directory=True)
    libraries = os.environ.get("COMFYUI_PACKS_LIBRARIES", "") if packs else ""
    return Server(folder, COMFYUI, PYTHON, ("--cpu",), python_path=libraries)


def results(server: Server, name: str) -> tuple[dict, list[str]]:
    """Texts and digests of the pixels that a template's nodes show."""
    path = next(path for path in TEMPLATES if path.stem.startswith(name))
    outputs = server.run(to_prompt(path, server.get("/object_info")))["outputs"]
    digests = []
    for node in sorted(outputs):
        for image in outputs[node].get("images", ()):
            query = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
            pixels = server.fetch(f"/view?{query}").split(b"IDAT", 1)[1]  # what is before holds the workflow
            digests.append(hashlib.sha256(pixels).hexdigest())
    return {node: shown["text"] for node, shown in outputs.items() if "text" in shown}, digests


def test_other_packages_change_nothing(tmp_path):
    packs = sorted(path for path in Path(PACKS).iterdir() if (path / "__init__.py").is_file())
    alone, beside = start(tmp_path / "alone", []), start(tmp_path / "beside", packs)
    try:
        failed = re.findall(r"IMPORT FAILED\)?:? .*/([^/\s]+)", beside.text())
        assert len(packs) - len(failed) >= 7, failed
        for name in ("1 ", "2 ", "4 ", "6 "):
            assert results(alone, name) == results(beside, name), name
    finally:
        alone.stop()
        beside.stop()
