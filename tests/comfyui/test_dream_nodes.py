"""DreamLLM's, VQ-VAE-2's and DALL-E's nodes in a real ComfyUI: texts with images in them, images as codes, drafts."""

import numpy as np
import pytest
import torch
from PIL import Image
from server import Failed
from test_behaviour import node

from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.presets import STARTER_DIR
from comfy_mminterleaved.stories.images import to_tensor
from comfy_mminterleaved.stories.story import ImageSegment, Story

TOLD = "Mia is a fox in a red coat with a hat. Mia waves by the lake with a kite."
TEXT = "{A} sits in the forest with a guitar."
SAMPLING = {"steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def pipeline():
    return MMInterleavedPipeline.load("starter", "cpu")


@pytest.fixture(scope="module")
def example():
    return ImageSegment(to_tensor(Image.open(STARTER_DIR.parents[1] / "example.png")))


def pixels(comfyui, prompt):
    saved = comfyui.run(prompt)["outputs"]["o"]["images"]
    paths = [comfyui.folder / "output" / each["subfolder"] / each["filename"] for each in saved]
    return [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in paths]


def in_context(text=TEXT, **images):
    return {
        "l": node("MMInterleavedLoad", model="starter"),
        "d": node("MMInterleavedLoadDream", model="starter"),
        "x": node("MMInterleavedExampleImage"),
        "c": node(
            "MMInterleavedDrawInContext",
            dream=["d", 0],
            encoder=["l", 0],
            llm=["l", 1],
            synchronizer=["l", 2],
            model=["l", 3],
            text=text,
            **(images or {"A": ["x", 0]}),
        ),
        "n": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "k": node("KSampler", model=["c", 0], positive=["c", 1], negative=["c", 2], latent_image=["n", 0], **SAMPLING),
        "v": node("VAEDecode", samples=["k", 0], vae=["l", 4]),
        "o": node("SaveImage", images=["v", 0], filename_prefix="dream/image"),
    }


def test_the_library_draws_the_same_in_context(comfyui, pipeline, example):
    (drawn,) = pixels(comfyui, in_context())
    config = ImageGenerationConfig(num_inference_steps=8, guidance_scale=3.0, scheduler="euler", seed=1)
    image = pipeline.draw_in_context(TEXT, {"A": example}, config)
    expected = np.asarray(image.pixels.movedim(0, -1) * 255)
    # ComfyUI's schedule of the same name ends a step earlier than diffusers', so edges differ.
    assert np.abs(drawn - expected).mean() < 12
    (other,) = pixels(comfyui, in_context("{A} in {B}.", A=["x", 0], B=["x", 0]))
    assert np.abs(drawn - other).mean() > 5


def test_a_panel_by_dream_queries(comfyui):
    """In the Perceiver's place, by hand and in Tell Story."""
    prompt = in_context()
    prompt["s"] = node("MMInterleavedStoryText", text=TOLD)
    prompt["c"] = node(
        "MMInterleavedSynchronize",
        llm=["l", 1],
        synchronizer=["l", 2],
        model=["l", 3],
        story=["s", 0],
        strength=1.0,
        start=0.0,
        end=1.0,
        pictures=-1,
        dream=["d", 0],
    )
    (dreamt,) = pixels(comfyui, prompt)
    del prompt["c"]["inputs"]["dream"]
    (plain,) = pixels(comfyui, prompt)
    assert 0 < np.abs(dreamt - plain).mean() < 90


@pytest.mark.parametrize(
    "text, images, sentence",
    [
        ("A fox waves.", {"A": ["x", 0]}, "names no image"),
        ("{A} in {B}.", {"A": ["x", 0]}, "no image B"),
        ("{A} waves.", {"A": ["x", 0], "C": ["x", 0]}, "does not name image C"),
        ("{A} waves.", {"A": ["b", 0]}, "batch of 2"),
    ],
)
def test_texts_that_do_not_fit_their_images(comfyui, text, images, sentence):
    prompt = in_context(text, **images)
    prompt["b"] = node("RepeatImageBatch", image=["x", 0], amount=2)
    with pytest.raises(Failed, match=sentence):
        comfyui.run(prompt)


# ---- image tokens ----


def encoded(side=128):
    return {
        "l": node("MMInterleavedLoad", model="starter"),
        "t": node("MMInterleavedLoadImageTokens", model="starter"),
        "x": node("MMInterleavedExampleImage"),
        "z": node("ImageScale", image=["x", 0], upscale_method="area", width=side, height=128, crop="disabled"),
        "e": node("VAEEncode", pixels=["z", 0], vae=["l", 4]),
        "c": node("MMInterleavedImageTokens", image_tokens=["t", 0], latent=["e", 0]),
        "v": node("VAEDecode", samples=["c", 1], vae=["l", 4]),
        "o": node("SaveImage", images=["v", 0], filename_prefix="dream/codes"),
    }


def test_what_codes_keep(comfyui, pipeline, example):
    (kept,) = pixels(comfyui, encoded())
    small = torch.nn.functional.interpolate(example.pixels[None], (128, 128), mode="area")
    expected = pipeline.decode_codes(pipeline.image_codes(ImageSegment(small[0])))[0].movedim(0, -1) * 255
    assert np.abs(kept - expected.numpy()).mean() < 3
    assert np.abs(kept - small[0].movedim(0, -1).numpy() * 255).mean() < 20
    (wide,) = pixels(comfyui, encoded(160))
    assert wide.shape == (128, 160, 3)


def test_latents_of_another_vae(comfyui):
    prompt = encoded()
    del prompt["x"], prompt["z"]
    prompt["e"] = node("EmptyLatentImage", width=128, height=128, batch_size=1)
    with pytest.raises(Failed, match="16 channels"):
        comfyui.run(prompt)


# ---- drafts ----


def drafting(count=2, **inputs):
    return {
        "l": node("MMInterleavedLoad", model="starter"),
        "t": node("MMInterleavedLoadImageTokens", model="starter"),
        "s": node("MMInterleavedStoryText", text=TOLD),
        "a": node(
            "MMInterleavedSynchronize",
            llm=["l", 1],
            synchronizer=["l", 2],
            model=["l", 3],
            story=["s", 0],
            strength=1.0,
            start=0.0,
            end=1.0,
            pictures=-1,
        ),
        "d": node(
            "MMInterleavedDraftImages",
            **{
                "image_tokens": ["t", 0],
                "positive": ["a", 1],
                "story": ["s", 0],
                "count": count,
                "temperature": 1.0,
                "top_k": 1,
                "guidance": 2.0,
                "seed": 4,
                **inputs,
            },
        ),
        "v": node("VAEDecode", samples=["d", 0], vae=["l", 4]),
        "o": node("SaveImage", images=["v", 0], filename_prefix="dream/draft"),
    }


def test_the_library_drafts_the_same(comfyui, pipeline, example):
    """With the likeliest code at each place, so that last bits do not decide; with an image before, and without."""
    drawn = pixels(comfyui, drafting())
    assert len(drawn) == 2 and np.abs(drawn[0] - drawn[1]).max() == 0
    small = torch.nn.functional.interpolate(example.pixels[None], (128, 128), mode="area")[0]
    later = drafting(1)
    later |= {
        "x": node("MMInterleavedExampleImage"),
        "z": node("ImageScale", image=["x", 0], upscale_method="area", width=128, height=128, crop="disabled"),
        "p": node("MMInterleavedStoryPicture", story=["s", 0], image=["z", 0], encoder=["l", 0]),
        "q": node("MMInterleavedStoryText", story=["p", 0], text="Mia sits in the forest with a guitar."),
    }
    later["a"]["inputs"]["story"] = later["d"]["inputs"]["story"] = ["q", 0]
    story = Story.of(TOLD, ImageSegment(small), "Mia sits in the forest with a guitar.")
    for prompt, told in ((drafting(1), Story.of(TOLD)), (later, story)):
        (image,) = pipeline.draft_images(told, 1, top_k=1, guidance_scale=2.0)
        expected = np.asarray(image.pixels.movedim(0, -1) * 255)
        assert np.abs(pixels(comfyui, prompt)[0] - expected).mean() < 3
    (seen,) = pixels(comfyui, later)
    del later["d"]["inputs"]["story"]
    assert np.abs(pixels(comfyui, later)[0] - seen).mean() > 3  # the story's images are attended to


def test_drafts_go_on_from_an_image(comfyui):
    prompt = {**encoded(), **drafting(1, tokens=["c", 0], rows=4)}
    (begun,) = pixels(comfyui, prompt)
    prompt["v"]["inputs"]["samples"] = ["c", 1]
    (whole,) = pixels(comfyui, prompt)
    top, bottom = (np.abs(begun[part] - whole[part]).mean() for part in (slice(0, 40), slice(80, 128)))
    assert top < 6 and bottom > top
    prompt = {**encoded(), **drafting(1, tokens=["c", 0], rows=8)}
    with pytest.raises(Failed, match="rows must be from 1 to 7"):
        comfyui.run(prompt)
    prompt["z"]["inputs"]["width"] = 160
    with pytest.raises(Failed, match="10 x 8 codes"):
        comfyui.run(prompt)
    prompt["z"]["inputs"]["width"] = 128
    prompt["b"] = node("RepeatLatentBatch", samples=["e", 0], amount=2)
    prompt["c"]["inputs"]["latent"] = ["b", 0]
    with pytest.raises(Failed, match="those of 2 images"):
        comfyui.run(prompt)


def test_a_conditioning_of_another_model(comfyui):
    prompt = drafting(1, positive=["w", 0])
    prompt["w"] = node("ConditioningConcat", conditioning_to=["a", 1], conditioning_from=["a", 1])
    with pytest.raises(Failed, match=r"has the shape \(1, 32, 192\)"):
        comfyui.run(prompt)
    prompt["w"] = node("ConditioningCombine", conditioning_1=["a", 1], conditioning_2=["a", 1])
    with pytest.raises(Failed, match="has 2 entries"):
        comfyui.run(prompt)
