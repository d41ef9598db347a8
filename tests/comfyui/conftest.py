import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("workflows", "web")]

COMFYUI = os.environ.get("COMFYUI_PATH", "")
PYTHON = os.environ.get("COMFYUI_PYTHON")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("comfyui")


@pytest.fixture(scope="session")
def comfyui(folder):
    """A running ComfyUI with this project in it; its log must hold no traceback that a test did not ask for."""
    if not COMFYUI:
        pytest.skip("no ComfyUI to test in: set COMFYUI_PATH (and COMFYUI_PYTHON) to one")
    from server import Server

    (folder / "input").mkdir()
    shutil.copy(Path(COMFYUI) / "input" / "example.png", folder / "input")
    server = Server(folder, COMFYUI, PYTHON)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def definitions(comfyui):
    return comfyui.get("/object_info")
