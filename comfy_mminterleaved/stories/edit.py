"""Changes single panels of a story; panels are numbered from 1."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import StoryError
from .story import ImageSegment, Story, TextSegment


def _panels(story: Story, number: int):
    """The segments of every panel; raises StoryError if `number` is none of them."""
    panels = story.panel_segments()
    if not 1 <= number <= len(panels):
        count = f"{len(panels)} panel" + ("s" if len(panels) != 1 else "")
        raise StoryError(f"The story has {count}; there is no panel {number}.")
    return panels


def panel_of(story: Story, number: int) -> tuple[str, ImageSegment | None, Story]:
    """The text and the image of a panel, and the story before it; raises StoryError."""
    panels = _panels(story, number)
    panel = story.panels()[number - 1]
    return panel.text, panel.image, Story.from_panels(panels[: number - 1], story.is_image_first)


def set_panel(story: Story, number: int, text: str | None = None, image: ImageSegment | None = None) -> Story:
    """The story with another text or image in one panel; None keeps what is there. Raises StoryError."""
    panels = _panels(story, number)
    texts, old = panels[number - 1]
    texts = texts if text is None else [TextSegment(text)]
    panels[number - 1] = texts, old if image is None else image
    return Story.from_panels(panels, story.is_image_first)


def arrange_panels(story: Story, numbers: Sequence[int]) -> Story:
    """The story with these panels, in this order; others are left out. Raises StoryError."""
    panels = story.panel_segments()
    for number in numbers:
        _panels(story, number)
    return Story.from_panels([panels[number - 1] for number in numbers], story.is_image_first)


def insert_panels(story: Story, other: Story, before: int | None = None) -> Story:
    """The story with another's panels before one of its own, or at its end (None). Raises StoryError."""
    panels = story.panel_segments() if before is None else _panels(story, before)
    place = len(panels) if before is None else before - 1
    return Story.from_panels([*panels[:place], *other.panel_segments(), *panels[place:]], story.is_image_first)
