"""The stage `sound`: what is heard, in the space of images and texts."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.models.audio_encoder import AudioEncoder, log_mel

from . import sounds, world

POOL = 150  # of each sound, made once for training
SNR = 5.0, 30.0  # of the hiss, in dB
MIX_PROB, MIX = 0.3, (0.05, 0.3)  # of sounds with another one quietly behind them
LOGIT_SCALE = 30.0


def phrase(kind: str, name: str) -> str:
    """What says that a sound is heard, in the words of the world."""
    if kind == "sky":
        return world.SKIES[name] or "It is day."
    if kind == "place":
        return world.PLACES[name].capitalize() + "."
    return f"A {name}." if kind == "species" else world.PROPS[name].capitalize() + "."


def shows(scene: world.Scene, kind: str, name: str) -> bool:
    """Whether an image shows what makes a sound."""
    if kind == "species":
        return any(hero.species == name for hero in scene.heroes)
    return getattr(scene, kind) == name


def class_means(scenes: list[world.Scene], embeds: torch.Tensor) -> torch.Tensor:
    """The mean embedding of the images that show what makes each sound, `(sounds, D)`."""
    rows = []
    for kind, name in sounds.NAMES:
        mask = torch.tensor([shows(scene, kind, name) for scene in scenes])
        rows.append(embeds[mask].mean(0) if mask.any() else embeds.mean(0))
    return torch.stack(rows)


class SoundObjective(nn.Module):
    """Cross-entropy of sounds among phrases, both ways; and from all sounds to one as from all images to such ones.

    Args:
        phrases, means: `(sounds, D)`, embeddings of the phrases, and of the images that show what is heard.
    """

    def __init__(self, model: AudioEncoder, phrases: torch.Tensor, means: torch.Tensor):
        super().__init__()
        self.model = model
        self.phrases, self.directions = phrases, F.normalize(means - means.mean(0), dim=-1)

    def forward(self, waveforms: torch.Tensor) -> dict[str, torch.Tensor]:
        """Windows `(sounds, samples)`, each sound once, in the order of `sounds.NAMES`."""
        embeds = self.model(log_mel(waveforms, self.model.config)).float()
        target = torch.arange(len(embeds), device=embeds.device)
        logits = LOGIT_SCALE * embeds @ self.phrases.to(embeds).T
        mean = embeds.mean(0)
        if self.training:
            self.model.neutral.lerp_(mean.detach(), 0.02)
        direction = 1 - F.cosine_similarity(embeds - mean, self.directions.to(embeds)).mean()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = (logits.argmax(1) == target).float().mean()
        return {"loss": loss + 2 * direction, "phrases": loss, "direction": direction, "right": right}


class SoundBatches:
    """Every sound once, from a pool that is made by seed, with hiss, now and then another sound, and cut anew."""

    def __init__(self, held_out: bool, count: int = POOL):
        self.pool = [
            [sounds.make_sound(kind, name, seed, held_out) for seed in range(count)] for kind, name in sounds.NAMES
        ]

    def build(self, seed: int) -> torch.Tensor:
        rng, noise = random.Random(f"sounds {seed}"), np.random.default_rng(seed)
        rows = []
        for versions in self.pool:
            x = np.roll(rng.choice(versions), rng.randrange(sounds.SAMPLES))
            if rng.random() < MIX_PROB:
                x = x + rng.uniform(*MIX) * rng.choice(rng.choice(self.pool))
            level = np.sqrt((x**2).mean()) * 10 ** (-rng.uniform(*SNR) / 20)
            rows.append(x + level * noise.standard_normal(len(x)))
        return torch.from_numpy(np.stack(rows)).float()
