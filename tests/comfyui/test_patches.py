"""ComfyUI's own patches of a MODEL, before and after Apply Synchronizer: they run, and earlier images still count."""

import io

import numpy as np
import pytest
from conftest import COMFYUI
from PIL import Image
from server import Failed
from test_behaviour import by_hand, node

pytestmark = pytest.mark.skipif(not COMFYUI, reason="no ComfyUI to test in: set COMFYUI_PATH (and COMFYUI_PYTHON)")

SHORT = ("FreeU_V2", "HyperTile", "PerturbedAttentionGuidance", "RescaleCFG")
# They change the file, the schedule or the kind of model, or hook the loaded weights for good, instead of patching.
NO_PATCHES = (
    "Model",
    "Load",
    "LoRA",
    "Lora",
    "MMInterleaved",
    "Sampling",
    "Train",
    "Save",
    "GroupOffload",
    "Layerwise",
)


def default_of(spec):
    """The value that a widget of an input shows."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    return choices[0] if choices else None


def patches(definitions) -> dict[str, dict]:
    """Class names and inputs of nodes that take a MODEL and settings, and give a MODEL."""
    found = {}
    for name, entry in definitions.items():
        required = entry["input"].get("required", {})
        if entry["output"] != ["MODEL"] or required.get("model", [None])[0] != "MODEL" or name.startswith(NO_PATCHES):
            continue
        inputs = {key: default_of(spec) for key, spec in required.items() if key != "model"}
        if all(value is not None for value in inputs.values()):
            found[name] = inputs
    return found


def drawing(name: str, inputs: dict, place: str, strength: float) -> dict:
    """A prompt that draws the third image of a story whose earlier ones are red and blue."""
    prompt = by_hand(steps=3)
    prompt |= {
        "10": node("EmptyImage", width=128, height=128, batch_size=1, color=0xCC2222),
        "11": node("EmptyImage", width=128, height=128, batch_size=1, color=0x2222CC),
        "12": node("MMInterleavedStoryPicture", encoder=["1", 0], image=["10", 0]),
        "13": node("MMInterleavedStoryPicture", story=["12", 0], encoder=["1", 0], image=["11", 0]),
        "20": node(name, model=["3", 0] if place == "after" else ["1", 3], **inputs),
    }
    prompt["2"]["inputs"]["story"] = ["13", 0]
    prompt["3"]["inputs"]["strength"] = strength
    prompt["3" if place == "before" else "5"]["inputs"]["model"] = ["20", 0]
    return prompt


def picture(comfyui, prompt) -> np.ndarray:
    shown = comfyui.run(prompt)["outputs"]["7"]["images"][0]
    query = f"filename={shown['filename']}&subfolder={shown['subfolder']}&type={shown['type']}"
    return np.asarray(Image.open(io.BytesIO(comfyui.fetch(f"/view?{query}"))).convert("RGB"), dtype=float)


def check(comfyui, name: str, inputs: dict) -> bool:
    """Whether this core can run the patch on the bare MODEL; if so, with Apply Synchronizer it must run too."""
    try:
        picture(comfyui, drawing(name, inputs, "alone", 0.0))
    except Failed:
        return False
    for place in ("before", "after"):
        with_images, without = (picture(comfyui, drawing(name, inputs, place, strength)) for strength in (1.0, 0.0))
        assert np.isfinite(with_images).all() and with_images.std() > 1, (name, place)
        assert np.abs(with_images - without).mean() > 1, (name, place)
    return True


@pytest.mark.parametrize("name", SHORT)
def test_a_patch_and_the_synchronizer(comfyui, definitions, name):
    assert check(comfyui, name, patches(definitions)[name])


@pytest.mark.long
def test_every_patch_and_the_synchronizer(comfyui, definitions):
    names = patches(definitions)
    run = [name for name in names if check(comfyui, name, names[name])]
    assert len(run) >= 15, (run, sorted(set(names) - set(run)))
