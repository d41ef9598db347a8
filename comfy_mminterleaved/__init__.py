"""Interleaved text and pictures with MM-Interleaved (arXiv 2401.10208).

>>> from comfy_mminterleaved import MMInterleaved, Story
>>> model = MMInterleaved.load("path/to/checkpoint")
>>> story = model.tell(Story.of("Mia found a red kite."), panels=3)
"""

import importlib

__version__ = "0.1.0"

# Name -> module; imported when first asked for, so that importing the package costs next to nothing.
_LAZY = {
    "Choice": "pipeline",
    "Drawing": "generation.image",
    "Features": "models.visual_tokenizer",
    "MMInterleaved": "pipeline",
    "Panel": "stories.story",
    "Picture": "stories.story",
    "Sampling": "generation.text",
    "Story": "stories.story",
    "Text": "stories.story",
    "Written": "generation.text",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
