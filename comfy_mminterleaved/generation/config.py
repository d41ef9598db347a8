"""Settings of generation: of text, of images, and a model's own (generation_config.json beside its weights)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, SettingError

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_REFINED_SIDE = 1024  # px of an image before it is refined
SYSTEMS = "systems"  # folder of a model with what stands beside its blocks
# Between the seeds of candidates; panels have consecutive ones. Odd, because torch's generators on the CPU look at the
# lowest 32 bits of a seed alone.
CANDIDATE_STEP = 2_654_435_761
KEYS = {"text_generation", "image_generation", "image_first", "introduction"}

CONDITIONERS = ("perceiver", "dream")

OnToken = Callable[[int, list[int]], object]  # number of the text, its token ids so far; a true result ends that text
OnStep = Callable[[int, int, Callable[[], object]], object]  # step from 1, number of steps, a cheap preview


@dataclass(frozen=True)
class TextGenerationConfig:
    """How text is generated; the defaults are those of the reference's inference, the names transformers'.

    Args:
        max_new_tokens, min_new_tokens: Bounds of a text in tokens, the one that ends it included.
        do_sample: Sample from the distribution; False takes the likeliest token.
        top_k: 0 for all.
        repetition_penalty: Over 1 makes tokens that the new text already has less likely.
        num_beams: Over 1 searches with that many beams instead, without sampling; length_penalty over 0 favours long
            texts.
        suppress_special_tokens: Never choose a token that has no text (bos, pad, image); the reference allows them.
        seed: Of the first text; the k-th text of a story has seed + k.
    """

    max_new_tokens: int = 90
    min_new_tokens: int = 8
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.3
    num_beams: int = 1
    length_penalty: float = 1.0
    suppress_special_tokens: bool = True
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("max_new_tokens", 1, 10**6),
            ("min_new_tokens", 0, 10**6),
            ("temperature", 1e-3, 100.0),
            ("top_k", 0, 10**9),
            ("top_p", 1e-6, 1.0),
            ("repetition_penalty", 1e-3, 10**6),
            ("num_beams", 1, 64),
            ("length_penalty", -100.0, 100.0),
            ("seed", 0, 2**63 - 1),
        ):
            _check_range(name, getattr(self, name), low, high)

    def with_seed_offset(self, offset: int) -> TextGenerationConfig:
        return replace(self, seed=self.seed + offset)


@dataclass(frozen=True)
class ImageGenerationConfig:
    """How images are drawn; the defaults are those of the reference's inference, the names diffusers'.

    Args:
        guidance_scale: Of classifier-free guidance; 1 for none.
        scheduler: A name in `schedulers.SCHEDULERS` or a class of diffusers.
        seed: Of the first image; the k-th image of a story has seed + k.
        size: `(width, height)` in px; None for the size that the model was trained at.
        num_context_images: How many of the previous images the U-Net attends to; None for the model's own number.
        mmfs_scale: Scale of the U-Net's MMFS residuals, between the steps `mmfs_start` and `mmfs_end` (fractions).
        denoise: With an initial image, the fraction of the noise schedule that is run; at 1 it hardly counts.
        best_of: How many candidates are drawn for each image; the model's contrastive model keeps the one that fits
            best (`ranking.rank_images`).
        conditioner: What makes the U-Net's conditioning of the LLM's states: "perceiver" is the paper's, "dream" the
            model's dream queries (`generation.dream`).
        refine: Whether the model's refiner gives each image a second form of twice the size, for pages
            (`ImageSegment.refined`); the story goes on from the first.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    scheduler: str = "ddpm"
    seed: int = 0
    size: tuple[int, int] | None = None
    num_context_images: int | None = None
    mmfs_scale: float = 1.0
    mmfs_start: float = 0.0
    mmfs_end: float = 1.0
    denoise: float = 1.0
    best_of: int = 1
    conditioner: str = "perceiver"
    refine: bool = False

    def __post_init__(self):
        for name, low, high in (
            ("num_inference_steps", 1, 1000),
            ("guidance_scale", 1.0, 100.0),
            ("seed", 0, 2**63 - 1),
            ("num_context_images", 0, 1000),
            ("mmfs_scale", -10.0, 10.0),
            ("mmfs_start", 0.0, 1.0),
            ("mmfs_end", 0.0, 1.0),
            ("best_of", 1, 64),
        ):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), low, high)
        check_conditioner_name(self.conditioner)
        if not isinstance(self.refine, bool):
            raise SettingError(f"refine must be true or false, not {self.refine!r:.60}.")
        if not 0 < self.denoise <= 1:
            raise SettingError(f"denoise must be over 0 and at most 1, not {self.denoise}.")

    def with_seed_offset(self, offset: int) -> ImageGenerationConfig:
        return replace(self, seed=self.seed + offset)


def check_conditioner_name(name: str) -> None:
    """Raises SettingError for a conditioner that there is not."""
    if name not in CONDITIONERS:
        raise SettingError(f"The conditioner must be {' or '.join(CONDITIONERS)}, not {name!r:.60}.")


def _check_range(name: str, value, low, high) -> None:
    if not low <= value <= high:
        label = value if not isinstance(value, int) or abs(value) < 10**30 else "a number of over thirty digits"
        raise SettingError(f"{name} must be at least {low} and at most {high}, not {label}.")


@dataclass(frozen=True)
class GeneratedText:
    """A generated text.

    Args:
        finish_reason: "eos", "image" (the model requests one), "length" or "cancelled".
        score: Summed log-probability / (number of tokens + 1) ** length_penalty; beam search only.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    text: str = ""
    score: float | None = None

    @property
    def requests_image(self) -> bool:
        return self.finish_reason == "image"


@dataclass(frozen=True)
class RankedOption:
    """An option and its summed log-probability after a story."""

    text: str
    log_prob: float


@dataclass(frozen=True)
class Introduction:
    """Prompts that introduce a character: the model completes them after an image of the character.

    Args:
        prompt: The start of the sentence that tells how `{name}` looks.
        scene_prompts: Starts of the sentence that tells what the image shows; the likeliest is completed.
        names: Names that the model knows; the first is used where the story has none.
        subject: Regular expression of who a caption is about, "a fox in a red coat with a hat", by which a caption is
            told as a story (`reconstruction.retell`); None where captions are no stories.
    """

    prompt: str
    scene_prompts: tuple[str, ...]
    names: tuple[str, ...]
    subject: str | None = None


@dataclass(frozen=True)
class GenerationConfig:
    """A model's defaults for text, images and stories.

    Args:
        image_first: Whether its stories put each image before its text; None keeps the opening's order.
        introduction: Prompts that introduce a character whom the opening shows but does not describe; None for none.
    """

    text: TextGenerationConfig = TextGenerationConfig()
    image: ImageGenerationConfig = ImageGenerationConfig()
    image_first: bool | None = None
    introduction: Introduction | None = None

    @classmethod
    def from_dict(cls, data: dict, label: str = GENERATION_CONFIG_FILE) -> GenerationConfig:
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
            return cls(TextGenerationConfig(**text), ImageGenerationConfig(**image), image_first, introduction)
        except (SettingError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{label}: {error}") from None

    def to_dict(self) -> dict:
        data: dict = {"text_generation": to_file(self.text), "image_generation": to_file(self.image)}
        data["image_first"] = self.image_first
        if self.introduction is not None:
            data["introduction"] = dataclasses.asdict(self.introduction)
        return data


def to_file(settings: TextGenerationConfig | ImageGenerationConfig) -> dict:
    """Settings as files hold them, without the seed; newer ones only if used, so that older files stay the same."""
    values = dataclasses.asdict(settings)
    return {name: value for name, value in values.items() if name != "seed" and (name, value) not in UNUSED}


UNUSED = (("best_of", 1), ("conditioner", "perceiver"), ("refine", False))

# Names that stories saved before the first release have.
OLD_TEXT_NAMES = {"sample": "do_sample", "beams": "num_beams", "only_text": "suppress_special_tokens"}
OLD_IMAGE_NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "look_back": "num_context_images",
    "strength": "mmfs_scale",
    "start": "mmfs_start",
    "end": "mmfs_end",
}


def text_settings(data) -> dict:
    """TextGenerationConfig fields from a file, under current or former names; raises SettingError."""
    return _settings(data, TextGenerationConfig, OLD_TEXT_NAMES, "text_generation")


def image_settings(data) -> dict:
    """ImageGenerationConfig fields from a file, under current or former names; raises SettingError."""
    values = _settings(data, ImageGenerationConfig, OLD_IMAGE_NAMES, "image_generation")
    if values.get("size") is not None:
        size = values["size"]
        if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int for side in size)):
            raise SettingError(f"size must be two whole numbers, not {size!r:.60}.")
        values["size"] = tuple(size)
    return values


def _settings(data, cls, old_names: dict[str, str], label: str) -> dict:
    if not isinstance(data, dict):
        raise SettingError(f"{label} must hold an object, not {data!r:.60}.")
    data = {old_names.get(name, name): value for name, value in data.items() if name != "seed"}
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise SettingError(f"{label} has settings that are not known: {', '.join(unknown)}.")
    return data


def can_refine(folder: str | Path) -> bool:
    """Whether a checkpoint folder has a refiner, and the contrastive model that reads for it."""
    return all((Path(folder) / SYSTEMS / f"{name}.safetensors").is_file() for name in ("refiner", "contrastive"))


def read_generation_config(folder: str | Path) -> GenerationConfig:
    """The GenerationConfig of a checkpoint folder; the reference's defaults if it has no file of its own."""
    from ..checkpoints.tensors import read_json

    path = Path(folder) / GENERATION_CONFIG_FILE
    data = read_json(path) if path.is_file() else {}
    if not set(data) & KEYS:  # none, or one that transformers wrote
        return GenerationConfig()
    return GenerationConfig.from_dict(data, repr(str(path)))


def usable_generation_config(folder: str | Path) -> GenerationConfig:
    """`read_generation_config`, but images are refined by default only where there is a refiner.

    A converted model has the defaults of the one that it was made of, and may lack its systems.
    """
    config = read_generation_config(folder)
    if config.image.refine and not can_refine(folder):
        config = replace(config, image=replace(config.image, refine=False))
    return config
