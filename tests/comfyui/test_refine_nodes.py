"""Load Refiner, Refine Image and a refined story in a real ComfyUI."""

import json

import numpy as np
import pytest
from PIL import Image
from server import Failed
from test_behaviour import node

from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.presets import STARTER_DIR
from comfy_mminterleaved.stories.images import to_tensor
from comfy_mminterleaved.stories.story import ImageSegment, Story

TEXT = "Mia is a fox in a green coat with a hat. Mia waves by the lake with a kite."
DRAWING = {"seed": 1, "steps": 3, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}


@pytest.fixture
def model(comfyui):
    """The starter with a refiner of random weights (conftest)."""
    return comfyui.folder / "models" / "mm_interleaved" / "random refiner"


def refined(**inputs):
    return {
        "l": node("MMInterleavedLoad", model="starter"),
        "x": node("MMInterleavedExampleImage"),
        "t": node("MMInterleavedStoryText", text=TEXT),
        "s": node(
            "MMInterleavedSynchronize",
            llm=["l", 1],
            synchronizer=["l", 2],
            model=["l", 3],
            story=["t", 0],
            strength=1.0,
            start=0.0,
            end=1.0,
            pictures=-1,
        ),
        "f": node("MMInterleavedLoadRefiner", model="random refiner"),
        "r": node("MMInterleavedRefine", refiner=["f", 0], image=["x", 0], **inputs),
        "o": node("SaveImage", images=["r", 0], filename_prefix="refined/image"),
    }


def pixels(comfyui, prompt):
    (image,) = comfyui.run(prompt)["outputs"]["o"]["images"]
    path = comfyui.folder / "output" / image["subfolder"] / image["filename"]
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_library_refines_the_same(comfyui, model):
    pipeline = MMInterleavedPipeline.load(model, "cpu")
    source = ImageSegment(to_tensor(Image.open(STARTER_DIR.parents[1] / "example.png")))
    alone = pixels(comfyui, refined())
    assert alone.shape == (2 * source.size[1], 2 * source.size[0], 3)
    assert np.abs(alone - np.asarray(pipeline.refine_image(source).refined.movedim(0, -1) * 255)).max() <= 2
    told = pixels(comfyui, refined(story=["t", 0], positive=["s", 1]))
    expected = pipeline.refine_image(source, Story.of(TEXT)).refined.movedim(0, -1) * 255
    assert np.abs(told - np.asarray(expected)).max() <= 2 and np.abs(told - alone).max() > 2
    by_text = pixels(comfyui, refined(story=["t", 0]))
    assert np.abs(by_text - told).max() > 2 and np.abs(by_text - alone).max() > 2


def test_a_story_is_told_with_both_forms(comfyui, model):
    blocks = {"encoder": ["l", 0], "llm": ["l", 1], "synchronizer": ["l", 2], "model": ["l", 3], "vae": ["l", 4]}
    text = {"max_tokens": 30, "min_tokens": 4, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.0}
    former = {"width": 0, "height": 0, "strength": 1.0, "pictures": -1, "picture_first": False, "seeds": ""}
    prompt = {
        "l": node("MMInterleavedLoad", model="starter"),
        "f": node("MMInterleavedLoadRefiner", model="random refiner"),
        "s": node(
            "MMInterleavedTellStory", opening=TEXT, panels=2, refiner=["f", 0], **blocks, **DRAWING, **text, **former
        ),
        "o": node("MMInterleavedSaveStory", story=["s", 0], filename_prefix="refined/story", title=""),
        "i": node("SaveImage", images=["s", 1], filename_prefix="refined/panel"),
    }
    outputs = comfyui.run(prompt)["outputs"]
    saved = outputs["o"]["images"]
    assert [each["filename"] for each in saved] == ["01-refined.png", "02-refined.png"]
    panels = outputs["o"]["mm_interleaved_panels"]
    assert [each["image"]["filename"] for each in panels] == ["01-refined.png", "02-refined.png"]
    folder = comfyui.folder / "output" / saved[0]["subfolder"]
    segments = json.loads((folder / "story.json").read_text())["segments"]
    names = [(s["image"], s["refined"]) for s in segments if "image" in s]
    assert names == [("01.png", "01-refined.png"), ("02.png", "02-refined.png")]
    for small, large in names:
        assert Image.open(folder / small).size == (128, 128) and Image.open(folder / large).size == (256, 256)
    for each in outputs["i"]["images"]:
        assert Image.open(comfyui.folder / "output" / each["subfolder"] / each["filename"]).size == (256, 256)
    del prompt["s"]["inputs"]["refiner"]
    prompt["o"]["inputs"]["filename_prefix"] = "refined/plain"
    saved = comfyui.run(prompt)["outputs"]["o"]["images"]
    plain = comfyui.folder / "output" / saved[0]["subfolder"]
    for small, _ in names:
        assert Image.open(plain / small).tobytes() == Image.open(folder / small).tobytes(), "the story stays the same"


def test_bad_input(comfyui, model):
    prompt = refined()
    prompt["x"] = node("EmptyImage", width=1032, height=640, batch_size=1, color=0)
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert "1024 px a side at most, not 1032 x 640" in failed.value.sentence
    prompt = refined()
    prompt["f"]["inputs"]["model"] = "nothing"
    with pytest.raises(Failed):
        comfyui.run(prompt)
    prompt = {
        **refined(),
        "e": node("EmptyImage", width=128, height=128, batch_size=2, color=0),
        "a": node("MMInterleavedStoryPicture", image=["x", 0], refined=["e", 0]),
        "o": node("MMInterleavedSaveStory", story=["a", 0], filename_prefix="refined/bad", title=""),
    }
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert "2 refined images of 1" in failed.value.sentence
