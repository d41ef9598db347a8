"""The folder that a storyboard's stories go to, with the journal of what is finished."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..files import ensure_writable_dir, friendly_errors, remove_leftovers, replace_path
from ..stories.journal import BEGUN, DONE, FAILED, Journal, StoryRecord
from ..stories.report import write_report
from ..stories.storyboard import StoryPlan

REPORT_EVERY = 10  # seconds between two writings of the report


class Stopped(Exception):
    """The run was asked to stop; what was finished is kept."""


class RunFolder:
    """One folder's stories: `001`, `002`, ..., a journal and report.html.

    Args:
        folder: Created if needed. Stories that its journal calls finished, with the same fingerprint, are left alone.
        fingerprints: Of what decides how each story comes out.
        restart: Tell all stories anew; each replaces the old one when it is whole. A run without it goes on with that.
        retry_failed: Tell failed stories again, which else stay failed.
    """

    def __init__(
        self,
        folder: str | Path,
        plans: Sequence[StoryPlan],
        fingerprints: Sequence[str],
        restart: bool = False,
        retry_failed: bool = False,
    ):
        self.folder, self.plans, self.fingerprints = Path(folder), list(plans), list(fingerprints)
        ensure_writable_dir(self.folder)
        remove_leftovers(self.folder)
        self.journal = Journal(self.folder)
        if restart and self.journal.records:
            self.journal.restart()
        self.retry_failed = retry_failed
        self._reported = float("-inf")
        for number in range(1, len(self.plans) + 1):  # of a run that was killed before its journal knew of them
            if self.record(number) is None or self.record(number).status not in (BEGUN, FAILED):
                shutil.rmtree(self.unfinished_folder(number), ignore_errors=True)

    def record(self, number: int) -> StoryRecord | None:
        """What the journal knows of a story, if it was told from the same plan; None if it is to be told afresh."""
        record = self.journal.records.get(number)
        if record is None or number in self.journal.afresh or record.fingerprint != self.fingerprints[number - 1]:
            return None
        return record

    def pending(self) -> list[int]:
        """Numbers of the stories to tell."""
        kept = (DONE,) if self.retry_failed else (DONE, FAILED)
        numbers = range(1, len(self.plans) + 1)
        return [n for n in numbers if self.record(n) is None or self.record(n).status not in kept]

    def story_folder(self, number: int) -> Path:
        return self.folder / f"{number:03d}"

    def unfinished_folder(self, number: int) -> Path:
        """Where a story grows while its own folder holds an older one."""
        return self.folder / f".{number:03d}.unfinished"

    def fail(self, number: int, sentence: str) -> None:
        """Records why a story ended."""
        self.journal.append(number, FAILED, fingerprint=self.fingerprints[number - 1], error=sentence)

    def ended(self, number: int, on_story: Callable | None) -> None:
        """Reports a story that is done or failed."""
        if time.monotonic() - self._reported > REPORT_EVERY:
            self.report()
        if on_story is not None:
            on_story(number, self.journal.records[number])

    def report(self) -> None:
        """Writes report.html."""
        records = {number: self.record(number) for number in range(1, len(self.plans) + 1)}
        write_report(self.folder, self.plans, {number: record for number, record in records.items() if record})
        self._reported = time.monotonic()


def move_into_place(work: Path, folder: Path) -> None:
    """Gives a folder its name, in place of an older one; raises OutputError."""
    old = folder.with_name(f".{folder.name}.old")
    if work != folder:
        shutil.rmtree(old, ignore_errors=True)
        with friendly_errors(folder, "The folder"):
            if folder.exists():
                replace_path(folder, old)
            replace_path(work, folder)
    shutil.rmtree(old, ignore_errors=True)


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
