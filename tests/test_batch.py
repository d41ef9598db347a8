"""Storyboards over night: runs that go on, failures that stay small, one run a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from comfy_mminterleaved import (
    ImageGenerationConfig,
    ImageSegment,
    Story,
    TextGenerationConfig,
    TextSegment,
)
from comfy_mminterleaved.cli import main
from comfy_mminterleaved.errors import DeviceError, OutputError
from comfy_mminterleaved.files import locked
from comfy_mminterleaved.generation.peak_memory import PeakMemory
from comfy_mminterleaved.generation.placement import choose_batch_size, make_plan
from comfy_mminterleaved.jobs.batch import BatchSettings, StoryboardRun, fingerprint, tell_stories
from comfy_mminterleaved.jobs.run_folder import Stopped
from comfy_mminterleaved.stories.images import encode_png
from comfy_mminterleaved.stories.journal import Journal
from comfy_mminterleaved.stories.page import load_story
from comfy_mminterleaved.stories.storyboard import load_storyboard, plan_panels
from comfy_mminterleaved.storyteller import run_plans

FAST = ["--model", "tiny-random", "--steps", "2", "--max-new-tokens", "5", "--quiet"]
TEXT = TextGenerationConfig(max_new_tokens=5)
IMAGE = ImageGenerationConfig(num_inference_steps=2)
SETTINGS = BatchSettings("tiny-random", None, TEXT, IMAGE)


@pytest.fixture
def board(tmp_path):
    """Five stories: plain, with an image, image first, with a script."""
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    (tmp_path / "otto.png").write_bytes(encode_png(pixels))
    stories = [
        {"title": "One", "opening": "Once there was a bear.", "panels": 2, "seed": 1},
        {"title": "Two", "opening": [{"text": "A fox"}, {"image": "otto.png"}], "panels": 2, "seed": 2},
        {"title": "Three", "opening": [{"image": "otto.png"}, {"text": "sat."}], "image_first": True, "panels": 2},
        {"title": "Four", "opening": [], "panels": [{"text": "A cat sat."}, {}, "It slept."], "seed": 4},
        {"title": "Five", "opening": "A dog sat.", "image_first": True, "panels": 2, "seed": 5},
    ]
    path = tmp_path / "board.json"
    path.write_text(json.dumps({"format": "mm-interleaved-storyboard", "version": 1, "stories": stories}))
    return path


def telling(pipeline, **callbacks):
    return lambda tasks: tell_stories(pipeline, tasks, SETTINGS, **callbacks)


def change(board, number: int, **values) -> None:
    data = json.loads(board.read_text())
    data["stories"][number - 1].update(values)
    board.write_text(json.dumps(data))


def contents(out) -> dict[str, bytes]:
    """Every file of the stories; times are in the journal and the report alone."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("[0-9]*/*"))}


def strays(out) -> list[str]:
    names = [p.name for p in out.rglob("*") if p.name.startswith(".") or p.suffix == ".part"]
    return [name for name in names if name != ".lock"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_random):
    """What a storyboard gives that nothing disturbs, by its path's contents."""
    made = {}

    def tell(board):
        key = board.read_bytes()
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed")
            StoryboardRun(out, load_storyboard(board), SETTINGS).run(telling(tiny_random))
            made[key] = contents(out)
        return made[key]

    return tell


# ---- going on ----


@pytest.mark.parametrize("segments", range(1, 18))
def test_a_run_that_stops_after_any_segment_goes_on(board, tmp_path, tiny_random, undisturbed, segments):
    out, count = tmp_path / "out", 0

    def should_stop():
        nonlocal count
        count += 1
        return count >= segments

    with pytest.raises(Stopped):
        StoryboardRun(out, load_storyboard(board), SETTINGS).run(telling(tiny_random), should_stop)
    assert contents(out) != undisturbed(board) or segments > 17
    StoryboardRun(out, load_storyboard(board), SETTINGS).run(telling(tiny_random))
    assert contents(out) == undisturbed(board) and not strays(out)
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    drawn = [(line["story"], line["panel"]) for line in lines if line["event"] == "panel"]
    assert len(drawn) == len(set(drawn)) == 11, "an image was drawn twice"


def test_finished_stories_are_left_alone(board, tmp_path, tiny_random):
    plans, out = load_storyboard(board), tmp_path / "out"
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    run = StoryboardRun(out, plans, SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert run.pending() == []
    run.run(None)
    assert before.items() >= {p: t for p, t in before.items() if "report" not in p.name}.items()


def test_only_stories_that_changed_are_told_again(board, tmp_path, tiny_random, undisturbed):
    out = tmp_path / "out"
    StoryboardRun(out, load_storyboard(board), SETTINGS).run(telling(tiny_random))
    change(board, 1, seed=9)
    (board.parent / "otto.png").write_bytes(encode_png(torch.zeros(3, 32, 32)))
    run = StoryboardRun(out, load_storyboard(board), SETTINGS)
    assert run.pending() == [1, 2, 3]
    run.run(telling(tiny_random))
    assert not strays(out)
    again = tmp_path / "again"
    StoryboardRun(again, load_storyboard(board), SETTINGS).run(telling(tiny_random))
    assert contents(out) == contents(again)


def test_an_old_story_stays_until_the_new_one_is_whole(board, tmp_path, tiny_random, undisturbed):
    out, plans = tmp_path / "out", load_storyboard(board)
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    old, asked = contents(out), iter([False, True])
    with pytest.raises(Stopped):
        StoryboardRun(out, plans, SETTINGS, restart=True).run(telling(tiny_random), lambda: next(asked))
    assert contents(out) == old and (out / ".001.unfinished").is_dir()
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    assert contents(out) == old == undisturbed(board) and not strays(out)


def test_a_restart_that_is_stopped_goes_on(board, tmp_path, tiny_random, undisturbed):
    """Without the flag: stories that the restart did not reach are told anew, too."""
    out, plans = tmp_path / "out", load_storyboard(board)
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    count = iter(range(100))
    with pytest.raises(Stopped):
        StoryboardRun(out, plans, SETTINGS, restart=True).run(telling(tiny_random), lambda: next(count) == 5)
    run = StoryboardRun(out, plans, SETTINGS)
    assert run.pending() == [2, 3, 4, 5]
    run.run(telling(tiny_random))
    assert StoryboardRun(out, plans, SETTINGS).pending() == [] and contents(out) == undisturbed(board)


def test_a_story_that_fails_anew_leaves_the_old_one(board, tmp_path, tiny_random):
    out = tmp_path / "out"
    StoryboardRun(out, load_storyboard(board), SETTINGS).run(telling(tiny_random))
    old = contents(out)
    change(board, 1, panels=1000)  # longer than the model's context
    for _ in range(2):
        run = StoryboardRun(out, load_storyboard(board), SETTINGS, retry_failed=True)
        assert run.pending() == [1]
        run.run(telling(tiny_random))
        assert run.record(1).status == "failed" and contents(out) == old


def test_a_half_story_whose_image_is_damaged_begins_anew(board, tmp_path, tiny_random, undisturbed):
    out, plans = tmp_path / "out", load_storyboard(board)
    count = iter(range(100))
    with pytest.raises(Stopped):
        StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random), lambda: next(count) == 2)
    (out / "001" / "01.png").write_bytes(b"nothing")
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    assert contents(out) == undisturbed(board)


def test_a_run_beside_another_story_goes_on_there(board, tmp_path, capsys):
    out = tmp_path / "story"
    assert main(["tell", "--text", "A bear.", "--panels", "1", "--out", str(out), *FAST]) == 0
    command = ["tell", "--storyboard", str(board), "--out", str(out), *FAST]
    assert main(command) == 0 and main(command) == 0
    assert f"going on in {out}-2" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("story*")) == ["story", "story-2"]


def test_annotations_that_draw_nothing(board, tmp_path, capsys):
    entry = {"sentences": ["A bear sat."], "images": [], "sentence_ixs": [], "image_first": []}
    board.write_text(json.dumps([entry, entry]))
    assert main(["tell", "--storyboard", str(board), "--out", str(tmp_path / "out"), *FAST]) == 0
    assert "[2/2] story 2: 0 panels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [{"seed": 2}, {"opening": "Once there was a cat."}, {"title": "Uno"}, {"panels": 3}, {"image_first": True}],
)
def test_a_fingerprint_changes_with_the_plan(board, values):
    before = fingerprint(load_storyboard(board)[0], SETTINGS)
    change(board, 1, **values)
    assert fingerprint(load_storyboard(board)[0], SETTINGS) != before


# ---- stories in step ----


@pytest.fixture
def alike(tmp_path):
    """A storyboard whose stories can be told in step, but for one with a given text."""
    openings = "Once there was a bear.", "A fox ran.", "The cat sat on a wall.", "A dog slept."
    stories = [{"opening": text, "panels": 1 + n % 3, "seed": n} for n, text in enumerate(openings)]
    stories.insert(2, {"opening": "A bird sang.", "panels": [{}, {"text": "It flew."}, {}]})
    path = tmp_path / "alike.json"
    path.write_text(json.dumps({"format": "mm-interleaved-storyboard", "version": 1, "stories": stories}))
    return path


def test_stories_in_step_come_out_as_alone(alike, tmp_path, tiny_random):
    """But for rounding: the last bits of a matrix product depend on its size."""
    plans, out = load_storyboard(alike), tmp_path / "out"
    run = StoryboardRun(out, plans, SETTINGS)
    assert run.batches(3) == [[1, 2], [3], [4, 5]]  # the given text is a step of another kind
    assert run.batches() == [[1], [2], [3], [4], [5]]
    run.run(telling(tiny_random), batch_size=3)
    alone = tmp_path / "alone"
    StoryboardRun(alone, plans, SETTINGS).run(telling(tiny_random))
    for number in range(1, 6):
        one, other = (load_story(folder / f"{number:03d}") for folder in (out, alone))
        assert one.text == other.text
        for image, same in zip(one.images, other.images, strict=True):
            assert (image.pixels - same.pixels).abs().max() < 0.05


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_stories_in_step_go_on(alike, tmp_path, tiny_random, stop_after):
    out, plans, count = tmp_path / "out", load_storyboard(alike), 0

    def should_stop():
        nonlocal count
        count += 1
        return count == stop_after

    with pytest.raises(Stopped):
        StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random), should_stop, batch_size=8)
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random), batch_size=8)
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    drawn = [(line["story"], line["panel"]) for line in lines if line["event"] == "panel"]
    assert len(drawn) == len(set(drawn)) == 10 and not strays(out)


def test_what_fails_in_step_is_told_alone(alike, tmp_path, tiny_random, monkeypatch, undisturbed):
    out, plans = tmp_path / "out", load_storyboard(alike)
    draw = tiny_random.image.generate

    def fail(stories, *args, **kwargs):
        if len(stories) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return draw(stories, *args, **kwargs)

    monkeypatch.setattr(tiny_random.image, "generate", fail)
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random), batch_size=8)
    assert contents(out) == undisturbed(alike)


def test_stories_in_step_never_read_a_prefix_twice(tiny_random, monkeypatch):
    """Also when one has ended: the others keep their rows of the cache.

    A story that is left alone would be read anew: what is told alone never depends on what was told before.
    """
    stories = [Story.of("A bear sat."), Story.of("The small fox ran away."), Story.of("It slept.")]
    plans = [plan_panels(story, panels) for story, panels in zip(stories, (3, 1, 3))]
    forward, tokens = type(tiny_random.llm).forward, 0

    def count(self, x, values, mask, cache, counts):
        nonlocal tokens
        tokens += sum(counts)
        return forward(self, x, values, mask, cache, counts)

    monkeypatch.setattr(type(tiny_random.llm), "forward", count)
    tiny_random.clear_cache()
    told = {}
    for grown in tiny_random.iterate_plans(stories, plans, TEXT, IMAGE):
        told.update(grown)
    lengths = [len(tiny_random.text.tokenize(told[i])) for i in range(3)]
    # Of a finished story, the last image is never read; its start is.
    assert tokens == sum(lengths) - 3 * tiny_random.config.llm.num_img_token


def test_a_batch_fits_the_memory_that_is_free(tiny_random):
    config, device = tiny_random.config, torch.device("cpu")
    story = Story.of("A bear sat.")
    per_story = max(make_plan(config, 2**60, torch.float32).work.values())
    for free, expected in ((0, 1), (3 * per_story, 2), (5 * per_story, 4), (2**50, 8)):
        assert choose_batch_size(config, device, torch.float32, free=free) == expected
    assert 1 <= tiny_random.choose_batch_size() <= 8
    with PeakMemory() as memory:
        for _ in tiny_random.iterate_plans([story] * 4, [plan_panels(story, 2)] * 4, TEXT, IMAGE):
            pass
    assert memory.peak < 4 * per_story


# ---- kills ----


class Instant:
    """A model that writes and draws at once, for runs of a thousand stories."""

    class text:
        @staticmethod
        def resolve_image_first(story, image_first=None):
            return False

    def introduce(self, story):
        return story

    def validate_plan(self, *_):
        pass

    def clear_cache(self):
        pass

    def iterate_plans(self, stories, plans, text_config, image_config, seeds, **_):
        return run_plans(stories, plans, self.write, self.illustrate, seeds=seeds)

    def write(self, stories, seeds):
        return [TextSegment(f"Text {seed} of a story.") for seed in seeds]

    def illustrate(self, stories, seeds):
        return [ImageSegment(torch.full((3, 32, 32), (seed % 7) / 7)) for seed in seeds]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_each_rename_loses_nothing(board, tmp_path, restart, after):
    plans, undisturbed = load_storyboard(board)[::4], tmp_path / "undisturbed"
    StoryboardRun(undisturbed, plans, SETTINGS).run(telling(Instant()))
    kills = 0
    while True:
        out = tmp_path / f"out-{kills}"
        if restart:
            shutil.copytree(undisturbed, out)
        child = os.fork()
        if not child:
            _kill_at_rename(kills, after)
            StoryboardRun(out, plans, SETTINGS, restart=restart).run(telling(Instant()))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0 and kills > 15
            return
        StoryboardRun(out, plans, SETTINGS).run(telling(Instant()))
        assert contents(out) == contents(undisturbed) and not strays(out)
        shutil.rmtree(out)
        kills += 1


def _kill_at_rename(number: int, after: bool) -> None:
    """Has this process die before or after its rename with this number."""
    replace, count = os.replace, 0

    def replace_and_die(*paths):
        nonlocal count
        count += 1
        if after:
            replace(*paths)
        if count == number + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            replace(*paths)

    os.replace = replace_and_die


@pytest.fixture
def told(board, tmp_path):
    """What the command line gives when nothing disturbs it."""
    assert start(board, tmp_path / "told").wait() == 0
    return contents(tmp_path / "told")


def start(board, out, *flags):
    command = [sys.executable, "-m", "comfy_mminterleaved", "tell", "--storyboard", str(board), "--out", str(out)]
    return subprocess.Popen([*command, *FAST, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.long)])
def test_kills_lose_nothing(board, tmp_path, told, kills):
    """At random moments, until all stories are there; each time from the beginning again, if they are."""
    generator, out, done = torch.Generator().manual_seed(3), tmp_path / "out", 0
    while done < kills:
        process = start(board, out)
        while process.poll() is None and not (out / "001").exists():
            time.sleep(0.01)
        time.sleep(1.5 * torch.rand(1, generator=generator).item())
        process.send_signal(signal.SIGKILL)
        done += process.wait() == -signal.SIGKILL
        process.stderr.close()
        if all((out / f"{n:03d}" / "story.html").exists() for n in range(1, 6)):
            assert start(board, out).wait() == 0
            assert contents(out) == told and not strays(out)
            shutil.rmtree(out)
    assert start(board, out).wait() == 0
    assert contents(out) == told and not strays(out)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child")
def test_ctrl_c_finishes_the_step_at_hand(board, tmp_path, told):
    out = tmp_path / "out"
    process = start(board, out)
    while not (out / "001" / "story.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    if process.returncode == 130:  # it may have been faster
        assert "the same command goes on" in said
    assert start(board, out).wait() == 0
    assert contents(out) == told and not strays(out)


def test_a_torn_line_of_the_journal_is_passed_over(tmp_path):
    journal = Journal(tmp_path)
    journal.append(1, "begun", fingerprint="a", opening=1)
    journal.append(1, "panel", panel=1, seconds=2.0)
    with open(journal.path, "ab") as file:
        file.write(b'{"story": 1, "event": "pan')
    again = Journal(tmp_path)
    assert again.records[1].panels == 1
    again.append(1, "done")
    assert Journal(tmp_path).records[1].status == "done"


def test_a_journal_of_a_thousand_stories_is_read_in_a_second(tmp_path):
    lines = []
    for story in range(1, 1001):
        lines.append({"story": story, "event": "begun", "fingerprint": "f", "opening": 1})
        lines += [{"story": story, "event": "panel", "panel": p, "seconds": 1} for p in range(1, 6)]
        lines.append({"story": story, "event": "done"})
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    began = time.monotonic()
    assert len(Journal(tmp_path).records) == 1000
    assert time.monotonic() - began < 1


def test_a_file_that_is_no_journal(tmp_path):
    (tmp_path / "journal.jsonl").write_text("hello\n")
    with pytest.raises(OutputError, match="holds a line that is none of a journal: b'hello'"):
        Journal(tmp_path)


# ---- failures ----


def test_a_story_that_fails_leaves_the_others_alone(board, tmp_path, capsys):
    change(board, 2, panels=1000)  # longer than the model's context
    out = tmp_path / "out"
    assert main(["tell", "--storyboard", str(board), "--out", str(out), "--json", *FAST]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [story["status"] for story in said["stories"]] == ["done", "failed", "done", "done", "done"]
    assert said["stories"][1]["error"].startswith("A story with 1000 more panels has 1001 images")
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "4 of 5 stories, 1 failed" in report and said["stories"][1]["error"].split("'")[0][:30] in report
    assert main(["tell", "--storyboard", str(board), "--out", str(out), *FAST]) == 1
    change(board, 2, panels=1)
    assert main(["tell", "--storyboard", str(board), "--out", str(out), *FAST]) == 0


def test_a_failed_story_is_told_again_when_asked(board, tmp_path, tiny_random, monkeypatch, undisturbed):
    out, plans = tmp_path / "out", load_storyboard(board)
    draw = tiny_random.image.generate

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(tiny_random.image, "generate", fail)
    records = StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    assert {record.error for record in records} == {"It ran out of memory; smaller images or fewer panels would do."}
    monkeypatch.setattr(tiny_random.image, "generate", draw)
    assert StoryboardRun(out, plans, SETTINGS).pending() == []
    StoryboardRun(out, plans, SETTINGS, retry_failed=True).run(telling(tiny_random))
    assert contents(out) == undisturbed(board)


def test_a_card_that_failed_ends_the_run(board, tmp_path, tiny_random, monkeypatch, undisturbed):
    """Nothing runs on it any more in this process; the next run goes on."""
    out, plans, draw = tmp_path / "out", load_storyboard(board), tiny_random.image.generate

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(tiny_random.image, "generate", fail)
    with pytest.raises(DeviceError, match="The card failed: CUDA error: an illegal memory access was encountered;"):
        StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    monkeypatch.setattr(tiny_random.image, "generate", draw)
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    assert contents(out) == undisturbed(board)


def test_a_second_run_into_the_same_folder_is_refused(board, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out / ".lock", ""):
        assert main(["tell", "--storyboard", str(board), "--out", str(out), *FAST]) == 2
    assert "Another run is writing into" in capsys.readouterr().err
    assert not list(out.glob("0*"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_turns_read_only(board, tmp_path, tiny_random, undisturbed):
    out, plans = tmp_path / "out", load_storyboard(board)

    def on_step(*_):
        (out / "001").chmod(0o500)

    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random, on_step=on_step))
    (out / "001").chmod(0o700)
    StoryboardRun(out, plans, SETTINGS).run(telling(tiny_random))
    assert contents(out) == undisturbed(board)


@pytest.mark.skipif(os.name == "nt", reason="no limit on a file's size")
def test_a_full_disk(board, tmp_path, told):
    """A limit on the size of files: the system then refuses to write, as a full disk does."""
    out = tmp_path / "out"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))\n"
        "from comfy_mminterleaved.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "tell", "--storyboard", str(board), "--out", str(out), *FAST]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written" in done.stderr, done.stderr
    assert start(board, out).wait() == 0
    assert contents(out) == told and not strays(out)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_memory_stays_flat_over_many_stories(tmp_path, count):
    """Between a fifth of the stories and all of them. A story has 37 kB of pixels."""
    import gc
    import tracemalloc

    board = {"format": "mm-interleaved-storyboard", "version": 1}
    stories = [{"title": f"Story {n}", "opening": "Once.", "panels": 3, "seed": n} for n in range(count)]
    (tmp_path / "board.json").write_text(json.dumps({**board, "stories": stories}))
    held, number = [], 0

    def on_story(*_):
        nonlocal number
        number += 1
        if number in (count // 5, count):
            gc.collect()
            sizes = [trace.size for trace in tracemalloc.take_snapshot().traces]
            held.append(sum(size for size in sizes if size < 2**20))  # a larger one is Python's table of names

    tracemalloc.start()
    try:
        run = StoryboardRun(tmp_path / "out", load_storyboard(tmp_path / "board.json"), SETTINGS)
        run.run(telling(Instant()), on_story=on_story)
    finally:
        tracemalloc.stop()
    assert (held[1] - held[0]) / (count - count // 5) < 10_000
    began = time.monotonic()
    assert StoryboardRun(tmp_path / "out", load_storyboard(tmp_path / "board.json"), SETTINGS).pending() == []
    assert time.monotonic() - began < 5
