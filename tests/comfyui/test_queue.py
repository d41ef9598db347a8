"""`mminterleaved queue`: a storyboard over one or two real servers, kills of either side included."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import COMFYUI, PYTHON
from server import ROOT, Server
from test_behaviour import LOAD, node, tell

from comfy_mminterleaved.cli import main
from comfy_mminterleaved.stories.page import load_story
from comfy_mminterleaved.stories.storyboard import load_storyboard

WORKFLOW = {
    **tell(story=["4", 0], panels=["4", 1], seed=["4", 2], opening="", plan=["4", 4]),
    "1": LOAD,
    "4": node("MMInterleavedLoadStoryboard", storyboard="", index=0, encoder=["1", 0]),
}


def url(server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture
def make_board(tmp_path):
    """A function that writes a storyboard of stories of one or two panels; every third opens with an image."""
    (tmp_path / "images").mkdir()
    shutil.copy(ROOT / "example.png", tmp_path / "images" / "otto.png")

    def make(count, **changes):
        stories = []
        for number in range(1, count + 1):
            opening = [{"text": f"Mia waves in the village with a {('kite', 'drum', 'ball')[number % 3]}."}]
            if number % 3 == 0:
                opening.insert(0, {"image": "images/otto.png"})
            stories.append({"title": f"Story {number}", "opening": opening, "panels": 1 + number % 2, "seed": number})
        for number, values in changes.items():
            stories[int(number[1:]) - 1].update(values)
        path = tmp_path / "board.json"
        path.write_text(json.dumps({"format": "mm-interleaved-storyboard", "version": 1, "stories": stories}))
        return path

    return make


@pytest.fixture
def workflow(tmp_path):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(WORKFLOW))
    return path


def command(workflow, board, out, *servers):
    flags = [flag for server in servers for flag in ("--server", server if isinstance(server, str) else url(server))]
    return ["queue", str(workflow), "--storyboard", str(board), "--out", str(out), *flags]


def start(*args):
    line = [sys.executable, "-m", "comfy_mminterleaved", *command(*args)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def contents(out) -> dict:
    """Texts and pixels of each story; the metadata of the images names the server's own files."""
    stories = {folder.name: load_story(folder) for folder in sorted(out.glob("[0-9]*"))}
    return {name: (story.text, [image.digest for image in story.images]) for name, story in stories.items()}


def events(out, kind) -> list[dict]:
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def queued_again(out) -> list[int]:
    """Stories that were sent to a server after they were done, or to two servers that both answered."""
    done, again = set(), []
    for line in map(json.loads, (out / "journal.jsonl").read_text().splitlines()):
        if line["event"] == "queued" and line["story"] in done:
            again.append(line["story"])
        if line["event"] == "done":
            done.add(line["story"])
    return again


def strays(out) -> list[str]:
    return [p.name for p in out.rglob(".*") if p.name != ".lock"]


def test_a_template_with_its_example(comfyui, tmp_path, capsys):
    """As the page saved it: what it would queue by itself is queued, one story after the other."""
    template = ROOT / "workflows" / "5 Storyboard batch.json"
    board = ROOT / "workflows" / "example storyboard" / "storyboard.json"
    out = tmp_path / "out"
    assert main([*command(template, board, out, comfyui), "--json"]) == 0
    answer = capsys.readouterr()
    stories = json.loads(answer.out)["stories"]
    assert [story["status"] for story in stories] == ["done"] * 3 and "about" in answer.err
    expected = [plan.panels + len(plan.opening.images) for plan in load_storyboard(board)]
    assert [len(load_story(story["folder"]).images) for story in stories] == expected
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "3 of 3 stories, 0 failed" in page and 'src="003/01.png"' in page and not strays(out)
    before = comfyui.get("/history").keys()
    assert main(command(template, board, out, comfyui)) == 0
    assert "3 of 3 stories are there already." in capsys.readouterr().err
    assert comfyui.get("/history").keys() == before


def test_a_story_that_fails_leaves_the_others_alone(comfyui, workflow, make_board, tmp_path, capsys):
    board, out = make_board(3, s2={"panels": 64}), tmp_path / "out"
    assert main([*command(workflow, board, out, comfyui), "--json"]) == 1
    stories = json.loads(capsys.readouterr().out)["stories"]
    assert [story["status"] for story in stories] == ["done", "failed", "done"]
    sentence = "A story with 64 more panels has"  # newer cores do not say which node it was
    assert stories[1]["error"].startswith((f"MMInterleavedTellStory: {sentence}", sentence))
    make_board(3)
    assert main(command(workflow, board, out, comfyui)) == 0
    assert [line["story"] for line in events(out, "done")] == [1, 3, 2]


def test_what_no_server_can_do_is_said_at_once(comfyui, workflow, make_board, tmp_path, capsys):
    board, out = make_board(2), tmp_path / "out"

    def sentence(data, *servers):
        workflow.write_text(json.dumps(data))
        assert main(command(workflow, board, out, *(servers or [comfyui]))) == 2
        return capsys.readouterr().err

    assert "has no node Load Storyboard; it must have one" in sentence({"1": LOAD})
    assert "has no node Unheard; install" in sentence({**WORKFLOW, "9": node("Unheard")})
    assert "cannot run the workflow: MMInterleavedSaveStory: " in sentence(
        {**WORKFLOW, "3": node("MMInterleavedSaveStory")}
    )
    assert "No server answers" in sentence(WORKFLOW, "127.0.0.1:9")
    assert "must be like http://127.0.0.1:8188, not 'ftp://x'" in sentence(WORKFLOW, "ftp://x")
    assert "is no workflow of ComfyUI" in sentence({"1": 2})
    assert not out.exists() or not list(out.glob("0*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_command_goes_on_with_what_its_server_has(comfyui, workflow, make_board, tmp_path):
    board, out = make_board(6), tmp_path / "out"
    before = set(comfyui.get("/history"))
    process = start(workflow, board, out, comfyui)
    while not (out / "001").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < len(events(out, "done")) < 6
    assert main(command(workflow, board, out, comfyui)) == 0
    assert sorted(line["story"] for line in events(out, "done")) == list(range(1, 7)) and not strays(out)
    assert len(set(comfyui.get("/history")) - before) == 6, "a story was told twice"


@pytest.fixture
def two(folder, tmp_path):
    """Two servers that write into one folder, with a function that kills one and starts it again."""
    if not COMFYUI:
        pytest.skip("no ComfyUI to test in: set COMFYUI_PATH (and COMFYUI_PYTHON) to one")
    places = [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "b").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "a").mkdir()
    for place in places:
        (place / "output").symlink_to(tmp_path / "output", target_is_directory=True)
    servers = [Server(place, COMFYUI, PYTHON) for place in places]

    def kill(number):
        servers[number].process.kill()
        servers[number].process.wait()
        servers[number] = Server(places[number], COMFYUI, PYTHON, port=servers[number].port)

    yield servers, kill
    for server in servers:
        server.stop()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
def test_kills_of_one_of_two_servers_lose_nothing(two, workflow, make_board, tmp_path, kills):
    servers, kill = two
    board, count = make_board(count := 20 if kills > 1 else 8), count
    alone = tmp_path / "alone"
    assert main(command(workflow, board, alone, servers[0])) == 0
    generator, done, out = torch.Generator().manual_seed(5), 0, tmp_path / "out"
    while done < kills:
        shutil.rmtree(out, ignore_errors=True)
        process = start(workflow, board, out, *servers)
        while process.poll() is None and done < kills:
            while process.poll() is None and not (out / "journal.jsonl").exists():
                time.sleep(0.05)
            time.sleep(0.5 + 3 * torch.rand(1, generator=generator).item())
            if process.poll() is None:
                kill(int(torch.randint(2, (1,), generator=generator)))
                done += 1
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert contents(out) == contents(alone) and not strays(out)
        assert sorted(line["story"] for line in events(out, "done")) == list(range(1, count + 1))
        assert not queued_again(out)
    used = {line["server"] for line in events(out, "queued")}
    assert used == {url(server) for server in servers}
    for path in (tmp_path / "output").glob("s_*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_server_that_stays_away_loses_its_stories_once(two, workflow, make_board, tmp_path):
    servers, _ = two
    board, out = make_board(8), tmp_path / "out"
    process = start(workflow, board, out, *servers)
    while not (out / "001").exists():
        time.sleep(0.05)
    servers[1].process.kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "does not answer" in said
    assert not queued_again(out) and sorted(line["story"] for line in events(out, "done")) == list(range(1, 9))
    assert len(events(out, "queued")) <= 8 + 2, "at most what the dead server had was sent again"
    assert main(command(workflow, board, out, servers[0])) == 0
    assert len(events(out, "queued")) <= 8 + 2
