"""The real page in a real browser: templates dropped on the canvas show no red node and run by the Run button."""

import base64
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from prompt import ANY_MODEL, FULL_SIZE, RUNNABLE, TEMPLATES
from screenshots import overlaps
from server import Failed

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
SHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def page(comfyui):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium to open the page with")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1800, "height": 1050})
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(f"{error}\n{error.stack}"))
        comfyui.post("/settings/Comfy.TutorialCompleted", True)  # else newer pages open with a dialog over the canvas
        page.goto(f"http://127.0.0.1:{comfyui.port}/")
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=60000)
        time.sleep(2)
        page.errors.clear()  # this frontend's own while it starts
        yield page
        browser.close()


def drop(page, path: Path) -> None:
    """Drops a file on the canvas, as a hand would."""
    page.evaluate(
        """async ([name, type, data]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            await window.app.handleFile(new File([bytes], name, {type}));
        }""",
        [
            path.name,
            "application/json" if path.suffix == ".json" else "image/png",
            base64.b64encode(path.read_bytes()).decode(),
        ],
    )
    time.sleep(1)


def fit(page) -> None:
    page.keyboard.press("Escape")
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(1.2)


RED = """() => window.app.graph.nodes
    .filter(n => n.has_errors || n.type !== 'MarkdownNote' && (!window.LiteGraph.registered_node_types[n.type]))
    .map(n => n.type)"""


OPENED = [
    FULL_SIZE,
    *(path if n % 3 == 0 else pytest.param(path, marks=pytest.mark.long) for n, path in enumerate(ANY_MODEL)),
]


@pytest.mark.parametrize("path", OPENED, ids=lambda path: path.stem)
def test_a_template_whose_weights_do_not_ship_opens(page, path):
    drop(page, path)
    titles = page.evaluate("window.app.graph.nodes.map(n => n.type)")
    assert sorted(titles) == sorted(node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"])
    fit(page)
    assert page.evaluate(RED) == [] and not page.errors and overlaps(page) == []


# All of them run in test_templates, too.
DROPPED = [path if n % 3 == 0 else pytest.param(path, marks=pytest.mark.long) for n, path in enumerate(RUNNABLE)]


@pytest.mark.parametrize("path", DROPPED, ids=lambda path: path.stem)
def test_a_dropped_template_runs_by_the_button(comfyui, page, path):
    drop(page, path)
    assert page.evaluate(RED) == []
    titles = page.evaluate("window.app.graph.nodes.map(n => n.type)")
    assert sorted(titles) == sorted(node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"])
    before = len(comfyui.get("/history"))
    page.evaluate("window.app.queuePrompt(0, 1)")
    deadline = time.monotonic() + 240
    while len(comfyui.get("/history")) == before:
        assert time.monotonic() < deadline, "the prompt did not end"
        time.sleep(0.5)
    last = list(comfyui.get("/history").values())[-1]
    assert last["status"]["status_str"] == "success", last["status"]
    assert page.evaluate(RED) == [] and not page.errors
    fit(page)
    assert overlaps(page) == []
    captions = page.evaluate("[...document.querySelectorAll('.mmi-panels figcaption')].map(c => c.textContent)")
    written = [text for entry in last["outputs"].values() for text in entry.get("text", []) if text.strip()]
    lines = {line.strip() for text in written for line in text.split("\n")}
    assert {line for line in lines if not any(line in caption for caption in captions)} == set()
    if SHOTS:
        fit(page)
        page.screenshot(path=str(Path(SHOTS) / f"{path.stem}.png"))


def test_a_saved_picture_brings_its_workflow_back(comfyui, page):
    drop(page, next(path for path in TEMPLATES if path.stem.startswith("1 ")))
    before = len(comfyui.get("/history"))
    page.evaluate("window.app.queuePrompt(0, 1)")
    while len(comfyui.get("/history")) == before:
        time.sleep(0.5)
    saved = sorted((comfyui.folder / "output" / "stories").glob("*/01.png"), key=lambda p: p.stat().st_mtime)[-1]
    page.evaluate("window.app.graph.clear()")
    drop(page, saved)
    types = page.evaluate("window.app.graph.nodes.map(n => n.type)")
    assert "MMInterleavedTellStory" in types and "MMInterleavedSaveStory" in types and page.evaluate(RED) == []


@pytest.mark.parametrize("mode, name", [pytest.param(2, "muted", marks=pytest.mark.long), (4, "bypassed")])
def test_a_node_that_is_switched_off_is_passed_or_its_absence_is_said(comfyui, page, mode, name):
    """One node after the other: the story is told without it, or ComfyUI or a node of ours says what is missing."""
    from comfy_mminterleaved import errors

    path = next(path for path in TEMPLATES if path.stem.startswith("3 "))
    drop(page, path)
    ids = page.evaluate("window.app.graph.nodes.filter(n => n.type.startsWith('MMInterleaved')).map(n => n.id)")
    for number in ids:
        prompt = page.evaluate(
            """async ([id, mode]) => {
                const node = window.app.graph.getNodeById(id);
                node.mode = mode;
                const {output} = await window.app.graphToPrompt();
                node.mode = 0;
                return output;
            }""",
            [number, mode],
        )
        answer = comfyui.post("/prompt", {"prompt": prompt, "client_id": comfyui.client})
        if "prompt_id" not in answer:
            reasons = [error["message"] for node in answer["node_errors"].values() for error in node["errors"]]
            assert "missing" in " ".join([*reasons, answer["error"]["message"]]) or "no outputs" in str(answer), answer
            continue
        try:
            assert comfyui.wait(answer["prompt_id"])["outputs"]
        except Failed as failed:
            assert hasattr(errors, failed.kind.rpartition(".")[2]), (name, number, failed.kind, failed.sentence)


@pytest.mark.parametrize("language", [pytest.param("zh", marks=pytest.mark.long), "ja"])
def test_notes_and_groups_are_in_the_pages_language(comfyui, page, language):
    words = json.loads((Path(__file__).parents[2] / "web/js/templates.json").read_text(encoding="utf-8"))
    try:
        comfyui.post("/settings/Comfy.Locale", language)
        page.reload()
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=60000)
        time.sleep(2)
        for path in TEMPLATES[:2]:
            drop(page, path)
            note = page.evaluate("window.app.graph.nodes.find(n => n.type === 'MarkdownNote').widgets[0].value")
            assert note.strip() == words[language]["notes"][path.stem]
            groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
            titles = page.evaluate("window.app.graph.groups.map(g => g.title)")
            assert titles == [words[language]["groups"][group["title"]] for group in groups]
    finally:
        comfyui.post("/settings/Comfy.Locale", "en")
        page.reload()
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=60000)
        time.sleep(2)
        page.errors.clear()
