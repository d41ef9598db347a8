"""Tells the stories of a storyboard into one folder: goes on where an earlier run stopped, and keeps failures small.

`tell_stories` works on a model and knows no files; `StoryboardRun` keeps what it yields and knows no model, which may
stand elsewhere (`ray_runner`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DeviceError, ImageError, MMInterleavedError, OutputError, StoryError, is_out_of_memory
from ..files import ensure_writable_dir
from ..generation.config import ImageGenerationConfig, TextGenerationConfig, to_file
from ..pipeline import MMInterleavedPipeline
from ..stories.journal import BEGUN, DONE, StoryRecord
from ..stories.page import load_book, save_story
from ..stories.story import ImageSegment, Segment, Story, TextSegment
from ..stories.storyboard import Step, StoryPlan, panel_seeds
from .run_folder import RunFolder, Stopped, move_into_place


@dataclass(frozen=True)
class BatchSettings:
    """What decides how stories come out, beside their plans.

    Args:
        model: Its name, for the settings that are saved with each story.
        model_fingerprint: Changes when the model's files do, or its LoRA's.
        lora: The LoRA's file, for the settings that are saved with each story.
    """

    model: str
    model_fingerprint: str | None
    text: TextGenerationConfig
    image: ImageGenerationConfig
    drop_oldest: bool = False
    introduce: bool = True
    lora: str | None = None


def describe_plan(plan: StoryPlan) -> list:
    """What decides how a story comes out, JSON-ready: its texts, its images' contents, its settings."""
    opening = [s.digest if isinstance(s, ImageSegment) else s.text for s in plan.opening]
    steps = plan.steps and [[getattr(step, "text", None) or str(step) for step in panel] for panel in plan.steps]
    return [opening, plan.opening.image_first, plan.panels, plan.title, plan.seed, plan.script, steps]


def fingerprint(plan: StoryPlan, settings: BatchSettings) -> str:
    """Changes when a story would come out another: with its plan, the settings, or the model."""
    about = describe_plan(plan)
    about += [settings.model, settings.model_fingerprint, to_file(settings.text), to_file(settings.image)]
    about += [settings.drop_oldest, settings.introduce]
    return hashlib.blake2b(json.dumps(about, default=str).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class StoryTask:
    """A story to tell, or the rest of one.

    Args:
        opening, story: What it opened with, and what an earlier run left of it; None to begin.
        done: How many steps of the plan that is.
    """

    plan: StoryPlan
    opening: Story | None = None
    story: Story | None = None
    done: int = 0


# After each step, what the stories that took part are now, by their place in the batch; an error ends its story.
Steps = Iterator[dict[int, "Story | Exception"]]


def tell_stories(
    pipeline: MMInterleavedPipeline, tasks: Sequence[StoryTask], settings: BatchSettings, **callbacks
) -> Steps:
    """Tells stories on a model, in step if there are several, so that they share passes of the LLM and the U-Net.

    Yields the openings of new stories first, then stories after each text and each image.

    Args:
        callbacks: `on_token` and `on_step` of `iterate_plans`.

    Raises:
        DeviceError: If the card cannot be used any more.
    """
    stories, plans, seeds, openings, places = [], [], [], {}, []
    for place, task in enumerate(tasks):
        try:
            story, steps, row = _prepare(pipeline, task, settings)
        except (MMInterleavedError, MemoryError, RuntimeError) as error:
            _check_device(error)
            yield {place: error}
            continue
        if task.story is None:
            openings[place] = story
        stories.append(story), plans.append(steps), seeds.append(row), places.append(place)
    if openings:
        yield openings
    try:
        for grown in pipeline.iterate_plans(
            stories, plans, settings.text, settings.image, seeds, drop_oldest=settings.drop_oldest, **callbacks
        ):
            yield {places[i]: story for i, story in grown.items()}
    except (MMInterleavedError, MemoryError, RuntimeError) as error:
        _check_device(error)
        pipeline.clear_cache()
        yield dict.fromkeys(places, error)


def _check_device(error: Exception) -> None:
    """Raises DeviceError for an error after which nothing runs on the card in this process."""
    if "CUDA error" in str(error) and not is_out_of_memory(error):
        raise DeviceError(
            f"The card failed: {str(error).splitlines()[0].rstrip('.')}; start the same command again to go on."
        ) from error


def _prepare(pipeline: MMInterleavedPipeline, task: StoryTask, settings: BatchSettings):
    """A story's opening, or what there is of it, the steps that are left and their seeds; checked first."""
    plan, opening = task.plan, task.plan.opening
    if plan.steps is None:
        opening = opening.arrange(pipeline.text.resolve_image_first(opening))
    seeded = replace(settings.text, seed=settings.text.seed + plan.seed)
    pipeline.validate_plan(opening, plan.steps_after(opening), seeded, settings.image, settings.drop_oldest)
    if task.story is not None:
        opening, story = task.opening, task.story
    else:
        story = opening = pipeline.introduce(opening) if settings.introduce and plan.steps is None else opening
    steps = plan.steps_after(opening)
    steps, seeds = _remaining(steps, panel_seeds(opening, steps), task.done)
    return story, steps, [plan.seed + seed for seed in seeds]


class StoryboardRun(RunFolder):
    """A run folder whose stories are told here; see RunFolder for the arguments."""

    def __init__(
        self,
        folder: str | Path,
        plans: Sequence[StoryPlan],
        settings: BatchSettings,
        restart: bool = False,
        retry_failed: bool = False,
    ):
        super().__init__(folder, plans, [fingerprint(plan, settings) for plan in plans], restart, retry_failed)
        self.settings = settings

    def run(
        self,
        tell: Callable[[list[StoryTask]], Steps],
        should_stop: Callable[[], bool] = lambda: False,
        on_story: Callable[[int, StoryRecord], object] | None = None,
        batch_size: int = 1,
    ) -> list[StoryRecord]:
        """Tells the pending stories; raises OutputError if the folder cannot be written, and Stopped.

        Args:
            tell: `tell_stories` on a model.
            on_story: Called with the number and record of each story that ended.
            batch_size: How many stories are told in step, where they have the same steps.
        """
        batches = self.batches(batch_size)
        while batches:
            opened = [OpenStory(self, number) for number in batches.pop(0)]
            for grown in tell([story.task for story in opened]):
                again = self.advance(opened, grown, on_story)
                if should_stop():
                    self.report()
                    raise Stopped
                if again:
                    batches[:0] = again
                    break
            else:
                self.close(opened, on_story)
        self.report()
        return [self.journal.records[number] for number in range(1, len(self.plans) + 1)]

    def advance(self, opened: list[OpenStory], grown: dict[int, Story | Exception], on_story) -> list[list[int]]:
        """Keeps one step of stories that are told together.

        Returns:
            Batches to tell instead, if the step failed for several: alone each has more memory, and only the one at
            fault fails.
        """
        results = {opened[place]: result for place, result in grown.items() if not opened[place].is_done}
        if len(results) > 1 and all(isinstance(result, Exception) for result in results.values()):
            return [[story.number] for story in results]
        for story, result in results.items():
            story.advance(result, len(opened))
            if story.is_done:
                self.ended(story.number, on_story)
        return []

    def close(self, opened: list[OpenStory], on_story) -> None:
        """Finishes stories of which nothing was left to tell."""
        for story in opened:
            if story.story is not None and not story.left and not story.is_done:
                story.finish()
                self.ended(story.number, on_story)

    def batches(self, batch_size: int = 1) -> list[list[int]]:
        """The pending stories in groups that can be told in step: those that wait for the same kinds of steps."""
        groups: list[list[int]] = []
        kinds: dict[int, list[str]] = {}
        for number in self.pending():
            plan = self.plans[number - 1]
            kinds[number] = [_kind(step) for panel in plan.steps_after(plan.opening) for step in panel]
            is_new = self.record(number) is None
            group = groups[-1] if groups else []
            longest = max((kinds[n] for n in group), key=len, default=[])
            length = min(len(longest), len(kinds[number]))
            fits = group and len(group) < batch_size and is_new and self.record(group[0]) is None
            if fits and longest[:length] == kinds[number][:length]:
                group.append(number)
            else:
                groups.append([number])
        return groups


class OpenStory:
    """A story of a run while it is told: keeps each segment in its folder and in the journal.

    It grows in its own folder, or in one beside it while that holds an older story.
    """

    def __init__(self, run: StoryboardRun, number: int):
        self.run, self.number, self.plan = run, number, run.plans[number - 1]
        self.folder = run.story_folder(number)
        self.beside = run.unfinished_folder(number)
        record = run.record(number)
        is_begun = record is not None and record.opening is not None
        self.work = self.beside if (self.beside if is_begun else self.folder).exists() else self.folder
        settings = run.settings
        text, image = settings.text.with_seed_offset(self.plan.seed), settings.image.with_seed_offset(self.plan.seed)
        self.settings = {
            "model": settings.model,
            **({"lora": settings.lora} if settings.lora else {}),
            "seed": text.seed,
            "text_generation": to_file(text),
            "image_generation": to_file(image),
        }
        self.task = StoryTask(self.plan)
        if is_begun:
            self._resume(record)
        self.opening, self.story, self.left = self.task.opening, self.task.story, 0
        if self.opening is not None:
            self.left = sum(map(len, self.plan.steps_after(self.opening))) - self.task.done
        self.is_done, self.began = False, time.monotonic()

    def _resume(self, record: StoryRecord) -> None:
        """Takes up what an earlier run of the same plan left, if it is whole."""
        with contextlib.suppress(StoryError, ImageError):
            saved = load_book(self.work).story
            if len(saved) < record.opening or len(saved.images) < record.opening_images:
                return
            # Of images that were drawn, the pixels: their files are written again, as if never read.
            drawn = saved.images[record.opening_images :]
            story = saved.map_images(lambda image: replace(image, file=None) if image in drawn else image)
            segments, end = list(story.segments), record.opening
            if story.image_first and not record.opening_images and drawn:
                segments.insert(end, segments.pop(0))  # it was put before the texts that it belongs to
            opening = replace(story, segments=tuple(segments[:end]))
            done = _count_done(self.plan.steps_after(opening), segments[end:])
            self.task = StoryTask(self.plan, opening, story, done)

    def advance(self, result: Story | Exception, num_in_step: int = 1) -> None:
        """Keeps the next state of the story, its opening first, or the error that ends it; raises OutputError.

        Args:
            num_in_step: How many stories are told in step; the time is divided among them.
        """
        if isinstance(result, OutputError):
            raise result
        if isinstance(result, Exception):
            self.run.fail(self.number, _sentence(result))
            self.is_done = True
        elif self.story is None:
            self._begin(result)
        else:
            self._grow(result, num_in_step)
        if not self.is_done and not self.left:
            self.finish()

    def _begin(self, opening: Story) -> None:
        for folder in (self.work, self.beside):
            shutil.rmtree(folder, ignore_errors=True)
        ensure_writable_dir(self.work)
        save_story(self.work, opening, self.plan.title, self.settings)
        fingerprint = self.run.fingerprints[self.number - 1]
        about = {"opening": len(opening), "opening_images": len(opening.images)}
        self.run.journal.append(self.number, BEGUN, fingerprint=fingerprint, **about)
        self.opening = self.story = opening
        self.left = sum(map(len, self.plan.steps_after(opening)))

    def _grow(self, story: Story, num_in_step: int) -> None:
        is_image = len(story.images) > len(self.story.images)
        self.story, self.left = story, self.left - 1
        save_story(self.work, story, self.plan.title, self.settings)
        if is_image:
            now = time.monotonic()
            panels = len(story.images) - len(self.opening.images)
            self.run.journal.append(
                self.number, "panel", panel=panels, seconds=round((now - self.began) / num_in_step, 3)
            )
            self.began = now

    def finish(self) -> None:
        """Moves the whole story into place."""
        save_story(self.work, self.story, self.plan.title, self.settings)  # a kill may have come between its files
        move_into_place(self.work, self.folder)
        self.run.journal.append(self.number, DONE)
        self.is_done = True


def _count_done(plan, segments: list[Segment]) -> int:
    """How many steps of a plan made these segments; an empty text made none."""
    count, generated = 0, list(segments)
    for step in (step for panel in plan for step in panel):
        if not generated:
            break
        if isinstance(generated[0], ImageSegment) == (step is Step.IMAGE):
            generated.pop(0)
        count += 1
    return count


def _kind(step: Step | TextSegment) -> str:
    return "given" if isinstance(step, TextSegment) else step.value


def _remaining(steps, seeds: list[int], done: int):
    """What is left of a plan after its first `done` segments, with the seeds of its entries."""
    left, left_seeds = [], []
    for panel, seed in zip(steps, seeds):
        panel, done = panel[min(done, len(panel)) :], max(0, done - len(panel))
        if panel:
            left.append(panel)
            left_seeds.append(seed)
    return tuple(left), left_seeds


def _sentence(error: Exception) -> str:
    if isinstance(error, MMInterleavedError):
        return str(error)
    if is_out_of_memory(error):
        return "It ran out of memory; smaller images or fewer panels would do."
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
