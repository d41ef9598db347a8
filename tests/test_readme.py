"""README's commands and snippets, read out of it and run as they stand; what takes long with fewer steps."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from places import HERE, TINY

ROOT = HERE.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in README.splitlines() if re.match(r"    \S", line)]
# What is not run here: installing, this suite itself, and measurements of many minutes, whose short forms
# test_evaluate.py and test_benchmarks.py run; comfyui/test_queue.py has servers.
ELSEWHERE = (
    "pip install",
    "python -m venv",
    ".venv/bin/pip",
    "source .venv",
    "python dev.py test",
    "COMFYUI_PATH=",
    "python -m starter_training.evaluate",
    "python -m benchmarks",
    "mminterleaved queue",
)
RUN = [c for c in COMMANDS if not c.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place with what the commands name."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "example.png", folder)
    shutil.copytree(ROOT / "workflows" / "example storyboard", folder / "workflows" / "example storyboard")
    shutil.copytree(TINY, folder / "REFERENCE_FOLDER", ignore=shutil.ignore_patterns("golden.safetensors"))
    return folder


def test_all_commands_are_run_here_or_named():
    assert len(RUN) >= 10 and {c.split()[0] for c in RUN} <= {"mminterleaved", "python"}


@pytest.mark.parametrize("command", RUN)
def test_command(folder, command, request):
    words = shlex.split(command)
    if words[:3] == ["python", "dev.py", "demo"]:
        return demo(folder, words[2:], request)
    program = [sys.executable, "-m", "comfy_mminterleaved"]
    words = [*program, *words[1:]] if words[0] == "mminterleaved" else [sys.executable, *words[1:]]
    short = [] if request.config.getoption("--long") else ["--steps", "2"]
    done = run(folder, [*words, *(short if {"tell", "draw", "finetune"} & set(words) else [])])
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("Open "):
            assert "<img" in (folder / line[5:]).read_text(encoding="utf-8")


def run(folder, command):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8")


def demo(folder, words, request):
    """The first command: as it stands in a long run, else in this environment and without installing."""
    for name in ("dev.py", "example.png"):
        shutil.copy(ROOT / name, folder)
    if request.config.getoption("--long"):
        shutil.copytree(ROOT, folder / "clone", ignore=shutil.ignore_patterns(".venv*", ".git"), dirs_exist_ok=True)
        done, out = run(folder / "clone", [sys.executable, "dev.py", *words]), folder / "clone" / "demo"
    else:
        code = "import sys, dev; dev.environment = lambda *_: sys.executable; sys.exit(dev.main())"
        code = f"import sys; sys.argv[0] = 'dev.py'; sys.path.insert(0, '.')\n{code}"
        done, out = run(folder, [sys.executable, "-c", code, *words, "--steps", "2"]), folder / "demo"
    assert done.returncode == 0, done.stderr
    story = json.loads((out / "story.json").read_text(encoding="utf-8"))
    kinds = ["text" if "text" in segment else "picture" for segment in story["segments"]]
    assert kinds == ["text", "text", "picture"] + ["text", "picture"] * 4
    assert (out / "01.png").read_bytes() == (folder / "example.png").read_bytes()


def test_the_demo_checks_its_arguments_before_it_installs(tmp_path):
    shutil.copy(ROOT / "dev.py", tmp_path)
    code = "import sys, dev; dev.environment = None; sys.exit(dev.main())"
    for words, sentence in (
        (["--image", "nobody.png"], "There is no file 'nobody.png'"),
        (["--panel", "x"], "invalid int value"),
        (["--tell"], "unrecognized arguments: --tell"),
        (["--storyboard", "none.json"], "There is no file 'none.json'"),
        (["--model", "nowhere"], "There is no model folder 'nowhere'"),
        (["--text", " "], "The text is empty"),
    ):
        done = run(tmp_path, [sys.executable, "-c", code, "demo", *words])
        assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("number", range(len(re.findall(r"```python", README))))
def test_python_snippet(folder, number, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(re.findall(r"```python\n(.*?)```", README, re.S)[number], "README.md", "exec"), {})  # noqa: S102


def test_storyboard_snippet(folder):
    from comfy_mminterleaved.stories.storyboard import load_storyboard

    (text,) = re.findall(r"```json\n(.*?)```", README, re.S)
    (folder / "stories.json").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "example.png", folder)
    first, second = load_storyboard(folder / "stories.json")
    assert (first.title, first.panels, second.panels) == ("Otto", 5, 2)
    assert second.script == ("Mia runs in the snow.", None)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)|`(docs/[\w.-]+)`", README):
        assert (ROOT / (target[0] or target[1])).exists(), target
