"""Every way to name a model in every command that takes one, and every file that is written where it is read."""

import json
import shutil
from pathlib import Path

import pytest
from places import TINY

from comfy_mminterleaved.cli import main

FAST = ["--device", "cpu", "--quiet", "--json"]
SHORT = ["--max-new-tokens", "4", "--min-new-tokens", "1"]
DRAWN = ["--steps", "1", "--scheduler", "ddim"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of both layouts, with a tokenizer (the recorded reference model has none)."""
    folder = tmp_path_factory.mktemp("models")
    assert main(["convert", "tiny-random", str(folder / "own"), "--dtype", "bfloat16"]) == 0
    shutil.copytree(TINY, folder / "reference", ignore=shutil.ignore_patterns("golden.safetensors"))
    assert main(["convert", str(folder / "reference"), str(folder / "converted")]) == 0
    return folder


MODELS = ("starter", "tiny-random", "own", "./own", "absolute")
COMMANDS = {
    "tell": ["tell", "--text", "Mia", "--panels", "1", "--out", "OUT", *DRAWN, *SHORT, *FAST],
    "write": ["write", "--text", "Mia", *SHORT, *FAST],
    "draw": ["draw", "--text", "Mia", "--out", "OUT/x.png", *DRAWN, *FAST],
    "ask": ["ask", "Who is it?", "--image", "IMAGE", *SHORT, *FAST],
    "caption": ["caption", "--image", "IMAGE", *SHORT, "--beams", "1", *FAST],
}


def run(capsys, words, tmp_path, image):
    words = [w.replace("OUT", str(tmp_path / "out")).replace("IMAGE", str(image)) for w in words]
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def image(tmp_path, pictures):
    from comfy_mminterleaved.stories.images import encode_png

    (tmp_path / "image.png").write_bytes(encode_png(pictures[0].pixels))
    return tmp_path / "image.png"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_by_any_name_in_any_command(folder, tmp_path, capsys, monkeypatch, image, model, command):
    monkeypatch.chdir(folder)
    name = str(folder / "own") if model == "absolute" else model
    assert run(capsys, [*COMMANDS[command], "--model", name], tmp_path, image)


@pytest.mark.parametrize("model", [*MODELS, "reference", "converted"])
def test_a_model_by_any_name_is_told_of_and_converted(folder, tmp_path, capsys, monkeypatch, model):
    monkeypatch.chdir(folder)
    name = str(folder / "own") if model == "absolute" else model
    about = run(capsys, ["info", name, "--json"], tmp_path, "")
    run(capsys, ["convert", name, str(tmp_path / "copy"), "--json"], tmp_path, "")
    again = run(capsys, ["info", str(tmp_path / "copy"), "--json"], tmp_path, "")
    for key in ("parameters", "tokenizer", "generation_config", "config"):
        assert about[key] == again[key], key
    if model == "starter":
        assert (tmp_path / "copy" / "words.txt").is_file()


@pytest.mark.parametrize("model", ["reference", "converted"])
def test_a_model_without_a_tokenizer_says_what_is_missing(folder, tmp_path, capsys, monkeypatch, model, image):
    monkeypatch.chdir(folder)
    assert main(["write", "--text", "x", "--model", model, *FAST]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    words = ["draw", "--image", "IMAGE", "--out", "OUT/x.png", *DRAWN, *FAST, "--model", model]
    assert run(capsys, words, tmp_path, image)


def test_every_file_that_is_written_is_read(tmp_path, capsys, image):
    book, drawn = tmp_path / "book", tmp_path / "drawn.png"
    words = [
        "tell",
        "--text",
        "Mia",
        "--image",
        "IMAGE",
        "--panels",
        "1",
        "--out",
        str(book),
        *DRAWN,
        *SHORT,
        *FAST,
        "--model",
        "tiny-random",
    ]
    run(capsys, words, tmp_path, image)
    run(
        capsys, ["draw", "--text", "Mia", "--out", str(drawn), *DRAWN, *FAST, "--model", "tiny-random"], tmp_path, image
    )
    for picture in (book / "01.png", book / "02.png", drawn):
        run(capsys, ["caption", "--image", str(picture), *SHORT, *FAST, "--model", "tiny-random"], tmp_path, image)
    for story in (book, book / "story.json"):
        for command in (["write"], ["ask", "Who?"], ["caption"]):
            run(capsys, [*command, "--story", str(story), *SHORT, *FAST], tmp_path, image)
        told = run(capsys, ["tell", "--story", str(story), "--panels", "1", "--out", "OUT", *FAST], tmp_path, image)
        settings = json.loads((Path(told["stories"][0]["folder"]) / "story.json").read_text())["settings"]
        assert settings["model"] == "tiny-random"  # and the steps, or this took long
        assert settings["image_generation"]["num_inference_steps"] == 1
        assert settings["text_generation"]["max_new_tokens"] == 4
        board = {
            "format": "mm-interleaved-storyboard",
            "version": 1,
            "stories": [{"opening": json.loads((book / "story.json").read_text())["segments"], "panels": 1}],
        }
        (book / "board.json").write_text(json.dumps(board))
        words = ["tell", "--storyboard", str(book / "board.json"), "--out", "OUT/board", *DRAWN, *SHORT, *FAST]
        run(capsys, [*words, "--model", "tiny-random"], tmp_path, image)


def test_flags_count_before_the_storys_settings_and_those_before_the_models(tmp_path, capsys, image):
    book = tmp_path / "book"
    words = ["--panels", "1", "--out", str(book), *SHORT, *FAST, "--model", "starter", "--steps", "1", "--seed", "5"]
    run(capsys, ["tell", "--text", "Mia waves.", *words], tmp_path, image)

    def settings(*more):
        words = ["tell", "--story", str(book), "--panels", "1", "--out", "OUT", *FAST, *more]
        told = run(capsys, words, tmp_path, image)
        return json.loads((Path(told["stories"][0]["folder"]) / "story.json").read_text())["settings"]

    first = settings()
    assert (first["seed"], first["image_generation"]["num_inference_steps"]) == (5, 1)
    assert first["image_generation"]["guidance_scale"] == 3.0 and first["text_generation"]["temperature"] == 0.7
    second = settings("--steps", "2", "--seed", "9", "--temperature", "0.5")
    assert (second["seed"], second["image_generation"]["num_inference_steps"]) == (9, 2)
    assert second["text_generation"]["temperature"] == 0.5


def test_settings_of_older_stories_are_read(tmp_path, capsys, image):
    (tmp_path / "story.json").write_text(
        json.dumps(
            {
                "format": "mm-interleaved-story",
                "version": 1,
                "segments": [{"text": "Mia"}],
                "title": "Old",
                "settings": {
                    "model": "tiny-random",
                    "seed": 2,
                    "sampling": {"max_new_tokens": 3, "sample": False, "min_new_tokens": 1},
                    "drawing": {"steps": 1, "scheduler": "ddim", "look_back": 1, "size": [64, 64]},
                },
            }
        )
    )
    told = run(capsys, ["tell", "--story", str(tmp_path), "--panels", "1", "--out", "OUT", *FAST], tmp_path, image)
    data = json.loads((Path(told["stories"][0]["folder"]) / "story.json").read_text())
    assert data["title"] == "Old" and data["settings"]["image_generation"]["size"] == [64, 64]
    for bad in (
        {"seed": "x"},
        {"model": 3},
        {"text_generation": {"max_new_tokens": "many"}},
        {"drawing": []},
        {"image_generation": {"size": 7}},
        {"text_generation": {"colour": 1}},
    ):
        (tmp_path / "story.json").write_text(
            json.dumps({"format": "mm-interleaved-story", "segments": [{"text": "Mia"}], "settings": bad})
        )
        assert main(["write", "--story", str(tmp_path), *FAST]) == 2
        assert capsys.readouterr().err.count("Error: ") == 1


def test_a_story_is_not_overwritten_unasked(tmp_path, capsys, image):
    words = ["tell", "--text", "Mia", "--panels", "1", "--out", str(tmp_path / "book"), *DRAWN, *SHORT, *FAST]
    words += ["--model", "tiny-random"]
    first = run(capsys, words, tmp_path, image)["stories"][0]["folder"]
    kept = (tmp_path / "book" / "story.json").read_bytes()
    second = run(capsys, [*words, "--seed", "3"], tmp_path, image)["stories"][0]["folder"]
    assert (Path(first).name, Path(second).name) == ("book", "book-2")
    assert (tmp_path / "book" / "story.json").read_bytes() == kept
    assert run(capsys, [*words, "--seed", "3", "--overwrite"], tmp_path, image)["stories"][0]["folder"] == first
    assert (tmp_path / "book" / "story.json").read_bytes() != kept
    going_on = ["tell", "--story", str(tmp_path / "book"), "--panels", "1", "--out", str(tmp_path / "book"), *FAST]
    assert run(capsys, going_on, tmp_path, image)["stories"][0]["folder"] == first
    assert len(json.loads((tmp_path / "book" / "story.json").read_text())["segments"]) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book", "book-2", "image.png"]


def test_a_failed_run_leaves_no_empty_folder(tmp_path, capsys):
    out = tmp_path / "new" / "deeper" / "book"
    assert main(["tell", "--text", "x" * 5000, "--out", str(out), "--model", "tiny-random", *FAST]) == 2
    assert main(["draw", "--text", "x" * 5000, "--out", str(out / "x.png"), "--model", "tiny-random", *FAST]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["tell", "write", "draw"])
def test_unknown_words_are_named(tmp_path, capsys, command):
    words = [w.replace("Mia", "Mia xyzzies") for w in COMMANDS[command]]
    assert main([w.replace("OUT", str(tmp_path / "out")) for w in words]) == 0
    assert "does not know the words xyzzies" in capsys.readouterr().err
