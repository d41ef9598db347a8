"""Describe for Redrawing, Round Trip and Look Inside in a real ComfyUI."""

import json

import pytest
from server import Failed
from test_behaviour import node

BLOCKS = {"encoder": ["l", 0], "llm": ["l", 1], "synchronizer": ["l", 2], "model": ["l", 3], "vae": ["l", 4]}
DRAWING = {"seed": 1, "steps": 3, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}


def nodes(images=1):
    """A story of images with texts, and the text of a panel to come."""
    prompt = {
        "l": node("MMInterleavedLoad", model="starter"),
        "x": node("MMInterleavedExampleImage"),
        "t0": node("MMInterleavedStoryText", text="Mia waves in the snow."),
    }
    for n in range(images):
        prompt[f"i{n}"] = node("MMInterleavedStoryPicture", story=[f"t{n}", 0], encoder=["l", 0], image=["x", 0])
        prompt[f"t{n + 1}"] = node(
            "MMInterleavedStoryText", story=[f"i{n}", 0], text="Mia jumps on the beach with a kite."
        )
    return prompt


def test_an_image_is_described_by_what_redraws_it(comfyui):
    prompt = {
        **nodes(0),
        "d": node("MMInterleavedDescribe", image=["x", 0], captions=4, drawings=2, **BLOCKS, **DRAWING),
        "s": node("PreviewAny", source=["d", 0]),
        "p": node("PreviewAny", source=["d", 2]),
        "o": node("SaveImage", images=["d", 1], filename_prefix="redrawn"),
    }
    done = comfyui.run(prompt)
    text, story = done["outputs"]["s"]["text"][0], done["outputs"]["p"]["text"][0]
    assert " coat with " in text and story.startswith("Mia is a") and len(done["outputs"]["o"]["images"]) == 1
    with pytest.raises(Failed) as failed:
        comfyui.run(
            {**prompt, "d": node("MMInterleavedDescribe", image=["x", 0], captions=0, drawings=2, **BLOCKS, **DRAWING)}
        )
    assert "captions" in failed.value.sentence


def test_a_story_goes_round(comfyui):
    prompt = {
        **nodes(2),
        "r": node("MMInterleavedRoundTrip", story=["i1", 0], **BLOCKS, **DRAWING),
        "m": node("PreviewAny", source=["r", 1]),
        "o": node("MMInterleavedSaveStory", story=["r", 0], filename_prefix="systems/round", title=""),
    }
    done = comfyui.run(prompt)
    assert -1 <= float(done["outputs"]["m"]["text"][0]) <= 1
    saved = done["outputs"]["o"]["images"]
    folder = comfyui.folder / "output" / saved[0]["subfolder"]
    segments = json.loads((folder / "story.json").read_text())["segments"]
    texts = [segment["text"] for segment in segments if "text" in segment]
    assert texts[0].startswith("Mia is a") and "coat" not in texts[1], "the same look is the same hero"
    with pytest.raises(Failed) as failed:
        comfyui.run({**prompt, "r": node("MMInterleavedRoundTrip", story=["t0", 0], **BLOCKS, **DRAWING)})
    assert "no images to tell again" in failed.value.sentence


@pytest.mark.parametrize(
    "method, images", [("leave out", 1), ("leave out", 2), ("gradient", 2), ("attention weights", 2)]
)
def test_a_panel_is_looked_inside_of(comfyui, method, images):
    look = {"questions": "Who is it?\nWhich colour is the coat?", "method": method, **BLOCKS, **DRAWING}
    prompt = {
        **nodes(images),
        "k": node("MMInterleavedLookInside", story=[f"t{images}", 0], **look),
        "r": node("PreviewAny", source=["k", 1]),
        "s": node("PreviewAny", source=["k", 2]),
        "o": node("SaveImage", images=["k", 0], filename_prefix="look"),
    }
    done = comfyui.run(prompt)
    report = done["outputs"]["r"]["text"][0]
    assert "every cell of its feature maps" in report and done["outputs"]["s"]["text"][0] in ("1", "2")
    assert len(done["outputs"]["o"]["images"]) == (1 if method == "leave out" else images)
    if method == "leave out":
        names = [name.rpartition(".")[2] for name in done["ran"] if "." in name]
        assert sum(name.startswith("draw ") for name in names) == {1: 2, 2: 5}[images]
    for changes, message in (
        ({"story": ["t0", 0]}, "has no earlier images"),
        ({"story": ["i0", 0]}, "does not end with a text"),
        ({"questions": " "}, "no questions to ask"),
    ):
        with pytest.raises(Failed) as failed:
            comfyui.run(
                {**prompt, "k": node("MMInterleavedLookInside", **{"story": [f"t{images}", 0], **look, **changes})}
            )
        assert message in failed.value.sentence


@pytest.mark.parametrize("change", ["images blurred", "a typo in the text"])
def test_a_story_is_probed(comfyui, change):
    prompt = {
        **nodes(1),
        "k": node(
            "MMInterleavedProbeStory", story=["t1", 0], change=change, questions="Who is it?", **BLOCKS, **DRAWING
        ),
        "r": node("PreviewAny", source=["k", 1]),
        "o": node("SaveImage", images=["k", 0], filename_prefix="probe"),
    }
    done = comfyui.run(prompt)
    assert done["outputs"]["r"]["text"][0].startswith("Who is it? ") and len(done["outputs"]["o"]["images"]) == 2
