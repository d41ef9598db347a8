"""LLMs that `convert --quantize` stored in fewer bits, in a real ComfyUI."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from conftest import COMFYUI, PYTHON
from prompt import TEMPLATES, to_prompt
from server import Failed

from comfy_mminterleaved.checkpoints import native
from comfy_mminterleaved.checkpoints.load import read
from comfy_mminterleaved.models.quantization import FORMATS

HAS_GGUF = bool(PYTHON) and subprocess.run([PYTHON, "-c", "import gguf"], capture_output=True).returncode == 0
NAMES = [name for name in FORMATS if HAS_GGUF or name != "q4_0"]
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="ComfyUI's Python has no package gguf")


@pytest.fixture(scope="module")
def quantized(comfyui, folder) -> Path:
    """Models of ComfyUI's: the starter in every format."""
    models = folder / "models" / "mm_interleaved"
    (folder / "models" / "text_encoders").mkdir(exist_ok=True)
    saved = read("starter")
    for name in NAMES:
        target = models / f"starter-{name}"
        if not target.exists():
            parts = saved.config, dict(saved.blocks), saved.tokenizer, None, saved.generation, saved.words
            native.save(target, *parts, quantization=name)
    return models


@pytest.mark.parametrize("name", NAMES)
def test_a_story_comes_with_text_and_images(comfyui, quantized, name):
    prompt = to_prompt(next(p for p in TEMPLATES if p.stem.startswith("1 ")), comfyui.get("/object_info"))
    for entry in prompt.values():
        entry["inputs"] = {key: 2 if key in ("panels", "steps") else v for key, v in entry["inputs"].items()}
        if entry["class_type"] == "MMInterleavedLoad":
            entry["inputs"]["model"] = f"starter-{name}"
    outputs = comfyui.run(prompt)["outputs"]
    saved = next(
        shown
        for number, shown in outputs.items()
        if prompt.get(number, {}).get("class_type") == "MMInterleavedSaveStory"
    )
    assert len(saved["images"]) == 2 and len(saved["text"][0].split("\n")) >= 2


@pytest.fixture(scope="module")
def found(comfyui, quantized):
    script = str(Path(__file__).with_name("in_quantized.py"))
    done = comfyui.run({"1": {"class_type": "RunScript", "inputs": {"script": script}}})
    return json.loads(done["outputs"]["1"]["text"][0])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_as_in_the_library(found, name):
    """Core's own layers multiply in an order of their own."""
    assert found[f"starter-{name}"]["library"] < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_partly_loaded_it_is_the_same(found, name):
    assert found[f"starter-{name}"]["partly loaded"] < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_that_is_announced_is_that_of_the_stored_weights(found, name):
    assert 0.99 < found[f"starter-{name}"]["announced"] < 1.01


def test_a_name_that_a_link_brings_is_not_refused_before_it_is_known(found):
    assert found["a name from a link"] is True


def run_loader(comfyui, file: str):
    required = comfyui.get("/object_info/MMInterleavedAsk")["MMInterleavedAsk"]["input"]["required"]
    defaults = {name: about[1]["default"] for name, about in required.items() if "default" in about[1:][0]}
    defaults["question"] = "Who is it?"
    comfyui.run(
        {
            "1": {"class_type": "MMInterleavedLoadLLM", "inputs": {"file": file}},
            "2": {"class_type": "MMInterleavedStoryText", "inputs": {"text": "Mia is a fox."}},
            "3": {"class_type": "MMInterleavedAsk", "inputs": {**defaults, "llm": ["1", 0], "story": ["2", 0]}},
        }
    )


@needs_gguf
def test_a_gguf_among_the_text_encoders(comfyui, folder, quantized):
    shutil.copy(quantized / "starter-q4_0" / "llm.gguf", folder / "models" / "text_encoders" / "story.gguf")
    run_loader(comfyui, "story.gguf")


@needs_gguf
def test_a_gguf_of_another_model_is_called_one(comfyui, folder, quantized):
    gguf = pytest.importorskip("gguf")
    path = folder / "models" / "text_encoders" / "other.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("Somebody's Qwen")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Failed) as failed:
        run_loader(comfyui, "other.gguf")
    assert "is a GGUF of the architecture 'qwen2', \"Somebody's Qwen\"" in failed.value.sentence


def test_weights_in_another_format_than_the_file_says(comfyui, folder, quantized):
    path = folder / "models" / "text_encoders" / "mixed.safetensors"
    data = (quantized / "starter-int8" / "llm.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(b'\\"quantization\\": \\"int8\\"', b'\\"quantization\\": \\"fp8\\" ')
    path.write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises(Failed) as failed:
        run_loader(comfyui, "mixed.safetensors")
    assert "stores weights as int8, but its settings say fp8; take all files from one" in failed.value.sentence


def test_core_reads_fp8_with_its_own_layers_where_it_has_them(found):
    assert found["starter-fp8"]["core reads it"] == (Path(COMFYUI) / "comfy" / "quant_ops.py").is_file()
