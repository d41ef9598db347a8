"""What nodes promise beside their results: the cache, Cancel, errors of one sentence, memory."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from server import ROOT, Failed

LOAD = {"class_type": "MMInterleavedLoad", "inputs": {"model": "starter"}}
TEXT = {"max_tokens": 24, "min_tokens": 2, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.0}


def tell(**changes):
    """A prompt that tells a story of four panels, with few steps."""
    inputs = {
        **{name: ["1", i] for i, name in enumerate(("encoder", "llm", "synchronizer", "model", "vae"))},
        "opening": "Mia is in the forest.", "panels": 4, "seed": 1, "seeds": "", "steps": 2, "cfg": 2.0,
        "sampler_name": "euler", "scheduler": "normal", "width": 0, "height": 0, "strength": 1.0, "pictures": -1,
        "picture_first": False, **TEXT, **changes,
    }  # fmt: skip
    save = {"class_type": "MMInterleavedSaveStory", "inputs": {"story": ["2", 0], "filename_prefix": "s", "title": ""}}
    return {"1": LOAD, "2": {"class_type": "MMInterleavedTellStory", "inputs": inputs}, "3": save}


def node(type, **inputs):
    return {"class_type": type, "inputs": inputs}


def show(link):
    return node("PreviewAny", source=link)


def story_of(comfyui, done):
    saved = done["outputs"]["3"]["images"]
    folder = comfyui.folder / "output" / saved[0]["subfolder"]
    texts = [s.get("text") for s in json.loads((folder / "story.json").read_text())["segments"]]
    return texts, [(folder / image["filename"]).read_bytes().split(b"IDAT", 1)[1] for image in saved]


def test_a_panel_drawn_anew_leaves_those_before_it_alone(comfyui):
    first = comfyui.run(tell(seed=77))
    again = comfyui.run(tell(seed=77, seeds=",,,5"))
    touched = {name.split(".")[-1] for name in again["ran"] if name.startswith("2.")}
    assert touched == {"write 4", "synchronize 4", "draw 4", "decode 4", "add 4", "panels"}
    (texts, pictures), (new_texts, new_pictures) = story_of(comfyui, first), story_of(comfyui, again)
    assert texts[:6] == new_texts[:6] and pictures[:3] == new_pictures[:3] and pictures[3] != new_pictures[3]


def test_the_same_seeds_give_the_same_story_in_another_prompt(comfyui):
    first = story_of(comfyui, comfyui.run(tell(seed=5)))
    comfyui.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    assert story_of(comfyui, comfyui.run(tell(seed=5))) == first


def test_text_and_progress_are_shown_while_it_is_written(comfyui):
    done = comfyui.run(tell(seed=31))
    progress = [e["data"] for e in done["events"] if not isinstance(e, bytes) and e["type"] == "progress"]
    assert any("write" in p["node"] and 0 < p["value"] < p["max"] for p in progress)
    texts = [e for e in done["events"] if isinstance(e, bytes) and e[:4] == b"\x00\x00\x00\x03"]
    assert len(texts) > 10 and any(b"write 2" in text for text in texts)


@pytest.mark.parametrize("where", ["write", "draw"])
def test_cancel_stops_at_once_and_the_queue_goes_on(comfyui, where):
    pressed = []

    def cancel(event):
        if isinstance(event, bytes) or event["type"] != "progress":
            return
        if where in event["data"]["node"] and not pressed:
            pressed.append(time.monotonic())
            threading.Thread(target=comfyui.post, args=("/interrupt",)).start()

    many = {"max_tokens": 200, "min_tokens": 190} if where == "write" else {"steps": 400}
    with pytest.raises(Failed) as stopped:
        comfyui.run(tell(seed=int(time.time()), **many), on_event=cancel)
    assert stopped.value.sentence == "execution_interrupted" and time.monotonic() - pressed[0] < 3
    assert comfyui.run(tell(seed=4))["outputs"]["3"]["images"]


BAD = {
    "no panels": (tell(panels=0), "panels must be at least 1, not 0"),
    "seeds of nothing": (tell(seeds="1, two"), "panel 2 must be a whole number of at least 0, not 'two'"),
    "too many seeds": (tell(seeds="1,2,3,4,5"), "5 seeds for 4 panels"),
    "too long": (tell(panels=40), "more than the"),
    "min over max": (tell(min_tokens=30), "min_tokens, 30, must not be over max_tokens, 24"),
    "no such model": (
        {"1": node("MMInterleavedLoad", model="../other"), "2": show(["1", 1])}, "'../other' is not in models/"),
    "empty text": ({"1": node("MMInterleavedStoryText", text="  "), "2": show(["1", 0])}, "text is empty"),
    "prefix outside": ({**tell(panels=1), "3": node("MMInterleavedSaveStory", story=["2", 0], title="",
                        filename_prefix="../../out")}, "must name something below ComfyUI's output folder"),
    "absolute prefix": ({**tell(panels=1), "3": node("MMInterleavedSaveStory", story=["2", 0], title="",
                         filename_prefix="/tmp/out")}, "must name something below ComfyUI's output folder"),
    "empty question": ({"1": LOAD, "2": node("MMInterleavedStoryText", text="Hello."), "3": node("MMInterleavedAsk",
                        llm=["1", 1], story=["2", 0], question="", max_tokens=5), "4": show(["3", 0])},
                       "question is empty"),
    "one option": ({"1": LOAD, "2": node("MMInterleavedStoryText", text="Hello."), "3": node("MMInterleavedChoose",
                    llm=["1", 1], story=["2", 0], options="a fox", question=""), "4": show(["3", 0])},
                   "at least two options"),
    "storyboard outside": ({"1": node("MMInterleavedLoadStoryboard", storyboard="../secret.json", index=0),
                            "2": show(["1", 1])}, "must be a file in ComfyUI's input folder"),
    "storyboard absolute": ({"1": node("MMInterleavedLoadStoryboard", storyboard="/etc/passwd", index=0),
                             "2": show(["1", 1])}, "must be a file in ComfyUI's input folder"),
    "storyboard index": ({"1": node("MMInterleavedLoadStoryboard", storyboard="example (three stories)", index=3),
                          "2": show(["1", 1])}, "has 3 stories, 0 to 2, not 3"),
    "no such block file": ({"1": node("MMInterleavedLoadEncoder", file="../../x.safetensors"), "2": show(["1", 0])},
                           "'../../x.safetensors' is not in models/clip_vision"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(comfyui, name):
    prompt, sentence = BAD[name]
    began = time.monotonic()
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert sentence in failed.value.sentence and "\n" not in failed.value.sentence
    assert failed.value.kind.startswith("comfy_mminterleaved") or "errors." in failed.value.kind
    assert time.monotonic() - began < 30


def test_blocks_of_their_own_files_and_files_that_are_none(comfyui):
    models = comfyui.folder / "models"
    starter = ROOT / "comfy_mminterleaved" / "starter"
    for kind, block in (("clip_vision", "encoder"), ("text_encoders", "llm"), ("model_patches", "synchronizer")):
        (models / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(starter / f"{block}.safetensors", models / kind / f"mmi-{block}.safetensors")
    (models / "clip_vision" / "cut.safetensors").write_bytes((starter / "encoder.safetensors").read_bytes()[:5000])
    shutil.copy(starter / "vae.safetensors", models / "text_encoders" / "vae.safetensors")
    prompt = tell(seed=3, panels=2)
    prompt |= {"7": node("MMInterleavedLoadEncoder", file="mmi-encoder.safetensors"),
               "8": node("MMInterleavedLoadLLM", file="mmi-llm.safetensors"),
               "9": node("MMInterleavedLoadSynchronizer", file="mmi-synchronizer.safetensors")}  # fmt: skip
    prompt["2"]["inputs"] |= {"encoder": ["7", 0], "llm": ["8", 0], "synchronizer": ["9", 0]}
    apart = story_of(comfyui, comfyui.run(prompt))
    assert apart == story_of(comfyui, comfyui.run(tell(seed=3, panels=2)))
    for type, file, sentence in (
        ("MMInterleavedLoadEncoder", "cut.safetensors", "cannot be read as safetensors"),
        ("MMInterleavedLoadLLM", "vae.safetensors", "holds the block 'vae', not 'llm'"),
    ):
        with pytest.raises(Failed) as failed:
            comfyui.run({"1": node(type, file=file), "2": show(["1", 0])})
        assert sentence in failed.value.sentence


def resident_mb(comfyui) -> float:
    status = Path(f"/proc/{comfyui.process.pid}/status")
    if not status.exists():
        pytest.skip("memory of another process is read from /proc")
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))


def test_thirty_stories_hold_no_more_memory_than_three(comfyui):
    def one(seed):
        comfyui.run(tell(seed=1000 + seed, panels=2, max_tokens=12))

    for seed in range(3):
        one(seed)
    after_three = resident_mb(comfyui)
    for seed in range(3, 30):
        one(seed)
    assert resident_mb(comfyui) < after_three + 60
    assert "Traceback" not in comfyui.text().split("got prompt")[-1]
