"""Writes the templates and runs each for its JPG: python workflows/build.py http://127.0.0.1:8188

A ComfyUI with this package must run there. Each template is a few lines below; what a node's inputs are called, and in
which order, comes from the server.
"""

from __future__ import annotations

import io
import json
import sys
import textwrap
import time
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import any_model
import systems
from PIL import Image, ImageDraw, ImageFont, ImageOps
from prompt import to_prompt

HERE = Path(__file__).parent
BLUE, GREEN, PURPLE, BROWN = "#3f789e", "#8A8", "#a1309b", "#b58b2a"
SEEDS = ("seed", "noise_seed", "index")  # these have a second widget: what to do with them after queueing


COLLAPSED = 220  # width of a collapsed node


@dataclass
class Node:
    id: int
    type: str
    position: tuple[int, int]
    size: tuple[int, int]
    values: dict
    heading: str | None
    wires: dict[str, tuple[Node, int]] = field(default_factory=dict)
    room: int = 0  # height to keep free, if it grows when it runs
    is_collapsed: bool = False

    @property
    def right(self) -> int:
        return self.position[0] + (COLLAPSED if self.is_collapsed else self.size[0])

    @property
    def bottom(self) -> int:
        return self.position[1] + (0 if self.is_collapsed else self.size[1])

    def __getitem__(self, output: int) -> tuple[Node, int]:
        return self, output


class Workflow:
    """A graph as ComfyUI's page saves it."""

    def __init__(self, definitions: dict):
        self.definitions = definitions
        self.nodes: list[Node] = []
        self.groups: list[dict] = []
        self.subgraphs: dict[str, Subgraph] = {}
        self.bends: dict[tuple[int, str], list[tuple[int, int]]] = {}  # of the wire to a node's input, by its id
        self.app_inputs: list[list] = []  # what the page's app mode shows: widgets, and nodes with results
        self.app_outputs: list[int] = []

    def add(self, type: str, /, x: int, y: int, size=(300, 120), heading: str | None = None, room=0, **inputs) -> Node:
        wires = {name: value for name, value in inputs.items() if isinstance(value, tuple)}
        values = {name: value for name, value in inputs.items() if not isinstance(value, tuple)}
        node = Node(len(self.nodes) + 1, type, (x, y), size, values, heading, wires, max(room, size[1]))
        self.nodes.append(node)
        return node

    def add_subgraph(self, subgraph: Subgraph, x: int, y: int, size, heading: str, room: int, **inputs) -> Node:
        """A node that stands for a graph of its own."""
        self.definitions = {**self.definitions, subgraph.id: subgraph.definition()}
        self.subgraphs[subgraph.id] = subgraph
        return self.add(subgraph.id, x, y, size, heading, room, **inputs)

    def bend(self, node: Node, name: str, *points: tuple[int, int]) -> None:
        """Leads the wire to an input through points, around what it would pass behind."""
        self.bends[node.id, name] = list(points)

    def bend_below(self, node: Node, name: str, above: Node) -> None:
        """Leads the wire from the first output of the node above between the two."""
        right, left = above.position[0] + above.size[0] + 30, node.position[0] - 30
        self.bend(
            node, name, (right, above.position[1] + 14), (right, node.position[1] - 42), (left, node.position[1] - 42)
        )

    def _bends_of(self, nodes: list[dict]) -> dict:
        """The points as the page saves them: each knows the one before it, and the link its last."""
        reroutes, extensions = [], []
        for (node, name), points in self.bends.items():
            link = next(each["link"] for each in nodes[node - 1]["inputs"] if each["name"] == name)
            for number, point in enumerate(points):
                parent = {"parentId": len(reroutes)} if number else {}
                reroutes.append({"id": len(reroutes) + 1, **parent, "pos": list(point), "linkIds": [link]})
            extensions.append({"id": link, "parentId": len(reroutes)})
        return {"reroutes": reroutes, "linkExtensions": extensions} if reroutes else {}

    def note(self, x: int, y: int, size: tuple[int, int], name: str) -> None:
        text = (HERE / "notes" / f"{name}.md").read_text(encoding="utf-8").rstrip()
        self.nodes.append(Node(len(self.nodes) + 1, "MarkdownNote", (x, y), size, {"text": text}, None))

    def group(self, title: str, color: str, *members: Node) -> None:
        """A frame around nodes, each with its title above it."""
        left = min(node.position[0] for node in members) - 20
        top = min(node.position[1] for node in members) - 80
        right = max(node.right for node in members) + 20
        bottom = max(node.bottom if node.is_collapsed else node.position[1] + node.room for node in members) + 20
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [left, top, right - left, bottom - top],
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )

    def inputs_of(self, type: str):
        """(name, type, whether it is a widget, settings) of a node's inputs, in order."""
        info = self.definitions[type]["input"]
        for section in ("required", "optional"):
            for name in self.definitions[type]["input_order"].get(section, []):
                kind, settings = (*info[section][name], {})[:2]
                combo = isinstance(kind, list) or kind == "COMBO"
                widget = (combo or kind in ("INT", "FLOAT", "STRING", "BOOLEAN")) and not settings.get("forceInput")
                yield name, "COMBO" if combo else kind, widget, settings, kind

    def nodes_and_links(self) -> tuple[list[dict], list[list], dict[tuple[int, int], list[int]]]:
        """Nodes and links as the page saves them, and the links that leave each output."""
        links, nodes = [], []
        outgoing: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            entry = {
                "id": node.id,
                "type": node.type,
                "pos": list(node.position),
                "size": list(node.size),
                "flags": {"collapsed": True} if node.is_collapsed else {},
                "order": node.id - 1,
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {"Node name for S&R": node.type},
            }
            if node.heading:
                entry["title"] = node.heading
            nodes.append(entry)
            if node.type == "MarkdownNote":
                entry |= {"widgets_values": [node.values["text"]], "properties": {}, "color": "#432", "bgcolor": "#653"}
                continue
            if node.type in self.subgraphs:
                entry["properties"] = {"proxyWidgets": []}
            values = []
            # The page has sockets before widgets.
            for name, kind, widget, settings, raw in sorted(self.inputs_of(node.type), key=lambda each: each[2]):
                slot = {"name": name, "type": kind, "link": None}
                if widget:
                    slot["widget"] = {"name": name}
                    options = settings.get("options", raw if isinstance(raw, list) else None)
                    default = settings.get("default", options[0] if options else "")
                    values.append(node.values.get(name, default))
                    if settings.get("control_after_generate") or (name in SEEDS and kind == "INT"):
                        values.append("increment" if name == "index" else "fixed")
                    elif settings.get("image_upload"):
                        values.append("image")
                if name in node.wires:
                    origin, output = node.wires[name]
                    links.append([len(links) + 1, origin.id, output, node.id, len(entry["inputs"]), kind])
                    outgoing.setdefault((origin.id, output), []).append(len(links))
                    slot["link"] = len(links)
                entry["inputs"].append(slot)
            unknown = (set(node.values) | set(node.wires)) - {name for name, *_ in self.inputs_of(node.type)}
            if unknown:
                raise ValueError(f"{node.type} has no inputs {sorted(unknown)}")
            entry["widgets_values"] = values
            files = any_model.missing(node.values.values())
            if files:
                entry["properties"]["models"] = files
            definition = self.definitions[node.type]
            for number, (kind, name) in enumerate(zip(definition["output"], definition["output_name"])):
                kind = "COMBO" if isinstance(kind, list) else kind
                entry["outputs"].append({"name": name, "type": kind, "links": None, "slot_index": number})
                if definition["output_is_list"][number]:
                    entry["outputs"][-1]["shape"] = 6
        for (node, output), numbers in outgoing.items():
            if node > 0:
                nodes[node - 1]["outputs"][output]["links"] = numbers
                for number in numbers:
                    links[number - 1][5] = nodes[node - 1]["outputs"][output]["type"]
        return nodes, links, outgoing

    def to_json(self, name: str) -> dict:
        nodes, links, _ = self.nodes_and_links()
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
            "revision": 0,
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": self.groups,
            **(
                {"definitions": {"subgraphs": [s.to_json() for s in self.subgraphs.values()]}} if self.subgraphs else {}
            ),
            "config": {},
            "extra": {"ds": self._view(), "mm_interleaved": name, **self._bends_of(nodes), **self._app()},
            "version": 0.4,
        }

    def _app(self) -> dict:
        data = {"inputs": self.app_inputs, "outputs": self.app_outputs}
        return {"linearData": data} if self.app_outputs else {}

    def _view(self) -> dict:
        """Zoom and offset at which the whole graph is in view on a screen of 1800 x 1000 px."""
        left = min(node.position[0] for node in self.nodes) - 40
        top = min(node.position[1] for node in self.nodes) - 60
        right = max(node.right for node in self.nodes) + 40
        bottom = max(node.bottom for node in self.nodes) + 40
        scale = min(1600 / (right - left), 900 / (bottom - top), 0.9)
        return {"scale": round(scale, 3), "offset": [round(100 / scale - left), round(80 / scale - top)]}


class Subgraph(Workflow):
    """A graph behind one node; `self.inputs[name]` is what its node is given.

    Args:
        kinds: Type of each input, by name.
    """

    def __init__(self, definitions: dict, name: str, kinds: dict[str, str]):
        super().__init__(definitions)
        self.name, self.kinds = name, kinds
        self.id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfy-mminterleaved {name}"))
        entrance = Node(-10, "", (0, 0), (0, 0), {}, None)
        self.inputs = {key: entrance[number] for number, key in enumerate(kinds)}
        self.outputs: dict[str, tuple[Node, int]] = {}

    def _kind_of(self, wire: tuple[Node, int]) -> str:
        return self.definitions[wire[0].type]["output"][wire[1]]

    def definition(self) -> dict:
        """As a server describes a node."""
        return {
            "input": {"required": {name: (kind, {"forceInput": True}) for name, kind in self.kinds.items()}},
            "input_order": {"required": list(self.kinds)},
            "output": [self._kind_of(wire) for wire in self.outputs.values()],
            "output_name": list(self.outputs),
            "output_is_list": [False] * len(self.outputs),
        }

    def to_json(self) -> dict:
        nodes, links, outgoing = self.nodes_and_links()
        for number, wire in enumerate(self.outputs.values()):
            links.append([len(links) + 1, wire[0].id, wire[1], -20, number, self._kind_of(wire)])
            entry = nodes[wire[0].id - 1]["outputs"][wire[1]]
            entry["links"] = [*(entry["links"] or []), len(links)]
        left = min(node.position[0] for node in self.nodes)
        right = max(node.position[0] + node.size[0] for node in self.nodes)

        def sockets(names, kinds, x, link_ids):
            return [
                {
                    "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.id} {name}")),
                    "name": name,
                    "type": kind,
                    "linkIds": link_ids(number),
                    "pos": [x, 20 + 20 * number],
                }
                for number, (name, kind) in enumerate(zip(names, kinds))
            ]

        ends = {link[4]: link[0] for link in links if link[3] == -20}
        outputs = [self._kind_of(wire) for wire in self.outputs.values()]
        return {
            "id": self.id,
            "version": 1,
            "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
            "revision": 0,
            "config": {},
            "name": self.name,
            "inputNode": {"id": -10, "bounding": [left - 240, 0, 120, 40 + 20 * len(self.kinds)]},
            "outputNode": {"id": -20, "bounding": [right + 120, 0, 120, 40 + 20 * len(outputs)]},
            "inputs": sockets(self.kinds, self.kinds.values(), left - 140, lambda k: outgoing.get((-10, k), [])),
            "outputs": sockets(self.outputs, outputs, right + 140, lambda k: [ends[k]]),
            "widgets": [],
            "nodes": nodes,
            "groups": [],
            "links": [
                dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link))
                for link in links
            ],
            "extra": {},
        }


EXAMPLE = "example (three stories)"
MIA = "Mia is a fox in a red coat with a crown. Mia jumps on the beach with a ball."
PAGES = (420, 760)  # of Save Story, which shows the panels
TELL, TELL_ROOM = (400, 480), 1320  # of Tell Story; with all its settings open and the panels below


def load(w: Workflow, x=0, y=0) -> Node:
    return w.add("MMInterleavedLoad", x, y, (300, 170))


def load_refiner(w: Workflow, y: int) -> Node:
    return w.add("MMInterleavedLoadRefiner", 0, y, (300, 80), model="starter")


def tell(w: Workflow, model: Node, x: int, **inputs) -> Node:
    blocks = {name: model[output] for output, name in enumerate(("encoder", "llm", "synchronizer", "model", "vae"))}
    return w.add("MMInterleavedTellStory", x, 0, TELL, room=TELL_ROOM, **blocks, **inputs)


def save(w: Workflow, told: Node, x: int, **inputs) -> Node:
    """Save Story behind Tell Story: collapsed, because Tell Story shows the panels already."""
    node = w.add("MMInterleavedSaveStory", x, 0, PAGES, story=told[0], **inputs)
    node.is_collapsed = True
    return node


def tell_a_story(w: Workflow) -> None:
    w.note(0, -360, (720, 220), "1 Tell a story")
    model = load(w)
    refiner = load_refiner(w, 290)
    told = tell(w, model, 380, opening=MIA, panels=4, seed=3, refiner=refiner[0])
    pages = save(w, told, 860, title="Mia")
    w.group("1. Model", BLUE, model, refiner)
    w.group("2. The story", PURPLE, told)
    w.group("3. Its pages", GREEN, pages)


def panel(definitions: dict) -> Subgraph:
    """The blocks that write and draw one panel of a story."""
    kinds = {"encoder": "MMI_ENCODER", "LLM": "MMI_LLM", "synchronizer": "MMI_SYNCHRONIZER", "MODEL": "MODEL"}
    g = Subgraph(definitions, "Panel", {"story": "STORY", **kinds, "VAE": "VAE", "seed": "INT"})
    text = g.add(
        "MMInterleavedWrite", 0, 0, (310, 240), llm=g.inputs["LLM"], story=g.inputs["story"], seed=g.inputs["seed"]
    )
    ready = g.add(
        "MMInterleavedSynchronize",
        390,
        0,
        (310, 320),
        llm=g.inputs["LLM"],
        synchronizer=g.inputs["synchronizer"],
        model=g.inputs["MODEL"],
        story=text[0],
    )
    latent = g.add("EmptyLatentImage", 390, 420, (310, 140), width=128, height=128)
    drawn = g.add(
        "KSampler",
        780,
        0,
        (310, 540),
        model=ready[0],
        positive=ready[1],
        negative=ready[2],
        latent_image=latent[0],
        seed=g.inputs["seed"],
        steps=20,
        cfg=4.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
    )
    image = g.add("VAEDecode", 1170, 0, (260, 80), samples=drawn[0], vae=g.inputs["VAE"])
    added = g.add(
        "MMInterleavedStoryPicture",
        1510,
        0,
        (300, 110),
        encoder=g.inputs["encoder"],
        image=image[0],
        story=text[0],
    )
    g.outputs = {"story": added[0], "text": text[1], "image": image[0]}
    return g


def four_blocks(w: Workflow) -> None:
    w.note(1000, 0, (640, 400), "2 The four blocks")
    model = load(w)
    begun = w.add("MMInterleavedStoryText", 0, 290, (300, 160), text="Mia is a fox in a red coat with a crown.")
    seeds = [
        w.add("PrimitiveInt", 0, 570 + 160 * k, (300, 110), f"Seed of panel {k + 1}", value=seed)
        for k, seed in enumerate((14, 15, 16))
    ]
    blocks = dict(zip(("encoder", "LLM", "synchronizer", "MODEL", "VAE"), (model[output] for output in range(5))))
    draw, told = panel(w.definitions), begun[0]
    for k, seed in enumerate(seeds):
        at = (560 + 60 * k, 490 * k)
        drawn = w.add_subgraph(draw, *at, (280, 220), f"Panel {k + 1}", room=440, story=told, seed=seed[0], **blocks)
        if k:
            w.bend(drawn, "story", (at[0] + 260, at[1] - 470), (at[0] + 260, at[1] - 42), (at[0] - 30, at[1] - 42))
        told = drawn[0]
    pages = w.add("MMInterleavedSaveStory", 1200, 520, (440, 760), story=told, title="Mia")
    w.group("Model and opening", BLUE, model, begun)
    w.group("Seeds", BROWN, *seeds)
    w.group("Pages", GREEN, pages)


def own_picture(w: Workflow) -> None:
    w.note(0, -380, (700, 240), "3 Continue from my picture")
    model = load(w)
    picture = w.add("MMInterleavedExampleImage", 0, 290, (300, 360))
    begun = w.add("MMInterleavedStoryText", 400, 250, (320, 160), text="Mia runs in the meadow with a kite.")
    shown = w.add("MMInterleavedStoryPicture", 400, 540, (320, 190), story=begun[0], encoder=model[0], image=picture[0])
    refiner = load_refiner(w, 750)
    told = tell(w, model, 820, story=shown[0], panels=3, seed=8, refiner=refiner[0])
    pages = save(w, told, 1320, title="My picture")
    w.group("1. Model and picture", BLUE, model, picture, refiner)
    w.bend_below(shown, "story", begun)
    w.group("2. The story begins", BROWN, begun, shown)
    w.group("3. and goes on", PURPLE, told)
    w.group("4. Its pages", GREEN, pages)


def ask_and_caption(w: Workflow) -> None:
    w.note(0, -390, (340, 290), "4 Ask and caption")
    model = load(w)
    picture = w.add("MMInterleavedExampleImage", 0, 290, (300, 360))
    story = w.add("MMInterleavedStoryPicture", 420, -160, (300, 190), encoder=model[0], image=picture[0])
    question = w.add("MMInterleavedAsk", 800, 0, (360, 240), llm=model[1], story=story[0], question="Where is it?")
    ranking = w.add(
        "MMInterleavedChoose",
        800,
        360,
        (360, 290),
        llm=model[1],
        story=story[0],
        options="a fox\na bear\na rabbit",
        question="Who is it?",
    )
    caption = w.add("MMInterleavedCaption", 800, 770, (360, 230), llm=model[1], encoder=model[0], image=picture[0])
    w.group("1. Model and picture", BLUE, model, picture)
    w.group("2. See", BROWN, story)
    w.group("3. Ask", PURPLE, question)
    w.group("4. Choose", PURPLE, ranking)
    w.group("5. Caption", PURPLE, caption)


def storyboard_batch(w: Workflow) -> None:
    w.note(0, -390, (760, 250), "5 Storyboard batch")
    model = load(w)
    board = w.add("MMInterleavedLoadStoryboard", 0, 290, (300, 260), encoder=model[0], storyboard=EXAMPLE)
    refiner = load_refiner(w, 660)
    told = tell(w, model, 420, story=board[0], panels=board[1], seed=board[2], plan=board[4], refiner=refiner[0])
    pages = save(w, told, 920, title=board[3], filename_prefix="storyboard/story")
    w.bend_below(board, "encoder", model)
    w.bend(pages, "title", (370, 440), (390, -50), (860, -50))
    w.group("1. Model and storyboard", BLUE, model, board, refiner)
    w.group("2. Tell", PURPLE, told)
    w.group("3. Save", GREEN, pages)


def own_sampler(w: Workflow) -> None:
    w.note(0, -360, (700, 220), "6 Own sampler")
    model = load(w)
    latent = w.add("EmptyLatentImage", 0, 290, (300, 140), width=128, height=128)
    begun = w.add("MMInterleavedStoryText", 400, 0, (320, 180), text=MIA)
    ready = w.add(
        "MMInterleavedSynchronize",
        400,
        290,
        (320, 320),
        llm=model[1],
        synchronizer=model[2],
        story=begun[0],
        model=model[3],
    )
    guider = w.add("CFGGuider", 820, 0, (300, 130), model=ready[0], positive=ready[1], negative=ready[2], cfg=4.0)
    noise = w.add("RandomNoise", 820, 220, (300, 110), noise_seed=5)
    sampler = w.add("KSamplerSelect", 820, 420, (300, 80), sampler_name="euler_ancestral")
    sigmas = w.add("BasicScheduler", 820, 590, (300, 150), model=ready[0], scheduler="karras", steps=25)
    drawn = w.add(
        "SamplerCustomAdvanced",
        1220,
        0,
        (300, 420),
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=sigmas[0],
        latent_image=latent[0],
    )
    image = w.add("VAEDecode", 1220, 510, (300, 80), samples=drawn[0], vae=model[4])
    large = w.add("ImageScaleBy", 1220, 680, (300, 120), image=image[0], upscale_method="lanczos", scale_by=4.0)
    saved = w.add("SaveImage", 1620, 0, (420, 560), images=large[0], filename_prefix="stories/large")
    w.group("1. Model", BLUE, model, latent)
    w.group("2. Story", BROWN, begun, ready)
    w.bend_below(ready, "story", begun)
    w.bend_below(image, "samples", drawn)
    w.bend_below(large, "image", image)
    w.bend(image, "vae", (340, 660), (1130, 790), (1170, 560))
    w.bend(drawn, "latent_image", (350, 690), (1150, 810), (1180, 130))
    w.group("3. Sampler", PURPLE, guider, noise, sampler, sigmas)
    w.group("4. Picture", BLUE, drawn, image, large)
    w.group("5. Large", GREEN, saved)


def reroll(w: Workflow) -> None:
    w.note(0, -390, (760, 250), "7 Draw a panel anew")
    model = load(w)
    refiner = load_refiner(w, 290)
    told = tell(w, model, 420, opening=MIA, panels=4, seed=3, seeds=", , 42", refiner=refiner[0])
    pages = save(w, told, 920, title="Mia, another way")
    w.group("1. Model", BLUE, model, refiner)
    w.group("2. Change the third of the seeds", PURPLE, told)
    w.group("3. Its pages", GREEN, pages)


CARDS = (("24 GB", "fp8"), ("16 GB", "fp8, blocks in turns"), ("12 GB", "4 bits"), ("8 GB", "4 bits, in parts"))


def full_size(w: Workflow) -> None:
    w.note(0, -380, (760, 240), "8 The full-size model")
    model = w.add("MMInterleavedLoad", 0, 0, (300, 170), model="mm-interleaved-13b")
    told = tell(w, model, 380, opening="A fox in a red coat finds a letter in the snow.", panels=3, seed=1)
    pages = save(w, told, 860, title="The letter")
    w.group("1. Model", BLUE, model)
    w.group("2. The story", PURPLE, told)
    w.group("3. Its pages", GREEN, pages)


def card(title: str, boxes: tuple[tuple[str, str], ...]) -> Image.Image:
    """In place of a photograph, which would need the weights: a title and boxes below it."""
    sheet = Image.new("RGB", (1360, 420), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((60, 50), title, "#1f3d52", ImageFont.load_default(64))
    for column, (size, form) in enumerate(boxes):
        x = 60 + 320 * column
        pen.rounded_rectangle((x, 170, x + 280, 350), 18, fill="#e8f0f5")
        large = next(n for n in range(56, 10, -1) if ImageFont.load_default(n).getlength(size) <= 236)
        small = next(n for n in range(25, 8, -1) if ImageFont.load_default(n).getlength(form) <= 236)
        pen.text((x + 24, 195), size, "#1f3d52", ImageFont.load_default(large))
        pen.text((x + 24, 290), form, "#3f5a6b", ImageFont.load_default(small))
    return sheet


def any_model_card(name: str, workflow: Workflow) -> Image.Image:
    """What a template for other models is made of."""
    kinds = {
        "CheckpointLoaderSimple": "image model",
        "UNETLoader": "image model",
        "CLIPVisionLoader": "compares images",
        "MMInterleavedLoadWriter": "writes",
        "MMInterleavedLoadStory": "a saved story",
        "MMInterleavedTellAnyModel": "script, references, seeds",
        "MMInterleavedComposePages": "a comic page, a PDF",
        "MMInterleavedSetPanel": "one panel changes",
    }
    boxes = [(workflow.definitions[n.type]["display_name"], kinds[n.type]) for n in workflow.nodes if n.type in kinds]
    return card(name.partition(", ")[2], tuple(boxes[:4]))


TEMPLATES = {
    "1 Tell a story": tell_a_story,
    "2 The four blocks": four_blocks,
    "3 Continue from my picture": own_picture,
    "4 Ask and caption": ask_and_caption,
    "5 Storyboard batch": storyboard_batch,
    "6 Own sampler": own_sampler,
    "7 Draw a panel anew": reroll,
    "8 The full-size model": full_size,
    **any_model.TEMPLATES,
    **systems.TEMPLATES,
}


def run(server: str, prompt: dict) -> dict:
    """What a prompt's nodes showed, by node."""
    request = urllib.request.Request(
        f"{server}/prompt", json.dumps({"prompt": prompt}).encode(), {"Content-Type": "application/json"}
    )
    number = json.load(urllib.request.urlopen(request))["prompt_id"]
    while number not in (history := json.load(urllib.request.urlopen(f"{server}/history/{number}"))):
        time.sleep(0.5)
    if history[number]["status"]["status_str"] != "success":
        raise SystemExit(f"The template failed: {history[number]['status']['messages'][-1]}")
    return history[number]["outputs"]


def photograph(server: str, prompt: dict, outputs: dict) -> Image.Image:
    """The pages that a template made, each over its text; of one without pictures, the picture it read and its answers."""

    def fetch(**query) -> Image.Image:
        with urllib.request.urlopen(f"{server}/view?{urllib.parse.urlencode(query)}") as answer:
            return Image.open(io.BytesIO(answer.read())).convert("RGB")

    saved = [n for n, entry in prompt.items() if entry["class_type"] in ("MMInterleavedSaveStory", "SaveImage")]
    if len(saved) > 1 and all(len(outputs[n]["images"]) == 1 for n in saved):
        pictures = [fetch(**outputs[n]["images"][0]) for n in saved]
        asked = [n for n, entry in prompt.items() if entry["class_type"] == "MMInterleavedDrawInContext"]
        texts = [prompt[n]["inputs"]["text"] for n in asked]
    elif saved:
        pictures = [fetch(**image) for image in outputs[saved[0]]["images"]]
        texts = outputs[saved[0]].get("text", [""])[0].split("\n")
    else:
        read = next(n for n, entry in prompt.items() if entry["class_type"] == "MMInterleavedExampleImage")
        pictures = [fetch(**outputs[read]["images"][0])]
        asked = {"MMInterleavedAsk": "question", "MMInterleavedChoose": "question", "MMInterleavedCaption": ""}
        texts = [
            f"{prompt[n]['inputs'].get(asked[prompt[n]['class_type']]) or 'Caption:'} {outputs[n]['text'][0]}"
            for n in sorted(prompt)
            if prompt[n]["class_type"] in asked
        ]
    side, margin, line = 320, 16, 22
    if len(pictures) == 1 and pictures[0].width != pictures[0].height:  # a sheet of several
        return ImageOps.expand(ImageOps.contain(pictures[0], (680, 680), Image.Resampling.LANCZOS), margin, "white")
    columns = len(pictures)
    rows = [textwrap.wrap(text, 34) for text in texts]
    below = [sum((*rows, []), [])] if len(pictures) == 1 else rows
    height = side + line * max((len(lines) for lines in below), default=0) + 3 * margin
    sheet = Image.new("RGB", (columns * (side + margin) + margin, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for column in range(columns):
        x = margin + column * (side + margin)
        sheet.paste(ImageOps.fit(pictures[column], (side, side), Image.Resampling.LANCZOS), (x, margin))
        if column < len(below):
            pen.multiline_text((x, side + 2 * margin), "\n".join(below[column]), "black", font)
    return sheet


def write_translations() -> None:
    """Notes and group titles in every language, for the page to put in place of the English ones (web/js/panels.js)."""
    groups = json.loads((HERE / "notes" / "groups.json").read_text(encoding="utf-8"))
    notes: dict[str, dict[str, str]] = {}
    for path in sorted((HERE / "notes").glob("*.md")):
        name, _, language = path.stem.partition(".")
        notes.setdefault(language or "en", {})[name] = path.read_text(encoding="utf-8").rstrip()
    data = {language: {"notes": notes[language], "groups": groups.get(language, {})} for language in notes}
    path = HERE.parent / "web" / "js" / "templates.json"
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main(server: str) -> None:
    write_translations()
    with urllib.request.urlopen(f"{server}/object_info") as answer:
        definitions = json.load(answer)
    for name, make in TEMPLATES.items():
        workflow = Workflow(definitions)
        make(workflow)
        path = HERE / f"{name}.json"
        path.write_text(json.dumps(workflow.to_json(name), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        prompt = to_prompt(path, definitions)
        if make is full_size:
            sheet = card("MM-Interleaved 13B", CARDS)
        elif name in any_model.TEMPLATES:
            sheet = any_model_card(name, workflow)
        else:
            sheet = photograph(server, prompt, run(server, prompt))
        sheet.save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main(sys.argv[1])
