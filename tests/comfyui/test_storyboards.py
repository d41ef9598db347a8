"""Storyboards in ComfyUI are told as the command line tells them: order, given texts, stories of text alone."""

import json
import shutil

import pytest
from server import ROOT
from test_behaviour import LOAD, node, tell

BOARD = {
    "format": "mm-interleaved-storyboard",
    "version": 1,
    "stories": [
        {
            "title": "picture first",
            "opening": "Mia waves in the village with a kite.",
            "panels": 2,
            "image_first": True,
        },
        {
            "title": "as the model",
            "opening": [{"image": "otto.png"}, {"text": "Mia waves in the village with a kite."}],
            "panels": 1,
        },
        {"title": "given", "opening": [], "panels": [{"text": "Mia runs in the snow with a drum."}, {}]},
    ],
}
ANNOTATION = [
    {
        "sentences": ["Mia waves in the village with a kite."],
        "images": ["otto.png"],
        "sentence_ixs": [0],
        "image_first": [False],
        "generate_mode": "generate_texts",
        "num_iter": 1,
    }
]


@pytest.fixture(scope="module")
def boards(comfyui):
    folder = comfyui.folder / "input" / "boards"
    folder.mkdir(exist_ok=True)
    (folder / "board.json").write_text(json.dumps(BOARD))
    (folder / "annotation.json").write_text(json.dumps(ANNOTATION))
    shutil.copy(ROOT / "example.png", folder / "otto.png")


def told(comfyui, board, index, plan=True):
    prompt = tell(story=["4", 0], panels=["4", 1], seed=["4", 2], opening="", **({"plan": ["4", 4]} if plan else {}))
    prompt["1"] = LOAD
    prompt["4"] = node("MMInterleavedLoadStoryboard", storyboard=f"boards/{board}.json", index=index, encoder=["1", 0])
    done = comfyui.run(prompt)
    subfolder = sorted((comfyui.folder / "output").glob("s_*"))[-1]
    data = json.loads((subfolder / "story.json").read_text(encoding="utf-8"))
    return done, data, "".join("t" if "text" in segment else "p" for segment in data["segments"])


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize("index, kinds", [(0, "ptpt"), (1, "ttptp")])
def test_the_order_is_the_storyboards_or_the_models(comfyui, boards, index, kinds, plan):
    _, data, found = told(comfyui, "board", index, plan)
    assert found == kinds and data["image_first"] == (index == 0)
    if index == 1:
        assert data["segments"][0]["text"].startswith("Mia is a fox in a green coat with a scarf.")


def test_texts_that_the_storyboard_gives(comfyui, boards):
    _, data, found = told(comfyui, "board", 2)
    assert found == "tptp" and data["segments"][0]["text"] == "Mia runs in the snow with a drum."


def test_a_story_of_text_alone_draws_nothing(comfyui, boards):
    done, data, found = told(comfyui, "annotation", 0)
    assert found == "tpt" and not any("KSampler" in name or "draw" in name for name in done["ran"])
    assert data["segments"][-1]["text"].strip()


def test_panels_added_later_have_the_seeds_of_a_story_told_at_once(comfyui):
    from test_behaviour import story_of

    whole = story_of(comfyui, comfyui.run(tell(seed=900, panels=3)))
    prompt = tell(seed=900, panels=2)
    prompt["5"] = {
        "class_type": "MMInterleavedTellStory",
        "inputs": {**prompt["2"]["inputs"], "story": ["2", 0], "opening": "", "panels": 1},
    }
    prompt["3"]["inputs"]["story"] = ["5", 0]
    assert story_of(comfyui, comfyui.run(prompt)) == whole
