"""Medians of interleaved runs: whatever else the machine does falls on all cases alike."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(cases: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Seconds of each case: every round runs all of them, in an order that turns round by round."""
    names, seconds = list(cases), {name: [] for name in cases}
    for number in range(-warm_up, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize()
            began = time.perf_counter()
            cases[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_mb() -> float:
    """Of this process, so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what rusage says there includes the peak of the process that started this one
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def in_a_process(module: str, *arguments: str) -> str:
    """What `python -m MODULE ARGUMENTS` prints."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()
