"""Tells the stories of a storyboard into one folder: goes on where an earlier run stopped, and keeps failures small."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import MMInterleavedError, OutputError, StoryError, is_out_of_memory
from .files import ensure_writable_dir, friendly_errors, remove_leftovers
from .generation.config import ImageGenerationConfig, TextGenerationConfig, to_file
from .pipeline import MMInterleavedPipeline
from .stories.journal import BEGUN, DONE, FAILED, Journal, StoryRecord
from .stories.page import load_book, save_story
from .stories.report import write_report
from .stories.story import ImageSegment, Story
from .stories.storyboard import StoryPlan, panel_seeds

REPORT_EVERY = 10  # seconds between two writings of the report


class Stopped(Exception):
    """The run was asked to stop; what was finished is kept."""


@dataclass(frozen=True)
class BatchSettings:
    """What decides how stories come out, beside their plans.

    Args:
        model: Its name, for the settings that are saved with each story.
        model_fingerprint: Changes when the model's files do.
    """

    model: str
    model_fingerprint: str | None
    text: TextGenerationConfig
    image: ImageGenerationConfig
    drop_oldest: bool = False
    introduce: bool = True


def fingerprint(plan: StoryPlan, settings: BatchSettings) -> str:
    """Changes when a story would come out another: with its texts, its images' contents, its settings, or the model."""
    opening = [s.digest if isinstance(s, ImageSegment) else s.text for s in plan.opening]
    steps = plan.steps and [[getattr(step, "text", None) or str(step) for step in panel] for panel in plan.steps]
    about = [opening, plan.opening.image_first, plan.panels, plan.title, plan.seed, plan.script, steps]
    about += [settings.model, settings.model_fingerprint, to_file(settings.text), to_file(settings.image)]
    about += [settings.drop_oldest, settings.introduce]
    return hashlib.blake2b(json.dumps(about, default=str).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def stop_after_step() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a request to stop after the step at hand; the second stops at once.

    Yields a function that says whether to stop.
    """
    asked = False

    def on_signal(*_):
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class StoryboardRun:
    """One folder's stories: `001`, `002`, ..., a journal and report.html.

    Args:
        folder: Created if needed. Stories that its journal calls finished, from the same plan, are left as they are.
        restart: Tell all stories anew; each replaces the old one when it is whole.
        retry_failed: Tell failed stories again, which else stay failed.
    """

    def __init__(
        self,
        folder: str | Path,
        plans: Sequence[StoryPlan],
        settings: BatchSettings,
        restart: bool = False,
        retry_failed: bool = False,
    ):
        self.folder, self.plans, self.settings = Path(folder), list(plans), settings
        ensure_writable_dir(self.folder)
        remove_leftovers(self.folder)
        self.journal = Journal(self.folder)
        self.fingerprints = [fingerprint(plan, settings) for plan in self.plans]
        self.restart, self.retry_failed = restart, retry_failed

    def record(self, number: int) -> StoryRecord | None:
        """What the journal knows of a story, if it was told from the same plan."""
        record = self.journal.records.get(number)
        return record if record is not None and record.fingerprint == self.fingerprints[number - 1] else None

    def pending(self) -> list[int]:
        """Numbers of the stories to tell."""
        kept = (DONE,) if self.retry_failed else (DONE, FAILED)
        numbers = range(1, len(self.plans) + 1)
        return [n for n in numbers if self.restart or self.record(n) is None or self.record(n).status not in kept]

    def story_folder(self, number: int) -> Path:
        return self.folder / f"{number:03d}"

    def _work_folder(self, number: int) -> Path:
        """Where a story grows: its own folder, or one beside it while that holds an older story."""
        beside, folder = self._beside(number), self.story_folder(number)
        is_begun = self.record(number) is not None and not self.restart
        return beside if (beside if is_begun else folder).exists() else folder

    def _beside(self, number: int) -> Path:
        return self.folder / f".{number:03d}.unfinished"

    def run(
        self,
        pipeline: MMInterleavedPipeline,
        should_stop: Callable[[], bool] = lambda: False,
        on_story: Callable[[int, StoryRecord], object] | None = None,
        **callbacks,
    ) -> list[StoryRecord]:
        """Tells the pending stories; raises OutputError if the folder cannot be written, and Stopped.

        Args:
            on_story: Called with the number and record of each story that ended.
            callbacks: `on_token` and `on_step` of `run_plan`.
        """
        reported = float("-inf")
        for number in self.pending():
            try:
                self._tell(number, pipeline, should_stop, callbacks)
            except OutputError:
                raise
            except (MMInterleavedError, MemoryError, RuntimeError) as error:
                sentence = _sentence(error)
                self.journal.append(number, FAILED, fingerprint=self.fingerprints[number - 1], error=sentence)
            if time.monotonic() - reported > REPORT_EVERY:
                write_report(self.folder, self.plans, self.journal.records)
                reported = time.monotonic()
            if on_story is not None:
                on_story(number, self.journal.records[number])
            if should_stop():
                write_report(self.folder, self.plans, self.journal.records)
                raise Stopped
        write_report(self.folder, self.plans, self.journal.records)
        return [self.journal.records[number] for number in range(1, len(self.plans) + 1)]

    def _tell(self, number: int, pipeline: MMInterleavedPipeline, should_stop, callbacks: dict) -> None:
        plan, work = self.plans[number - 1], self._work_folder(number)
        text = self.settings.text.with_seed_offset(plan.seed)
        image = self.settings.image.with_seed_offset(plan.seed)
        settings = {
            "model": self.settings.model,
            "seed": text.seed,
            "text_generation": to_file(text),
            "image_generation": to_file(image),
        }
        story = plan.opening
        if plan.steps is None:
            story = story.arrange(pipeline.text.resolve_image_first(story))
        pipeline.validate_plan(story, plan.steps_after(story), text, image, self.settings.drop_oldest)
        opening, story = self._resume(number, plan, story, work, pipeline, settings)
        steps = plan.steps_after(opening)
        seeds = panel_seeds(opening, steps)
        steps, seeds = _remaining(steps, seeds, len(story) - len(opening))
        began = time.monotonic()

        def on_segment(story: Story) -> None:
            nonlocal began
            save_story(work, story, plan.title, settings)
            if isinstance(story.segments[-1], ImageSegment):
                now = time.monotonic()
                panels = len(story.images) - len(opening.images)
                self.journal.append(number, "panel", panel=panels, seconds=round(now - began, 3))
                began = now
            if should_stop():
                raise Stopped

        if steps:
            story = pipeline.run_plan(
                story,
                steps,
                text,
                image,
                seeds,
                on_segment=on_segment,
                drop_oldest=self.settings.drop_oldest,
                **callbacks,
            )
        save_story(work, story, plan.title, settings)  # a kill may have come between its files
        self._move_into_place(work, self.story_folder(number))
        self.journal.append(number, DONE)

    def _resume(self, number: int, plan: StoryPlan, story: Story, work: Path, pipeline, settings: dict):
        """The opening and the story so far: what an earlier run of the same plan left, or a new beginning."""
        record = self.record(number)
        if record is not None and record.opening and not self.restart:
            with contextlib.suppress(StoryError):
                saved = load_book(work).story
                if len(saved) >= record.opening:
                    opening, generated = saved.segments[: record.opening], saved.segments[record.opening :]
                    # Of images that were drawn, the pixels: their files are written again, as if never read.
                    generated = [replace(s, file=None) if isinstance(s, ImageSegment) else s for s in generated]
                    return replace(saved, segments=opening), replace(saved, segments=(*opening, *generated))
        if self.settings.introduce and plan.steps is None:
            story = pipeline.introduce(story)
        for folder in (work, self._beside(number)):
            shutil.rmtree(folder, ignore_errors=True)
        ensure_writable_dir(work)
        save_story(work, story, plan.title, settings)
        self.journal.append(number, BEGUN, fingerprint=self.fingerprints[number - 1], opening=len(story))
        return story, story

    def _move_into_place(self, work: Path, folder: Path) -> None:
        old = folder.with_name(f".{folder.name}.old")
        if work != folder:
            shutil.rmtree(old, ignore_errors=True)
            with friendly_errors(folder, "The folder"):
                if folder.exists():
                    os.replace(folder, old)
                os.replace(work, folder)
        shutil.rmtree(old, ignore_errors=True)


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
