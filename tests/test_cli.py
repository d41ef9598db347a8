"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from places import HERE, TINY

from comfy_mminterleaved.cli import COMMANDS, main, make_parser
from comfy_mminterleaved.cli.common import read_opening
from comfy_mminterleaved.stories.page import METADATA_KEY, load_story

FAST = ["--steps", "1", "--scheduler", "ddim", "--max-new-tokens", "6", "--device", "cpu", "--quiet"]


def run(*args, cwd=None):
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "comfy_mminterleaved", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, env=env)


def fails(capsys, *args) -> str:
    """Runs a command that must end with exit code 2 and one sentence."""
    assert main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith("Note:")]
    assert len(lines) == 1 and lines[0].startswith("Error: ")
    return lines[0]


def test_from_a_photograph_to_a_page(photo, tmp_path):
    out = tmp_path / "Mia's book"
    done = run(
        "tell",
        "--text",
        "Mia the cat waited. 猫",
        "--picture",
        photo,
        "--panels",
        "2",
        "--out",
        out,
        "--json",
        "--title",
        "Mia",
        "--seed",
        "3",
        *FAST,
    )
    assert done.returncode == 0, done.stderr
    assert "does not know the words waited, 猫" in done.stderr
    story = json.loads(done.stdout)["stories"][0]
    assert [list(s)[0] for s in story["segments"]] == ["text", "text", "image"] + ["text", "image"] * 2
    assert story["segments"][0]["text"].startswith("Mia is a ")
    files = ["01.jpg", "02-refined.png", "02.png", "03-refined.png", "03.png", "story.html", "story.json"]
    assert sorted(p.name for p in out.iterdir()) == files
    assert Image.open(out / "03-refined.png").size == (256, 256)
    assert (out / "01.jpg").read_bytes() == photo.read_bytes()
    sizes = [Image.open(out / name).size for name in ("01.jpg", "02.png", "03.png")]
    assert sizes == [(451, 300), (128, 128), (128, 128)]
    assert json.loads(Image.open(out / "03.png").text[METADATA_KEY])["settings"]["seed"] == 3
    page = (out / "story.html").read_text(encoding="utf-8")
    assert page.count("<img") == 3 and '<h1 dir="auto">Mia</h1>' in page and "猫" in page
    assert load_story(out / "story.json").text.splitlines()[0].endswith(" Mia the cat waited. 猫")


def test_going_on_with_a_saved_story(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["tell", "--text", "Otto.", "--panels", "1", "--out", str(one), *FAST]) == 0
    assert main(["tell", "--story", str(one / "story.json"), "--panels", "1", "--out", str(two), *FAST]) == 0
    first, second = load_story(one / "story.json"), load_story(two / "story.json")
    assert [p.digest for p in second.images[:1]] == [p.digest for p in first.images] and len(second.images) == 2


def test_a_storyboard_makes_a_folder_for_each_story(tmp_path, capsys):
    board = {
        "format": "mm-interleaved-storyboard",
        "version": 1,
        "stories": [
            {"title": "A", "opening": "Otto.", "panels": 1},
            {"opening": [], "panels": 1, "picture_first": True},
        ],
    }
    (tmp_path / "board.json").write_text(json.dumps(board))
    assert main(["tell", "--storyboard", str(tmp_path / "board.json"), "--out", str(tmp_path / "out"), *FAST]) == 0
    assert [len(load_story(tmp_path / "out" / n / "story.json")) for n in ("001", "002")] == [2, 2]


def test_the_references_annotations(tmp_path, photo, capsys):
    board = [
        {
            "sentences": ["A photo of"],
            "images": [photo.name],
            "sentence_ixs": [0],
            "image_first": [True],
            "generate_mode": "generate_texts",
            "num_iter": 2,
        }
    ]
    (tmp_path / "annt.json").write_text(json.dumps(board))
    assert (
        main(["tell", "--storyboard", str(tmp_path / "annt.json"), "--out", str(tmp_path / "out"), "--json", *FAST])
        == 0
    )
    segments = json.loads(capsys.readouterr().out)["stories"][0]["segments"]
    assert [list(s)[0] for s in segments] == ["image", "text", "text", "image"]


def test_write_draw_ask_caption(tmp_path, photo, capsys):
    common = ["--device", "cpu", "--quiet", "--json"]

    def found(*args):
        assert main([*map(str, args), *common]) == 0
        return json.loads(capsys.readouterr().out)

    texts = found("write", "--text", "Otto", "--count", 2, "--max-new-tokens", 5)["texts"]
    assert len(texts) == 2 and texts[0]["finish_reason"] == "length"
    out = tmp_path / "new folder" / "otto.png"
    pictures = found(
        "draw", "--text", "Otto", "--out", out, "--count", 2, "--steps", 1, "--size", "64x96", "--seed", 4
    )["images"]
    assert [Image.open(p).size for p in pictures] == [(64, 96)] * 2 and Path(pictures[1]).name == "otto-2.png"
    begun = found("draw", "--text", "Otto", "--out", out, "--begin", photo, "--denoise", 0.5, "--steps", 2)["images"]
    assert Image.open(begun[0]).size == (128, 128)
    assert "answer" in found("ask", "What is it?", "--picture", photo, "--max-new-tokens", 4)
    choices = found("ask", "What is it?", "--picture", photo, "--option", "a cat", "--option", "a car")["ranking"]
    assert {c["text"] for c in choices} == {"a cat", "a car"}
    assert len(found("caption", "--picture", photo, "--count", 2, "--beams", 2, "--max-new-tokens", 3)["captions"]) == 2


def test_how_much_of_a_picture_is_drawn_over():
    def denoise(*options):
        return read_opening(make_parser(COMMANDS).parse_args(["draw", "--text", "x", *options])).image_config.denoise

    assert denoise() == 1.0 and denoise("--begin", "x.png") == 0.6
    assert denoise("--begin", "x.png", "--denoise", "0.3") == 0.3


def test_convert_and_info(tmp_path, capsys):
    assert main(["convert", str(TINY), str(tmp_path / "own"), "--dtype", "bfloat16"]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "own"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["layout"] == "native" and data["parameters"]["llm"] == 102854 and data["tokenizer"] is False
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--to", "reference"]) == 0
    assert main(["info", str(tmp_path / "back")]) == 0
    assert "reference" in capsys.readouterr().out


def test_sentences_for_bad_input(tmp_path, capsys, photo):
    full = tmp_path / "file"
    full.write_text("not a folder")
    out = ["--out", tmp_path / "out", *FAST]
    cases = {
        ("tell", *out): "story is empty; give --text, --image or --story",
        ("tell", "--text", "", *out): "story is empty",
        ("tell", "--picture", tmp_path / "no.png", *out): "no image file",
        ("tell", "--text", "x", "--panels", 0, *out): "--panels must be at least 1 and at most 1000, not 0",
        ("tell", "--text", "x", "--panels", 300_000_000, *out): "at most 1000, not 300000000",
        ("tell", "--text", "x", "--panels", 500, *out): "A story with 500 more panels",
        ("tell", "--text", "x" * 2000, *out): "more than the LLM's context of 1024",
        ("draw", "--text", "x", "--denoise", 0.5): "--denoise 0.5 requires --init-image",
        ("tell", "--text", "x", "--size", "big", *out): "--size must be like 512x512, not 'big'",
        ("tell", "--text", "x", "--size", "100x100", *out): "must be in multiples of 32 px",
        ("tell", "--text", "x", *out, "--scheduler", "nope"): "scheduler 'nope' is not known",
        ("tell", "--text", "x", "--model", tmp_path / "none", *out): "no checkpoint folder",
        ("tell", "--text", "x", "--out", full, *FAST): "cannot be written",
        ("tell", "--text", "x", "--storyboard", "b.json", *out): "omit --text, --image and --story",
        ("tell", "--picture-first", "--storyboard", "b.json", *out): "omit --title, --panels and --image-first",
        ("tell", "--story", tmp_path / "no.json", *out): "cannot be read: No such file",
        ("draw", "--text", "x", "--out", tmp_path / "x.bmp"): "--out must be a .png file",
        ("write", "--text", "x", "--top-p", 3): "top_p must be at least",
        ("write", "--text", "x", "--seed", 2**64): "seed must be at least 0 and at most",
        ("tell", "--text", "x", "--out", "a\0b", *FAST): "cannot be written: embedded null byte",
        ("tell", "--text", "x", "--model", "a\0b", *out): "no checkpoint folder",
        ("caption", "--image", "a\0b.png"): "no image file",
        ("ask", "", "--picture", photo, "--quiet"): "question must not be empty",
        ("caption", "--text", "no picture", "--quiet"): "no image to caption",
        ("info", tmp_path): "is no checkpoint",
        ("convert", TINY, tmp_path): "already exists",
    }
    for args, sentence in cases.items():
        assert sentence in fails(capsys, *args), args
    assert not (tmp_path / "out").exists()  # nor an empty folder


def test_bad_settings_are_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("comfy_mminterleaved.pipeline.MMInterleavedPipeline.load", None)
    out = ["--out", tmp_path / "out", *FAST]
    fails(capsys, "tell", "--text", "x", "--guidance", 0, *out)
    fails(capsys, "tell", "--picture", tmp_path / "no.png", *out)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere; Windows keeps no such bits")
def test_a_read_only_folder(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written: Permission denied" in fails(
        capsys, "tell", "--text", "x", "--out", tmp_path / "locked", *FAST
    )


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("comfy_mminterleaved.pipeline.MMInterleavedPipeline.load", None)
    assert "cannot be written: Permission denied" in fails(capsys, "tell", "--text", "x", "--out", tmp_path, *FAST)


def test_ctrl_c_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    from comfy_mminterleaved.pipeline import MMInterleavedPipeline

    draw, calls = MMInterleavedPipeline.generate_images, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(MMInterleavedPipeline, "generate_images", interrupted)
    assert main(["tell", "--text", "Otto.", "--panels", "3", "--out", str(tmp_path), *FAST]) == 130
    assert "what was finished is kept" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["01-refined.png", "01.png", "story.html", "story.json"]
    assert len(load_story(tmp_path / "story.json")) == 3  # the opening, its picture, and the text of the second panel


def test_importing_costs_next_to_nothing():
    code = (
        "import sys, time; start = time.perf_counter(); import comfy_mminterleaved; "
        "took = time.perf_counter() - start; assert took < 0.3, took; "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), sorted(sys.modules); "
        "import comfy_mminterleaved.pipeline; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_the_library_never_imports_comfyui_and_prints_nothing():
    import re

    for path in (HERE.parent / "comfy_mminterleaved").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (comfy|comfy_api|folder_paths|nodes|server)\b", code, re.M), path
        assert not re.search(r"^\s*print\(", code, re.M), path


@pytest.mark.parametrize(
    "new, old",
    [
        ("tell --image a.png", "tell --picture a.png"),
        ("tell --image-first", "tell --picture-first"),
        ("tell --no-image-first", "tell --no-picture-first"),
        ("tell --num-beams 3", "tell --beams 3"),
        ("tell --guidance-scale 2", "tell --guidance 2"),
        ("tell --context-images 2", "tell --look-back 2"),
        ("tell --mmfs-scale 0.5 --mmfs-start 0.1 --mmfs-end 0.9", "tell --strength 0.5 --start 0.1 --end 0.9"),
        ("draw --init-image a.png", "draw --begin a.png"),
    ],
)
def test_flags_keep_their_former_spelling(new, old, capsys):
    assert vars(make_parser(COMMANDS).parse_args(new.split())) == vars(make_parser(COMMANDS).parse_args(old.split()))
    with pytest.raises(SystemExit):
        make_parser(COMMANDS).parse_args([new.split()[0], "--help"])
    shown = capsys.readouterr().out
    assert new.split()[1] in shown and f"{old.split()[1]} " not in shown.replace(new.split()[1], "")


def test_redraw(tmp_path, capsys):
    book = tmp_path / "book"
    begin = ["tell", "--model", "tiny-random", "--steps", "2", "--max-new-tokens", "5", "--quiet", "--out", str(book)]
    assert main([*begin, "--text", "A bear sat.", "--panels", "3", "--seed", "5"]) == 0
    before = {path.name: path.read_bytes() for path in book.iterdir()}
    redraw = ["tell", "--story", str(book), "--quiet", "--redraw", "2"]
    assert main([*redraw, "--seed", "77"]) == 0
    changed = {path.name for path in book.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"02.png", "story.json", "story.html"}
    seeds = [segment.get("seed") for segment in json.loads((book / "story.json").read_text())["segments"]]
    assert [seed for seed in seeds if seed is not None] == [5, 77, 7]
    assert main([*redraw, "--seed", "6"]) == 0
    after = {path.name: path.read_bytes() for path in book.iterdir()}
    assert after == before, "its own seed gives its own image"
    capsys.readouterr()
    for flags, sentence in (
        (["--redraw", "4"], "The story has 3 panels; there is no panel 4."),
        (["--redraw", "2", "--panels", "2"], "--redraw draws one panel of a saved story"),
    ):
        assert main(["tell", "--story", str(book), "--quiet", *flags]) == 2
        assert sentence in capsys.readouterr().err
