"""Extends stories panel by panel, with any writer and any illustrator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from .errors import SettingError
from .stories.story import ImageSegment, Story, TextSegment
from .stories.storyboard import Step, panel_seeds


class Writer(Protocol):
    """Anything that continues a story with text: the MM-Interleaved LLM, a local LLM, or a person."""

    def write(self, story: Story, seed: int) -> TextSegment: ...


class Illustrator(Protocol):
    """Anything that illustrates a story: MM-Interleaved's U-Net, or any other model with reference images."""

    def illustrate(self, story: Story, seed: int) -> ImageSegment: ...


def run_plan(
    story: Story,
    plan: Sequence[Sequence[Step | TextSegment]],
    writer: Writer,
    illustrator: Illustrator,
    *,
    seeds: Sequence[int] | None = None,
    on_segment: Callable[[Story], object] | None = None,
) -> Story:
    """Extends `story` panel by panel. Panel `k` uses `seeds[k]`, so regenerating one panel leaves the earlier ones.

    Args:
        plan: The steps of each panel in order; a TextSegment is taken as it is.
        seeds: Of each entry of the plan; None for the number of its panel in the story (`panel_seeds`).
        on_segment: Called with the story after each text and each image.
    """
    seeds = panel_seeds(story, plan) if seeds is None else seeds
    if len(seeds) != len(plan):
        raise SettingError(f"There must be one seed per panel, {len(plan)}, not {len(seeds)}.")
    for seed, steps in zip(seeds, plan):
        for step in steps:
            if isinstance(step, TextSegment):
                story = story.add(step)
            elif step is Step.IMAGE:
                story = story.add(illustrator.illustrate(story, seed))
            else:
                story = story.add(writer.write(story, seed))
            if on_segment is not None:
                on_segment(story)
    return story
