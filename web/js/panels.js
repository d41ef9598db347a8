// Shows a story on its node, each image with its text below, and what the LLM writes; both grow while they are made.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const PANELS = "mm_interleaved_panels";
const TELL_NODES = ["MMInterleavedTellStory", "MMInterleavedTellAnyModel"];
const PANEL_NODES = [
    ...TELL_NODES,
    "MMInterleavedSaveStory",
    "MMInterleavedStoryToPanels",
    "MMInterleavedSetPanel",
    "MMInterleavedEditPanels",
    "MMInterleavedLoadStory",
    "MMInterleavedRoundTrip",
    "MMInterleavedDescribe",
    "MMInterleavedLookInside",
    "MMInterleavedProbeStory",
];
// Nodes that draw inside: the sampler's last preview would hide what came of it.
const DRAWING_NODES = [
    ...TELL_NODES,
    "MMInterleavedRoundTrip",
    "MMInterleavedDescribe",
    "MMInterleavedLookInside",
    "MMInterleavedProbeStory",
];
const TEXT_NODES = [
    "MMInterleavedWrite",
    "MMInterleavedIntroduce",
    "MMInterleavedAsk",
    "MMInterleavedCaption",
    "MMInterleavedChoose",
    "MMInterleavedClipScore",
    "MMInterleavedFindImage",
    "MMInterleavedDescribeSound",
];
const NODES = [...PANEL_NODES, ...TEXT_NODES];

const STYLE = `
.mmi-panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 8px; align-content: start;
    box-sizing: border-box; width: 100%; height: 100%; padding: 4px; overflow-y: auto; }
.mmi-panels figure { margin: 0; }
.mmi-panels img { display: block; width: 100%; border-radius: 4px; }
.mmi-panels figcaption { margin-top: 4px; color: var(--input-text, #ddd); font: 12px/1.4 sans-serif; overflow-wrap: anywhere;
    white-space: pre-line; }
.mmi-panels small { color: var(--descrip-text, #999); font: 11px/1.6 sans-serif; }
.mmi-panels .mmi-live { opacity: 0.7; }
.mmi-panels.mmi-text { display: block; }
.mmi-panels.mmi-text figcaption { white-space: pre-wrap; font-size: 13px; }
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
    if (Number.isInteger(panel.seed)) {
        const seed = Object.assign(document.createElement("small"), { textContent: `seed ${panel.seed}` });
        element.append(seed);
    }
    return element;
}

function rootOf(node) {
    if (!node.mmiPanels) {
        const root = document.createElement("div");
        const isText = TEXT_NODES.includes(node.comfyClass);
        root.className = isText ? "mmi-panels mmi-text" : "mmi-panels";
        const widget = node.addDOMWidget(PANELS, "MMI_PANELS", root, {
            serialize: false,
            hideOnZoom: false,
            getMinHeight: () => (isText ? 70 : root.childElementCount > 2 ? 500 : 320), // two rows of panels
            getValue: () => "",
            setValue: () => {},
        });
        widget.serialize = false;
        node.mmiPanels = root;
        grow(node);
    }
    return node.mmiPanels;
}

function grow(node) {
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
}

function show(node, panels) {
    const root = rootOf(node);
    const isAtEnd = root.scrollTop + root.clientHeight >= root.scrollHeight - 8;
    root.replaceChildren(...panels.map(figure));
    if (!node.flags?.collapsed) grow(node);
    if (isAtEnd) root.scrollTop = root.scrollHeight;
    node.setDirtyCanvas?.(true, true);
}

// What a sampler drew on the node while it ran; the panel it became is shown.
function dropPreview(node) {
    delete app.nodePreviewImages?.[node.id];
    const index = node.widgets?.findIndex((widget) => widget.name === "$$canvas-image-preview") ?? -1;
    if (index < 0) return; // the new nodes keep theirs elsewhere
    node.widgets[index].onRemove?.();
    node.widgets.splice(index, 1);
    node.imgs = undefined;
    node.setSize([node.size[0], node.computeSize()[1]]);
}

function finish(node) {
    if (DRAWING_NODES.includes(node.comfyClass)) dropPreview(node);
    node.mmiPanels.scrollTop = 0;
    node.setDirtyCanvas?.(true, true);
}

function showLive(node, text) {
    const root = rootOf(node);
    if (TEXT_NODES.includes(node.comfyClass)) root.replaceChildren();
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

// Notes and group titles of the templates, in the page's language.
const translations = fetch(new URL("./templates.json", import.meta.url)).then((answer) => answer.json());

async function translate(graph) {
    const name = graph.extra?.mm_interleaved;
    const language = app.extensionManager?.setting?.get("Comfy.Locale")?.split("-")[0];
    const words = name && (await translations)[language];
    if (!words || language === "en") return;
    const english = (await translations).en.notes[name];
    for (const node of graph.nodes) {
        const widget = node.type === "MarkdownNote" && node.widgets?.[0];
        if (widget && widget.value.trim() === english) widget.value = words.notes[name]; // as it came, not edited
    }
    for (const group of graph.groups) group.title = words.groups[group.title] ?? group.title;
    graph.setDirtyCanvas(true, true);
}

app.registerExtension({
    name: "comfy-mminterleaved.panels",
    setup() {
        document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
        api.addEventListener("mm_interleaved.text", ({ detail }) => {
            const node = findNode(detail.node);
            if (node) showLive(node, detail.text);
        });
        api.addEventListener("execution_success", () => {
            // The last preview may come after the last panel.
            setTimeout(() => app.graph.nodes.filter((node) => node.mmiPanels).forEach(finish), 400);
        });
    },
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (!NODES.includes(nodeData.name)) return;
        const onExecuted = nodeType.prototype.onExecuted;
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.call(this, output);
            if (output?.[PANELS]) {
                if (DRAWING_NODES.includes(nodeData.name) && nodeData.name !== "MMInterleavedTellAnyModel") dropPreview(this);
                show(this, output[PANELS]);
            } else if (output?.text && TEXT_NODES.includes(nodeData.name)) {
                show(this, [{ text: output.text.join("\n") }]);
            }
        };
        if (nodeData.name === "MMInterleavedSaveStory") {
            nodeType.prototype.onDrawBackground = undefined; // the images are in the panels
        }
    },
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("MMInterleaved")) return;
        for (const widget of node.widgets ?? []) {
            // Older pages know these of a widget, but do not take them from its definition, and leave it its room.
            if (!widget.options?.advanced && !widget.options?.hidden) continue;
            widget.advanced = Boolean(widget.options.advanced);
            widget.hidden = Boolean(widget.options.hidden);
            widget.computeSize = (width) => [width ?? 0, node.isWidgetVisible?.(widget) === false ? -4 : 20];
        }
        if (node.comfyClass === "MMInterleavedSaveStory") node.hideOutputImages = true; // newer pages' way to say so
    },
    afterConfigureGraph() {
        translate(app.graph);
    },
    loadedGraphNode(node) {
        const output = app.nodeOutputs?.[node.id];
        if (output && NODES.includes(node.comfyClass)) node.onExecuted?.(output);
    },
});
