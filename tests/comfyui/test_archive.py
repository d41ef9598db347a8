"""The Registry's archive, unpacked alone into custom_nodes, runs the templates."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import COMFYUI, PYTHON
from prompt import to_prompt
from server import ROOT, Server


@pytest.fixture
def package(tmp_path):
    comfy = shutil.which("comfy", path=str(Path(sys.executable).parent))
    if not COMFYUI or comfy is None or not (ROOT / ".git").exists():
        pytest.skip("needs a ComfyUI (COMFYUI_PATH), comfy-cli and a clone of the repository")
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", tmp_path / "clone"], check=True)
    command = [comfy, "--skip-prompt", "--no-enable-telemetry", "node", "pack"]
    subprocess.run(command, cwd=tmp_path / "clone", check=True, capture_output=True)
    with zipfile.ZipFile(tmp_path / "clone" / "node.zip") as archive:
        archive.extractall(tmp_path / "package")
    return tmp_path / "package"


def test_the_archive_alone_runs_the_templates(package, tmp_path, request):
    (tmp_path / "server" / "input").mkdir(parents=True)
    shutil.copy(Path(COMFYUI) / "input" / "example.png", tmp_path / "server" / "input")
    server = Server(tmp_path / "server", COMFYUI, PYTHON, package=package)
    try:
        templates = sorted((package / "workflows").glob("*.json"))
        assert len(templates) == 26
        for path in templates[:7] if request.config.getoption("--long") else templates[:1]:
            outputs = server.run(to_prompt(path, server.get("/object_info")))["outputs"]
            assert any(shown.get("images") or shown.get("text") for shown in outputs.values())
        assert b"![The node]" in server.fetch("/extensions/comfy-mminterleaved/docs/MMInterleavedTellStory.md")
    finally:
        server.stop()
