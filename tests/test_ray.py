"""Storyboards on Ray: workers of a local cluster, killed now and then."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed")

FAST = ["--model", "tiny-random", "--max-new-tokens", "5", "--quiet"]


@pytest.fixture
def make_board(tmp_path):
    def make(count, panels=2):
        openings = "Once there was a bear.", "A fox ran.", "The cat sat on a wall."
        stories = [{"opening": openings[n % 3], "panels": panels, "seed": n, "title": str(n)} for n in range(count)]
        path = tmp_path / "board.json"
        path.write_text(json.dumps({"format": "mm-interleaved-storyboard", "version": 1, "stories": stories}))
        return path

    return make


def start(board, out, *flags, mark="", steps=2):
    """One thread each, because sums depend on the number of threads."""
    command = [sys.executable, "-m", "comfy_mminterleaved", "tell", "--storyboard", str(board), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MMI_TEST": mark}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*command, *FAST, "--steps", str(steps), *flags], text=True, env=environment, start_new_session=True, **pipes
    )


def contents(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("[0-9]*/*"))}


def drawn(out) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    return [(line["story"], line["panel"]) for line in lines if line["event"] == "panel"]


def workers(mark: str) -> list[int]:
    """Processes of actors that a run with this mark started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = process.joinpath("cmdline").read_bytes().startswith(b"ray::_Worker.tell")
            if is_worker and f"MMI_TEST={mark}".encode() in process.joinpath("environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
def test_kills_of_workers_lose_nothing(make_board, tmp_path, kills):
    board = make_board(20 if kills > 1 else 6, panels=4)
    one = start(board, tmp_path / "one", steps=20)
    one.communicate()
    assert one.returncode == 0
    generator, out, mark = torch.Generator().manual_seed(2), tmp_path / "out", uuid.uuid4().hex
    done = size = 0
    while done < kills:
        before = len(drawn(out)) if out.exists() else 0
        process = start(board, out, "--ray", "--workers", "2", "--restart", mark=mark, steps=20)
        while process.poll() is None and done < kills:
            time.sleep(0.2 + 2 * torch.rand(1, generator=generator).item())
            if size and (out / "journal.jsonl").stat().st_size == size:
                continue  # five deaths without a step would make a story fail
            if alive := workers(mark):
                os.kill(alive[int(torch.randint(len(alive), (1,), generator=generator))], signal.SIGKILL)
                done, size = done + 1, (out / "journal.jsonl").stat().st_size
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert contents(out) == contents(tmp_path / "one")
        assert len(drawn(out)[before:]) == len(set(drawn(out)[before:])), "an image was drawn twice"
        assert not [p for p in out.rglob(".*") if p.name != ".lock"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child")
def test_ctrl_c_and_a_story_that_fails(make_board, tmp_path):
    board, out = make_board(6), tmp_path / "out"
    data = json.loads(board.read_text())
    data["stories"][1]["panels"] = 1000
    board.write_text(json.dumps(data))
    process = start(board, out, "--ray", "--workers", "2", steps=30)
    while process.poll() is None and not (out / "001" / "01.png").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate()
    assert process.returncode == 130 and "the same command goes on" in errors, errors
    process = start(board, out, "--ray", "--workers", "2", "--json", steps=30)
    answer, errors = process.communicate()
    assert process.returncode == 1, errors
    stories = json.loads(answer)["stories"]
    assert [story["status"] for story in stories] == ["done", "failed", "done", "done", "done", "done"]
    assert stories[1]["error"].startswith("A story with 1000 more panels")
    assert len(drawn(out)) == len(set(drawn(out))) == 10, "an image was drawn twice"


def test_what_is_refused(make_board, tmp_path):
    board = make_board(1)
    for flags, sentence in (
        (["--ray", "--model", "nowhere"], "nowhere"),
        (["--ray", "127.0.0.1:9"], "The Ray cluster '127.0.0.1:9' is not reached"),
        (["--workers", "2"], "--workers is the number of Ray's workers"),
        (["--ray", "--workers", "0"], "at least 1"),
    ):
        process = start(board, tmp_path / "out", *flags)
        _, errors = process.communicate()
        assert process.returncode == 2 and sentence in errors and "Traceback" not in errors, errors
