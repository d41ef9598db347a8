"""Sounds in the space of images and texts: what is heard, and images that are moved towards it (2112.00007)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from ..checkpoints.tensors import read_json
from ..errors import CheckpointError, SettingError
from ..models.audio_encoder import AudioEncoder, AudioEncoderConfig, log_mel
from .embedders import Embedder, cosines, pooled, read_system

MAX_SECONDS = 600
QUIET = 0.02  # of the loudest sample: windows below that are not heard
TEMPERATURE = 0.05  # of the weights of phrases
SOUND_STRENGTH = 0.3
PHRASES = "phrases"  # in the config of a sound system's file


class Sounds(Protocol):
    """What embeds sounds in the space of an image embedder."""

    phrases: tuple[str, ...]

    def embed(self, waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor: ...  # (D,)

    def direction(self, waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor: ...  # (D,)

    def hear(self, waveform: torch.Tensor, sampling_rate: int, phrases: Sequence[str]) -> list[tuple[str, float]]: ...


class SoundEmbedder:
    """`Sounds` of a model's own audio encoder.

    Args:
        embedder: Of the same model; it reads phrases.
        phrases: That the encoder was trained to tell apart.
    """

    def __init__(self, model: AudioEncoder, embedder: Embedder, phrases: Sequence[str] = ()):
        self.model, self.embedder, self.phrases = model, embedder, tuple(phrases)

    @property
    def device(self) -> torch.device:
        return self.model.proj.weight.device

    @torch.no_grad()
    def embed(self, waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        """`(D,)` of unit length: the mean over windows of two seconds, half of which overlap.

        Args:
            waveform: `(channels, samples)`, any rate.

        Raises:
            SettingError: For silence, for what is not a number, and for more than ten minutes.
        """
        c = self.model.config
        x = resample(to_mono(waveform, sampling_rate), sampling_rate, c.sampling_rate).to(self.device)
        hop = c.window_length // 2
        x = F.pad(x, (0, max(c.window_length - len(x), -(len(x) - c.window_length) % hop)))
        windows = x.unfold(0, c.window_length, hop)
        loud = windows.abs().amax(1) > QUIET * x.abs().max()
        return F.normalize(self.model(log_mel(windows[loud], c)).mean(0), dim=-1)

    def direction(self, waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        """`(D,)`, from the mean of all sounds to this one: where an image goes that is moved towards it."""
        embed = self.embed(waveform, sampling_rate)
        return embed - self.model.neutral.to(embed)

    def hear(self, waveform: torch.Tensor, sampling_rate: int, phrases: Sequence[str] = ()) -> list[tuple[str, float]]:
        """Phrases by how well they say what is heard, the best first, with their cosine.

        Args:
            phrases: Nothing for those that the model was trained on.
        """
        phrases = check_phrases(phrases or self.phrases)
        embed = self.embed(waveform, sampling_rate)[None].cpu()
        scores = cosines(embed, self.embedder.text_embeds(phrases).cpu())[0].tolist()
        return sorted(zip(phrases, scores), key=lambda each: -each[1])


class ClapSounds:
    """`Sounds` of a CLAP of transformers (2211.06687), whose space is another one: phrases are the bridge.

    A sound's embedding is the mean of the phrases' in the embedder's space, weighted by how well CLAP fits them to it.

    Args:
        model, processor: transformers'.
        embedder: Reads the phrases in the space of images.
        phrases: Say what there is to hear.
    """

    def __init__(self, model, processor, embedder: Embedder, phrases: Sequence[str]):
        self.model, self.processor, self.embedder = model, processor, embedder
        self.phrases = tuple(check_phrases(phrases))

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder, phrases: Sequence[str], device="cpu") -> ClapSounds:
        """Reads a folder, never the network; raises CheckpointError."""
        from transformers import ClapModel, ClapProcessor

        folder = Path(folder)
        if not is_clap_folder(folder):
            raise CheckpointError(f"The folder {str(folder)!r} holds no CLAP of transformers.")
        try:
            options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
            model = ClapModel.from_pretrained(folder, **options)
            processor = ClapProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises errors of any type
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
            raise CheckpointError(f"The folder {str(folder)!r} cannot be read as a CLAP: {reason}.") from None
        return cls(model.eval().requires_grad_(False).to(device), processor, embedder, phrases)

    @torch.no_grad()
    def hear(self, waveform: torch.Tensor, sampling_rate: int, phrases: Sequence[str] = ()) -> list[tuple[str, float]]:
        """As `SoundEmbedder.hear`, in CLAP's space."""
        phrases = check_phrases(phrases or self.phrases)
        extractor, device = self.processor.feature_extractor, self.model.device
        rate = extractor.sampling_rate
        mono = resample(to_mono(waveform, sampling_rate).cpu(), sampling_rate, rate)
        # Of what is longer than it takes at once, the extractor would take a part by chance.
        parts = [part.numpy() for part in mono.split(extractor.nb_max_samples)]
        heard = extractor(parts, sampling_rate=rate, return_tensors="pt").to(device)
        read = self.processor.tokenizer(phrases, padding=True, truncation=True, return_tensors="pt").to(device)
        names = ("input_ids", "attention_mask")
        sound = F.normalize(pooled(self.model.get_audio_features(**heard)), dim=-1).mean(0, keepdim=True)
        texts = pooled(self.model.get_text_features(**{name: read[name] for name in names}))
        scores = cosines(F.normalize(sound, dim=-1), F.normalize(texts, dim=-1))[0].tolist()
        return sorted(zip(phrases, scores), key=lambda each: -each[1])

    def embed(self, waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        """`(D,)` of unit length, by the phrases."""
        scores = dict(self.hear(waveform, sampling_rate))
        weights = (torch.tensor([scores[phrase] for phrase in self.phrases]) / TEMPERATURE).softmax(0)
        return F.normalize(weights @ self.embedder.text_embeds(self.phrases).float().cpu(), dim=-1)

    def direction(self, waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        """`(D,)`, from the mean of all phrases to what is heard; raises SettingError for fewer than two phrases."""
        if len(self.phrases) < 2:
            raise SettingError(f"There is one phrase, {self.phrases[0]!r}; give several, so that a sound can differ.")
        texts = self.embedder.text_embeds(self.phrases).float().cpu()
        return self.embed(waveform, sampling_rate) - texts.mean(0)


def is_clap_folder(folder: Path) -> bool:
    """Whether a folder is a CLAP as transformers saves it."""
    try:
        return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "clap"
    except CheckpointError:  # lists of models name what can be read, and leave the rest out
        return False


def check_phrases(phrases: Sequence[str]) -> list[str]:
    """The phrases that say something; raises SettingError for none."""
    phrases = [phrase.strip() for phrase in phrases if phrase.strip()]
    if not phrases:
        raise SettingError("There are no phrases to say what is heard; give at least one.")
    return phrases


def to_mono(waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """The mean of the channels `(samples,)`; raises SettingError for a sound that cannot be embedded."""
    if sampling_rate < 1000:
        raise SettingError(f"The sampling rate must be at least 1000 Hz, not {sampling_rate}.")
    if waveform.shape[-1] > MAX_SECONDS * sampling_rate:
        raise SettingError(
            f"The sound lasts {waveform.shape[-1] / sampling_rate:.0f} s; {MAX_SECONDS} s are the most, so trim it."
        )
    if not waveform.isfinite().all():
        raise SettingError("The sound has samples that are not numbers.")
    mono = waveform.float().mean(0) if waveform.numel() else waveform.new_zeros(1)
    if mono.abs().max() < 1e-5:
        raise SettingError("The sound is silent; give one that can be heard.")
    return mono


def resample(x: torch.Tensor, rate: int, target: int) -> torch.Tensor:
    """A signal `(samples,)` at another rate, by its spectrum: nothing above half of the lower rate is left."""
    if rate == target:
        return x
    count = max(1, round(len(x) * target / rate))
    spectrum = torch.fft.rfft(x)
    spectrum = F.pad(spectrum[: count // 2 + 1], (0, max(0, count // 2 + 1 - len(spectrum))))
    return torch.fft.irfft(spectrum, count) * (count / len(x))


def load_sound(path: Path, embedder: Embedder, device="cpu") -> SoundEmbedder:
    """The audio encoder of a system's file, in float32; raises CheckpointError."""
    model, phrases = build_sound(*read_system(path, "sound"), repr(path.name), device=device)
    return SoundEmbedder(model, embedder, phrases)


def build_sound(tensors: dict, about: dict, label: str, operations=None, device="cpu"):
    """AudioEncoder with these weights, and the phrases it was trained on; raises CheckpointError.

    Args:
        about: From `embedders.parse_system_metadata`.
        operations: Layers of the host, None for `torch.nn`.
    """
    from torch import nn

    from ..models.build import check_shapes, param_shapes

    config = dict(about["config"])
    phrases = config.pop(PHRASES, [])
    c = AudioEncoderConfig.from_dict(config, label)
    try:
        model = AudioEncoder(c, operations or nn)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{label} has settings that no audio encoder can have.") from None
    check_shapes(param_shapes(model), {name: tuple(t.shape) for name, t in tensors.items()}, label)
    model.load_state_dict({name: t.to(device, torch.float32) for name, t in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False), phrases
