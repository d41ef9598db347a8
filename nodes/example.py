"""Example Image: a picture of the starter's world, for templates that continue from one."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..comfy_mminterleaved.stories.images import read_image
from .types import CATEGORY

PATH = Path(__file__).parents[1] / "example.png"


class ExampleImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedExampleImage",
            display_name="Example Image",
            category=CATEGORY,
            description="A picture of the starter model's world, to try a workflow with; replace it by Load Image.",
            inputs=[],
            outputs=[io.Image.Output("image_out", display_name="image")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        image = read_image(PATH).movedim(0, -1).unsqueeze(0)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
