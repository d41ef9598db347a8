"""Runs inside ComfyUI: language models in its layers, against transformers' own."""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CoreClip:
    """Stands in for the CLIP of newer releases, whose `generate` the ones that tests run in do not have."""

    class tokenizer:
        llama_template_images = "x"

    def tokenize(self, text, image=None, min_length=0, thinking=True):
        return {"text": text, "image": image, "thinking": thinking}

    def generate(self, tokens, **settings):
        self.asked = tokens, settings
        return [[1, 2, 3]]

    def decode(self, ids):
        return ["Panel 1: Mia runs."]


def checks():
    import comfy.model_management
    import folder_paths
    import torch

    load(TESTS / "comfyui" / "in_comfyui.py").package()
    from mmi.comfy_mminterleaved.errors import SettingError
    from mmi.comfy_mminterleaved.stories.story import ImageSegment, Story
    from mmi.comfy_mminterleaved.writers.chat import WRITING
    from mmi.comfy_mminterleaved.writers.local import load_chat_model
    from mmi.nodes.load_writer import LoadWriter, chat_models
    from mmi.nodes.writer_from_clip import WriterFromClip

    sys.path.append(str(TESTS))
    tiny_chat = load(TESTS / "tiny_chat.py")
    folder = Path(folder_paths.get_folder_paths("LLM")[0])
    with torch.inference_mode(False):
        tiny_chat.save_tiny_llm(folder / "tiny")
        tiny_chat.save_tiny_qwen_vl(folder / "family" / "tiny-vl")
    result = {"models": sorted(chat_models())}

    config = dataclasses.replace(WRITING, max_new_tokens=12)
    image = ImageSegment(torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(1)))
    other = ImageSegment(torch.zeros(3, 64, 96))
    for name in ("tiny", "family/tiny-vl"):
        plain, writer = load_chat_model(folder / name), LoadWriter.execute(name, "story").result[0]
        patched = writer.model
        parts = ["Mia waves. ", *([image] if plain.sees_images else []), "Go on."]
        inputs = plain.encode(parts)
        with torch.inference_mode():
            one, two = plain.model(**inputs).logits, patched.model(**inputs).logits
        result[f"{name} equal"] = torch.equal(one, two)
        result[f"{name} sees"] = writer.sees_images
        result[f"{name} text equal"] = plain.chat(parts, config) == patched.chat(parts, config)
        result[f"{name} scores"] = patched.score(parts, ["a fox", "a bear"])
        layers = [m for m in patched.model.modules() if hasattr(m, "comfy_cast_weights")]
        kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm, torch.nn.Conv3d)
        result[f"{name} layers"] = len(layers), sum(isinstance(m, kinds) for m in plain.model.modules())
        held = [loaded.model for loaded in comfy.model_management.current_loaded_models]
        result[f"{name} held"] = patched.patcher in held
        comfy.model_management.unload_all_models()
        held = [loaded.model for loaded in comfy.model_management.current_loaded_models]
        result[f"{name} unloaded"] = patched.patcher not in held
        if plain.sees_images:
            first, second = (patched.score(["Who? ", each], ["a fox"]) for each in (image, other))
            result["images count"] = abs(first[0] - second[0])

    # One that scales what its embedding finds (Gemma), and weights that no layer casts.
    from mmi.nodes.load_writer import move_uncast, uncast_tensors, use_comfy_layers

    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    torch.manual_seed(0)
    module = torch.nn.Sequential(Scaled(5, 4), torch.nn.Linear(4, 4), torch.nn.RMSNorm(4))
    ids = torch.arange(5)
    before = module(ids)
    use_comfy_layers(module)
    result["scaled equal"] = torch.equal(module(ids), before) and hasattr(module[0], "comfy_cast_weights")
    result["uncast"] = [tuple(tensor.shape) for _, _, tensor in uncast_tensors(module)]
    move_uncast(module, torch.device("meta"))  # in place of a card
    result["moved"] = {name: parameter.device.type for name, parameter in module.named_parameters()}

    clip = CoreClip()
    writer = WriterFromClip.execute(clip, "story").result[0]
    result["clip text"] = writer.write(Story.of("Mia.", image), 7).text
    tokens, settings = clip.asked
    result["clip image"], result["clip seed"] = list(tokens["image"].shape), settings["seed"]
    try:
        WriterFromClip.execute(object(), "story")
    except SettingError as error:
        result["clip without"] = str(error)
    os.makedirs(folder / "broken", exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / "broken" / name).write_bytes((folder / "tiny" / name).read_bytes())
    return result
