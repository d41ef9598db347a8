"""The commands for storyboards: on this computer, on Ray, on ComfyUI servers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingError
from .common import (
    ProgressBars,
    emit,
    load_options,
    load_pipeline,
    print_status,
    read_opening,
    story_record,
)
from .parser import DEFAULT_OUT

if TYPE_CHECKING:
    from ..jobs.run_folder import RunFolder
    from ..stories.journal import StoryRecord
    from ..stories.storyboard import StoryPlan


def tell_storyboard(args) -> int:
    from ..checkpoints.load import fingerprint
    from ..files import locked, output_folder
    from ..jobs.batch import BatchSettings, StoryboardRun, tell_stories
    from ..jobs.run_folder import Stopped, stop_after_step
    from ..stories.storyboard import load_storyboard

    if args.opening or args.story:
        raise SettingError("--storyboard has its own openings; omit --text, --image and --story.")
    if args.title or args.panels or args.image_first is not None:
        raise SettingError(
            "A storyboard's stories have their own title, panels and image_first; omit --title, --panels and "
            "--image-first."
        )
    if args.workers is not None and (args.ray is None or args.workers < 1):
        raise SettingError(f"--workers is the number of Ray's workers, at least 1 and with --ray, not {args.workers}.")
    batch_size = _batch_size(args.batch)
    plans = load_storyboard(args.storyboard)
    opening = read_opening(args, required=False)
    settings = BatchSettings(
        opening.model,
        fingerprint(opening.model, opening.lora),
        opening.text_config,
        opening.image_config,
        args.drop_oldest_panels,
        args.introduce,
        opening.lora,
    )
    out = _run_folder(args)
    with output_folder(out), locked(out / ".lock", _busy(out)):
        run = StoryboardRun(out, plans, settings, args.restart or args.overwrite, args.retry_failed)
        progress, stopped = _Progress(run, args.quiet), False
        if run.pending() and args.ray is not None:
            from ..jobs.ray_runner import run_on_ray

            options = load_options(args, opening)
            try:
                with stop_after_step() as should_stop:
                    run_on_ray(run, options, args.ray, args.workers, should_stop, progress.on_story, batch_size)
            except Stopped:
                stopped = True
        elif run.pending():
            pipeline = load_pipeline(args, opening, *(plans[number - 1].opening for number in run.pending()))
            progress.began = time.monotonic()
            callbacks = {
                "on_token": progress.bars.on_token(opening.text_config.max_new_tokens),
                "on_step": progress.bars.on_step,
            }
            batch_size = batch_size or pipeline.choose_batch_size(opening.image_config)
            if batch_size > 1:
                print_status(f"Note: up to {batch_size} stories are told in step.")
            try:
                with contextlib.closing(progress.bars), stop_after_step() as should_stop:
                    run.run(
                        lambda tasks: tell_stories(pipeline, tasks, settings, **callbacks),
                        should_stop,
                        progress.on_story,
                        batch_size,
                    )
            except Stopped:
                stopped = True
    return _finish(args, run, "Stopped after the step at hand" if stopped else "")


def queue(args) -> int:
    from ..files import locked, output_folder
    from ..jobs.comfy_client import ComfyServer
    from ..jobs.comfy_queue import QueueRun
    from ..jobs.run_folder import Stopped, stop_after_step
    from ..jobs.workflow import read_workflow
    from ..stories.storyboard import load_storyboard

    servers = [ComfyServer(url) for url in dict.fromkeys(args.server)]
    workflow, plans = read_workflow(args.workflow), load_storyboard(args.storyboard)
    out = _run_folder(args)
    with output_folder(out), locked(out / ".lock", _busy(out)):
        run = QueueRun(out, plans, args.storyboard, workflow, args.restart or args.overwrite, args.retry_failed)
        progress, stopped = _Progress(run, quiet=True), False
        if run.pending():
            try:
                with stop_after_step() as should_stop:
                    run.run(servers, should_stop, progress.on_story, print_status)
            except Stopped:
                stopped = True
    return _finish(args, run, "Stopped; what the servers have begun stays there" if stopped else "")


def _batch_size(value: str) -> int | None:
    """What --batch says; None for auto."""
    if value == "auto":
        return None
    if not value.isdecimal() or not 1 <= int(value[:9]) <= 64:
        raise SettingError(f"--batch must be auto, or a number of stories from 1 to 64, not {value!r:.40}.")
    return int(value)


def _run_folder(args) -> Path:
    """--out, or a free name beside it if it holds stories of something else."""
    from ..files import free_name
    from ..stories.journal import JOURNAL_FILE
    from ..stories.page import has_book

    out = Path(args.out or DEFAULT_OUT)
    if not has_book(out) or (out / JOURNAL_FILE).exists() or args.restart or args.overwrite:
        return out
    number, earlier = 2, None
    while (other := out.with_name(f"{out.name}-{number}")).exists():
        earlier, number = other if (other / JOURNAL_FILE).exists() else earlier, number + 1
    if earlier is not None:  # a run that was sent there before goes on
        print_status(f"Note: {out} holds a story; going on in {earlier}.")
        return earlier
    print_status(f"Note: {out} holds a story; writing to {free_name(out)}. Use --overwrite to replace it.")
    return free_name(out)


def _busy(out: Path) -> str:
    return f"Another run is writing into {str(out)!r}; wait for it, or give another --out."


class _Progress:
    """Says what is there already, then each story as it ends, with an estimate of the time that is left."""

    def __init__(self, run: RunFolder, quiet: bool):
        from ..stories.journal import FAILED

        self.plans: Sequence[StoryPlan] = run.plans
        self.bars, self.began = ProgressBars(quiet), time.monotonic()
        pending = run.pending()
        self.panels_left, self.num_panels = sum(self.plans[n - 1].panels for n in pending), 0
        records = [run.record(number) for number in range(1, len(self.plans) + 1) if number not in pending]
        failed = sum(record.status == FAILED for record in records)
        if records:
            print_status(f"{len(records) - failed} of {len(self.plans)} stories are there already.")
        if failed:
            print_status(f"{failed} failed before; --retry-failed tries again.")

    def on_story(self, number: int, record: StoryRecord) -> None:
        from ..stories.journal import FAILED
        from ..stories.report import duration

        self.bars.close()
        plan = self.plans[number - 1]
        self.panels_left -= plan.panels
        title, place = plan.title or f"story {number}", f"[{number}/{len(self.plans)}]"
        if record.status == FAILED:
            print_status(f"{place} {title} failed: {record.error}")
            return
        self.num_panels += plan.panels
        left = (time.monotonic() - self.began) / max(1, self.num_panels) * self.panels_left
        estimate = f"; about {duration(left)} left" if self.panels_left else ""
        print_status(f"{place} {title}: {plan.panels} panels, {duration(record.seconds)}{estimate}")


def _finish(args, run: RunFolder, stopped: str) -> int:
    """Prints what became of each story; the exit code."""
    from ..stories.journal import DONE, FAILED

    run.report()
    stories, lines, report = [], [], str(run.folder / "report.html")
    for number, plan in enumerate(run.plans, 1):
        record, folder = run.record(number), run.story_folder(number)
        status = record.status if record else "not begun"
        about = story_record(folder) if status == DONE and (folder / "story.json").exists() else {"folder": str(folder)}
        if status == DONE:
            lines.append(f"Open {about.get('page', folder)}")
        elif status == FAILED:
            about["error"] = record.error
            lines.append(f"Failed: {about['folder']}: {record.error}")
        stories.append({"title": plan.title, "status": status, **about})
    lines.append(f"All of them: {report}")
    emit(args, {"stories": stories, "report": report}, "\n".join(lines))
    if stopped:
        without = " without --restart" if args.restart else " without --overwrite" if args.overwrite else ""
        print_status(f"{stopped}; the same command{without} goes on.")
        return 130
    return 1 if any(story["status"] == FAILED for story in stories) else 0
