"""The templates, and what the page sends when Run is pressed."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also without this project installed

from comfy_mminterleaved.jobs import workflow

TEMPLATES = sorted(Path(__file__).parent.glob("*.json"))
RUNNABLE = [path for path in TEMPLATES if path.stem[0] not in "89"]  # those need weights which do not ship
FULL_SIZE = next((path for path in TEMPLATES if path.stem.startswith("8 ")), None)
ANY_MODEL = [path for path in TEMPLATES if path.stem.startswith("9 ")]


def to_prompt(path: Path, definitions: dict) -> dict:
    """A template as ComfyUI's /prompt takes it; `definitions` are those of /object_info."""
    return workflow.to_prompt(json.loads(path.read_text(encoding="utf-8")), definitions, path.name)
