"""How a model generates when it is told nothing else: generation_config.json, beside its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, SettingError
from .image import Drawing
from .text import Sampling

FILE = "generation_config.json"
KEYS = {"text_generation", "image_generation", "image_first", "introduction"}
# Field -> its name in files, which is transformers' or diffusers' where they have one.
TEXT_NAMES = {
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "only_text": "suppress_special_tokens",
}
IMAGE_NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "scheduler": "scheduler",
    "size": "size",
    "look_back": "num_context_images",
    "strength": "mmfs_scale",
    "start": "mmfs_start",
    "end": "mmfs_end",
    "denoise": "denoise",
}


@dataclass(frozen=True)
class Introduction:
    """How this model's stories introduce a character, as prompts that the model completes behind a picture of it.

    Args:
        prompt: The start of the sentence that tells how `{name}` looks.
        scene_prompts: Starts of the sentence that tells what the picture shows; the likeliest is completed.
        names: Names that the model knows; the first is used where the story has none.
    """

    prompt: str
    scene_prompts: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class GenerationConfig:
    """A model's defaults for text, images and stories.

    Args:
        image_first: Whether its stories put each image before its text; None does as the opening does.
        introduction: How a character is introduced whom the opening shows but does not describe; None never does.
    """

    text: Sampling = Sampling()
    image: Drawing = Drawing()
    image_first: bool | None = None
    introduction: Introduction | None = field(default=None)

    @classmethod
    def from_dict(cls, data: dict, label: str = FILE) -> GenerationConfig:
        """Reads the content of a generation_config.json; raises CheckpointError."""
        unknown = sorted(set(data) - KEYS)
        if unknown:
            raise CheckpointError(f"{label} has entries that this release does not know: {', '.join(unknown)}.")
        image_first, introduction = data.get("image_first"), data.get("introduction")
        if not isinstance(image_first, bool | None):
            raise CheckpointError(f"{label}: image_first must be true, false or null, not {image_first!r:.60}.")
        try:
            text = text_settings(data.get("text_generation", {}))
            image = image_settings(data.get("image_generation", {}))
            if introduction is not None:
                values = {k: tuple(v) if isinstance(v, list) else v for k, v in introduction.items()}
                introduction = Introduction(**values)
            return cls(Sampling(**text), Drawing(**image), image_first, introduction)
        except (SettingError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{label}: {error}") from None

    def to_dict(self) -> dict:
        data: dict = {"text_generation": to_file(self.text), "image_generation": to_file(self.image)}
        data["image_first"] = self.image_first
        if self.introduction is not None:
            data["introduction"] = dataclasses.asdict(self.introduction)
        return data


def to_file(settings: Sampling | Drawing) -> dict:
    """Settings as files name them, without the seed."""
    names = TEXT_NAMES if isinstance(settings, Sampling) else IMAGE_NAMES
    return {names[name]: getattr(settings, name) for name in names}


def text_settings(data) -> dict:
    """`Sampling` fields of settings from a file, under either name; raises SettingError."""
    return _settings(data, TEXT_NAMES, "text_generation")


def image_settings(data) -> dict:
    """`Drawing` fields of settings from a file, under either name; raises SettingError."""
    values = _settings(data, IMAGE_NAMES, "image_generation")
    if values.get("size") is not None:
        size = values["size"]
        if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int for side in size)):
            raise SettingError(f"size must be two whole numbers, not {size!r:.60}.")
        values["size"] = tuple(size)
    return values


def _settings(data, names: dict[str, str], label: str) -> dict:
    if not isinstance(data, dict):
        raise SettingError(f"{label} must hold an object, not {data!r:.60}.")
    fields = {file_name: name for name, file_name in names.items()} | {name: name for name in names}
    unknown = sorted(set(data) - set(fields) - {"seed"})
    if unknown:
        raise SettingError(f"{label} has settings that are not known: {', '.join(unknown)}.")
    return {fields[name]: value for name, value in data.items() if name in fields}


def read_generation_config(folder: str | Path) -> GenerationConfig:
    """The GenerationConfig of a checkpoint folder; the reference's defaults if it has no file of its own."""
    from ..checkpoints.load import read_json

    path = Path(folder) / FILE
    data = read_json(path) if path.is_file() else {}
    if not set(data) & KEYS:  # none, or one that transformers wrote
        return GenerationConfig()
    return GenerationConfig.from_dict(data, repr(str(path)))
