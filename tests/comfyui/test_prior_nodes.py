"""DALL-E 2's nodes in a real ComfyUI: ideas from texts, variations, blends, and Karlo's layout."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from server import Failed
from test_behaviour import node

from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.prior import load_prior_folder, move
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.presets import STARTER_DIR
from comfy_mminterleaved.stories.images import to_tensor
from comfy_mminterleaved.stories.story import ImageSegment

sys.path.append(str(Path(__file__).parents[1]))
from tiny_prior import make_prior

TEXT = "A fox in a red coat with a crown waves on the beach with a kite."
SAMPLING = {"steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def drawing(embedding, count=1, seed=1, **inputs):
    """Nodes that draw image embeddings with the starter."""
    return {
        "l": node("MMInterleavedLoad", model="starter"),
        "p": node("MMInterleavedLoadPrior", model="starter"),
        "x": node("MMInterleavedExampleImage"),
        "c": node("MMInterleavedLoadContrastive", model="starter", encoder=["l", 0]),
        "e": node("MMInterleavedEmbedImage", contrastive=["c", 0], image=["x", 0]),
        "a": node(
            "MMInterleavedApplyImageEmbedding",
            prior=["p", 0],
            synchronizer=["l", 2],
            model=["l", 3],
            embedding=embedding,
            strength=1.0,
            **inputs,
        ),
        "n": node("EmptyLatentImage", width=128, height=128, batch_size=count),
        "k": node(
            "KSampler",
            model=["a", 0],
            positive=["a", 1],
            negative=["a", 2],
            latent_image=["n", 0],
            seed=seed,
            **SAMPLING,
        ),
        "v": node("VAEDecode", samples=["k", 0], vae=["l", 4]),
        "o": node("SaveImage", images=["v", 0], filename_prefix="prior/image"),
    }


def imagined(text=TEXT, count=1, seed=3, steps=6, prior="p"):
    return node(
        "MMInterleavedTextToImageEmbedding",
        prior=[prior, 0],
        text=text,
        count=count,
        guidance=4.0,
        steps=steps,
        seed=seed,
    )


def images(comfyui, prompt):
    saved = comfyui.run(prompt)["outputs"]["o"]["images"]
    paths = [comfyui.folder / "output" / each["subfolder"] / each["filename"] for each in saved]
    return [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in paths]


@pytest.fixture(scope="module")
def pipeline():
    return MMInterleavedPipeline.load("starter", "cpu")


def test_the_library_draws_the_same_of_a_text(comfyui, pipeline):
    (drawn,) = images(comfyui, {**drawing(["t", 0]), "t": imagined()})
    embeds = pipeline.prior.sample(TEXT, num_inference_steps=6, seed=3)
    config = ImageGenerationConfig(num_inference_steps=8, guidance_scale=3.0, scheduler="euler", seed=1)
    (image,) = pipeline.generate_from_embeds(embeds, config)
    expected = np.asarray(image.pixels.movedim(0, -1) * 255)
    # ComfyUI's schedule of the same name ends a step earlier than diffusers', so edges differ.
    assert np.abs(drawn - expected).mean() < 12


def test_each_latent_draws_an_embedding_of_its_own(comfyui):
    three = images(comfyui, {**drawing(["t", 0], 3), "t": imagined("A fox waves.", 3)})
    assert len(three) == 3
    assert all(np.abs(a - b).mean() > 5 for a, b in ((three[0], three[1]), (three[0], three[2])))
    again = images(comfyui, {**drawing(["t", 0], 3), "t": imagined("A fox waves.", 3)})
    assert all((a == b).all() for a, b in zip(three, again))


def test_a_picture_is_moved_by_the_difference_of_texts(comfyui, pipeline):
    night, day = TEXT + " It is night.", TEXT
    prompt = drawing(["m", 0], story=["s", 0])
    prompt["m"] = node(
        "MMInterleavedMoveEmbedding", prior=["p", 0], embedding=["e", 0], text=night, neutral=day, amount=0.4
    )
    prompt["s"] = node("MMInterleavedStoryPicture", encoder=["l", 0], image=["x", 0])
    (moved,) = images(comfyui, prompt)
    (plain,) = images(comfyui, {**drawing(["e", 0], story=["s", 0]), "s": prompt["s"]})
    (alone,) = images(comfyui, drawing(["e", 0]))
    assert np.abs(moved - plain).mean() > 3 and np.abs(plain - alone).mean() > 0.5
    source = ImageSegment(to_tensor(Image.open(STARTER_DIR.parents[1] / "example.png")))
    embed = pipeline.embedder.image_embeds([source])
    expected = move(embed, *pipeline.embedder.text_embeds([night, day]), 0.4)
    shown = {name: prompt[name] for name in ("l", "p", "x", "c", "e", "m")}
    shown["o"] = node("ShowEmbedding", embedding=["m", 0])
    (values,) = comfyui.run(shown)["outputs"]["o"]["text"]
    assert np.abs(np.array(json.loads(values)[0]) - expected.numpy()).max() < 2e-2


def test_blends(comfyui):
    prompt = drawing(["b", 0], 3)
    prompt["t"] = imagined()
    prompt["b"] = node("MMInterleavedBlendEmbeddings", embedding=["e", 0], other=["t", 0], amount=1.0, count=3)
    blended = images(comfyui, prompt)
    (first,) = images(comfyui, drawing(["e", 0]))
    assert np.abs(blended[0] - first).mean() < 3  # of a batch of three, so in other last bits
    assert np.abs(blended[2] - blended[0]).mean() > 5


def test_karlos_layout(comfyui):
    """A prior of diffusers, tiny, gives what the library gives, for unCLIP models; the starter does not draw it."""
    folder = comfyui.folder / "models" / "diffusers" / "tiny karlo"
    if not folder.exists():
        make_prior(folder)
    names = comfyui.get("/object_info/MMInterleavedLoadPrior")["MMInterleavedLoadPrior"]["input"]["required"]["model"]
    options = names[0] if isinstance(names[0], list) else names[1]["options"]
    assert {"starter", "diffusers/tiny karlo"} <= set(options)
    prompt = {
        "k": node("MMInterleavedLoadPrior", model="diffusers/tiny karlo"),
        "t": imagined("a fox.", 2, 1, 3, "k"),
        "o": node("ShowEmbedding", embedding=["t", 0]),
    }
    (text,) = comfyui.run(prompt)["outputs"]["o"]["text"]
    embeds, conditioning = map(np.array, json.loads(text))
    expected = load_prior_folder(folder).sample("a fox.", 2, 4.0, 3, seed=1).numpy()
    assert np.abs(embeds - expected).max() < 1e-3
    # Core's unCLIP adds its least noise to the embedding, and says how much.
    assert conditioning.shape == (1, 32) and np.abs(conditioning[0, :16] - expected[0]).max() < 0.2
    prompt = {**drawing(["t", 0]), "q": prompt["k"], "t": imagined("a fox.", 1, 1, 3, "q")}
    prompt["a"]["inputs"]["prior"] = ["q", 0]
    with pytest.raises(Failed, match="unCLIPConditioning"):
        comfyui.run(prompt)
    prompt["a"]["inputs"]["prior"] = ["p", 0]
    with pytest.raises(Failed, match="widths 16 and 256"):
        comfyui.run(prompt)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"t": {"text": "  "}}, "empty; write one"),
        ({"m": {"text": ""}}, "empty; write one"),
        ({"m": {"neutral": TEXT}}, "no difference"),
    ],
)
def test_bad_input(comfyui, change, sentence):
    prompt = {**drawing(["m", 0]), "t": imagined()}
    prompt["m"] = node(
        "MMInterleavedMoveEmbedding", prior=["p", 0], embedding=["t", 0], text=TEXT, neutral="A fox.", amount=0.4
    )
    for name, inputs in change.items():
        prompt[name]["inputs"].update(inputs)
    with pytest.raises(Failed, match=sentence):
        comfyui.run(prompt)
