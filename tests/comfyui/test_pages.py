"""Compose Pages and the books of Save Story in a real ComfyUI."""

import json
import zipfile

import pytest
from PIL import Image
from server import Failed
from test_behaviour import node


def prompt(story_panels=3, save=None, **changes):
    nodes = {"1": node("MMInterleavedExampleImage")}
    story = {}
    for n in range(story_panels):
        nodes[f"t{n}"] = node("MMInterleavedStoryText", text=f"Mia takes step {n}.", **story)
        nodes[f"i{n}"] = node("MMInterleavedStoryPicture", image=["1", 0], story=[f"t{n}", 0])
        story = {"story": [f"i{n}", 0]}
    inputs = {
        "layout": "2 panels",
        "page_size": "A6",
        "captions": "beneath",
        "fit": "whole",
        "order": "",
        "dpi": 60,
        "font": "default",
        "font_size": 0.0,
        "margin": 8.0,
        "gutter": 4.0,
        "cells": "",
        "custom_size": "",
        **changes,
    }
    nodes["2"] = node("MMInterleavedComposePages", **story, **inputs)
    nodes["3"] = node("SaveImage", images=["2", 0], filename_prefix="pages")
    nodes["4"] = node(
        "MMInterleavedSaveStory", **story, filename_prefix="books/mia", title="Mia", **(save or {"layout": ["2", 1]})
    )
    return nodes


def test_pages_and_books(comfyui):
    books = {"pdf": True, "epub": True, "cbz": True, "metadata": False, "layout": ["2", 1]}
    done = comfyui.run(prompt(save=books))
    output = comfyui.folder / "output"
    pages = [Image.open(output / each["filename"]) for each in done["outputs"]["3"]["images"]]
    assert [page.size for page in pages] == [(248, 350)] * 2
    files = done["outputs"]["4"]
    folder = output / files["images"][0]["subfolder"]
    assert [each["filename"] for each in files["pages"]] == [
        "story.json",
        "story.html",
        "story.pdf",
        "story.epub",
        "story.cbz",
    ]
    with zipfile.ZipFile(folder / "story.cbz") as archive:
        assert len([name for name in archive.namelist() if name.endswith(".png")]) == 2, "laid out as Compose Pages"
    assert not Image.open(folder / "01.png").info, "neither workflow nor story"
    comfyui.run(prompt(save={}))
    newest = max((output / "books").iterdir())
    assert sorted(path.name for path in newest.iterdir()) == ["01.png", "02.png", "03.png", "story.html", "story.json"]
    assert "prompt" in Image.open(newest / "01.png").info


def test_a_story_is_saved_though_its_book_is_not(comfyui):
    """The layout is of another story: it names a panel that this one lacks."""
    nodes = prompt(3, order="3", save={"pdf": True, "layout": ["2", 1]})
    nodes["6"] = node("MMInterleavedStoryText", text="Mia sleeps.")
    nodes["4"]["inputs"]["story"] = ["6", 0]
    nodes["4"]["inputs"]["filename_prefix"] = "books/safe"
    with pytest.raises(Failed) as failed:
        comfyui.run(nodes)
    assert "The story is saved in books/safe_00001, but not as .pdf: order must be" in failed.value.sentence
    assert (comfyui.folder / "output" / "books" / "safe_00001" / "story.json").is_file()


def test_cells_and_fonts_of_ones_own(comfyui):
    info = comfyui.get("/object_info/MMInterleavedComposePages")["MMInterleavedComposePages"]["input"]["required"]
    fonts = info["font"][1].get("options") or info["font"][0]
    assert fonts[0] == "default"
    done = comfyui.run(prompt(cells="2: 1 / 1: 1 1", custom_size="4 x 4 in", order="3, 0, 1", font=fonts[-1]))
    (page,) = (comfyui.folder / "output" / each["filename"] for each in done["outputs"]["3"]["images"])
    assert Image.open(page).size == (240, 240)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"cells": "1 / x"}, "The layout '1 / x'"),
        ({"order": "4"}, "'4' is none"),
        ({"font": "../x.ttf"}, "There is no font '../x.ttf'"),
        (
            {"custom_size": "900 x 900 mm", "dpi": 250, "layout": "picture book", "order": "1," * 300 + "1"},
            "of memory; lower dpi",
        ),
    ],
)
def test_bad_input_of_pages(comfyui, changes, sentence):
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt(**changes))
    assert sentence in failed.value.sentence and "\n" not in failed.value.sentence


def test_an_image_has_words_of_its_own(comfyui):
    nodes = prompt(1)
    nodes["5"] = node("PrimitiveStringMultiline", value="A fox that waves.")
    nodes["i0"]["inputs"]["alt"] = ["5", 0]
    done = comfyui.run(nodes)
    folder = comfyui.folder / "output" / done["outputs"]["4"]["images"][0]["subfolder"]
    segments = json.loads((folder / "story.json").read_text(encoding="utf-8"))["segments"]
    assert segments[1]["alt"] == "A fox that waves."
