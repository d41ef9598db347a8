"""Workflows as the page saves them, and the prompts that ComfyUI's /prompt takes."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import SettingError

STORYBOARD_NODE = "MMInterleavedLoadStoryboard"
_MUTED, _BYPASSED = 2, 4  # modes of the page's nodes
_EXPORT = "save it with Export (API) and queue that file"


def read_workflow(path: str | Path) -> dict:
    """Reads a workflow, as the page saves it or in API format; raises SettingError."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingError(f"The workflow {str(path)!r} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise SettingError(f"The workflow {str(path)!r} is not JSON in UTF-8: {error}.") from None
    if not isinstance(data, dict) or not (is_page_format(data) or _is_prompt(data)):
        raise SettingError(f"{str(path)!r} is no workflow of ComfyUI, neither as the page saves it nor in API format.")
    return data


def is_page_format(workflow: dict) -> bool:
    return isinstance(workflow.get("nodes"), list) and isinstance(workflow.get("links"), list)


def _is_prompt(data: dict) -> bool:
    nodes = data.values()
    return bool(data) and all(isinstance(n, dict) and "class_type" in n and "inputs" in n for n in nodes)


def with_story(prompt: dict, storyboard: str, index: int, name: str = "The workflow") -> dict:
    """A prompt whose Load Storyboard reads one story of a storyboard; raises SettingError if it has none or several."""
    nodes = [node for node, entry in prompt.items() if entry["class_type"] == STORYBOARD_NODE]
    if len(nodes) != 1:
        count = "no node" if not nodes else f"{len(nodes)} nodes"
        raise SettingError(f"{name} has {count} Load Storyboard; it must have one, which says where each story goes.")
    entry = prompt[nodes[0]]
    inputs = {**entry["inputs"], "storyboard": storyboard, "index": index, "start_over": False}
    return {**prompt, nodes[0]: {**entry, "inputs": inputs}}


def to_prompt(workflow: dict, definitions: dict, name: str = "The workflow") -> dict:
    """A workflow that the page saved as a prompt; raises SettingError.

    Args:
        definitions: Those of the server's /object_info.
    """
    subgraphs = {entry["id"]: entry for entry in workflow.get("definitions", {}).get("subgraphs", [])}
    prompt: dict = {}
    _add_nodes(prompt, workflow["nodes"], workflow["links"], "", {}, subgraphs, definitions, name)
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
        if by_id[node].get("mode") == _MUTED:
            return None
        if by_id[node]["type"] == "Reroute":
            link = by_id[node]["inputs"][0]["link"]
            return None if link is None else origin(link)
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
        if node["type"] in ("MarkdownNote", "Note", "Reroute") or node.get("mode") == _MUTED:
            continue
        if node.get("mode") == _BYPASSED:
            raise SettingError(f"{name} has a bypassed node, {node['type']}; {_EXPORT}.")
        if node["type"] in subgraphs:
            enter(node)
            continue
        if node["type"] not in definitions:
            raise SettingError(
                f"The server has no node {node['type']}; install it, or if only the page has it, {_EXPORT}."
            )
        prompt[f"{prefix}{node['id']}"] = {
            "class_type": node["type"],
            "inputs": _inputs(node, definitions, origin, name),
        }
    return {link[4]: origin(link[0]) for link in links if link[3] == -20}


def _inputs(node: dict, definitions: dict, origin, name: str) -> dict:
    """A node's values and links; raises SettingError if its values are not those that the server's version has."""
    values, inputs = node.get("widgets_values") or [], {}
    info = definitions[node["type"]]["input"]
    info = info.get("required", {}) | info.get("optional", {})
    with_widget = [slot for slot in node.get("inputs", []) if "widget" in slot]
    counted = []  # with each slot, how many values it has: some have a second widget
    for slot in with_widget:
        settings = (*info.get(slot["name"], ()), {}, {})[1]
        counted.append((slot, 2 if settings.get("control_after_generate") or settings.get("image_upload") else 1))
    if not isinstance(values, list) or len(values) != sum(count for _, count in counted):
        raise SettingError(f"{name}: the values of {node['type']} are of another version of it; {_EXPORT}.")
    position = 0
    for slot, count in counted:
        inputs[slot["name"]] = values[position]
        position += count
    for slot in node.get("inputs", []):
        if slot.get("link") is not None and (source := origin(slot["link"])) is not None:
            inputs[slot["name"]] = source
    return inputs
