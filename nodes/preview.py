"""What a node shows of a story on the canvas: each panel's image with its text below (web/js/panels.js)."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ui
from server import PromptServer

from ..comfy_mminterleaved.files import atomic_write
from ..comfy_mminterleaved.stories.images import encode_png
from ..comfy_mminterleaved.stories.story import ImageSegment, Story

SUBFOLDER = "mm_interleaved"
CONTEXT = "context"  # begins the names of a Tell Story's parts that hold what a panel refers to
LIVE_TEXT = "mm_interleaved.text"


def panels_ui(story: Story, saved: list[dict] | None = None) -> dict:
    """A node's UI output.

    Args:
        saved: Where the images are, as ComfyUI's page asks for them; None saves them in its temporary folder.
    """
    images = iter(saved if saved is not None else [_temporary(image) for image in story.images])
    return {
        "mm_interleaved_panels": [
            {
                "text": panel.text,
                "image": next(images) if panel.image is not None else None,
                "seed": panel.image.seed if panel.image is not None else None,
            }
            for panel in story.panels()
        ]
    }


def pictures_ui(*pictures) -> dict:
    """A node's UI output of images with texts below them, each an `ImageSegment` and its text."""
    return {
        "mm_interleaved_panels": [{"text": text, "image": _temporary(image), "seed": None} for image, text in pictures]
    }


def _temporary(image) -> dict:
    folder = Path(folder_paths.get_temp_directory()) / SUBFOLDER
    larger = image if image.refined is None else ImageSegment(image.refined)
    path = folder / f"{larger.digest}.png"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, encode_png(larger.pixels))
    return {"filename": path.name, "subfolder": SUBFOLDER, "type": "temp"}


def is_inside(hidden) -> bool:
    """Whether a node runs as a part of another one, Tell Story."""
    return hidden.dynprompt is not None and hidden.unique_id in hidden.dynprompt.ephemeral_prompt


def shows_panels(hidden) -> bool:
    """Whether a node is a part of Tell Story whose story is the one that is told, not what a panel refers to."""
    return is_inside(hidden) and not hidden.unique_id.rpartition(".")[2].startswith(CONTEXT)


def text_or_panels(hidden, text: str, story: Story):
    """What a node shows that adds to a story: its text; inside Tell Story, all panels so far."""
    return panels_ui(story) if is_inside(hidden) else ui.PreviewText(text)


def send_live_text(hidden, text: str) -> None:
    """Shows a text as it grows, on the node or on the Tell Story that it is a part of."""
    server, node_id = PromptServer.instance, hidden.unique_id
    if node_id is None:
        return
    if hidden.dynprompt is not None:
        node_id = hidden.dynprompt.get_display_node_id(node_id)
    server.send_sync(LIVE_TEXT, {"node": node_id, "text": text}, server.client_id)
