"""Writers in a real ComfyUI: models of one's own in its layers, a server, and stories that they write."""

import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import pytest
from server import Failed
from test_any_model import drawn, saved, tell
from test_behaviour import node

sys.path.append(str(Path(__file__).parents[1]))
from chat_server import chat_server


@pytest.fixture(scope="module")
def results(comfyui):
    script = str(Path(__file__).parent / "in_writers.py")
    return json.loads(comfyui.run({"1": node("RunScript", script=script)})["outputs"]["1"]["text"][0])


def test_a_folder_runs_in_comfyuis_layers(results):
    assert {"tiny", "family/tiny-vl"} <= set(results["models"])
    for name, sees in (("tiny", False), ("family/tiny-vl", True)):
        assert results[f"{name} equal"] and results[f"{name} text equal"] and results[f"{name} sees"] is sees
        patched, plain = results[f"{name} layers"]
        assert patched == plain > 10
        assert results[f"{name} held"] and results[f"{name} unloaded"]
    assert results["images count"] > 1e-5
    assert results["scaled equal"] and results["uncast"] == [[4]]
    devices = results["moved"]
    assert devices.pop("2.weight") == "meta" and set(devices.values()) == {"cpu"}, "norms are moved, layers are cast"


def test_core_generates_where_it_can(results):
    assert results["clip text"] == "Mia runs." and results["clip image"] == [1, 64, 96, 3] and results["clip seed"] == 7
    assert results["clip without"].startswith("This ComfyUI cannot generate text with a CLIP; update it")


def server_writer(server, **settings):
    inputs = {"url": server.url, "model": "", "sees_images": False, "prompts": "story"}
    return node("MMInterleavedWriterFromServer", **inputs, timeout=60, any_host=False, options="", **settings)


def written(server, sees=False, family="flux", **changes):
    """A prompt of Tell Story (any model) with a writer behind a server; without one, node 9 is left out."""
    settings = {"idea": "About Mia.", "script": "", "panels": 3, "context": "first", **changes}
    prompt = tell(family, writer=["9", 0], **settings)
    if server is not None:
        prompt["9"] = server_writer(server)
        prompt["9"]["inputs"]["sees_images"] = sees
    return prompt


SCRIPT = "Panel 1: Mia wakes.\nPanel 2: Mia runs.\nPanel 3: Mia rests."


def test_a_writer_that_does_not_see_writes_all_texts_first(comfyui):
    with chat_server(SCRIPT) as server:
        done = comfyui.run(written(server))
        texts, files, _ = saved(comfyui, done, "3")
        assert texts == ["Mia wakes.", "Mia runs.", "Mia rests."] and len(files) == 3
        assert len(server.requests) == 1
        names = [name.rpartition(".")[2] for name in done["ran"] if "." in name]
        assert names.index("write") < min(names.index(f"draw {n}") for n in (1, 2, 3))
        again = comfyui.run(written(server, seeds=",,9"))
        assert drawn(again) == [3] and len(server.requests) == 1, "texts are not written again"


def test_a_writer_that_sees_is_shown_each_image(comfyui):
    with chat_server("Mia wakes.", "Mia runs.", "Mia rests.") as server:
        texts, files, _ = saved(comfyui, comfyui.run(written(server, sees=True, seed=300)), "3")
        assert texts == ["Mia wakes.", "Mia runs.", "Mia rests."] and len(files) == 3
        counts = []
        for request in server.requests:
            content = request["messages"][0]["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            counts.append(sum(part["type"] == "image_url" for part in parts))
            assert "of 3" in parts[-1]["text"]
        assert counts == [0, 1, 2] and [request["seed"] for request in server.requests] == [300, 301, 302]


def test_a_writer_continues_a_script(comfyui):
    with chat_server("Panel 3: Mia rests.") as server:
        prompt = written(server, script="Mia wakes.\n\nMia runs.", seed=310)
        texts, _, _ = saved(comfyui, comfyui.run(prompt), "3")
        assert texts == ["Mia wakes.", "Mia runs.", "Mia rests."]
        assert "Panel 2: Mia runs." in server.requests[0]["messages"][0]["content"]
        prompt = written(server, script="Mia wakes.\n\nMia runs.", panels=1, seed=311)
        assert saved(comfyui, comfyui.run(prompt), "3")[0] == ["Mia wakes."]


def test_a_folder_tells_a_story(comfyui, results):
    prompt = written(None, panels=2, seed=320, max_tokens=12)
    prompt["9"] = node("MMInterleavedLoadWriter", model="family/tiny-vl", prompts="story")
    prompt["3"] = node("MMInterleavedSaveStory", story=["2", 0], filename_prefix="any", title="")
    done = comfyui.run(prompt)
    texts, files, _ = saved(comfyui, done, "3")
    assert len(files) == 2 and all(texts)
    assert texts == saved(comfyui, comfyui.run({**prompt, "3": {**prompt["3"]}}), "3")[0]


def test_other_nodes_take_a_writer(comfyui):
    with chat_server("Mia is red.", "A red fox.", "2, 1", "She waves.") as server:
        prompt = {
            "1": node("MMInterleavedExampleImage"),
            "2": node("MMInterleavedStoryPicture", image=["1", 0]),
            "9": server_writer(server),
            "3": node("MMInterleavedAsk", writer=["9", 0], story=["2", 0], question="Who?", max_tokens=20),
            "4": node("MMInterleavedCaption", writer=["9", 0], image=["1", 0], beams=1, max_tokens=20),
            "5": node("MMInterleavedChoose", writer=["9", 0], story=["2", 0], options="a bear\na fox", question=""),
        }
        prompt["9"]["inputs"]["sees_images"] = True
        outputs = {}
        for key in ("3", "4", "5"):
            done = comfyui.run({k: v for k, v in prompt.items() if k in ("1", "2", "9", key)})
            outputs[key] = done["outputs"][key]["text"]
        assert [list(outputs[key]) for key in ("3", "4")] == [["Mia is red."], ["A red fox."]]
        assert outputs["5"][0].splitlines()[0].endswith("a fox")
        prompt["3"]["inputs"].pop("writer")
        with pytest.raises(Failed) as failed:
            comfyui.run({k: prompt[k] for k in ("1", "2", "3")})
        assert "connect an LLM or a writer" in failed.value.sentence


def test_ten_stories_hold_as_much_as_two(comfyui, results):
    def told(seed):
        prompt = written(None, panels=2, seed=seed, max_tokens=8, family="sdxl")
        prompt["9"] = node("MMInterleavedLoadWriter", model="family/tiny-vl", prompts="story")
        comfyui.run(prompt)
        return comfyui.get("/probe")

    two = [told(seed) for seed in (400, 401)][-1]
    ten = [told(seed) for seed in range(402, 410)][-1]
    assert ten["bytes"] <= two["bytes"] * 1.02 and ten["tensors"] <= two["tensors"] * 1.02


def test_live_text_and_cancel(comfyui):
    with chat_server(" ".join(["Mia walks on."] * 200), pause=0.05) as server:
        prompt = written(server, seed=330, max_tokens=4000)
        texts = []

        def on_event(event):
            if not isinstance(event, bytes) and event["type"] == "mm_interleaved.text":
                texts.append(event["data"])
                if len(texts) == 5:
                    comfyui.post("/interrupt")

        start = time.monotonic()
        with contextlib.suppress(Failed, AssertionError):
            comfyui.run(prompt, on_event=on_event)
        assert time.monotonic() - start < 8 and server.is_cut.wait(5)
        assert len(texts) >= 5 and texts[0]["node"] == "2" and texts[4]["text"].startswith(texts[0]["text"])
        assert server.pieces_sent < 200


def test_cancel_while_a_server_is_silent(comfyui):
    asked = threading.Event()

    def silent(handler):
        asked.set()
        time.sleep(20)

    with chat_server(silent) as server:
        prompt_id = comfyui.queue(written(server, seed=340))
        assert asked.wait(20)
        comfyui.post("/interrupt")
        start = time.monotonic()
        with contextlib.suppress(Failed, AssertionError):
            comfyui.wait(prompt_id)
        assert time.monotonic() - start < 3
    assert drawn(comfyui.run(tell(seed=341, script="Mia."))) == [1], "the queue goes on"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"panels": 0}, "The script is empty, and panels is 0"),
        ({"9": ("url", "http://example.com/v1")}, "is another computer"),
        ({"9": ("url", "http://127.0.0.1:9/v1")}, "does not answer"),
        ({"9": ("options", "[1]")}, "must be a JSON object"),
        ({"9": ("prompts", "mine")}, "There are no prompts 'mine'"),
    ],
)
def test_bad_input_of_writers(comfyui, changes, sentence):
    with chat_server(SCRIPT) as server:
        key, change = next(iter(changes.items()))
        prompt = written(server, seed=350, **({} if key == "9" else changes))
        if key == "9":
            prompt["9"]["inputs"][change[0]] = change[1]
        with pytest.raises(Failed) as failed:
            comfyui.run(prompt)
    assert sentence in failed.value.sentence and "\n" not in failed.value.sentence


def test_models_that_cannot_be_loaded(comfyui, results):
    for name, sentence in (("broken", "cannot be loaded"), ("../x", "There is no language model '../x'")):
        prompt = tell(writer=["9", 0], script="", panels=1)
        prompt["9"] = node("MMInterleavedLoadWriter", model=name, prompts="story")
        with pytest.raises(Failed) as failed:
            comfyui.run(prompt)
        assert sentence in failed.value.sentence and "\n" not in failed.value.sentence


def test_without_a_writer_the_script_says_all(comfyui):
    with pytest.raises(Failed) as failed:
        comfyui.run(tell(script="Mia.", panels=3))
    assert "The script has 1 panels, but 3 are to be drawn" in failed.value.sentence
