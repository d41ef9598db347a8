"""Random prompts: each ends in images, in ComfyUI's own refusal, or in one sentence of ours; none takes a minute.

`FUZZ` sets how many `--long` tries (1,000).
"""

import os
import random
import time

import pytest
from conftest import COMFYUI
from server import Failed

from comfy_mminterleaved import errors

pytestmark = pytest.mark.skipif(not COMFYUI, reason="no ComfyUI to test in: set COMFYUI_PATH (and COMFYUI_PYTHON)")

OURS = {name for name in vars(errors) if name.endswith("Error")}
OTHERS = ("EmptyImage", "EmptyLatentImage", "KSampler", "VAEDecode", "VAEEncode")
LITERALS = ("PrimitiveInt", "PrimitiveFloat", "PrimitiveString")
PATCHES = ("FreeU", "RescaleCFG", "TomePatchModel", "HyperTile")
TEXTS = (
    "Mia is a fox in a red coat.",
    "Mia waves in the snow.",
    "Who is in the picture?",
    "",
    " ",
    "\n",
    "0",
    "\\",
    '"',
    "{story}{question}",
    "%date:yyyy%",
    "<script>alert(1)</script>&amp;",
    "a\0b",
    "\ud800half",
    "\N{FOX FACE}\n\N{BEAR FACE}",
    "\N{RIGHT-TO-LEFT OVERRIDE}abc",
    "../../x",
    "/etc/passwd",
    "C:\\con",
    "stories/fz",
    "a/" * 200,
    "x" * 300,
    "word " * 3000,
    "a fox\na bear",
    "\n".join(f"o{i}" for i in range(300)),
    "7, , 42",
    "1" * 5000,
)
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"), -0.0)
INTEGERS = (0, 1, -1, 2, 7, 8, 64, 128, 2**31, 2**63 - 1, 2**64)
SIZES = (128, 0, 7, 8, 64, 200, 256)
# Legal values of these make honest work of minutes.
CAPPED = {
    "steps": (1, 2, 3, 0),
    "panels": (1, 2, 0, 64),
    "max_tokens": (24, 1, 5, 0),
    "beams": (1, 2, 4, 64),
    "batch_size": (1, 2, 3),
    "width": SIZES,
    "height": SIZES,
    "dpi": (40, 30, 0),
    "sampler_name": ("euler", "dpmpp_2m", "uni_pc", "lcm", "x"),  # a core may have one that it cannot run itself
}


def widget(rng: random.Random, name: str, kind, options: dict):
    """A value for a widget: mostly its default, else whatever somebody or another node might put there."""
    choices = kind if isinstance(kind, list) else options.get("options")
    default = options.get("default", choices[0] if choices else None)
    if name in CAPPED:
        return CAPPED[name][0] if rng.random() < 0.6 else rng.choice(CAPPED[name])
    if choices or kind == "COMBO":
        return rng.choice(TEXTS) if rng.random() < 0.1 or not choices else rng.choice(choices)
    if rng.random() < 0.8 and default is not None:
        return default
    if kind == "BOOLEAN":
        return rng.choice([True, False, "yes"])
    return rng.choice({"INT": INTEGERS, "FLOAT": FLOATS}.get(kind, TEXTS))


def random_prompt(rng: random.Random, definitions: dict) -> dict:
    kinds = [name for name in definitions if name.startswith("MMInterleaved")]
    kinds += [name for name in (*OTHERS, *LITERALS, *PATCHES) if name in definitions]
    prompt, pool = {"1": {"class_type": "MMInterleavedLoad", "inputs": {"model": "starter"}}}, {}

    def offer(number: str, name: str) -> None:
        for index, output in enumerate(definitions[name]["output"]):
            pool.setdefault(output if isinstance(output, str) else "COMBO", []).append([number, index])

    offer("1", "MMInterleavedLoad")
    for number in map(str, range(2, rng.randint(5, 16))):
        name = rng.choice(kinds)
        inputs, sections = {}, definitions[name]["input"]
        for section in ("required", "optional"):
            for key, spec in sections.get(section, {}).items():
                kind, options = spec[0], spec[1] if len(spec) > 1 else {}
                links = pool.get(kind, []) if isinstance(kind, str) else []
                is_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
                if section == "optional" and rng.random() < 0.5:
                    continue
                if is_widget and not (links and rng.random() < 0.15) and not options.get("forceInput"):
                    inputs[key] = widget(rng, key, kind, options)
                elif links:
                    inputs[key] = rng.choice(links)
        if any(key not in inputs for key in sections.get("required", {})):
            continue
        prompt[number] = {"class_type": name, "inputs": inputs}
        offer(number, name)
    for kind, show, key in (("IMAGE", "PreviewImage", "images"), ("STRING", "PreviewAny", "source")):
        for link in rng.sample(pool.get(kind, []), min(3, len(pool.get(kind, [])))):
            prompt[str(len(prompt) + 100)] = {"class_type": show, "inputs": {key: link}}
    for kind in ("CONDITIONING", "STORY", "FLOAT", "LATENT"):
        for link in pool.get(kind, [])[:1]:
            prompt[str(len(prompt) + 100)] = {"class_type": "PreviewAny", "inputs": {"source": link}}
    return prompt


def fault(comfyui, prompt: dict) -> str:
    """What is wrong with how a prompt ended; empty if nothing is."""
    began = time.monotonic()
    answer = comfyui.post("/prompt", {"prompt": prompt, "client_id": comfyui.client})
    if "prompt_id" not in answer:  # ComfyUI refused all of it
        return ""
    comfyui.tried = getattr(comfyui, "tried", 0) + 1
    try:
        comfyui.wait(answer["prompt_id"], timeout=60)
    except Failed as failed:
        is_core = not failed.node.startswith("MMInterleaved") and "mminterleaved" not in failed.traceback
        is_ours = failed.kind.rpartition(".")[2] in OURS
        is_sentence = 0 < len(failed.sentence) < 600 and "\n" not in failed.sentence.strip()
        if not is_core and not (is_ours and is_sentence):
            return f"{failed.node}: {failed.kind}: {failed.sentence[:300]}"
    except Exception as error:  # no end within a minute
        return f"no end within a minute: {type(error).__name__}"
    seconds = time.monotonic() - began
    return f"took {seconds:.0f} s" if seconds > 60 else ""


def faults(comfyui, definitions, seed: int, count: int) -> dict[int, str]:
    """The faults of `count` prompts that ComfyUI ran at least in part, by seed."""
    found, comfyui.tried = {}, 0
    while comfyui.tried < count:
        if text := fault(comfyui, random_prompt(random.Random(seed), definitions)):
            found[seed] = text
        seed += 1
    return found


def test_random_prompts(comfyui, definitions):
    assert faults(comfyui, definitions, 0, 25) == {}


@pytest.mark.long
def test_a_thousand_random_prompts(comfyui, definitions):
    assert faults(comfyui, definitions, 1000, int(os.environ.get("FUZZ", "1000"))) == {}
