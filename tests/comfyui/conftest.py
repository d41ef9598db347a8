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


def make_random_refiner(folder: Path) -> None:
    """A copy of the starter whose refiner has random weights, so that all that goes into it counts."""
    import torch
    from safetensors.torch import save_file

    from comfy_mminterleaved.generation.embedders import system_metadata
    from comfy_mminterleaved.models.refiner import Refiner, RefinerConfig
    from comfy_mminterleaved.presets import STARTER_DIR

    shutil.copytree(STARTER_DIR, folder)
    torch.manual_seed(0)
    refiner = Refiner(RefinerConfig())
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    metadata = system_metadata(RefinerConfig().to_dict(), "refiner")
    save_file(refiner.state_dict(), folder / "systems" / "refiner.safetensors", metadata)


@pytest.fixture(scope="session")
def comfyui(folder):
    """A running ComfyUI with this project in it; its log must hold no traceback that a test did not ask for."""
    if not COMFYUI:
        pytest.skip("no ComfyUI to test in: set COMFYUI_PATH (and COMFYUI_PYTHON) to one")
    from server import Server

    (folder / "input").mkdir()
    shutil.copy(Path(COMFYUI) / "input" / "example.png", folder / "input")
    make_random_refiner(folder / "models" / "mm_interleaved" / "random refiner")
    server = Server(folder, COMFYUI, PYTHON)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def definitions(comfyui):
    return comfyui.get("/object_info")
