"""Writes the help pages, a picture of each node among them: python web/build.py http://127.0.0.1:8188

Needs a running ComfyUI with this package, playwright and Chromium. The words about each node are in
web/docs/about.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request
from pathlib import Path

DOCS = Path(__file__).parent / "docs"
PREFIX = "MMInterleaved"


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
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.goto(server)
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=60000)
        page.wait_for_timeout(2500)
        page.keyboard.press("Escape")
        for name in nodes:
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
                    return [node.size[0], node.size[1]];
                }""",
                name,
            )
            page.wait_for_timeout(600)
            clip = {"x": 440, "y": 140, "width": box[0] + 40, "height": min(860, box[1] + 70)}
            page.screenshot(path=str(DOCS / f"{name}.png"), clip=clip)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
