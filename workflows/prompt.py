"""What the page does when Run is pressed: a saved workflow as a prompt."""

import json
from pathlib import Path

TEMPLATES = sorted(Path(__file__).parent.glob("*.json"))


def to_prompt(path: Path, definitions: dict) -> dict:
    """A template as ComfyUI's /prompt takes it; `definitions` are those of /object_info."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    bends = {node["id"]: node["inputs"][0]["link"] for node in workflow["nodes"] if node["type"] == "Reroute"}
    ends = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    links = {}
    for link, (node, output) in ends.items():
        while node in bends:
            node, output = ends[bends[node]]
        links[link] = (str(node), output)
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("MarkdownNote", "Reroute"):
            continue
        assert node["type"] in definitions, f"{path.name}: the node {node['type']} is not there"
        values, inputs = iter(node["widgets_values"]), {}
        for slot in node["inputs"]:
            if "widget" in slot:
                inputs[slot["name"]] = next(values)
                info = definitions[node["type"]]["input"]
                settings = (*(info.get("required", {}) | info.get("optional", {}))[slot["name"]], {})[1]
                if settings.get("control_after_generate") or settings.get("image_upload"):
                    next(values)
            if slot["link"] is not None:
                inputs[slot["name"]] = list(links[slot["link"]])
        assert next(values, None) is None, f"{path.name}: {node['type']} has a value too many"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
