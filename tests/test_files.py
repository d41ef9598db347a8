"""Files appear whole or not at all, and what was left half written goes."""

import os
import signal
import subprocess
import sys

import pytest
from places import HERE

from comfy_mminterleaved import files

KILLED_SAVE = """
import os, signal, sys, torch
from comfy_mminterleaved import Story, files
from comfy_mminterleaved.stories.page import save_story
replaced, replace = [], os.replace
def killed(*paths):
    replaced.append(paths)
    if len(replaced) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*paths)
os.replace = killed
story = Story.of("A.", torch.zeros(3, 16, 16), "B.", torch.ones(3, 16, 16))
with files.atomic_dir(sys.argv[1]) as folder:
    save_story(folder, story)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on Windows")
@pytest.mark.parametrize("number", [1, 2, 4, 5])  # a picture, the next one, the page, the folder itself
def test_what_a_killed_save_left_is_gone_after_the_next(tmp_path, number):
    code = [sys.executable, "-c", KILLED_SAVE, str(tmp_path / "story"), str(number)]
    assert subprocess.run(code, cwd=HERE.parent).returncode == -signal.SIGKILL
    assert [path.name[:7] for path in tmp_path.iterdir()] == [".story."]
    assert subprocess.run([*code[:-1], "99"], cwd=HERE.parent).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["story"]
    assert sorted(p.name for p in (tmp_path / "story").iterdir()) == ["01.png", "02.png", "story.html", "story.json"]


def test_what_another_process_is_writing_stays(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = tmp_path / f".a.png.0123abcd-{files._HOST}-{other.pid}.part"
        elsewhere = tmp_path / ".b.png.0123abcd-ffffffff-1.part"
        old = tmp_path / ".c.png.0123abcd-ffffffff-1.part"
        for path in (theirs, elsewhere, old, tmp_path / ".hidden.part"):
            path.write_bytes(b"x")
        os.utime(old, (1, 1))
        with files.atomic_path(tmp_path / "mine") as temp_path:
            temp_path.write_bytes(b"y")
            files.remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {theirs.name, elsewhere.name, ".hidden.part", "mine"}
        other.communicate(b"\n")
    files.remove_leftovers(tmp_path)
    assert not theirs.exists() and elsewhere.exists()


def test_a_rename_that_is_held_up_is_tried_again(tmp_path, monkeypatch):
    """As a virus scanner on Windows holds new files open."""
    replace, refused = os.replace, []

    def held_up(*paths):
        if len(refused) < 3:
            refused.append(paths)
            raise PermissionError(13, "in use")
        replace(*paths)

    monkeypatch.setattr(os, "replace", held_up)
    files.atomic_write(tmp_path / "a.png", b"x")
    assert (tmp_path / "a.png").read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 1 and len(refused) == 3
