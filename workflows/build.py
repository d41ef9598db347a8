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

from PIL import Image, ImageDraw, ImageFont, ImageOps
from prompt import to_prompt

HERE = Path(__file__).parent
BLUE, GREEN, PURPLE, BROWN = "#3f789e", "#8A8", "#a1309b", "#b58b2a"
SEEDS = ("seed", "noise_seed", "index")  # these have a second widget: what to do with them after queueing


@dataclass
class Node:
    id: int
    type: str
    position: tuple[int, int]
    size: tuple[int, int]
    values: dict
    heading: str | None
    wires: dict[str, tuple[Node, int]] = field(default_factory=dict)

    def __getitem__(self, output: int) -> tuple[Node, int]:
        return self, output


class Workflow:
    """A graph as ComfyUI's page saves it."""

    def __init__(self, definitions: dict):
        self.definitions = definitions
        self.nodes: list[Node] = []
        self.groups: list[dict] = []

    def add(self, type: str, x: int, y: int, size=(300, 120), heading: str | None = None, **inputs) -> Node:
        wires = {name: value for name, value in inputs.items() if isinstance(value, tuple)}
        values = {name: value for name, value in inputs.items() if not isinstance(value, tuple)}
        node = Node(len(self.nodes) + 1, type, (x, y), size, values, heading, wires)
        self.nodes.append(node)
        return node

    def reroute(self, x: int, y: int, wire: tuple[Node, int]) -> tuple[Node, int]:
        """A bend: the wire as it goes on."""
        self.nodes.append(Node(len(self.nodes) + 1, "Reroute", (x, y), (75, 26), {}, None, {"": wire}))
        return self.nodes[-1][0]

    def note(self, x: int, y: int, size: tuple[int, int], name: str) -> None:
        text = (HERE / "notes" / f"{name}.md").read_text(encoding="utf-8").rstrip()
        self.nodes.append(Node(len(self.nodes) + 1, "MarkdownNote", (x, y), size, {"text": text}, None))

    def group(self, title: str, x: int, y: int, w: int, h: int, color: str) -> None:
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [x, y, w, h],
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

    def to_json(self, name: str) -> dict:
        links, nodes = [], []
        outgoing: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            entry = {
                "id": node.id,
                "type": node.type,
                "pos": list(node.position),
                "size": list(node.size),
                "flags": {},
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
            if node.type == "Reroute":
                self._bend(entry, node, links, outgoing)
                continue
            values = []
            for name, kind, widget, settings, raw in self.inputs_of(node.type):
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
            definition = self.definitions[node.type]
            for number, (kind, name) in enumerate(zip(definition["output"], definition["output_name"])):
                kind = "COMBO" if isinstance(kind, list) else kind
                entry["outputs"].append({"name": name, "type": kind, "links": None, "slot_index": number})
                if definition["output_is_list"][number]:
                    entry["outputs"][-1]["shape"] = 6
        for (node, output), found in outgoing.items():
            nodes[node - 1]["outputs"][output]["links"] = found
        for link in links:
            link[5] = nodes[link[1] - 1]["outputs"][link[2]]["type"]
            if nodes[link[3] - 1]["type"] == "Reroute":  # they stand in order
                nodes[link[3] - 1]["outputs"][0]["type"] = link[5]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
            "revision": 0,
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [60, 80]}},
            "version": 0.4,
        }

    @staticmethod
    def _bend(entry: dict, node: Node, links: list, outgoing: dict) -> None:
        origin, output = node.wires[""]
        links.append([len(links) + 1, origin.id, output, node.id, 0, "*"])
        outgoing.setdefault((origin.id, output), []).append(len(links))
        entry["inputs"] = [{"name": "", "type": "*", "link": len(links)}]
        entry["outputs"] = [{"name": "", "type": "*", "links": None, "slot_index": 0}]
        entry["properties"] = {"showOutputText": False, "horizontal": False}


EXAMPLE = "example (three stories)"
MIA = "Mia is a fox in a red coat with a crown. Mia jumps on the beach with a ball."


def load(w: Workflow, x=0, y=0) -> Node:
    return w.add("MMInterleavedLoad", x, y, (300, 150))


def tell(w: Workflow, model: Node, x: int, **inputs) -> Node:
    blocks = {name: model[output] for output, name in enumerate(("encoder", "llm", "synchronizer", "model", "vae"))}
    return w.add("MMInterleavedTellStory", x, 0, (360, 640), **blocks, **inputs)


def tell_a_story(w: Workflow) -> None:
    w.note(0, -340, (720, 200), "1 Tell a story")
    model = load(w)
    told = tell(
        w,
        model,
        360,
        opening=MIA,
        panels=4,
        seed=3,
    )
    w.add("PreviewImage", 780, 0, (420, 320), images=told[1])
    w.add("MMInterleavedSaveStory", 780, 380, (420, 420), story=told[0], title="Mia")
    w.group("1. Model", -20, -70, 340, 240, BLUE)
    w.group("2. The story", 340, -70, 400, 1040, PURPLE)
    w.group("3. Its pages", 760, -70, 460, 890, GREEN)


def four_blocks(w: Workflow) -> None:
    w.note(0, -400, (1080, 250), "2 The four blocks")
    told = None
    for number in range(3):
        y = number * 660
        model = load(w, 0, y + 60)
        encoder = w.reroute(340, y, model[0])
        vae = w.reroute(340, y + 470, model[4])
        if told is None:
            told = w.add("MMInterleavedStoryText", 420, y + 60, (310, 180), text=MIA)[0]
        else:
            told = w.add("MMInterleavedWrite", 420, y + 60, (310, 380), llm=model[1], story=told, seed=number)[0]
        ready = w.add(
            "MMInterleavedSynchronize",
            810,
            y + 60,
            (310, 240),
            llm=model[1],
            synchronizer=model[2],
            model=model[3],
            story=told,
        )
        latent = w.add("EmptyLatentImage", 810, y + 370, (310, 110), width=128, height=128)
        drawn = w.add(
            "KSampler",
            1200,
            y + 60,
            (310, 470),
            model=ready[0],
            positive=ready[1],
            negative=ready[2],
            latent_image=latent[0],
            seed=10 + number,
            steps=20,
            cfg=4.0,
            sampler_name="dpmpp_2m",
            scheduler="karras",
        )
        vae = w.reroute(1590, y + 560, w.reroute(1120, y + 560, vae))
        image = w.add("VAEDecode", 1590, y + 120, (230, 60), samples=drawn[0], vae=vae)
        w.add("PreviewImage", 1590, y + 250, (230, 280), images=image[0])
        encoder = w.reroute(1820, y, encoder)
        told = w.add("MMInterleavedStoryPicture", 1900, y + 60, (280, 90), encoder=encoder, image=image[0], story=told)[
            0
        ]
        if number < 2:  # back to the left, between the rows
            told = w.reroute(340, y + 612, w.reroute(2040, y + 612, told))
        w.group(f"Panel {number + 1}", -30, y - 60, 2250, 650, (PURPLE, BLUE, GREEN)[number])
    w.add("MMInterleavedSaveStory", 2290, 1380, (420, 480), story=told, title="Mia at the beach")
    w.group("Pages", 2260, 1260, 480, 650, BROWN)


def own_picture(w: Workflow) -> None:
    w.note(0, -340, (700, 200), "3 Continue from my picture")
    model = load(w)
    picture = w.add("LoadImage", 0, 260, (300, 330), image="example.png")
    begun = w.add("MMInterleavedStoryText", 380, 0, (320, 130), text="Mia runs in the meadow with a kite.")
    shown = w.add("MMInterleavedStoryPicture", 380, 260, (320, 90), story=begun[0], encoder=model[0], image=picture[0])
    told = tell(
        w,
        model,
        780,
        story=shown[0],
        panels=3,
        seed=8,
    )
    w.add("MMInterleavedSaveStory", 1220, 0, (420, 460), story=told[0], title="My picture")
    w.group("1. Model and picture", -20, -70, 340, 680, BLUE)
    w.group("2. The story begins", 360, -70, 360, 440, BROWN)
    w.group("3. and goes on", 760, -70, 400, 1040, PURPLE)
    w.group("4. Its pages", 1200, -70, 460, 560, GREEN)


def ask_and_caption(w: Workflow) -> None:
    w.note(0, -340, (700, 200), "4 Ask and caption")
    model = load(w)
    picture = w.add("LoadImage", 0, 260, (300, 330), image="example.png")
    story = w.add("MMInterleavedStoryPicture", 400, 80, (300, 90), encoder=model[0], image=picture[0])
    answer = w.add("MMInterleavedAsk", 800, 0, (360, 200), llm=model[1], story=story[0], question="Where is it?")
    best = w.add(
        "MMInterleavedChoose",
        800,
        300,
        (360, 240),
        llm=model[1],
        story=story[0],
        options="a fox\na bear\na rabbit",
        question="Who is it?",
    )
    caption = w.add("MMInterleavedCaption", 800, 640, (360, 170), llm=model[1], encoder=model[0], image=picture[0])
    for y, text in ((0, answer), (300, best), (640, caption)):
        w.add("PreviewAny", 1260, y, (300, 140), source=text[0])
    w.group("1. Model and picture", -20, -70, 340, 680, BLUE)
    w.group("2. See", 380, -70, 340, 260, BROWN)
    w.group("3. Ask", 780, -70, 400, 290, PURPLE)
    w.group("4. Choose", 780, 230, 400, 330, PURPLE)
    w.group("5. Caption", 780, 570, 400, 260, PURPLE)
    w.group("Answers", 1240, -70, 340, 900, GREEN)


def storyboard_batch(w: Workflow) -> None:
    w.note(0, -370, (760, 230), "5 Storyboard batch")
    model = load(w)
    board = w.add("MMInterleavedLoadStoryboard", 0, 260, (300, 170), encoder=model[0], storyboard=EXAMPLE)
    told = tell(
        w,
        model,
        400,
        story=board[0],
        panels=board[1],
        seed=board[2],
        plan=board[4],
    )
    w.add(
        "MMInterleavedSaveStory", 840, 0, (420, 460), story=told[0], title=board[3], filename_prefix="storyboard/story"
    )
    w.group("1. Model and storyboard", -20, -70, 340, 520, BLUE)
    w.group("2. Tell", 380, -70, 400, 1040, PURPLE)
    w.group("3. Save", 820, -70, 460, 560, GREEN)


def own_sampler(w: Workflow) -> None:
    w.note(0, -340, (700, 200), "6 Own sampler")
    model = load(w)
    latent = w.add("EmptyLatentImage", 0, 260, (300, 110), width=128, height=128)
    begun = w.add("MMInterleavedStoryText", 380, 0, (320, 130), text=MIA)
    ready = w.add(
        "MMInterleavedSynchronize",
        380,
        260,
        (320, 240),
        llm=model[1],
        synchronizer=model[2],
        story=begun[0],
        model=model[3],
    )
    guider = w.add("CFGGuider", 780, 0, (300, 100), model=ready[0], positive=ready[1], negative=ready[2], cfg=4.0)
    noise = w.add("RandomNoise", 780, 180, (300, 90), noise_seed=5)
    sampler = w.add("KSamplerSelect", 780, 350, (300, 60), sampler_name="euler_ancestral")
    sigmas = w.add("BasicScheduler", 780, 490, (300, 110), model=ready[0], scheduler="karras", steps=25)
    drawn = w.add(
        "SamplerCustomAdvanced",
        1160,
        0,
        (300, 330),
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=sigmas[0],
        latent_image=latent[0],
    )
    image = w.add("VAEDecode", 1160, 400, (300, 60), samples=drawn[0], vae=model[4])
    large = w.add("ImageScaleBy", 1160, 530, (300, 90), image=image[0], upscale_method="lanczos", scale_by=4.0)
    w.add("SaveImage", 1540, 0, (420, 460), images=large[0], filename_prefix="stories/large")
    w.group("1. Model", -20, -70, 340, 460, BLUE)
    w.group("2. Story", 360, -70, 360, 590, BROWN)
    w.group("3. Sampler", 760, -70, 340, 690, PURPLE)
    w.group("4. Picture", 1140, -70, 340, 720, BLUE)
    w.group("5. Large", 1520, -70, 460, 560, GREEN)


def reroll(w: Workflow) -> None:
    w.note(0, -370, (760, 230), "7 Draw a panel anew")
    model = load(w)
    told = tell(
        w,
        model,
        400,
        opening=MIA,
        panels=4,
        seed=3,
        seeds=", , 42",
    )
    w.add("PreviewImage", 840, 0, (420, 320), images=told[1])
    w.add("MMInterleavedSaveStory", 840, 420, (420, 420), story=told[0], title="Mia, another way")
    w.group("1. Model", -20, -70, 340, 240, BLUE)
    w.group("2. Change the third of the seeds", 380, -70, 400, 1040, PURPLE)
    w.group("3. Pictures and pages", 820, -70, 460, 930, GREEN)


TEMPLATES = {
    "1 Tell a story": tell_a_story,
    "2 The four blocks": four_blocks,
    "3 Continue from my picture": own_picture,
    "4 Ask and caption": ask_and_caption,
    "5 Storyboard batch": storyboard_batch,
    "6 Own sampler": own_sampler,
    "7 Draw a panel anew": reroll,
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
    if saved:
        pictures = [fetch(**image) for image in outputs[saved[0]]["images"]]
        texts = outputs[saved[0]].get("text", [""])[0].split("\n")
    else:
        read = next(entry for entry in prompt.values() if entry["class_type"] == "LoadImage")["inputs"]["image"]
        pictures = [fetch(filename=read, type="input")]
        asked = {"MMInterleavedAsk": "question", "MMInterleavedChoose": "question", "MMInterleavedCaption": ""}
        texts = [
            f"{prompt[n]['inputs'].get(asked[prompt[n]['class_type']]) or 'Caption:'} {outputs[n]['text'][0]}"
            for n in sorted(prompt)
            if prompt[n]["class_type"] in asked
        ]
    side, margin, line = 320, 16, 22
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


def main(server: str) -> None:
    with urllib.request.urlopen(f"{server}/object_info") as answer:
        definitions = json.load(answer)
    for name, make in TEMPLATES.items():
        workflow = Workflow(definitions)
        make(workflow)
        path = HERE / f"{name}.json"
        path.write_text(json.dumps(workflow.to_json(name), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        prompt = to_prompt(path, definitions)
        photograph(server, prompt, run(server, prompt)).save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main(sys.argv[1])
