"""Writes the help pages with an image of each node, and README's canvases: python web/build.py http://127.0.0.1:8188

Needs a running ComfyUI with this package, playwright and Chromium. The words about each node are in
web/docs/about.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request
from pathlib import Path

from screenshots import open_template, run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "web" / "docs"
PREFIX = "MMInterleaved"
# Template -> file, zoom, top left corner on the canvas, size in px.
CANVASES = {
    "1 Tell a story": ("canvas-tell.png", 0.72, (-50, -400), (980, 900)),
    "2 The four blocks": ("canvas-blocks.png", 0.62, (-60, -100), (1080, 960)),
}


def main(server: str) -> None:
    with urllib.request.urlopen(f"{server}/object_info") as answer:
        nodes = {name: entry for name, entry in json.load(answer).items() if name.startswith(PREFIX)}
    about = json.loads((DOCS / "about.json").read_text(encoding="utf-8"))
    for name, entry in nodes.items():
        (DOCS / f"{name}.md").write_text(page(name, entry, about[name]), encoding="utf-8")
    photograph(server, list(nodes))


def page(name: str, entry: dict, about: str) -> str:
    lines = [f"# {entry['display_name']}", "", entry["description"], "", f"![The node]({name}.png)", "", about, ""]
    rows = [
        f"| {slot} | {settings[0].get('tooltip', '') if settings else ''} |"
        for section in ("required", "optional")
        for slot, (_, *settings) in entry["input"].get(section, {}).items()
    ]
    if rows:
        lines += ["## Inputs", "", "| input | what it does |", "|---|---|", *rows, ""]
    outputs = zip(entry["output_name"], entry["output_tooltips"], entry["output_is_list"])
    rows = [f"| {slot} | {tip or ''}{' A list.' if many else ''} |" for slot, tip, many in outputs]
    if rows:
        lines += ["## Outputs", "", "| output | what it is |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def photograph(server: str, nodes: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1800, "height": 1300})
        page.goto(server)
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=60000)
        page.wait_for_timeout(2500)
        page.keyboard.press("Escape")
        for name in nodes:
            photograph_node(page, name)
        for template, where in CANVASES.items():
            photograph_canvas(server, page, template, *where)
        browser.close()


def photograph_node(page, name: str) -> None:
    box = page.evaluate(
        """async name => {
            const app = window.app;
            app.graph.clear();
            const node = window.LiteGraph.createNode(name);
            node.pos = [0, 0];
            app.graph.add(node);
            node.setSize([Math.max(330, node.computeSize()[0]), node.computeSize()[1]]);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [420, 160];
            app.canvas.draw(true, true);
            const canvas = app.canvas.canvas.getBoundingClientRect();
            return [canvas.left + 420, canvas.top + 160, node.size[0], node.size[1]];
        }""",
        name,
    )
    page.wait_for_timeout(600)
    left, top, width, height = box
    title = 50  # and the badge over it
    clip = {"x": left - 20, "y": top - title - 10, "width": width + 40, "height": height + title + 30}
    page.screenshot(path=str(DOCS / f"{name}.png"), clip=clip)


def photograph_canvas(server: str, page, template: str, file: str, scale: float, corner, size) -> None:
    """A template on the canvas after a run."""
    open_template(page, ROOT / "workflows" / f"{template}.json")
    run(server, page)
    x, y = 90, 110  # beside the side bar, below the menu
    page.evaluate(
        """([scale, x, y, left, top]) => {
            const canvas = window.app.canvas.canvas.getBoundingClientRect();
            window.app.canvas.ds.scale = scale;
            window.app.canvas.ds.offset = [(x - canvas.left) / scale - left, (y - canvas.top) / scale - top];
            window.app.canvas.setDirty(true, true);
        }""",
        [scale, x, y, *corner],
    )
    page.wait_for_timeout(1500)
    width, height = size
    page.screenshot(path=str(ROOT / "docs" / file), clip={"x": x, "y": y, "width": width, "height": height})


if __name__ == "__main__":
    main(sys.argv[1])
