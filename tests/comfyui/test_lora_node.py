"""Apply Story LoRA in a real ComfyUI, beside ComfyUI's own Load LoRA and the library."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from server import Failed
from test_behaviour import node

from comfy_mminterleaved.models.lora import kohya_tensors
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import Story

TEXT = "Mia is a fox in a green coat with a hat. Mia waves by the lake with a kite."


@pytest.fixture(scope="module")
def files(comfyui):
    """LoRA files in models/loras: of both blocks, of the U-Net alone, and one for another model."""
    pipeline = MMInterleavedPipeline.load("starter", "cpu")
    generator, parts = torch.Generator().manual_seed(0), {}
    for block, ends in (("llm", (".v_proj", ".o_proj")), ("unet", (".attn2.to_k", ".attn2.to_v"))):
        tensors = {}
        for name, layer in getattr(pipeline, block).named_modules():
            if name.endswith(ends):
                size = layer.in_features, layer.out_features
                tensors[f"{name}.lora_A.weight"] = torch.randn(4, size[0], generator=generator) * 0.2
                tensors[f"{name}.lora_B.weight"] = torch.randn(size[1], 4, generator=generator) * 0.2
        parts[block] = kohya_tensors(block, tensors)
    folder = comfyui.folder / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(parts["llm"] | parts["unet"], folder / "both.safetensors")
    save_file(parts["unet"], folder / "unet.safetensors")
    wider = {key: torch.cat([t, t]) if key.endswith("lora_up.weight") else t for key, t in parts["llm"].items()}
    save_file(wider, folder / "wider.safetensors")
    save_file({"lora_te1_text_model.lora_up.weight": torch.zeros(2, 2)}, folder / "clip.safetensors")
    return folder


def drawing(file=None, stock=False, **strengths):
    """A panel and an answer of the starter, with a LoRA or without."""
    model, llm = ["l", 3], ["l", 1]
    prompt = {"l": node("MMInterleavedLoad", model="starter")}
    if stock:
        prompt["a"] = node("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0)
        model = ["a", 0]
    elif file:
        strengths = {"strength_model": 1.0, "strength_llm": 1.0, **strengths}
        prompt["a"] = node("MMInterleavedApplyLoRA", model=model, llm=llm, file=file, **strengths)
        model, llm = ["a", 0], ["a", 1]
    drawn = {"seed": 3, "steps": 4, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    return {
        **prompt,
        "t": node("MMInterleavedStoryText", text=TEXT),
        "s": node(
            "MMInterleavedSynchronize",
            llm=llm,
            synchronizer=["l", 2],
            model=model,
            story=["t", 0],
            strength=1.0,
            start=0.0,
            end=1.0,
            pictures=-1,
        ),
        "e": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "k": node("KSampler", model=["s", 0], positive=["s", 1], negative=["s", 2], latent_image=["e", 0], **drawn),
        "v": node("VAEDecode", samples=["k", 0], vae=["l", 4]),
        "o": node("SaveImage", images=["v", 0], filename_prefix="lora/image"),
    }


def pixels(comfyui, prompt):
    (image,) = comfyui.run(prompt)["outputs"]["o"]["images"]
    path = comfyui.folder / "output" / image["subfolder"] / image["filename"]
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def anew(prompt):
    """The same prompt, which no cache holds."""
    anew.count += 1
    prompt["t"]["inputs"]["text"] += " " * anew.count
    return prompt


anew.count = 0


@pytest.fixture(scope="module")
def restores(comfyui, files):
    """Whether ComfyUI's own node leaves the model as it was; the fork of January 2026 does not on CPUs."""
    plain = pixels(comfyui, drawing())
    pixels(comfyui, drawing("unet.safetensors", stock=True))
    return np.abs(pixels(comfyui, anew(drawing())) - plain).max() == 0


def test_a_lora_changes_what_it_is_applied_to(comfyui, files, restores):
    plain = pixels(comfyui, drawing())
    off = pixels(comfyui, drawing("both.safetensors", strength_llm=0.0, strength_model=0.0))
    llm = pixels(comfyui, drawing("both.safetensors", strength_model=0.0))
    both = pixels(comfyui, drawing("both.safetensors"))
    unet = pixels(comfyui, drawing("both.safetensors", strength_llm=0.0))
    if restores:
        assert np.abs(off - plain).max() == 0
        assert min(np.abs(a - b).mean() for a, b in ((llm, plain), (both, llm), (unet, both), (unet, plain))) > 0.3
        assert np.abs(pixels(comfyui, anew(drawing())) - plain).max() == 0, "the model itself stays as it was"
    else:
        assert np.abs(both - plain).mean() > 1


def test_comfyuis_own_node_reads_the_same(comfyui, files):
    ours = pixels(comfyui, drawing("unet.safetensors"))
    stock = pixels(comfyui, drawing("unet.safetensors", stock=True))
    assert np.abs(ours - stock).max() == 0
    alone = pixels(comfyui, drawing("both.safetensors", stock=True))  # it leaves the LLM's part out
    assert np.abs(alone - stock).max() == 0


def test_the_library_reads_with_the_same_weights(comfyui, files):
    """Log-probabilities of answers: in ComfyUI by patches, in the library by hooks."""
    options, question = ["a fox", "a bear"], "Who is it?"

    def ranked(llm):
        prompt = {key: each for key, each in anew(drawing("both.safetensors")).items() if key in ("l", "a", "t")}
        prompt["w"] = node(
            "MMInterleavedChoose", llm=llm, story=["t", 0], options="\n".join(options), question=question
        )
        table = comfyui.run(prompt)["outputs"]["w"]["text"][0]
        return [float(line.split()[0]) for line in table.splitlines()]

    before, scores, after = ranked(["l", 1]), ranked(["a", 1]), ranked(["l", 1])
    story = Story.of(TEXT)
    plain, adapted = (
        MMInterleavedPipeline.load("starter", "cpu", lora=lora).rank(story, options, question)
        for lora in (None, files / "both.safetensors")
    )
    assert before == after == pytest.approx([option.log_prob for option in plain], abs=0.02)
    assert scores == pytest.approx([option.log_prob for option in adapted], abs=0.02)
    assert abs(plain[0].log_prob - adapted[0].log_prob) > 0.1


@pytest.mark.parametrize(
    "file, sentence",
    [
        ("wider.safetensors", "does not fit this model"),
        ("clip.safetensors", "use Load LoRA for it"),
        ("none.safetensors", "not in"),
    ],
)
def test_files_that_do_not_fit(comfyui, files, file, sentence):
    with pytest.raises(Failed) as failed:
        comfyui.run(drawing(file))
    assert sentence in failed.value.sentence
