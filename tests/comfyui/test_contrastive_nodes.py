"""CLIP Score, Best Panel, Find Image, Word Mask and best_of in a real ComfyUI."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from server import Failed
from test_behaviour import node

sys.path.append(str(Path(__file__).parents[1]))
from tiny_clip import make_clip

TEXT = "A fox in a green coat with a hat waves in the snow with a gift."


def loaded(model="starter"):
    return {"1": node("MMInterleavedLoadContrastive", model=model)}


def images(*names):
    """Nodes that give a batch of example images."""
    nodes = {
        f"i{n}": node("MMInterleavedExampleImage", **({"image": name} if name else {})) for n, name in enumerate(names)
    }
    return nodes


def drawing(
    seed=0, best_of=1, batch=1, text="Mia is a fox in a green coat with a hat. Mia waves by the lake with a kite."
):
    """A panel drawn from a text, as a batch in the latent."""
    return {
        **loaded(),
        "l": node("MMInterleavedLoad", model="starter"),
        "t": node("MMInterleavedStoryText", text=text),
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
        "e": node("EmptyLatentImage", width=128, height=128, batch_size=batch),
        "k": node(
            "KSampler",
            model=["s", 0],
            positive=["s", 1],
            negative=["s", 2],
            latent_image=["e", 0],
            seed=seed,
            steps=4,
            cfg=3.0,
            sampler_name="dpmpp_2m",
            scheduler="karras",
            denoise=1.0,
        ),
        "d": node("VAEDecode", samples=["k", 0], vae=["l", 4]),
    }


def pixels(comfyui, done, number):
    return [
        np.asarray(Image.open(comfyui.folder / "output" / each["subfolder"] / each["filename"]))
        for each in done["outputs"][number]["images"]
    ]


def test_a_batch_is_scored_and_sorted(comfyui):
    prompt = {
        **drawing(batch=3),
        "c": node("MMInterleavedClipScore", contrastive=["1", 0], images=["d", 0], text=TEXT),
        "b": node("MMInterleavedBestPanel", contrastive=["1", 0], story=["t", 0], images=["d", 0], references=0.0),
        "o1": node("SaveImage", images=["c", 1], filename_prefix="ranked"),
        "o2": node("SaveImage", images=["b", 0], filename_prefix="best"),
        "o3": node("SaveImage", images=["c", 0], filename_prefix="first"),
    }
    done = comfyui.run(prompt)
    lines = done["outputs"]["c"]["text"][0].splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True) and scores[0] > 0.1
    ranked, (first,) = pixels(comfyui, done, "o1"), pixels(comfyui, done, "o3")
    assert len(ranked) == 3 and (ranked[0] == first).all() and len(pixels(comfyui, done, "o2")) == 1


def test_images_are_found_in_stories_and_batches(comfyui):
    story = {
        **loaded(),
        "x": node("MMInterleavedExampleImage"),
        "t": node("MMInterleavedStoryText", text="The first panel."),
        "p": node("MMInterleavedStoryPicture", story=["t", 0], image=["x", 0]),
    }
    prompt = {
        **story,
        "f": node(
            "MMInterleavedFindImage", contrastive=["1", 0], text="A fox.", count=2, story=["p", 0], images=["x", 0]
        ),
        "o": node("SaveImage", images=["f", 0], filename_prefix="result"),
        "q": node("MMInterleavedFindImage", contrastive=["1", 0], text="", count=1, story=["p", 0], query=["x", 0]),
    }
    done = comfyui.run(prompt)
    assert len(pixels(comfyui, done, "o")) == 2 and "The first panel." in done["outputs"]["f"]["text"][0]
    assert done["outputs"]["q"]["text"][0].startswith(" 1.000") or "0.99" in done["outputs"]["q"]["text"][0]
    for changes, message in (
        ({"text": ""}, "There is nothing to look for"),
        ({"query": ["x", 0]}, "There are a text and an image to look for"),
        ({"story": None, "images": None}, "There are no images to look through"),
    ):
        bad = {
            **prompt,
            "f": node(
                "MMInterleavedFindImage",
                **{k: v for k, v in {**prompt["f"]["inputs"], **changes}.items() if v is not None},
            ),
        }
        with pytest.raises(Failed) as failed:
            comfyui.run(bad)
        assert message in failed.value.sentence


def test_a_mask_redraws_one_thing(comfyui):
    prompt = {
        **drawing(),
        "x": node("MMInterleavedExampleImage"),
        "w": node(
            "MMInterleavedWordMask",
            contrastive=["1", 0],
            image=["x", 0],
            text="A fox in a green coat waves.",
            word="fox",
            threshold=0.5,
            grow=4,
            rivals="bear, cat, dog",
        ),
        "v": node("VAEEncode", pixels=["x", 0], vae=["l", 4]),
        "m": node("SetLatentNoiseMask", samples=["v", 0], mask=["w", 0]),
        "o1": node("MaskToImage", mask=["w", 0]),
        "o2": node("SaveImage", images=["o1", 0], filename_prefix="mask"),
        "o3": node("SaveImage", images=["d", 0], filename_prefix="redrawn"),
    }
    prompt["k"]["inputs"]["latent_image"] = ["m", 0]
    done = comfyui.run(prompt)
    (mask,) = pixels(comfyui, done, "o2")
    assert 0.02 < (mask > 127).mean() < 0.9 and len(done["outputs"]["w"]["images"]) == 1
    prompt["w"]["inputs"]["word"] = "trumpet"
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert "The word 'trumpet' is not in the text" in failed.value.sentence


def tell(best_of, **changes):
    inputs = {
        "encoder": ["l", 0],
        "llm": ["l", 1],
        "synchronizer": ["l", 2],
        "model": ["l", 3],
        "vae": ["l", 4],
        "opening": "Mia is a fox in a red coat with a crown. Mia waves by the lake with a kite.",
        "panels": 2,
        "seed": 3,
        "seeds": "",
        "steps": 3,
        "cfg": 3.0,
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
        "width": 0,
        "height": 0,
        "strength": 1.0,
        "pictures": -1,
        "picture_first": False,
        "max_tokens": 30,
        "min_tokens": 4,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.9,
        "repetition_penalty": 1.0,
        "best_of": best_of,
        **changes,
    }
    return {
        **loaded(),
        "l": node("MMInterleavedLoad", model="starter"),
        "t": node("MMInterleavedTellStory", **inputs),
        "o": node("MMInterleavedSaveStory", story=["t", 0], filename_prefix="systems/best", title=""),
    }


def test_tell_story_keeps_the_best(comfyui):
    done = comfyui.run(tell(3, contrastive=["1", 0]))
    assert len(done["outputs"]["o"]["images"]) == 2, "one image a panel"
    names = [name.rpartition(".")[2] for name in done["ran"] if "." in name]
    assert {"best 1", "best 2"} <= set(names)
    with pytest.raises(Failed) as failed:
        comfyui.run(tell(3))
    assert "best_of is 3, but nothing chooses" in failed.value.sentence
    with pytest.raises(Failed) as failed:
        comfyui.run(tell(2, contrastive=["1", 0], opening="", picture_first=True))
    assert "the first image needs a text or an image before it" in failed.value.sentence


def test_a_clip_of_transformers(comfyui):
    folder = comfyui.folder / "models" / "clip_vision" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    make_clip(folder)
    prompt = {**drawing(batch=2), **loaded("clip_vision/tiny")}
    prompt["c"] = node("MMInterleavedClipScore", contrastive=["1", 0], images=["d", 0], text="a red kite")
    prompt["w"] = node(
        "MMInterleavedWordMask",
        contrastive=["1", 0],
        image=["d", 0],
        text="a red kite",
        word="kite",
        threshold=0.5,
        grow=0,
        rivals="",
    )
    assert len(comfyui.run(prompt)["outputs"]["c"]["text"][0].splitlines()) == 2
    with pytest.raises(Failed) as failed:
        comfyui.run({**prompt, **loaded("clip_vision/none")})
    assert "not in models/clip_vision" in failed.value.sentence or "none" in failed.value.sentence
