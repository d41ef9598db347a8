"""Sounds in a real ComfyUI: what is heard, panels drawn again as they would sound, CLAP."""

import json
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from server import Failed
from test_behaviour import node

from comfy_mminterleaved.generation.sound import resample
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from starter_training import sounds
from starter_training.sound_training import phrase

sys.path.append(str(Path(__file__).parents[1]))
from tiny_clap import make_clap

EXAMPLES = Path(__file__).parents[2] / "nodes" / "sounds"
DRAWING = {"seed": 1, "steps": 8, "cfg": 3.0, "denoise": 1.0, "sampler_name": "euler", "scheduler": "normal"}


def write(comfyui, name, samples, rate):
    with wave.open(str(comfyui.folder / "input" / name), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())


def sound(name="rain"):
    return node("MMInterleavedExampleSound", sound=name)


def described(source, phrases=""):
    return {
        "m": node("MMInterleavedLoadSound", model="starter"),
        "a": source,
        "o": node("MMInterleavedDescribeSound", sound_model=["m", 0], audio=["a", 0], phrases=phrases),
        "t": node("PreviewAny", source=["o", 0]),
    }


def text(comfyui, prompt):
    return comfyui.run(prompt)["outputs"]["t"]["text"][0]


def over(source, amount=0.35, **inputs):
    return {
        "l": node("MMInterleavedLoad", model="starter"),
        "p": node("MMInterleavedLoadPrior", model="starter"),
        "m": node("MMInterleavedLoadSound", model="starter"),
        "c": node("MMInterleavedLoadContrastive", model="starter", encoder=["l", 0]),
        "x": node("MMInterleavedExampleImage"),
        "a": source,
        "d": node(
            "MMInterleavedSoundOverPanel",
            image=["x", 0],
            audio=["a", 0],
            sound_model=["m", 0],
            contrastive=["c", 0],
            prior=["p", 0],
            encoder=["l", 0],
            synchronizer=["l", 2],
            model=["l", 3],
            vae=["l", 4],
            amount=amount,
            **{**DRAWING, **inputs},
        ),
        "o": node("SaveImage", images=["d", 0], filename_prefix="sound/image"),
        "k": node("MaskToImage", mask=["d", 1]),
        "q": node("SaveImage", images=["k", 0], filename_prefix="sound/mask"),
    }


def saved(comfyui, prompt):
    outputs = comfyui.run(prompt)["outputs"]
    for name in ("o", "q"):
        (image,) = outputs[name]["images"]
        path = comfyui.folder / "output" / image["subfolder"] / image["filename"]
        yield np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_examples_are_heard(comfyui):
    assert text(comfyui, described(sound("rain"))) == "It rains."
    assert text(comfyui, described(sound("night"))) == "It is night."
    assert text(comfyui, described(sound("night"), "It snows.\n\nA bear.\nIt is night.")) == "It is night."


def test_files_of_any_rate(comfyui):
    """As core loads them: other rates, and what the package's library hears is the same."""
    pipeline = MMInterleavedPipeline.load("starter", "cpu")
    for kind, name, rate in (("species", "cow", 44_100), ("prop", "drum", 8_000), ("place", "beach", 22_050)):
        x = torch.from_numpy(sounds.make_sound(kind, name, 5, True))
        x = resample(x, sounds.RATE, rate).clamp(-1, 1)
        write(comfyui, f"{name}.wav", x, rate)
        heard = text(comfyui, described(node("LoadAudio", audio=f"{name}.wav")))
        assert heard == pipeline.systems.sounds.hear(x[None], rate)[0][0]
        assert heard == phrase(kind, name)


def test_a_sound_over_a_panel(comfyui):
    night, changed = saved(comfyui, over(sound("night")))
    still, unchanged = saved(comfyui, over(sound("night"), 0.0))
    assert night.shape == (128, 128, 3) and night[:30].mean() < still[:30].mean() - 20  # the sky is dark
    assert (changed > 127).mean() > 0.1 and (changed > 127).mean() > (unchanged > 127).mean()


def test_denoise_keeps_the_picture(comfyui):
    source, _ = saved(comfyui, over(sound("rain"), 0.0, denoise=0.01, steps=100))
    for denoise, low, high in ((0.25, 0, 12), (1.0, 12, 255)):
        drawn, _ = saved(comfyui, over(sound("night"), 0.35, denoise=denoise))
        assert low <= np.abs(drawn - source).mean() < high


def test_silence_is_an_error_before_anything_is_drawn(comfyui):
    write(comfyui, "silence.wav", np.zeros(16_000), 16_000)
    source = node("LoadAudio", audio="silence.wav")
    with pytest.raises(Failed, match="silent"):
        comfyui.run(over(source))
    with pytest.raises(Failed, match="silent"):
        comfyui.run(described(source))


def test_a_sounds_own_embedding(comfyui):
    prompt = {
        "m": node("MMInterleavedLoadSound", model="starter"),
        "a": sound("rain"),
        "e": node("MMInterleavedSoundToEmbedding", sound_model=["m", 0], audio=["a", 0], amount=0.3),
        "o": node("ShowEmbedding", embedding=["e", 0]),
    }
    (shown,) = comfyui.run(prompt)["outputs"]["o"]["text"]
    with wave.open(str(EXAMPLES / "rain.wav"), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    expected = MMInterleavedPipeline.load("starter", "cpu").systems.sounds.embed(
        torch.from_numpy(samples)[None], 16_000
    )
    assert np.abs(np.array(json.loads(shown)[0][0]) - expected.numpy()).max() < 1e-3


def test_clap(comfyui):
    """A tiny CLAP with the starter's contrastive model as the reader of its phrases."""
    folder = comfyui.folder / "models" / "audio_encoders" / "tiny clap"
    if not folder.exists():
        make_clap(folder)
    prompt = described(sound())
    prompt["m"] = node("MMInterleavedLoadSound", model="audio_encoders/tiny clap", phrases="It rains.\nIt is night.")
    with pytest.raises(Failed, match="connect a contrastive model"):
        comfyui.run(prompt)
    prompt["c"] = node("MMInterleavedLoadContrastive", model="starter")
    prompt["m"]["inputs"]["contrastive"] = ["c", 0]
    assert text(comfyui, prompt) in ("It rains.", "It is night.")
    drawn = over(sound())
    drawn["m"] = prompt["m"]
    assert [image.shape for image in saved(comfyui, drawn)] == [(128, 128, 3)] * 2
