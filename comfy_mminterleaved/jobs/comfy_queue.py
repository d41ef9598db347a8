"""Sends a storyboard through a workflow to running ComfyUI servers, and collects what they make.

Each server has a thread that keeps a prompt or two ahead. The journal knows which prompt went where, so that a run goes
on after a restart of either side.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingError
from ..files import atomic_write, ensure_writable_dir, path_below
from ..stories.journal import DONE, QUEUED, StoryRecord
from ..stories.storyboard import StoryPlan, storyboard_images
from .batch import describe_plan
from .comfy_client import ComfyServer, RequestRefused, ServerDown
from .run_folder import RunFolder, Stopped, move_into_place
from .workflow import STORYBOARD_NODE, is_page_format, to_prompt, with_story

AHEAD = 2  # prompts at a server: one that runs, and one so that it need not wait for us
POLL_EVERY, RETRY_EVERY = 0.25, 3.0  # seconds between two questions, and to a server that does not answer
LOST_AFTER = 3  # questions in a row after which a prompt that a server does not know is lost
INPUT_FOLDER = "mminterleaved"  # below the servers' input folder
_LAYOUT = {"pos", "size", "order", "flags", "color", "bgcolor", "title", "properties", "groups", "extra", "config"}


class QueueRun(RunFolder):
    """A run folder whose stories are told by ComfyUI servers; see RunFolder for the other arguments.

    Args:
        storyboard: The file; it is sent to the servers with its images.
        workflow: As the page saves it, or in API format; with one Load Storyboard.
    """

    def __init__(
        self,
        folder: str | Path,
        plans: Sequence[StoryPlan],
        storyboard: str | Path,
        workflow: dict,
        restart: bool = False,
        retry_failed: bool = False,
    ):
        essence = _without_layout(workflow)
        fingerprints = [_digest([describe_plan(plan), essence]) for plan in plans]
        super().__init__(folder, plans, fingerprints, restart, retry_failed)
        self.workflow, self.storyboard = workflow, Path(storyboard)
        names = storyboard_images(storyboard)
        self.files = {name: (self.storyboard.parent / name).read_bytes() for name in names}
        self.files[self.storyboard.name] = self.storyboard.read_bytes()
        contents = [[name, _digest(data.hex())] for name, data in sorted(self.files.items())]
        self.input_folder = f"{INPUT_FOLDER}/{_digest(contents)}"  # another storyboard never overwrites a waiting one's

    def run(
        self,
        servers: Sequence[ComfyServer],
        should_stop: Callable[[], bool] = lambda: False,
        on_story: Callable[[int, StoryRecord], object] | None = None,
        on_status: Callable[[str], object] = lambda line: None,
        ahead: int = AHEAD,
    ) -> list[StoryRecord]:
        """Has the servers tell the pending stories.

        Args:
            on_status: Called with a line about a server.

        Raises:
            SettingError: If no server can run the workflow; OutputError, and Stopped: the prompts that are at a server
                stay there, and the next run collects them.
        """
        work = _Work(self, [server.url for server in servers], on_story, ahead)
        threads = [_Feeder(work, server, on_status) for server in servers]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.1)
                if all(thread.has_failed and not thread.was_up for thread in threads):
                    work.fault(SettingError("No server answers; start one, or give another --server."))
                if should_stop() or work.error is not None:
                    break
        finally:
            work.stop.set()
            for thread in threads:
                thread.join()
        self.report()
        if work.error is not None:
            raise work.error
        if work.left:
            refusals = [thread.refusal for thread in threads if thread.refusal]
            if len(refusals) == len(threads):
                raise SettingError(refusals[0])
            raise Stopped
        return [self.journal.records[number] for number in range(1, len(self.plans) + 1)]


class _Work:
    """What is left to do, shared by the servers' threads."""

    def __init__(self, run: QueueRun, urls: Sequence[str], on_story, ahead: int):
        self.run, self.on_story, self.ahead, self.num_servers = run, on_story, ahead, len(urls)
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.error: Exception | None = None
        self.waiting: deque[int] = deque()
        self.at_servers: dict[str, dict[str, int]] = {}  # from an earlier run: url -> prompt -> story
        pending = run.pending()
        self.left, self.being_collected = set(pending), set()
        for number in pending:
            record = run.record(number)
            if record is not None and record.status == QUEUED and record.server in urls:
                self.at_servers.setdefault(record.server, {})[record.prompt] = number
            else:
                self.waiting.append(number)

    def take(self, is_idle: bool) -> int | None:
        """A story for a server; the last ones are kept for servers that have nothing to do."""
        with self.lock:
            return self.waiting.popleft() if len(self.waiting) > (0 if is_idle else self.num_servers - 1) else None

    def claim(self, number: int, is_finished: bool) -> bool:
        """Whether a server may keep a story that it was sent before: if nobody else has it, or it is finished there."""
        with self.lock:
            is_free = number in self.waiting
            if is_free:
                self.waiting.remove(number)
            return is_free or (is_finished and number in self.left)

    @contextlib.contextmanager
    def collecting(self, number: int):
        """Yields whether a server may collect a story: only one does, and only if it is still to be told."""
        with self.lock:
            is_first = number in self.left and number not in self.being_collected
            if is_first:
                self.being_collected.add(number)
        try:
            yield is_first
        finally:
            if is_first:
                with self.lock:
                    self.being_collected.discard(number)

    def take_over(self, url: str) -> dict[str, int]:
        """Prompts that an earlier run sent to a server."""
        with self.lock:
            return self.at_servers.pop(url, {})

    def put_back(self, numbers) -> None:
        """Has stories told by whoever comes next."""
        with self.lock:
            again = (n for n in numbers if n in self.left and n not in self.waiting)
            self.waiting.extendleft(sorted(again, reverse=True))

    def record_queued(self, number: int, server: str, prompt_id: str) -> None:
        with self.lock:
            fingerprint = self.run.fingerprints[number - 1]
            self.run.journal.append(number, QUEUED, fingerprint=fingerprint, server=server, prompt=prompt_id)

    def finish(self, number: int, folder: Path, seconds: float) -> None:
        """Keeps a story that was collected in a folder."""
        with self.lock:
            move_into_place(folder, self.run.story_folder(number))
            panels = self.run.plans[number - 1].panels
            self.run.journal.append(number, DONE, panel=panels, seconds=round(seconds, 3))
            self._end(number)

    def fail(self, number: int, sentence: str) -> None:
        with self.lock:
            if number in self.left:
                self.run.fail(number, sentence)
                self._end(number)

    def _end(self, number: int) -> None:
        self.left.discard(number)
        if number in self.waiting:
            self.waiting.remove(number)
        self.run.ended(number, self.on_story)

    def fault(self, error: Exception) -> None:
        """Ends the run."""
        with self.lock:
            self.error = self.error or error
        self.stop.set()


class _Feeder(threading.Thread):
    """Keeps one server busy."""

    def __init__(self, work: _Work, server: ComfyServer, on_status: Callable[[str], object]):
        super().__init__(daemon=True, name=server.url)
        self.work, self.server, self.on_status = work, server, on_status
        self.prompts: dict[str, _Sent] = {}
        self.orphans: dict[str, int] = {}  # sent before the server stopped answering; others may have them now
        self.template: dict | None = None
        self.last_end = time.monotonic()
        self.refusal, self.was_up, self.has_failed = "", False, False

    def run(self) -> None:
        work, is_down = self.work, False
        try:
            while work.left and not work.stop.is_set():
                try:
                    if self.template is None:
                        self._connect()
                        if is_down:
                            self.on_status(f"{self.server.url} is back.")
                        is_down, self.was_up = False, True
                    self._feed()
                    self._collect()
                except ServerDown as error:
                    if not is_down:
                        self.on_status(f"{error} Its stories go to the others; it is asked again.")
                    is_down = self.has_failed = True
                    self._let_go()
                    work.stop.wait(RETRY_EVERY)
                    continue
                work.stop.wait(POLL_EVERY)
        except RequestRefused as error:
            self.was_up = True
            self._refuse(f"The server {self.server.url} cannot run the workflow: {error}.")
        except SettingError as error:
            self.was_up = True
            self._refuse(str(error))
        except Exception as error:
            work.fault(error)

    def _refuse(self, sentence: str) -> None:
        self.refusal = sentence
        self.on_status(sentence)
        self._let_go()

    def _let_go(self) -> None:
        """Gives back the stories that are at the server."""
        lost = {prompt: sent.number for prompt, sent in self.prompts.items()} | self.work.take_over(self.server.url)
        self.orphans |= lost
        self.work.put_back(lost.values())
        self.prompts.clear()
        self.template = None

    def _connect(self) -> None:
        """Sends the storyboard, and takes up what an earlier run sent to this server."""
        run, server = self.work.run, self.server
        definitions = server.definitions()
        template = run.workflow
        if is_page_format(template):
            template = to_prompt(template, definitions, f"The workflow on {server.url}")
        missing = sorted({entry["class_type"] for entry in template.values()} - set(definitions))
        if missing:
            raise SettingError(f"The server {server.url} has no node {', '.join(missing)}; install what brings it.")
        with_story(template, "", 0)  # says so now if it has no Load Storyboard
        for name, data in run.files.items():
            server.upload(f"{run.input_folder}/{name}", data)
        queued = server.queued()
        earlier = self.work.take_over(server.url)
        self.orphans |= earlier
        self.work.put_back(earlier.values())
        for prompt, number in self.orphans.items():
            is_finished = server.history(prompt) is not None
            if (is_finished or prompt in queued) and self.work.claim(number, is_finished):
                self.prompts[prompt] = _Sent(number)
        server.remove([prompt for prompt in self.orphans if prompt in queued and prompt not in self.prompts])
        self.orphans.clear()
        self.template = template

    def _feed(self) -> None:
        while len(self.prompts) < self.work.ahead and (number := self.work.take(not self.prompts)) is not None:
            prompt = with_story(
                self.template, f"{self.work.run.input_folder}/{self.work.run.storyboard.name}", number - 1
            )
            page = self.work.run.workflow if is_page_format(self.work.run.workflow) else None
            extra = {"extra_pnginfo": {"workflow": page}} if page else {}
            prompt_id = str(uuid.uuid4())
            try:
                self.work.record_queued(number, self.server.url, prompt_id)
                given = self.server.queue(prompt, prompt_id, extra)
                if given != prompt_id:
                    self.work.record_queued(number, self.server.url, given)
            except BaseException:
                self.orphans[prompt_id] = number  # it may have come through
                self.work.put_back([number])
                raise
            self.prompts[given] = _Sent(number)

    def _collect(self) -> None:
        """Fetches what has ended."""
        queued: set[str] | None = None
        for prompt_id, sent in list(self.prompts.items()):
            if sent.number not in self.work.left:
                del self.prompts[prompt_id]
                continue
            entry = self.server.history(prompt_id)
            if entry is not None:
                with self.work.collecting(sent.number) as is_first:
                    if is_first:
                        self._keep(sent.number, entry)
                del self.prompts[prompt_id]
                continue
            queued = self.server.queued() if queued is None else queued
            sent.missing = 0 if prompt_id in queued else sent.missing + 1
            if sent.missing >= LOST_AFTER:  # the server was started again
                del self.prompts[prompt_id]
                self.work.put_back([sent.number])

    def _keep(self, number: int, entry: dict) -> None:
        error = _failure(entry)
        if error:
            self.work.fail(number, error)
            return
        run = self.work.run
        folder = run.unfinished_folder(number)
        files = [(node, file) for node, output in entry.get("outputs", {}).items() for file in _files(output)]
        saved = [pair for pair in files if pair[1].get("type") == "output"] or files  # previews, if that is all
        if not saved:
            self.work.fail(number, "The workflow saved no file; add Save Story or another node that saves.")
            return
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        ensure_writable_dir(folder)
        try:
            for number_of_file, (_, file) in enumerate(saved, 1):
                name = re.split(r"[/\\]", file["filename"])[-1]
                path = path_below(folder, name)
                if path is None or path.exists():  # two nodes saved under one name
                    path = folder / f"{number_of_file:02d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"
                atomic_write(path, self.server.download(file))
        except RequestRefused as refused:
            shutil.rmtree(folder, ignore_errors=True)
            self.work.fail(number, f"{file['filename']!r} cannot be fetched from {self.server.url}: {refused}.")
            return
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        now = time.monotonic()
        seconds = _seconds(entry) or now - self.last_end
        self.last_end = now
        self.work.finish(number, folder, seconds)


@dataclass
class _Sent:
    """A prompt at a server; `missing` counts how often in a row the server did not know it."""

    number: int
    missing: int = 0


def _files(output: dict) -> list[dict]:
    """Every file that a node's output names, each once."""
    files = {}
    for items in output.values():
        for item in items if isinstance(items, list) else []:
            if isinstance(item, dict) and isinstance(item.get("filename"), str):
                files[item["filename"], item.get("subfolder"), item.get("type")] = item
    return list(files.values())


def _failure(entry: dict) -> str:
    """The sentence that a prompt ended with; empty if it went well."""
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return ""
    for event, data in _messages(entry):
        if event == "execution_error":
            sentence = str(data.get("exception_message", "")).strip().splitlines()
            node = f"{data['node_type']}: " if data.get("node_type") else ""
            return f"{node}{sentence[0] if sentence else data.get('exception_type', 'no reason given')}"
        if event == "execution_interrupted":
            return "It was cancelled at the server."
    return "The server gave no reason."


def _messages(entry: dict) -> list[tuple[str, dict]]:
    """What happened to a prompt, as events with their data; some newer cores have lines of text instead."""
    messages = []
    for message in (entry.get("status") or {}).get("messages", []):
        if isinstance(message, str):
            event, _, sentence = message.partition(": ")
            messages.append((event, {"exception_message": sentence}))
        else:
            messages.append((message[0], message[1]))
    return messages


def _seconds(entry: dict) -> float:
    """How long a prompt ran; 0 if the server does not say."""
    times = [data.get("timestamp") for _, data in _messages(entry)]
    times = [t for t in times if isinstance(t, (int, float))]
    return (max(times) - min(times)) / 1000 if times else 0.0


def _without_layout(value):
    """A workflow without what does not change its result: where nodes stand, and what Load Storyboard reads."""
    if isinstance(value, list):
        return [_without_layout(item) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("inputs"), dict):  # in API format
        return {} if value.get("class_type") == STORYBOARD_NODE else value
    kept = {key: _without_layout(item) for key, item in value.items() if key not in _LAYOUT}
    if value.get("type") == STORYBOARD_NODE:
        kept.pop("widgets_values", None)
    return kept


def _digest(data) -> str:
    return hashlib.blake2b(json.dumps(data).encode(), digest_size=16).hexdigest()
