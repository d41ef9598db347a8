"""Tells a storyboard's stories on Ray: one worker per GPU of a cluster, each with a model of its own.

Workers only compute. What they yield comes back to this process, which writes all files and the journal; so a worker
that dies loses the step at hand, and its machine needs no access to the run's folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace

from ..errors import CheckpointError, DeviceError, MMInterleavedError, SettingError
from ..stories.journal import StoryRecord
from ..stories.story import Story
from .batch import BatchSettings, OpenStory, StoryboardRun, StoryTask, tell_stories
from .run_folder import Stopped

LOCAL = "local"  # address of a Ray that is started for this run, on this computer
MAX_DEATHS = 5  # of workers in a row at the same place of a story, after which it fails


class _Worker:
    """The actor: loads the model once, and again if Ray starts it again."""

    def __init__(self, load: dict, settings: BatchSettings, num_threads: int | None):
        self.load, self.settings, self.num_threads, self.pipeline = load, settings, num_threads, None

    def prepare(self, choose_batch_size: bool = False) -> int | str:
        """Loads the model; the number of stories that it can tell in step, or why it cannot be loaded."""
        try:
            pipeline = self._pipeline()
            return pipeline.choose_batch_size(self.settings.image) if choose_batch_size else 1
        except MMInterleavedError as error:
            return str(error)

    def _pipeline(self):
        if self.pipeline is None:
            import torch

            from ..pipeline import MMInterleavedPipeline

            if self.num_threads is not None:
                torch.set_num_threads(self.num_threads)
            self.pipeline = MMInterleavedPipeline.load(**self.load)
        return self.pipeline

    def tell(self, tasks: list[StoryTask]):
        """`tell_stories`, without the features of images, which only this model can use."""
        try:
            for grown in tell_stories(self._pipeline(), tasks, self.settings):
                yield {
                    place: _without_features(result) if isinstance(result, Story) else result
                    for place, result in grown.items()
                }
        except DeviceError:
            os._exit(1)  # Ray starts a new process


def _without_features(story: Story) -> Story:
    return story.map_images(lambda image: replace(image, features=None))


def run_on_ray(
    run: StoryboardRun,
    load: dict,
    address: str = LOCAL,
    num_workers: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_story: Callable[[int, StoryRecord], object] | None = None,
    batch_size: int | None = 1,
) -> list[StoryRecord]:
    """Tells the pending stories of a run; see `StoryboardRun.run`.

    Args:
        load: Arguments of `MMInterleavedPipeline.load`; the workers' machines must have the model under the same name.
        address: Of a Ray cluster, "auto" for the one that this computer belongs to, or LOCAL.
        num_workers: None for one per GPU of the cluster, without any one per four CPU cores.
        batch_size: How many stories a worker tells in step; None for what its memory holds.

    Raises:
        SettingError: If Ray is not installed or not reached; CheckpointError, OutputError, and Stopped.
    """
    num_pending = len(run.pending())
    with started_workers(run.settings, load, address, num_workers, num_pending, batch_size is None) as started:
        ray, workers, fitting = started
        return Dispatcher(ray, run, on_story).work(workers, batch_size or fitting, should_stop)


@contextlib.contextmanager
def started_workers(
    settings: BatchSettings,
    load: dict,
    address: str = LOCAL,
    num_workers: int | None = None,
    max_workers: int = 10**6,
    choose_batch_size: bool = False,
):
    """Ray, workers that have loaded the model, and how many stories each can tell in step; ends Ray when left.

    Raises:
        SettingError, CheckpointError: As `run_on_ray`.
    """
    ray = _connect(address)
    try:
        resources = ray.cluster_resources()
        num_gpus, num_cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1)
        count = min(num_workers or num_gpus or max(1, int(num_cpus) // 4), max_workers)
        if num_gpus:
            options = {"num_gpus": 1 / math.ceil(count / num_gpus), "num_cpus": 0}
        else:
            largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
            options = {"num_cpus": min(largest, num_cpus / count)}
        threads = None if num_gpus or "OMP_NUM_THREADS" in os.environ else max(1, int(num_cpus) // count)
        actor = ray.remote(max_restarts=-1, **options)(_Worker)
        workers = [actor.remote(load, settings, threads) for _ in range(count)]
        try:
            answers = ray.get([worker.prepare.remote(choose_batch_size) for worker in workers])
        except ray.exceptions.RayActorError:
            raise CheckpointError("A worker died while it loaded the model; see Ray's logs.") from None
        for answer in answers:
            if isinstance(answer, str):
                raise CheckpointError(answer)
        yield ray, workers, min(answers)
    finally:
        ray.shutdown()


def _connect(address: str):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise SettingError("Ray is not installed; install it with `pip install ray`, or omit --ray.") from None
    options = {"include_dashboard": False} if address == LOCAL else {}
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), 10).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
    except (ValueError, RuntimeError, OSError, OverflowError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SettingError(f"The Ray cluster {address!r} is not reached: {reason}.") from None
    return ray


class Dispatcher:
    """Gives each worker stories, and keeps what comes back."""

    def __init__(self, ray, run: StoryboardRun, on_story):
        self.ray, self.run, self.on_story = ray, run, on_story
        self.deaths: dict[int, int] = {}

    def work(self, workers: list, batch_size: int, should_stop: Callable[[], bool]) -> list[StoryRecord]:
        ray, run = self.ray, self.run
        batches, idle, busy, stopping = run.batches(batch_size), list(workers), {}, None
        starting: dict = {}  # workers that Ray starts again
        while busy or (batches and stopping is None):
            while idle and batches and stopping is None:
                worker = idle.pop(0)
                opened = [OpenStory(run, number) for number in batches.pop(0)]
                steps = worker.tell.options(num_returns="streaming").remote([story.task for story in opened])
                busy[steps] = worker, opened
            if stopping is None and should_stop():
                stopping = set(busy)  # each finishes its step
            for ready in ray.wait([*busy, *starting], timeout=0.2)[0]:
                if ready in starting:
                    worker = starting.pop(ready)
                    if self._is_started(ready):
                        idle.append(worker)
                    else:
                        starting[worker.prepare.remote()] = worker
                    continue
                worker, opened = busy[ready]
                try:
                    grown = ray.get(next(ready))
                except StopIteration:
                    run.close(opened, self.on_story)
                    idle.append(worker)
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError:  # the worker died, or with its computer what it had drawn
                    batches[:0] = [[number] for number in self._survivors(opened)]
                    starting[worker.prepare.remote()] = worker
                else:
                    for story in opened:
                        self.deaths.pop(story.number, None)
                    again = run.advance(opened, grown, self.on_story)
                    is_last = bool(again) or (stopping is not None and ready in stopping)
                    if not is_last:
                        continue
                    batches[:0] = again
                    ray.cancel(ready)
                    idle.append(worker)
                del busy[ready]
        run.report()
        if stopping is not None:
            raise Stopped
        return [run.journal.records[number] for number in range(1, len(run.plans) + 1)]

    def _is_started(self, answer) -> bool:
        """Whether a worker that died is there again; raises CheckpointError if it cannot load the model any more."""
        try:
            result = self.ray.get(answer)
        except self.ray.exceptions.RayTaskError:
            raise
        except self.ray.exceptions.RayError:
            time.sleep(0.2)
            return False
        if isinstance(result, str):
            raise CheckpointError(result)
        return True

    def _survivors(self, opened: list[OpenStory]) -> list[int]:
        """Stories to go on with after their worker's death."""
        numbers = []
        for story in opened:
            if story.is_done:
                continue
            self.deaths[story.number] = self.deaths.get(story.number, 0) + 1
            if self.deaths[story.number] < MAX_DEATHS:
                numbers.append(story.number)
            else:
                self.run.fail(story.number, f"Its worker died {MAX_DEATHS} times at the same place; see Ray's logs.")
                self.run.ended(story.number, self.on_story)
        return numbers
