"""Extends stories panel by panel, with any writer and any illustrator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    seeds = None if seeds is None else [seeds]

    def write(stories: list[Story], seeds: list[int]) -> list[TextSegment]:
        return [writer.write(story, seed) for story, seed in zip(stories, seeds)]

    def illustrate(stories: list[Story], seeds: list[int]) -> list[ImageSegment]:
        return [illustrator.illustrate(story, seed) for story, seed in zip(stories, seeds)]

    for grown in run_plans([story], [plan], write, illustrate, seeds=seeds):
        story = grown[0]
        if on_segment is not None:
            on_segment(story)
    return story


def run_plans(
    stories: Sequence[Story],
    plans: Sequence[Sequence[Sequence[Step | TextSegment]]],
    write_all: Callable[[list[Story], list[int]], list[TextSegment]],
    illustrate_all: Callable[[list[Story], list[int]], list[ImageSegment]],
    *,
    seeds: Sequence[Sequence[int]] | None = None,
) -> Iterator[dict[int, Story]]:
    """Extends several stories in step: first those that wait for a text, together, then those that wait for an image.

    Args:
        write_all, illustrate_all: Called with stories and the seed of each.
        seeds: Of each story, one per entry of its plan; None for those of `panel_seeds`.

    Yields:
        After each step, the stories that grew by a segment, by their place in `stories`.
    """
    stories = list(stories)
    seeds = [panel_seeds(*pair) for pair in zip(stories, plans)] if seeds is None else seeds
    for row, plan in zip(seeds, plans):
        if len(row) != len(plan):
            raise SettingError(f"There must be one seed per panel, {len(plan)}, not {len(row)}.")
    pending = [
        [(step, seed) for seed, steps in zip(row, plan) for step in steps][::-1] for row, plan in zip(seeds, plans)
    ]
    while any(pending):
        waiting = {i: steps[-1][0] for i, steps in enumerate(pending) if steps}
        given = [i for i, step in waiting.items() if isinstance(step, TextSegment)]
        texts = [i for i, step in waiting.items() if step is Step.TEXT]
        rows = given or texts or list(waiting)
        steps = [pending[i][-1] for i in rows]
        before = [stories[i] for i in rows]
        if given:
            segments = [step for step, _ in steps]
        else:
            segments = (write_all if texts else illustrate_all)(before, [seed for _, seed in steps])
        for i, story, segment in zip(rows, before, segments):
            pending[i].pop()
            stories[i] = story.add(segment)
        yield {i: stories[i] for i in rows}
