"""What the commands share: values from arguments, the model, output and progress."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, SettingError
from .parser import DEFAULT_DENOISE

if TYPE_CHECKING:
    from ..generation.config import ImageGenerationConfig, TextGenerationConfig
    from ..stories.story import Story

# Flag (argparse's name) -> field of TextGenerationConfig, of ImageGenerationConfig.
TEXT_FLAGS = {
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "num_beams": "num_beams",
}
IMAGE_FLAGS = {
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "scheduler": "scheduler",
    "size": "size",
    "context_images": "num_context_images",
    "mmfs_scale": "mmfs_scale",
    "mmfs_start": "mmfs_start",
    "mmfs_end": "mmfs_end",
    "best_of": "best_of",
    "refine": "refine",
}


# ---- from arguments to values ----


def parse_dtype(name: str | None):
    import torch

    return getattr(torch, name) if name else None


@dataclasses.dataclass
class Opening:
    """The story that a command works on, and its settings: flags first, then the story's own, then the model's."""

    story: Story
    title: str
    model: str
    seed: int
    text_config: TextGenerationConfig
    image_config: ImageGenerationConfig
    lora: str | None = None


def read_opening(args, text_config: TextGenerationConfig | None = None, required: bool = True) -> Opening:
    """Story and settings of a command, checked before the model is loaded; raises MMInterleavedError.

    Args:
        text_config: The command's own settings, instead of the story's and the model's.
    """
    from ..checkpoints.load import model_folder
    from ..errors import StoryError
    from ..generation.config import (
        MAX_REFINED_SIDE,
        GenerationConfig,
        can_refine,
        image_settings,
        read_generation_config,
        text_settings,
    )
    from ..stories.page import load_book
    from ..stories.story import ImageSegment, Story

    book = load_book(args.story) if args.story else None
    story, settings = (book.story, book.settings) if book else (Story(), {})
    for kind, value in args.opening or []:
        story = story.add(ImageSegment.of(value) if kind == "image" else value.strip())
    if required and not len(story):
        raise StoryError("The story is empty; give --text, --image or --story.")
    model = args.model or settings.get("model", "starter")
    if not isinstance(model, str):
        raise SettingError(f"The story's model must be a name, not {model!r:.60}; give one with --model.")
    folder = model_folder(model)
    generation = read_generation_config(folder) if folder is not None else GenerationConfig()
    seed = settings.get("seed", 0) if args.seed is None else args.seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SettingError(f"The story's seed must be a whole number, not {seed!r:.60}; give one with --seed.")

    def saved(names: tuple[str, ...], read) -> dict:
        return read(next((settings[name] for name in names if name in settings), {}))

    if text_config is None:
        text_config = _replaced(generation.text, saved(("text_generation", "sampling"), text_settings))
    image_values = saved(("image_generation", "drawing"), image_settings)
    if image_values:  # a story's settings are complete but for what it did not use
        image_values.setdefault("refine", False)
    image_config = _replaced(generation.image, image_values)
    text_config = _replaced(text_config, {**_flags(args, TEXT_FLAGS), "seed": seed})
    if getattr(args, "greedy", False):
        text_config = _replaced(text_config, {"do_sample": False})
    flags = _flags(args, IMAGE_FLAGS)
    if flags.get("size"):
        width, cross, height = args.size.lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and len(args.size) < 20):
            raise SettingError(f"--size must be like 512x512, not {args.size!r:.60}.")
        flags["size"] = int(width), int(height)
    flags["denoise"] = _denoise(args)
    image_config = _replaced(image_config, {**flags, "seed": seed})
    if getattr(args, "refine", None) is None and image_config.refine:  # a default, which gives way
        is_large = max(image_config.size or (0,)) > MAX_REFINED_SIDE
        if is_large or folder is None or not can_refine(folder):
            image_config = _replaced(image_config, {"refine": False})
    lora = settings.get("lora") if getattr(args, "lora", None) is None else args.lora
    if lora and not (isinstance(lora, str) and Path(lora).is_file()):
        raise CheckpointError(f"The LoRA {lora!r:.200} does not exist; give a file that `finetune` wrote with --lora.")
    return Opening(story, book.title if book else "", model, seed, text_config, image_config, lora or None)


def _flags(args, fields: dict[str, str]) -> dict:
    return {field: getattr(args, flag) for flag, field in fields.items() if getattr(args, flag, None) is not None}


def _replaced(settings, values: dict):
    """Settings with other values; raises SettingError also for values of a wrong type, as a file can have them."""
    try:
        return dataclasses.replace(settings, **values)
    except TypeError as error:
        raise SettingError(f"A setting has a value of a wrong type: {error}.") from None


def _denoise(args) -> float:
    denoise = getattr(args, "denoise", None)
    if denoise is None:
        return DEFAULT_DENOISE if getattr(args, "init_image", None) else 1.0
    if not args.init_image:
        raise SettingError(f"--denoise {denoise:g} requires --init-image.")
    return denoise


def load_pipeline(args, opening: Opening, *stories):
    """Loads the model; prints a note if stories have words, or settings a size, that it was not trained on."""
    from ..loading import resolve_device
    from ..pipeline import MMInterleavedPipeline

    if args.memory and resolve_device(args.device).type == "cpu":
        raise SettingError("--memory is of a card, but the model runs on the CPU; omit it.")
    if opening.model in ("tiny-random", "untrained"):
        print_status(f"Note: the model '{opening.model}' has random weights; its texts and images mean nothing.")
    pipeline = MMInterleavedPipeline.load(**load_options(args, opening))
    _note_large(pipeline)
    _warn_unknown_words(pipeline, stories)
    size, trained = opening.image_config.size, pipeline.config.synchronizer.image_size
    if size is not None and size != (trained, trained) and pipeline.known_words is not None:
        print_status(
            f"Note: this model was trained at {trained} x {trained} px; at other sizes it tends to repeat objects."
        )
    return pipeline


def load_options(args, opening: Opening) -> dict:
    """Arguments of `MMInterleavedPipeline.load`."""
    return {
        "source": opening.model,
        "device": args.device,
        "dtype": parse_dtype(args.dtype),
        "compile": args.compile,
        "memory": args.memory,
        "cache_dtype": cache_dtype(args),
        "quantize": args.quantize,
        "image_size": opening.image_config.size,
        "lora": opening.lora,
    }


def cache_dtype(args):
    import torch

    return torch.float8_e4m3fn if args.kv_cache == "fp8" else None


def _note_large(pipeline) -> None:
    """One line on how a large model is computed."""
    from ..checkpoints.load import is_large
    from ..files import format_memory

    if not is_large(pipeline.config):
        return
    plan = pipeline.placement.plan if pipeline.placement is not None else None
    where = f"on {pipeline.device}, in {str(pipeline.llm.soi_token.dtype)[6:]}"
    stored = pipeline.config.llm.quantization
    stored = f", from {stored} weights" if stored else ""
    if plan is None:
        print_status(f"Note: the model is computed {where}{stored}.")
    else:
        print_status(f"Note: the model is computed {where}{stored}; {plan.mode}, at most {format_memory(plan.peak)}.")


def _warn_unknown_words(pipeline, stories) -> None:
    words = list(dict.fromkeys(word for story in stories for word in pipeline.find_unknown_words(story)))
    if words:
        print_status(
            f"Note: this model does not know the words {', '.join(words)}; it may continue with different words."
        )


# ---- output ----


def print_status(line: str) -> None:
    sys.stderr.write(line + "\n")


def emit(args, data: dict, text: str) -> int:
    sys.stdout.write((json.dumps(data) if args.json else text) + "\n")
    return 0


class ProgressBars:
    """Progress on standard error: one bar for the current step, with the text so far behind it."""

    def __init__(self, quiet: bool):
        from tqdm import tqdm

        self.make = lambda total, label: tqdm(total=total, desc=label, leave=False, disable=quiet or None, unit="")
        self.bar, self.label = None, ""

    def update(self, label: str, done: int, total: int):
        if self.bar is None or self.label != label or done < self.bar.n:
            self.close()
            self.bar, self.label = self.make(total, label), label
        self.bar.update(done - self.bar.n)

    def on_step(self, done: int, total: int, _preview) -> None:
        self.update("drawing", done, total)

    def on_token(self, limit: int):
        def on_token(text: str) -> None:
            count = 1 if self.bar is None or self.label != "writing" else self.bar.n + 1
            self.update("writing", min(count, limit), limit)
            self.bar.set_postfix_str(text[-60:].replace("\n", " "))

        return on_token

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def story_record(folder: Path) -> dict:
    """What `--json` says of a story."""
    segments = json.loads((folder / "story.json").read_text(encoding="utf-8"))["segments"]
    return {"folder": str(folder), "page": str(folder / "story.html"), "segments": segments}
