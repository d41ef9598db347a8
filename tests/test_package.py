"""What ships: the wheel, the Registry's archive, and the starter inside both."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from places import HERE

import comfy_mminterleaved
from comfy_mminterleaved.presets import STARTER_DIR

ROOT = HERE.parent
NOT_SHIPPED = re.compile(r"(^|/)(starter_training|tests|benchmarks|art|\.ci)/|judge|classifier|training|golden|canvas-")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files that git knows, in a folder of their own."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    folder = tmp_path_factory.mktemp("clone") / "comfy-mminterleaved"
    # The checkout may belong to somebody else, as in a container.
    settings = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    command = ["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", folder]
    subprocess.run(command, env={**os.environ, **settings}, check=True)
    return folder


def contents(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def wheel(copy):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "dist", "."]
    subprocess.run(command, cwd=copy, check=True)
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    files = contents(wheel)
    assert not [name for name in files if NOT_SHIPPED.search(name)]
    assert {"comfy_mminterleaved/stories/page.html", "comfy_mminterleaved/starter/llm.safetensors"} <= set(files)
    with zipfile.ZipFile(wheel) as archive:
        systems = sum(each.compress_size for each in archive.infolist() if "/systems/" in each.filename)
    assert 0 < systems <= 25e6 and wheel.stat().st_size - systems <= 33e6
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in files if name.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata and f"Version: {comfy_mminterleaved.__version__}" in metadata
    assert "\nLicense:" not in metadata


def test_the_wheel_tells_a_story(wheel, tmp_path):
    """Installed by itself, beside the libraries of these tests."""
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", target, wheel], check=True)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); from comfy_mminterleaved import cli; print(cli.__file__)"
    words = ["tell", "--text", "Mia waves in the forest.", "--panels", "1", "--steps", "2", "--out", "book"]
    code += f"; sys.exit(cli.main({words}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and str(target) in done.stdout, done.stderr
    assert "<img" in (tmp_path / "book" / "story.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_wheel_in_a_bare_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "-c", HERE / "constraints.txt", "torch", wheel], check=True)
    command = [tmp_path / "venv" / "bin" / "mminterleaved", "tell", "--text", "Mia waves.", "--panels", "1"]
    assert subprocess.run([*command, "--out", "book"], cwd=tmp_path).returncode == 0


@pytest.fixture(scope="module")
def archive(copy):
    """What `comfy node publish` would upload; packing validates first, as the Registry does."""
    comfy = shutil.which("comfy", path=str(Path(sys.executable).parent))
    if comfy is None:
        pytest.skip("comfy-cli is not installed")
    command = [comfy, "--skip-prompt", "--no-enable-telemetry", "node"]
    done = subprocess.run([*command, "validate"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and "All validation checks passed" in done.stdout + done.stderr, done.stderr
    subprocess.run([*command, "pack"], cwd=copy, check=True, capture_output=True)
    return copy / "node.zip"


def test_the_registrys_archive_is_the_runtime(archive):
    files = contents(archive)
    assert not [name for name in files if NOT_SHIPPED.search(name)] and archive.stat().st_size <= 34e6 + 25e6
    for needed in ("__init__.py", "nodes/tell.py", "comfy_mminterleaved/starter/unet.safetensors", "locales/de"):
        assert any(name.startswith(needed) for name in files), needed
    assert sum(name.startswith("web/docs/") for name in files) > 30
    assert sum(bool(re.fullmatch(r"workflows/[^/]+\.json", name)) for name in files) == 26


def test_the_starters_tensors_are_those_that_were_trained():
    """Renaming them changed no bit: SHA-256, shortened, of each as it was before."""
    from safetensors import safe_open

    expected = json.loads((HERE / "starter-hashes.json").read_text())
    actual = {}
    for block in ("encoder", "llm", "synchronizer"):
        with safe_open(STARTER_DIR / f"{block}.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                data = file.get_tensor(name).contiguous().numpy().tobytes()
                actual[f"{block}.{name}"] = hashlib.sha256(data).hexdigest()[:16]
    assert actual == expected


def test_versions_agree():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version == comfy_mminterleaved.__version__
