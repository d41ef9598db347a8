"""Sounds in the space of images and texts: the forty that are synthesised, the audio encoder, CLAP by phrases."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_clap import make_clap

from comfy_mminterleaved.errors import CheckpointError, SettingError
from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.embedders import FeatureEmbedder, system_metadata
from comfy_mminterleaved.generation.prior import ImagePrior, make_prior_scheduler, of_embedder
from comfy_mminterleaved.generation.sound import (
    PHRASES,
    ClapSounds,
    SoundEmbedder,
    is_clap_folder,
    load_sound,
    resample,
)
from comfy_mminterleaved.models.audio_encoder import AudioEncoder, AudioEncoderConfig, log_mel
from comfy_mminterleaved.models.contrastive import ContrastiveConfig, ContrastiveModel
from comfy_mminterleaved.models.prior import DiffusionPrior, PriorConfig
from starter_training import sounds
from starter_training.sound_training import SoundBatches, SoundObjective, class_means, phrase, shows
from starter_training.world import Hero, Scene

WIDTH = 32
SMALL = AudioEncoderConfig(WIDTH, channels=4)


@pytest.fixture
def embedder(tiny_random):
    torch.manual_seed(0)
    vocab_size = tiny_random.config.llm.vocab_size
    config = ContrastiveConfig(WIDTH, hidden_size=16, num_hidden_layers=1, vocab_size=vocab_size)
    return FeatureEmbedder(ContrastiveModel(config).eval(), tiny_random.tokenizer, lambda images: images)


@pytest.fixture
def system(embedder):
    torch.manual_seed(0)
    model = AudioEncoder(SMALL).eval().requires_grad_(False)
    model.neutral.copy_(torch.randn(WIDTH) * 0.01)
    return SoundEmbedder(model, embedder, ["It rains.", "A bear."])


def tone(hertz: float, seconds: float, rate: int) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate)[None]


# ---- what is heard ----


@pytest.mark.parametrize("kind, name", sounds.NAMES, ids=" ".join)
def test_every_sound_can_be_made(kind, name):
    versions = [sounds.make_sound(kind, name, seed, held_out) for seed, held_out in ((0, False), (1, False), (0, True))]
    for x in versions:
        assert x.shape == (sounds.SAMPLES,) and x.dtype == np.float32
        assert np.isfinite(x).all() and 0.79 < np.abs(x).max() < 0.81
    assert all(np.abs(a - versions[0]).max() > 0.1 for a in versions[1:])
    assert (sounds.make_sound(kind, name, 0, False) == versions[0]).all()


def test_training_does_not_hear_the_middle_of_a_range():
    def positions(held_out):
        knobs = sounds.Knobs(0, held_out)
        return [math.log(knobs(1, math.e)) for _ in range(300)]

    assert all(0.4 <= x <= 0.6 for x in positions(True))
    rest = positions(False)
    assert not any(0.4 < x < 0.6 for x in rest) and min(rest) < 0.05 and max(rest) > 0.95


def test_resampling_keeps_tones():
    for rate in (8_000, 44_100, 48_000):
        x = resample(tone(1000, 1, rate)[0], rate, 16_000)
        assert len(x) == 16_000
        assert (x - tone(1000, 1, 16_000)[0]).abs().max() < 1e-2
    assert resample(tone(9000, 1, 48_000)[0], 48_000, 16_000).abs().max() < 1e-2  # above half of the lower rate


def test_spectrograms():
    low, high = log_mel(torch.cat([tone(300, 2, 16_000), tone(3000, 2, 16_000)]), SMALL)
    assert low.shape == (64, 129)
    peaks = [int(each.mean(1).argmax()) for each in (low, high)]
    assert peaks[0] < 20 < 35 < peaks[1]
    assert torch.allclose(log_mel(0.01 * tone(300, 2, 16_000), SMALL)[0], low, atol=1e-3)  # loudness does not count


def test_embeddings(system):
    x = torch.from_numpy(sounds.make_sound("sky", "rain", 0))[None]
    embed = system.embed(x, 16_000)
    assert embed.shape == (WIDTH,) and embed.norm().item() == pytest.approx(1, abs=1e-5)
    stereo = torch.cat([x, x])
    assert torch.allclose(system.embed(stereo, 16_000), embed, atol=1e-5)
    other = system.embed(torch.from_numpy(sounds.make_sound("prop", "drum", 0))[None], 16_000)
    assert (other - embed).abs().max() > 1e-4
    assert torch.allclose(system.direction(x, 16_000), embed - system.model.neutral, atol=1e-6)
    with_silence = torch.cat([torch.zeros(1, 64_000), x], dim=1)  # windows in which nothing is heard do not count
    assert system.embed(with_silence, 16_000) @ embed > 0.9
    assert system.embed(x[:, :800], 16_000).isfinite().all()
    late = torch.cat([torch.zeros(1, 32_000), x[:, :15_000]], dim=1)  # all of it is in what a whole window leaves over
    assert system.embed(late, 16_000).isfinite().all()


def test_phrases(system):
    x = torch.from_numpy(sounds.make_sound("species", "cow", 0))[None]
    heard = system.hear(x, 16_000)
    assert {text for text, _ in heard} == {"It rains.", "A bear."} and heard[0][1] >= heard[1][1]
    assert [text for text, _ in system.hear(x, 16_000, ["", " It snows. "])] == ["It snows."]


@pytest.mark.parametrize(
    "waveform, rate, sentence",
    [
        (torch.zeros(1, 16_000), 16_000, "silent"),
        (torch.zeros(1, 0), 16_000, "silent"),
        (torch.zeros(0, 100), 16_000, "silent"),
        (torch.stack([torch.ones(100), -torch.ones(100)]), 16_000, "silent"),  # its channels cancel out
        (torch.full((1, 100), math.nan), 16_000, "not numbers"),
        (torch.ones(1, 100), 0, "at least 1000 Hz, not 0"),
        (torch.ones(1, 601_000), 1000, "lasts 601 s"),
    ],
)
def test_what_cannot_be_heard(system, waveform, rate, sentence):
    with pytest.raises(SettingError, match=sentence):
        system.embed(waveform, rate)
    with pytest.raises(SettingError, match="no phrases"):
        SoundEmbedder(system.model, system.embedder).hear(torch.ones(1, 100), 16_000)


def test_files(tmp_path, system, embedder):
    path = tmp_path / "sound.safetensors"
    config = {**SMALL.to_dict(), PHRASES: ["It rains."]}
    tensors = {name: tensor.contiguous() for name, tensor in system.model.state_dict().items()}
    save_file(tensors, path, system_metadata(config, "sound"))
    loaded, x = load_sound(path, embedder), tone(500, 1, 16_000)
    assert loaded.phrases == ("It rains.",)
    assert torch.allclose(loaded.embed(x, 16_000), system.embed(x, 16_000), atol=1e-5)
    save_file({k: v for k, v in tensors.items() if k != "neutral"}, path, system_metadata(config, "sound"))
    with pytest.raises(CheckpointError, match="neutral"):
        load_sound(path, embedder)
    save_file(tensors, path, system_metadata({**config, "channels": "many"}, "sound"))
    with pytest.raises(CheckpointError, match="sound.safetensors"):
        load_sound(path, embedder)


# ---- CLAP ----


def test_clap_by_phrases(tmp_path, embedder):
    folder = make_clap(tmp_path / "clap")
    assert is_clap_folder(folder) and not is_clap_folder(tmp_path)
    phrases = ["a red kite", "mia waves", "fox"]
    system, x = ClapSounds.load(folder, embedder, phrases), tone(700, 1, 24_000)
    heard = dict(system.hear(x, 24_000))
    assert set(heard) == set(phrases)
    embed, texts = system.embed(x, 24_000), embedder.text_embeds(phrases)
    weights = (torch.tensor([heard[each] for each in phrases]) / 0.05).softmax(0)
    assert torch.allclose(embed, torch.nn.functional.normalize(weights @ texts, dim=-1), atol=1e-5)
    assert torch.allclose(system.direction(x, 24_000), embed - texts.mean(0), atol=1e-5)
    long = torch.cat([x, tone(2000, 2.3, 24_000)], dim=1)  # longer than CLAP takes at once
    assert system.hear(long, 24_000) == system.hear(long, 24_000) != system.hear(x, 24_000)
    with pytest.raises(SettingError, match="no phrases"):
        ClapSounds.load(folder, embedder, [" "])
    with pytest.raises(SettingError, match="one phrase, 'fox'"):
        ClapSounds.load(folder, embedder, ["fox"]).direction(x, 24_000)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot be read as a CLAP"):
        ClapSounds.load(folder, embedder, phrases)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds no CLAP"):
        ClapSounds.load(folder, embedder, phrases)
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert not is_clap_folder(folder)


# ---- over images ----


def test_a_sound_over_an_image(tiny_random, embedder, system, pictures, monkeypatch):
    perceiver = tiny_random.config.synchronizer.perceiver
    torch.manual_seed(1)
    model = DiffusionPrior(PriorConfig(WIDTH, 10, 2, 8, 1, perceiver.num_queries, perceiver.hidden_size, 16)).eval()
    for parameter in model.conditioner.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    prior = ImagePrior(model.prior, make_prior_scheduler(), of_embedder(embedder, 10)), model.conditioner
    monkeypatch.setitem(vars(tiny_random.systems), "_prior", prior)
    monkeypatch.setitem(vars(tiny_random.systems), "sounds", system)
    monkeypatch.setitem(vars(tiny_random.systems), "embedder", embedder)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(1, WIDTH, generator=generator), dim=-1)
    monkeypatch.setattr(embedder, "image_embeds", lambda images: embeds)
    config = ImageGenerationConfig(num_inference_steps=1, guidance_scale=1.0)
    x = torch.from_numpy(sounds.make_sound("sky", "rain", 0))[None]
    drawn = {amount: tiny_random.draw_sound_over(pictures[0], x, 16_000, config, amount) for amount in (0, 0.9)}
    assert (drawn[0].pixels - drawn[0.9].pixels).abs().max() > 1e-3
    with pytest.raises(SettingError, match="silent"):
        tiny_random.draw_sound_over(pictures[0], 0 * x, 16_000, config)


def test_a_model_that_cannot_hear(tiny_random):
    with pytest.raises(CheckpointError, match="cannot hear"):
        _ = tiny_random.systems.sounds


# ---- training ----


def test_the_objective_learns_what_is_heard():
    torch.manual_seed(0)
    count = len(sounds.NAMES)
    phrases = torch.nn.functional.normalize(torch.randn(count, WIDTH), dim=-1)
    objective, batches = SoundObjective(AudioEncoder(SMALL), phrases, phrases), SoundBatches(False, 1)
    optimizer = torch.optim.AdamW(objective.model.parameters(), 3e-3)
    losses = []
    for step in range(12):
        loss = objective.train()(batches.build(step))
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        losses.append(float(loss["phrases"].detach()))
    assert losses[-1] < losses[0] - 0.5 and objective.model.neutral.abs().max() > 0


def test_images_that_show_what_is_heard():
    scene = Scene((Hero("bear", "red", "hat"), Hero("cat", "blue", "bow")), "wave", "beach", "drum", "rain")
    heard = {(kind, name) for kind, name in sounds.NAMES if shows(scene, kind, name)}
    assert heard == {("species", "bear"), ("species", "cat"), ("place", "beach"), ("prop", "drum"), ("sky", "rain")}
    assert len({phrase(*name) for name in sounds.NAMES}) == 40
    embeds = torch.eye(2)
    means = class_means([scene, Scene(scene.heroes[:1], "wave", "lake", "kite")], embeds)
    rows = {name: means[i].tolist() for i, name in enumerate(sounds.NAMES)}
    assert rows["species", "bear"] == [0.5, 0.5] and rows["species", "cat"] == [1, 0] and rows["sky", "day"] == [0, 1]
