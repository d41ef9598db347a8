"""Every template, queued through /prompt of a real ComfyUI and run to its end."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prompt import FULL_SIZE, RUNNABLE, to_prompt
from server import Failed

from comfy_mminterleaved.checkpoints import native
from comfy_mminterleaved.checkpoints.load import read


def pictures(comfyui, outputs):
    """The PNGs that a prompt's nodes showed, by node."""
    found = {}
    for node, shown in outputs.items():
        for image in shown.get("images", ()):
            query = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
            found.setdefault(node, []).append(Image.open(io.BytesIO(comfyui.fetch(f"/view?{query}"))))
    return found


SAVED = sorted((Path(__file__).parent / "saved").glob("*.json"))


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_workflows_saved_before_still_run(comfyui, definitions, path):
    """The seven templates as they were before nodes and inputs got other titles."""
    prompt = to_prompt(path, definitions)
    for entry in prompt.values():
        if "steps" in entry["inputs"]:
            entry["inputs"]["steps"] = 2
    done = comfyui.run(prompt)
    assert any(shown.get("images") or shown.get("text") for shown in done["outputs"].values())


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_template(comfyui, definitions, path):
    prompt = to_prompt(path, definitions)
    logged = len(comfyui.text())
    done = comfyui.run(prompt)
    shown = pictures(comfyui, done["outputs"])
    for images in shown.values():
        for image in images:
            sizes = ((128, 128), (256, 256), (512, 512), Image.open(comfyui.folder / "input" / "example.png").size)
            assert image.size in sizes or path.stem == "Look inside"  # a sheet of several
            pixels = np.asarray(image.convert("RGB"), dtype=float)
            assert pixels.std() > 8, "a picture of one colour"
    for node, entry in prompt.items():
        if entry["class_type"] == "MMInterleavedSaveStory":
            saved = done["outputs"][node]
            folder = comfyui.folder / "output" / saved["images"][0]["subfolder"]
            story = json.loads((folder / "story.json").read_text(encoding="utf-8"))
            texts = [segment["text"] for segment in story["segments"] if "text" in segment]
            files = [image["filename"] for image in saved["images"]]
            names = {path.name for path in folder.glob("*.png")}
            numbers = sorted(name[:2] for name in names if "-" not in name)
            refined = {number: f"{number}-refined.png" for number in numbers}
            assert files == [refined[n] if refined[n] in names else f"{n}.png" for n in numbers]
            has_refiner = any("refiner" in each["inputs"] for each in prompt.values())
            assert any(name in names for name in refined.values()) == has_refiner
            assert len(saved["images"]) >= 3 and all(text in " ".join(texts) for text in saved["text"][0].split("\n"))
            assert all(text.strip() for text in texts) and "<img" in (folder / "story.html").read_text(encoding="utf-8")
            for file in {"01.png", files[0]}:  # dropped on the canvas, it is back
                kept = json.loads(Image.open(folder / file).text["prompt"])
                graphs = [{n: (e["class_type"], e["inputs"]) for n, e in graph.items()} for graph in (kept, prompt)]
                assert graphs[0] == graphs[1]
        if entry["class_type"] in ("MMInterleavedAsk", "MMInterleavedCaption", "MMInterleavedChoose"):
            assert done["outputs"][node]["text"][0].strip()
    assert shown or "4 Ask" in path.stem
    assert "Traceback" not in comfyui.text()[logged:]


def test_the_full_size_template_says_what_is_missing_and_runs_when_it_is_there(comfyui, definitions, folder):
    """The starter in 8 bits stands in for the 13B model: the same code at another width."""
    prompt = to_prompt(FULL_SIZE, definitions)
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert "is not in models/mm_interleaved" in failed.value.sentence and "docs/full-size.md" in failed.value.sentence
    model, saved = folder / "models" / "mm_interleaved" / "mm-interleaved-13b", read("starter")
    parts = dict(saved.blocks), saved.tokenizer, None, saved.generation, saved.words
    native.save(model, saved.config, *parts, quantization="int8")
    kept = (model / "unet.safetensors").rename(model / "elsewhere")
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert "'mm-interleaved-13b' lacks unet.safetensors; copy all files that" in failed.value.sentence
    kept.rename(model / "unet.safetensors")
    done = comfyui.run(prompt)
    assert any(len(shown.get("images", ())) == 3 for shown in done["outputs"].values())


def test_every_node_is_there_with_a_tooltip_on_every_input(definitions):
    ours = {name: entry for name, entry in definitions.items() if name.startswith("MMInterleaved")}
    assert len(ours) == 70
    for name, entry in ours.items():
        assert entry["description"], name
        for section in ("required", "optional"):
            for slot, (_, *settings) in entry["input"].get(section, {}).items():
                assert settings and settings[0].get("tooltip"), f"{name}: {slot}"


def test_workflows_saved_by_this_version_will_still_load(definitions):
    """Node ids, input names and types, and the order of outputs are for ever; new inputs may come, with defaults."""
    kept = json.loads((Path(__file__).parent / "schema.json").read_text(encoding="utf-8"))
    for name, entry in kept.items():
        now = definitions[name]
        for section, input_ids in entry["inputs"].items():
            for slot, kind in input_ids.items():
                sections = [section] if section == "optional" else ["required", "optional"]  # one may become optional
                raw = next(now["input"][s][slot][0] for s in sections if slot in now["input"].get(s, {}))
                assert (raw if isinstance(raw, str) else "COMBO") == kind, f"{name}: {slot}"
        for slot, settings in now["input"].get("required", {}).items():
            if slot not in entry["inputs"]["required"]:
                assert "default" in settings[1], f"{name}: the new input {slot} has no default"
        outputs = zip(now["output_name"], now["output"], now["output_is_list"])
        found = [[title, kind if isinstance(kind, str) else "COMBO", many] for title, kind, many in outputs]
        assert found[: len(entry["outputs"])] == entry["outputs"], name


def test_names_in_every_language(definitions):
    ours = {name for name in definitions if name.startswith("MMInterleaved")}
    for language in ("en", "zh", "ja", "de"):
        path = Path(__file__).parents[2] / "locales" / language / "nodeDefs.json"
        names = json.loads(path.read_text(encoding="utf-8"))
        assert set(names) == ours
        for name, entry in names.items():
            input_ids = {s for section in ("required", "optional") for s in definitions[name]["input"].get(section, {})}
            assert entry["display_name"] and set(entry["inputs"]) == input_ids, (language, name)


def test_a_help_page_with_a_picture_for_every_node(comfyui, definitions):
    for name in (name for name in definitions if name.startswith("MMInterleaved")):
        page = comfyui.fetch(f"/extensions/comfy-mminterleaved/docs/{name}.md").decode()
        assert f"![The node]({name}.png)" in page
        picture = Image.open(io.BytesIO(comfyui.fetch(f"/extensions/comfy-mminterleaved/docs/{name}.png")))
        assert picture.width > 250


def test_the_import_takes_less_than_half_a_second(comfyui):
    line = next(line for line in comfyui.text().splitlines() if line.endswith("comfy-mminterleaved"))
    (seconds,) = re.findall(r"([\d.]+) seconds", line)  # newer cores put the time of day before it
    assert float(seconds) < 0.5 and "IMPORT FAILED" not in line
