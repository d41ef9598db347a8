"""What the page does when Run is pressed: a saved workflow as a prompt."""

import json
from pathlib import Path

TEMPLATES = sorted(Path(__file__).parent.glob("*.json"))
RUNNABLE = [path for path in TEMPLATES if not path.stem.startswith("8 ")]  # that one needs weights which do not ship


def to_prompt(path: Path, definitions: dict) -> dict:
    """A template as ComfyUI's /prompt takes it; `definitions` are those of /object_info."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    subgraphs = {entry["id"]: entry for entry in workflow.get("definitions", {}).get("subgraphs", [])}
    prompt: dict = {}
    _add_nodes(prompt, workflow["nodes"], workflow["links"], "", {}, subgraphs, definitions, path.name)
    return prompt


def _add_nodes(prompt, nodes, links, prefix, given, subgraphs, definitions, name) -> dict[int, list]:
    """Adds a graph's nodes to a prompt; returns where its outputs come from, if it is a subgraph.

    Args:
        prefix: Of its nodes' names: that of the node it stands behind.
        given: Where its inputs come from.
    """
    origins = {link[0]: (link[1], link[2]) for link in links}
    by_id = {node["id"]: node for node in nodes}
    inside: dict[int, dict[int, list]] = {}

    def origin(link: int):
        node, output = origins[link]
        if node == -10:
            return given.get(output)
        if by_id[node]["type"] == "Reroute":
            return origin(by_id[node]["inputs"][0]["link"])
        if by_id[node]["type"] in subgraphs:
            return enter(by_id[node])[output]
        return [f"{prefix}{node}", output]

    def enter(node: dict) -> dict[int, list]:
        if node["id"] not in inside:
            graph = subgraphs[node["type"]]
            inner = [
                [entry[k] for k in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
                for entry in graph["links"]
            ]
            sockets, values = {}, iter(node["widgets_values"])
            for number, slot in enumerate(node["inputs"]):
                value = next(values) if "widget" in slot else None
                sockets[number] = origin(slot["link"]) if slot["link"] is not None else value
            inside[node["id"]] = _add_nodes(
                prompt, graph["nodes"], inner, f"{prefix}{node['id']}:", sockets, subgraphs, definitions, name
            )
        return inside[node["id"]]

    for node in nodes:
        if node["type"] in ("MarkdownNote", "Reroute"):
            continue
        if node["type"] in subgraphs:
            enter(node)
            continue
        assert node["type"] in definitions, f"{name}: the node {node['type']} is not there"
        values, inputs = iter(node["widgets_values"]), {}
        for slot in node["inputs"]:
            if "widget" in slot:
                inputs[slot["name"]] = next(values)
                info = definitions[node["type"]]["input"]
                settings = (*(info.get("required", {}) | info.get("optional", {}))[slot["name"]], {})[1]
                if settings.get("control_after_generate") or settings.get("image_upload"):
                    next(values)
            if slot["link"] is not None and (source := origin(slot["link"])) is not None:
                inputs[slot["name"]] = source
        assert next(values, None) is None, f"{name}: {node['type']} has a value too many"
        prompt[f"{prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
    return {link[4]: origin(link[0]) for link in links if link[3] == -20}
