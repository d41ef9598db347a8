"""Interleaved text and images with MM-Interleaved (arXiv 2401.10208).

>>> from comfy_mminterleaved import MMInterleavedPipeline, Story
>>> pipeline = MMInterleavedPipeline.load("starter")
>>> story = pipeline.generate_story(Story.of("Mia waves in the forest."), panels=3)
"""

import importlib

__version__ = "0.1.0"

# Name -> module; imported when first asked for, so that importing the package costs next to nothing.
_LAZY = {
    "GeneratedText": "generation.config",
    "GenerationConfig": "generation.config",
    "ImageFeatures": "models.visual_tokenizer",
    "ImageGenerationConfig": "generation.config",
    "ImageSegment": "stories.story",
    "MMInterleavedPipeline": "pipeline",
    "Panel": "stories.story",
    "RankedOption": "generation.config",
    "Story": "stories.story",
    "TextGenerationConfig": "generation.config",
    "TextGenerator": "generation.text",
    "TextSegment": "stories.story",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
