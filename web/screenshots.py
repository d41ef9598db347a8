"""Photographs every template after a run in ComfyUI's page: python web/screenshots.py http://127.0.0.1:8188 FOLDER

Those of docs/screenshots were made with ComfyUI 0.3.64 (`classic`), and with `--vue` and the page of
comfyui-frontend-package 1.58.1 (`new-nodes`; ComfyUI's `--front-end-root` takes one).

Needs a running ComfyUI with this package, playwright and Chromium. `--vue` turns the page's new nodes on.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import shutil
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image

WORKFLOWS = Path(__file__).parents[1] / "workflows"
TEMPLATES = [path for path in sorted(WORKFLOWS.glob("*.json")) if path.stem[0] not in "89"]  # need weights
SIZE = {"width": 1800, "height": 1100}


def main(server: str, folder: Path, vue: bool) -> None:
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    post(server, "/settings/Comfy.TutorialCompleted", True)  # else the page opens with a dialog
    post(server, "/settings/Comfy.VueNodes.Enabled", vue)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(server)
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=60000)
        page.wait_for_timeout(3000)
        page.keyboard.press("Escape")
        for path in TEMPLATES:
            open_template(page, path)
            post(server, "/free", {"unload_models": True, "free_memory": True})  # nothing of the template before
            page.wait_for_timeout(1500)
            run(server, page)
            page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
            page.wait_for_timeout(2500)
            shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            shot.resize((1440, 880), Image.Resampling.LANCZOS).save(folder / f"{path.stem}.jpg", quality=78)
            for problem in overlaps(page):
                sys.stdout.write(f"{path.stem}: {problem}\n")
        browser.close()


def post(server: str, path: str, value) -> None:
    request = urllib.request.Request(
        server + path, json.dumps(value).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    urllib.request.urlopen(request).read()


def open_template(page, path: Path) -> None:
    """Drops a template on the canvas, as a hand would."""
    page.evaluate(
        """async ([name, data]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            await window.app.handleFile(new File([bytes], name, {type: "application/json"}));
        }""",
        [path.name, base64.b64encode(path.read_bytes()).decode()],
    )
    page.wait_for_timeout(2500)


def run(server: str, page) -> None:
    def num_finished() -> int:
        with urllib.request.urlopen(f"{server}/history") as answer:
            return len(json.load(answer))

    before = num_finished()
    page.evaluate("window.app.queuePrompt(0, 1)")
    deadline = time.monotonic() + 240
    while num_finished() == before:
        if time.monotonic() > deadline:
            raise SystemExit("The template did not end within four minutes.")
        time.sleep(0.5)
    page.wait_for_timeout(1500)


def overlaps(page) -> list[str]:
    """Nodes that lie over another, and nodes that a group cuts."""
    nodes, groups = page.evaluate(
        """() => {
            const title = window.LiteGraph.NODE_TITLE_HEIGHT, scale = window.app.canvas.ds.scale;
            const box = n => {  // the new nodes are elements of the page
                const element = document.querySelector(`[data-node-id="${n.id}"]`)?.getBoundingClientRect();
                const height = element ? element.height / scale : n.collapsed ? title : n.size[1] + title;
                const width = element ? element.width / scale : n.collapsed ? n._collapsed_width : n.size[0];
                return [n.title, n.pos[0], n.pos[1] - title, width, height].map(v => v?.toFixed ? Math.round(v) : v);
            };
            return [
                window.app.graph.nodes.filter(n => n.type !== "Reroute").map(box),
                window.app.graph.groups.map(g => [g.title, ...g.pos, ...g.size]),
            ];
        }"""
    )
    found = []
    for i, (name, x, y, w, h) in enumerate(nodes):
        for other, x2, y2, w2, h2 in nodes[i + 1 :]:
            if x < x2 + w2 and x2 < x + w and y < y2 + h2 and y2 < y + h:
                found.append(f"{name} lies over {other}")
        for group, gx, gy, gw, gh in groups:
            overlap = x < gx + gw and gx < x + w and y < gy + gh and gy < y + h
            if overlap and not (gx <= x and gy <= y and x + w <= gx + gw and y + h <= gy + gh):
                found.append(f"the group {group!r} does not hold {name} ({x}, {y}, {w}, {h})")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("server")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vue", action="store_true")
    options = parser.parse_args()
    main(options.server.rstrip("/"), options.folder, options.vue)
