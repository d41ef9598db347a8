"""The types of the wires, and inputs that several nodes share."""

import comfy.samplers
from comfy_api.latest import io

from ..comfy_mminterleaved.generation.config import read_generation_config
from ..comfy_mminterleaved.presets import STARTER_DIR

# What the widgets show; a model's own defaults are in its generation_config.json.
DEFAULTS = read_generation_config(STARTER_DIR)
CATEGORY = "MM-Interleaved"

StorySocket = io.Custom("STORY")
EncoderSocket = io.Custom("MMI_ENCODER")
LLMSocket = io.Custom("MMI_LLM")
SynchronizerSocket = io.Custom("MMI_SYNCHRONIZER")
PlanSocket = io.Custom("STORY_PLAN")
PagesSocket = io.Custom("STORY_PAGES")
WriterSocket = io.Custom("STORY_WRITER")
ContrastiveSocket = io.Custom("MMI_CONTRASTIVE")
RefinerSocket = io.Custom("MMI_REFINER")
PriorSocket = io.Custom("MMI_PRIOR")
SoundSocket = io.Custom("MMI_SOUND")
DreamSocket = io.Custom("MMI_DREAM")
ImageTokensSocket = io.Custom("MMI_IMAGE_TOKENS")
TokensSocket = io.Custom("MMI_TOKENS")


def search_aliases(*names: str) -> dict[str, list[str]]:
    """An argument of `io.Schema`: the node's former names, for cores whose search looks at them."""
    return {"search_aliases": list(names)} if "search_aliases" in io.Schema.__dataclass_fields__ else {}


def marked(flag: str, *inputs):
    """Inputs with a flag for the page ("advanced", "hidden"), also on cores whose inputs have no argument for it."""
    for each in inputs:
        each.extra_dict = {**getattr(each, "extra_dict", {}), flag: True}
    return inputs


def advanced(*inputs):
    """Inputs that pages hide until asked for, where they know how to."""
    return marked("advanced", *inputs)


def seed_input(label: str, name: str = "seed"):
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=2**63 - 1,
        control_after_generate=True,
        tooltip=f"The seed of {label}. The same seed gives the same result.",
    )


def strength_input():
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.05,
        tooltip="How much the earlier images count in the U-Net; 0 draws from the text alone.",
    )


def former(label: str, name: str, default: int, low: int, high: int, step: int = 1):
    """A widget in which a number stood for "the model's own", hidden now.

    It stays because workflows saved before hold widgets by position.
    """
    widget = io.Int.Input(
        name, default=default, min=low, max=high, step=step, tooltip=f"{label}; {default} for the model's own."
    )
    return marked("hidden", widget)[0]


def model_default_input(label: str, name: str, low: int, high: int, step: int = 1):
    """A socket of a number that the model has one of its own for, which is used if nothing is connected."""
    return io.Int.Input(
        name,
        optional=True,
        force_input=True,
        min=low,
        max=high,
        step=step,
        tooltip=f"{label}; unconnected, the model's own.",
    )


WIDTH, HEIGHT = "Width of the images in pixels", "Height of the images in pixels"
CONTEXT_IMAGES = "How many of the last images the U-Net attends to"


def drop_oldest_input():
    return io.Boolean.Input(
        "drop_oldest",
        default=False,
        optional=True,
        tooltip="On: a story that is too long for the LLM is continued without its oldest panels, which stay in the "
        "story. Off: it is an error.",
    )


def writer_input():
    return WriterSocket.Input(
        "writer", optional=True, tooltip="A language model of your own, which does this instead of the LLM."
    )


def sampler_inputs():
    """Which of ComfyUI's samplers and schedules draw."""
    return [
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            default="dpmpp_2m",
            tooltip="Any of ComfyUI's samplers.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            default="karras",
            tooltip="Any of ComfyUI's schedules.",
        ),
    ]


def sampling_inputs():
    """Settings of writing."""
    text = DEFAULTS.text
    return [
        io.Int.Input(
            "max_tokens",
            default=text.max_new_tokens,
            min=1,
            max=4096,
            tooltip="Longest text, in tokens of about three quarters of a word.",
        ),
        io.Int.Input(
            "min_tokens",
            default=text.min_new_tokens,
            min=0,
            max=4096,
            tooltip="Shortest text, in tokens.",
        ),
        io.Float.Input(
            "temperature",
            default=text.temperature,
            min=0.0,
            max=5.0,
            step=0.05,
            tooltip="How freely words are chosen: 0 always takes the likeliest, 1 samples as the model learned.",
        ),
        io.Int.Input(
            "top_k",
            default=text.top_k,
            min=0,
            max=100000,
            tooltip="Sample among this many likeliest tokens; 0 for all.",
        ),
        io.Float.Input(
            "top_p",
            default=text.top_p,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="Sample among the likeliest tokens that together have this probability.",
        ),
        io.Float.Input(
            "repetition_penalty",
            default=text.repetition_penalty,
            min=0.5,
            max=3.0,
            step=0.05,
            tooltip="Over 1 makes words that the new text already has less likely.",
        ),
    ]
