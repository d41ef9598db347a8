"""The journal of a storyboard's run: one line for everything that is finished, appended and synced.

A run that is killed leaves a journal that says where it was; the next reads it and goes on.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from ..files import friendly_errors

JOURNAL_FILE = "journal.jsonl"
BEGUN, QUEUED, DONE, FAILED = "begun", "queued", "done", "failed"
RESTART = "restart"


@dataclass
class StoryRecord:
    """What a journal knows of one story.

    Args:
        fingerprint: Of text, settings and images that it was told from.
        status: BEGUN, QUEUED (at a server), DONE or FAILED.
        opening, opening_images: Number of segments before the first that is generated, and of images among them; None
            for a story that was not begun here.
        panels: Finished so far; seconds: that they took, over all runs.
        error: The sentence that a failed story ended with.
        server, prompt: Where it was queued last, and as which prompt.
    """

    fingerprint: str
    status: str = BEGUN
    opening: int | None = None
    opening_images: int = 0
    panels: int = 0
    seconds: float = 0.0
    error: str = ""
    server: str = ""
    prompt: str = ""


class Journal:
    """Records of stories by their number in the storyboard, from 1; raises OutputError.

    `afresh` has the numbers of those that are told anew since a restart and were not begun yet: their records are old.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / JOURNAL_FILE
        self.records: dict[int, StoryRecord] = {}
        self.afresh: set[int] = set()
        with friendly_errors(self.path, "The journal"):
            self.path.touch()  # from now on the folder is known as a run's, also if that is killed at once
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):  # a line that a kill cut short
                with open(self.path, "rb+") as file:
                    file.truncate(whole)
        for line in data[:whole].splitlines():
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise OutputError(
                    f"The journal {str(self.path)!r} holds a line that is none of a journal: {line[:60]!r}; remove it "
                    "to begin anew."
                ) from None

    def _apply(self, line: dict) -> None:
        event = line["event"]
        if event == RESTART:
            self.afresh = set(self.records)
            return
        number = int(line["story"])
        if number in self.afresh:
            self.afresh.discard(number)
            self.records.pop(number, None)
        if event == BEGUN:
            counts = int(line["opening"]), int(line.get("opening_images", 0))
            self.records[number] = StoryRecord(line["fingerprint"], BEGUN, *counts)
            return
        record = self.records.get(number)
        if record is None or line.get("fingerprint", record.fingerprint) != record.fingerprint:
            record = self.records[number] = StoryRecord(line.get("fingerprint", ""))
        record.seconds += float(line.get("seconds", 0))
        if event == "panel":
            record.panels, record.status = int(line["panel"]), BEGUN
        elif event == QUEUED:
            record.status, record.server, record.prompt = event, line["server"], line["prompt"]
        elif event in (DONE, FAILED):
            record.status, record.error = event, line.get("error", "")
            record.panels = int(line.get("panel", record.panels))
        else:
            raise ValueError(event)

    def restart(self) -> None:
        """Has all stories told anew, in this run and those that go on with it."""
        self._append({"event": RESTART})

    def append(self, story: int, event: str, **values) -> None:
        """Adds a line, on the disk when this returns."""
        self._append({"story": story, "event": event, **values})

    def _append(self, line: dict) -> None:
        self._apply(line)
        with friendly_errors(self.path, "The journal"), open(self.path, "ab") as file:
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
