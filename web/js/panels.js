// Shows the panels of a story on its node: each image with its text below, growing while the story is told.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const PANELS = "mm_interleaved_panels";
const NODES = ["MMInterleavedTellStory", "MMInterleavedSaveStory", "MMInterleavedStoryToPanels"];
const HEIGHT = 240;

const STYLE = `
.mmi-panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 8px; align-content: start;
    box-sizing: border-box; width: 100%; height: 100%; padding: 4px; overflow-y: auto; }
.mmi-panels figure { margin: 0; }
.mmi-panels img { display: block; width: 100%; border-radius: 4px; }
.mmi-panels figcaption { margin-top: 4px; color: var(--input-text, #ddd); font: 12px/1.4 sans-serif; overflow-wrap: anywhere; }
.mmi-panels .mmi-live { opacity: 0.7; }
`;

function figure(panel) {
    const element = document.createElement("figure");
    if (panel.image) {
        const url = api.apiURL(`/view?${new URLSearchParams(panel.image)}`);
        const link = Object.assign(document.createElement("a"), { href: url, target: "_blank" });
        link.append(Object.assign(document.createElement("img"), { src: url, alt: panel.text, draggable: false }));
        element.append(link);
    }
    const caption = document.createElement("figcaption");
    caption.dir = "auto";
    caption.textContent = panel.text;
    element.append(caption);
    return element;
}

function rootOf(node) {
    if (!node.mmiPanels) {
        const root = document.createElement("div");
        root.className = "mmi-panels";
        const widget = node.addDOMWidget(PANELS, "MMI_PANELS", root, {
            serialize: false,
            hideOnZoom: false,
            getMinHeight: () => HEIGHT,
            getValue: () => "",
            setValue: () => {},
        });
        widget.serialize = false;
        node.mmiPanels = root;
        const [width, height] = node.computeSize();
        node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
    }
    return node.mmiPanels;
}

function show(node, panels) {
    const root = rootOf(node);
    const isAtEnd = root.scrollTop + root.clientHeight >= root.scrollHeight - 8;
    root.replaceChildren(...panels.map(figure));
    if (isAtEnd) root.scrollTop = root.scrollHeight;
    node.setDirtyCanvas?.(true, true);
}

function showLive(node, text) {
    const root = rootOf(node);
    let live = root.querySelector(".mmi-live");
    if (!live) {
        live = figure({ text: "" });
        live.className = "mmi-live";
        root.append(live);
    }
    live.querySelector("figcaption").textContent = text;
    root.scrollTop = root.scrollHeight;
}

// "5:3" is node 3 of the subgraph that node 5 stands for.
function findNode(id) {
    let graph = app.graph;
    let node = null;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById?.(Number.isNaN(Number(part)) ? part : Number(part));
        graph = node?.subgraph;
    }
    return node;
}

app.registerExtension({
    name: "comfy-mminterleaved.panels",
    setup() {
        document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
        api.addEventListener("mm_interleaved.text", ({ detail }) => {
            const node = findNode(detail.node);
            if (node) showLive(node, detail.text);
        });
    },
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (!NODES.includes(nodeData.name)) return;
        const onExecuted = nodeType.prototype.onExecuted;
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.call(this, output);
            if (output?.[PANELS]) show(this, output[PANELS]);
        };
        if (nodeData.name === "MMInterleavedSaveStory") {
            nodeType.prototype.onDrawBackground = undefined; // the images are in the panels
        }
    },
    nodeCreated(node) {
        if (node.comfyClass === "MMInterleavedSaveStory") node.hideOutputImages = true; // newer pages' way to say so
    },
    loadedGraphNode(node) {
        const panels = app.nodeOutputs?.[node.id]?.[PANELS];
        if (panels && NODES.includes(node.comfyClass)) show(node, panels);
    },
});
