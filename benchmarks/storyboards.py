"""python -m benchmarks.storyboards: stories per hour of a storyboard's ways, one thread for each worker.

"bare" is a plain loop over `generate_story`. With two ComfyUI servers (`--server URL --server URL`, started with
OMP_NUM_THREADS=1) also the workflow of template 5: "bare" then means that all prompts are queued at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
import uuid
from pathlib import Path

import torch

from comfy_mminterleaved import MMInterleavedPipeline
from comfy_mminterleaved.jobs.batch import BatchSettings, StoryboardRun, tell_stories
from comfy_mminterleaved.jobs.comfy_client import ComfyServer
from comfy_mminterleaved.jobs.comfy_queue import QueueRun
from comfy_mminterleaved.jobs.workflow import read_workflow, to_prompt, with_story
from comfy_mminterleaved.stories.page import save_story
from comfy_mminterleaved.stories.storyboard import load_storyboard

from .timing import interleaved

TEMPLATE = Path(__file__).parents[1] / "workflows" / "5 Storyboard batch.json"
NAMES = "Mia", "Otto", "Lea", "Ben", "Ida", "Tom", "Eva", "Max"
_seeds = itertools.count(step=1000)  # a server would take a story that it has told before from its cache


def write_board(folder: Path, count: int, panels: int) -> Path:
    stories = [
        {
            "opening": f"{NAMES[n % 8]} is a cat in a red coat with a bow. {NAMES[n % 8]} waves in the village.",
            "panels": panels,
            "seed": n + next(_seeds),
        }
        for n in range(count)
    ]
    path = folder / "board.json"
    path.write_text(json.dumps({"format": "mm-interleaved-storyboard", "version": 1, "stories": stories}))
    return path


def local_cases(pipeline, settings: BatchSettings, count: int, panels: int) -> dict:
    """Functions that tell a storyboard in a new folder on this model."""

    def bare():
        with tempfile.TemporaryDirectory() as folder:
            for number, plan in enumerate(load_storyboard(write_board(Path(folder), count, panels))):
                text, image = (config.with_seed_offset(plan.seed) for config in (settings.text, settings.image))
                story = pipeline.generate_story(plan.opening, plan.panels, text_config=text, image_config=image)
                target = Path(folder) / str(number)
                target.mkdir()
                save_story(target, story)

    def run(batch_size: int):
        with tempfile.TemporaryDirectory() as folder:
            plans = load_storyboard(write_board(Path(folder), count, panels))
            StoryboardRun(Path(folder) / "out", plans, settings).run(
                lambda tasks: tell_stories(pipeline, tasks, settings), batch_size=batch_size
            )

    cases = {"bare loop": bare, "tell --storyboard": lambda: run(1)}
    return cases | {f"the same, --batch {n}": lambda n=n: run(n) for n in (2, 4, 8)}


def ray_cases(stack: contextlib.ExitStack, settings: BatchSettings, count: int, panels: int) -> dict:
    from comfy_mminterleaved.jobs.ray_runner import LOCAL, Dispatcher, started_workers

    ray, workers, _ = stack.enter_context(started_workers(settings, {"source": "starter"}, LOCAL, 2))

    def run(num_workers: int):
        with tempfile.TemporaryDirectory() as folder:
            plans = load_storyboard(write_board(Path(folder), count, panels))
            storyboard_run = StoryboardRun(Path(folder) / "out", plans, settings)
            Dispatcher(ray, storyboard_run, None).work(workers[:num_workers], 1, lambda: False)

    return {"Ray, one worker": lambda: run(1), "Ray, two workers": lambda: run(2)}


def server_cases(urls: list[str], count: int, panels: int) -> dict:
    workflow, servers = read_workflow(TEMPLATE), [ComfyServer(url) for url in urls]

    def run(used: list[ComfyServer]):
        with tempfile.TemporaryDirectory() as folder:
            board = write_board(Path(folder), count, panels)
            QueueRun(Path(folder) / "out", load_storyboard(board), board, workflow).run(used)

    def bare():
        server, name = servers[0], f"benchmark/{uuid.uuid4().hex}.json"
        with tempfile.TemporaryDirectory() as folder:
            server.upload(name, write_board(Path(folder), count, panels).read_bytes())
        prompt = to_prompt(workflow, server.definitions())
        ids = [server.queue(with_story(prompt, name, n), str(uuid.uuid4())) for n in range(count)]
        while server.history(ids[-1]) is None:
            time.sleep(0.1)

    cases = {"ComfyUI, bare": bare, "queue, one server": lambda: run(servers[:1])}
    return cases | ({"queue, two servers": lambda: run(servers)} if len(servers) > 1 else {})


def measure(urls: list[str], count: int, panels: int, rounds: int, source: str = "starter", ray: bool = True) -> dict:
    """Stories per hour of each case: the median of interleaved rounds."""
    torch.set_num_threads(1)
    pipeline = MMInterleavedPipeline.load(source)
    defaults = pipeline.generation_config
    settings = BatchSettings(source, None, defaults.text, defaults.image)
    with contextlib.ExitStack() as stack:
        cases = local_cases(pipeline, settings, count, panels)
        cases |= ray_cases(stack, settings, count, panels) if ray else {}
        cases |= server_cases(urls, count, panels) if urls else {}
        seconds = interleaved(cases, rounds)
    return {name: 3600 * count / duration for name, duration in seconds.items()}


def table(found: dict) -> str:
    lines = ["| way | stories per hour | to its bare loop |", "|---|---|---|"]
    for name, rate in found.items():
        bare = found["ComfyUI, bare" if "server" in name or "ComfyUI" in name else "bare loop"]
        lines.append(f"| {name} | {rate:,.0f} | {rate / bare:.2f} |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.storyboards", description=__doc__.splitlines()[0])
    parser.add_argument("--server", action="append", default=[], metavar="URL")
    parser.add_argument("--stories", type=int, default=8)
    parser.add_argument("--panels", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    sys.stdout.write(table(measure(args.server, args.stories, args.panels, args.rounds)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
