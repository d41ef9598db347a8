"""Stories with any image model: references as the stock nodes give them, and a script drawn panel by panel."""

import json
import sys
from pathlib import Path

import pytest
from prompt import ANY_MODEL, to_prompt
from server import Failed
from test_behaviour import node

sys.path.append(str(Path(__file__).parents[1]))
from chat_server import chat_server

SCRIPT = "Mia waves.\n\nMia runs in the snow.\n\nMia sits by the lake.\n\nMia sleeps."


@pytest.fixture(scope="module")
def found(comfyui):
    script = str(Path(__file__).parent / "in_any_model.py")
    done = comfyui.run({"1": node("RunScript", script=script)})
    return json.loads(done["outputs"]["1"]["text"][0])


def test_what_a_model_takes_is_asked_of_it(found):
    takes = {name: found[f"{name} takes"] for name in ("sd15", "sdxl", "flux", "qwen")}
    latents, attention = [True, False], [False, True]
    assert takes == {"sd15": attention, "sdxl": attention, "flux": latents, "qwen": latents}


def test_references_are_those_of_the_stock_nodes_to_the_bit(found):
    assert found["flux equal"] and found["flux drawn equal"] and found["qwen equal"]
    assert found["flux looks"] > 0.01 and found["flux without"]
    assert found["references"] == [2, 64, 96, 3]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_self_attention_attends_to_the_references(found, family):
    assert found[f"{family} off"] and found[f"{family} not yet"]
    assert found[f"{family} looks"] > 0.01 and found[f"{family} at them"] > 0.001
    assert 0 < found[f"{family} looks less"] < found[f"{family} looks"]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_it_does_not_matter_how_guidance_is_computed(found, family):
    assert found[f"{family} apart"] < 1e-3 and found[f"{family} swapped"] < 1e-3


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_pass_has_controlnets_output(found, family):
    """Two steps of three passes: the positive half, and the negative one with the references and without."""
    assert found[f"{family} control"] == [1, 6]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_fidelity_keeps_references_from_the_negative_half(found, family):
    plain, between, attending = found[f"{family} negative"]
    assert plain < 1e-3 < between < attending


def tell(family="flux", **changes):
    inputs = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "script": SCRIPT,
        "idea": "",
        "panels": 0,
        "max_tokens": 60,
        "temperature": 0.8,
        "style": "A drawing of",
        "negative": "",
        "seed": 1,
        "seeds": "",
        "context": "first and last",
        "references": 2,
        "steps": 1,
        "cfg": 1.0,
        "width": 64,
        "height": 64,
        "sampler_name": "euler",
        "scheduler": "simple",
        "megapixels": 0.01,
        "guidance": 0.0,
        "strength": 1.0,
        "fidelity": 0.5,
        "start": 0.0,
        "end": 1.0,
        "best_of": 1,
        **changes,
    }
    return {
        "1": node("TinyModel", family=family),
        "2": node("MMInterleavedTellAnyModel", **inputs),
        "3": node("MMInterleavedSaveStory", story=["2", 0], filename_prefix="any", title=""),
    }


def saved(comfyui, done, node_id):
    """Texts and files of a saved story."""
    folder = comfyui.folder / "output" / done["outputs"][node_id]["images"][0]["subfolder"]
    segments = json.loads((folder / "story.json").read_text(encoding="utf-8"))["segments"]
    files = [(folder / s["image"]).read_bytes().split(b"IDAT", 1)[1] for s in segments if "image" in s]
    return [s["text"] for s in segments if "text" in s], files, folder


def save(story):
    return node("MMInterleavedSaveStory", story=story, filename_prefix="edited", title="")


def drawn(done) -> list[int]:
    """Panels that were drawn."""
    return sorted(int(name.rpartition(" ")[2]) for name in done["ran"] if ".draw " in name)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "qwen"])
def test_every_family_tells_a_script(comfyui, family):
    done = comfyui.run(tell(family))
    folder = comfyui.folder / "output" / done["outputs"]["3"]["images"][0]["subfolder"]
    story = json.loads((folder / "story.json").read_text(encoding="utf-8"))
    assert [segment.get("text") for segment in story["segments"]] == [
        part for text in SCRIPT.split("\n\n") for part in (text, None)
    ]
    assert drawn(done) == [1, 2, 3, 4]


def test_only_what_refers_to_a_panel_is_drawn_again(comfyui):
    """Context images are small stories of their own, so ComfyUI's cache cuts between them."""
    comfyui.run(tell(seed=50))
    assert drawn(comfyui.run(tell(seed=50, seeds=",,5"))) == [3, 4]  # the last panel refers to it
    comfyui.run(tell(seed=50))
    assert drawn(comfyui.run(tell(seed=50, script=SCRIPT.replace("runs", "swims")))) == [2, 3, 4]
    comfyui.run(tell(seed=50))
    assert drawn(comfyui.run(tell(seed=50, script=SCRIPT + "\n\nMia wakes."))) == [5]
    comfyui.run(tell(seed=60, context="first"))
    assert drawn(comfyui.run(tell(seed=60, context="first", seeds=",,5"))) == [3]
    comfyui.run(tell(seed=60, context="first"))
    assert drawn(comfyui.run(tell(seed=60, context="first", script=SCRIPT.replace("runs", "swims")))) == [2]
    comfyui.run(tell(seed=60, context="first"))
    more = comfyui.run(tell(seed=60, context="first", script=SCRIPT + "\n\nMia wakes."))
    assert drawn(more) == [5]


def test_heroes_are_referred_to_and_not_drawn(comfyui):
    prompt = tell(heroes=["5", 0], script="Mia waves.\n\nMia runs.")
    prompt["4"] = node("MMInterleavedExampleImage")
    prompt["5"] = node("MMInterleavedStoryPicture", image=["4", 0])
    done = comfyui.run(prompt)
    assert len(done["outputs"]["3"]["images"]) == 2
    events = [e["data"] for e in done["events"] if not isinstance(e, bytes) and e["type"] == "executed"]
    shown = [e["output"].get("mm_interleaved_panels") for e in events if e.get("display_node") == "2"]
    assert all(len(panels) <= 2 for panels in shown if panels), "what a panel refers to is not shown as the story"
    assert [(panel["text"], panel["seed"]) for panel in shown[-1]] == [("Mia waves.", 1), ("Mia runs.", 2)]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"script": " \n\n "}, "The script is empty"),
        ({"script": "x\n\n" * 201}, "The script has 201 panels; at most 200"),
        ({"seeds": "1,2,3,4,5"}, "There are 5 seeds for 4 panels"),
        ({"heroes": ["6", 0]}, "The heroes' story has no images"),
    ],
)
def test_bad_input_gets_a_sentence(comfyui, changes, sentence):
    prompt = tell(**changes)
    prompt["6"] = node("MMInterleavedStoryText", text="Mia.")
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert sentence in failed.value.sentence and "\n" not in failed.value.sentence


def test_select_context_images(comfyui):
    prompt = {
        "1": node("MMInterleavedExampleImage"),
        "2": node("MMInterleavedStoryPicture", image=["1", 0]),
        "3": node("MMInterleavedStoryPicture", image=["1", 0], story=["2", 0]),
        "4": node("MMInterleavedStoryText", text="Mia runs.", story=["3", 0]),
        "5": node("MMInterleavedSelectContext", story=["4", 0], choose="last", count=1),
        "6": node("MMInterleavedSaveStory", story=["5", 0], filename_prefix="context", title=""),
    }
    assert len(comfyui.run(prompt)["outputs"]["6"]["images"]) == 1
    prompt["5"]["inputs"]["choose"] = "most alike"
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert "needs a CLIP vision model" in failed.value.sentence


# ---- the best of several ----


def test_pick_image_takes_the_one_most_alike(comfyui):
    prompt = {
        "1": node("MMInterleavedExampleImage"),
        "2": node("ImageInvert", image=["1", 0]),
        "3": node("ImageBatch", image1=["2", 0], image2=["1", 0]),
        "4": node("MMInterleavedStoryPicture", image=["1", 0]),
        "5": node("TinyClipVision"),
        "6": node("MMInterleavedPickImage", images=["3", 0], heroes=["4", 0], clip_vision=["5", 0]),
        "7": node("PreviewAny", source=["6", 2]),
        "8": node("PreviewAny", source=["6", 1]),
        "9": node("MMInterleavedStoryPicture", image=["2", 0], story=["4", 0]),
        "10": node("MMInterleavedStoryPicture", image=["1", 0], story=["9", 0]),
        "11": node(
            "MMInterleavedSelectContext",
            story=["10", 0],
            choose="most alike",
            count=2,
            hero=["1", 0],
            clip_vision=["5", 0],
        ),
        "12": save(["11", 0]),
    }
    done = comfyui.run(prompt)
    assert list(done["outputs"]["7"]["text"]) == ["1"]
    scores = [float(text) for text in done["outputs"]["8"]["text"]]
    assert abs(scores[1] - 1) < 1e-3 and scores[0] < 0.99
    _, files, _ = saved(comfyui, done, "12")
    assert len(files) == 3 and len(set(files)) == 1, "the hero and the two images that are like it"


def test_the_best_of_several_is_kept(comfyui):
    prompt = tell(seed=80, best_of=3, clip_vision=["5", 0], script="Mia waves.\n\nMia runs.")
    prompt["5"] = node("TinyClipVision")
    done = comfyui.run(prompt)
    texts, files, _ = saved(comfyui, done, "3")
    assert texts == ["Mia waves.", "Mia runs."] and len(files) == 2
    assert sum(".pick " in name for name in done["ran"]) == 2
    del prompt["2"]["inputs"]["clip_vision"]
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert "The best of 3 images is chosen by a CLIP vision model" in failed.value.sentence


# ---- single panels ----


def test_a_saved_story_is_changed_panel_by_panel(comfyui):
    texts, files, folder = saved(comfyui, comfyui.run(tell(seed=70)), "3")
    name = folder.relative_to(comfyui.folder / "output").as_posix()
    prompt = {
        "1": node("MMInterleavedLoadStory", folder=name),
        "2": node("MMInterleavedStoryPanel", story=["1", 0], number=3),
        "3": node("ImageInvert", image=["2", 1]),
        "4": node("MMInterleavedSetPanel", story=["1", 0], number=3, text="", image=["3", 0]),
        "5": save(["4", 0]),
        "6": node("MMInterleavedEditPanels", story=["1", 0], order="3, 1", insert=["2", 2], before=2),
        "7": save(["6", 0]),
        "8": node("PreviewAny", source=["2", 0]),
    }
    done = comfyui.run(prompt)
    new_texts, new_files, _ = saved(comfyui, done, "5")
    assert new_texts == texts and [a == b for a, b in zip(files, new_files)] == [True, True, False, True]
    moved_texts, moved_files, _ = saved(comfyui, done, "7")
    assert moved_texts == [texts[n] for n in (2, 0, 1, 0)] and moved_files == [files[n] for n in (2, 0, 1, 0)]
    assert done["outputs"]["8"]["text"] == (texts[2],) or list(done["outputs"]["8"]["text"]) == [texts[2]]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"2": node("MMInterleavedStoryPanel", story=["1", 0], number=9)},
            "there is no panel 9.",
        ),
        (
            {"6": node("MMInterleavedEditPanels", story=["1", 0], order="1; 2", before=0)},
            "must be panel numbers",
        ),
        ({"1": node("MMInterleavedLoadStory", folder="../x")}, "There is no saved story '../x'"),
    ],
)
def test_panels_that_are_not_there(comfyui, changes, sentence):
    _, _, folder = saved(comfyui, comfyui.run(tell(seed=71)), "3")
    prompt = {
        "1": node("MMInterleavedLoadStory", folder=folder.relative_to(comfyui.folder / "output").as_posix()),
        "2": node("MMInterleavedStoryPanel", story=["1", 0], number=1),
        "3": node("PreviewAny", source=["2", 0]),
        "6": node("MMInterleavedEditPanels", story=["1", 0], order="", before=0),
        "7": save(["6", 0]),
        **changes,
    }
    with pytest.raises(Failed) as failed:
        comfyui.run(prompt)
    assert sentence in failed.value.sentence


# ---- templates ----

OUTPUTS = {"CheckpointLoaderSimple": 0, "UNETLoader": 0, "CLIPLoader": 1, "DualCLIPLoader": 1, "VAELoader": 2}


def with_tiny_models(prompt, family: str, saved_story: str, writer) -> dict:
    """A template's prompt with models of toy width in the loaders' place, small pictures and one step."""
    small = {"steps": 1, "width": 64, "height": 64, "megapixels": 0.01, "dpi": 40}
    loaders = {key: OUTPUTS[entry["class_type"]] for key, entry in prompt.items() if entry["class_type"] in OUTPUTS}
    changed = {"tiny": node("TinyModel", family=family)}
    for key, entry in prompt.items():
        if key in loaders:
            continue
        inputs = {name: small.get(name, value) for name, value in entry["inputs"].items()}
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in loaders:
                inputs[name] = ["tiny", loaders[value[0]] + value[1]]
        if entry["class_type"] == "CLIPVisionLoader":
            entry, inputs = node("TinyClipVision"), {}
        elif entry["class_type"] == "MMInterleavedLoadWriter":
            entry = writer
            inputs = entry["inputs"]
        elif entry["class_type"] == "MMInterleavedLoadStory":
            inputs["folder"] = saved_story
        changed[key] = {**entry, "inputs": inputs}
    return changed


FAMILY = {"Flux Kontext": "flux", "Qwen-Image-Edit": "qwen", "SD 1.5": "sd15"}


@pytest.mark.parametrize("path", ANY_MODEL, ids=lambda path: path.stem)
def test_template(comfyui, definitions, path):
    name = path.stem.partition(", ")[2]
    texts, before, folder = saved(comfyui, comfyui.run(tell(seed=90)), "3")
    with chat_server(*(f"Mia takes step {n}." for n in range(4))) as server:
        inputs = {"url": server.url, "model": "", "sees_images": True, "prompts": "story"}
        writer = node("MMInterleavedWriterFromServer", **inputs, timeout=60, any_host=False, options="")
        prompt = to_prompt(path, definitions)
        book = folder.relative_to(comfyui.folder / "output").as_posix()
        tiny = with_tiny_models(prompt, FAMILY.get(name, "sdxl"), book, writer)
        done = comfyui.run(tiny)
    key = next(key for key, entry in tiny.items() if entry["class_type"] == "MMInterleavedSaveStory")
    told, files, folder = saved(comfyui, done, key)
    assert len(told) == len(files) == 4 and all(told)
    if "writer" in name:
        assert told == [f"Mia takes step {n}." for n in range(4)] and len(server.requests) == 4
    if "saved panel" in name:
        assert told == texts and [one == two for one, two in zip(before, files)] == [True, True, False, True]
    if name == "SDXL":
        assert (folder / "story.pdf").read_bytes().startswith(b"%PDF")
    if "best of four" in name:
        assert sum(".pick " in node_id for node_id in done["ran"]) == 4


@pytest.mark.parametrize("path", ANY_MODEL, ids=lambda path: path.stem)
def test_a_template_names_its_files_and_what_app_mode_shows(definitions, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {entry["id"]: entry for entry in workflow["nodes"]}
    files = [file for entry in nodes.values() for file in entry["properties"].get("models", ())]
    assert files and all(file["url"].endswith(f"/{file['name']}") for file in files)
    named = {
        value
        for entry in nodes.values()
        for value in entry.get("widgets_values", ())
        if str(value).endswith(".safetensors")
    }
    assert named == {file["name"] for file in files}
    app = workflow["extra"]["linearData"]
    for number, widget in app["inputs"]:
        assert any(slot["name"] == widget and "widget" in slot for slot in nodes[number]["inputs"])
    assert all(definitions[nodes[number]["type"]]["output_node"] for number in app["outputs"]) and app["outputs"]
