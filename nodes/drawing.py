"""What nodes share that draw inside: their inputs, and the graph of stock nodes that they expand to."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from .types import DEFAULTS, EncoderSocket, LLMSocket, SynchronizerSocket, advanced, sampler_inputs, seed_input

BLOCKS = ("llm", "synchronizer", "model")


def drawing_inputs(steps: int):
    """The model's blocks, and how images are drawn."""
    return [
        EncoderSocket.Input("encoder", tooltip="Compares the drawings with the image."),
        LLMSocket.Input("llm", tooltip="Writes the captions."),
        SynchronizerSocket.Input("synchronizer", tooltip="Lets the U-Net attend to the earlier images."),
        io.Model.Input("model", tooltip="The U-Net, with LoRAs if you like."),
        io.Vae.Input("vae", tooltip="Decodes the images."),
        seed_input("captions and drawings"),
        io.Int.Input("steps", default=steps, min=1, max=1000, tooltip="Sampling steps per drawing."),
        io.Float.Input(
            "cfg",
            default=DEFAULTS.image.guidance_scale,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="How strictly the drawings follow the caption.",
        ),
        *advanced(*sampler_inputs()),
    ]


class Drawing:
    """The expansion of a node that draws panels of the model's own size.

    Args:
        hidden: Of the node, whose inputs `links` are.
        images: Drawings of each panel.
        sampling: Inputs of KSampler: steps, cfg, sampler_name, scheduler.
    """

    def __init__(self, hidden, synchronizer, images: int = 1, **sampling):
        self.graph, self.sampling = GraphBuilder(), sampling
        self.links = hidden.dynprompt.get_node(hidden.unique_id)["inputs"]
        size = synchronizer.config.synchronizer.image_size
        self.latent = self.graph.node("EmptyLatentImage", "latent", width=size, height=size, batch_size=images)

    def given(self, *names: str) -> dict:
        """The node's own links."""
        return {name: self.links[name] for name in names}

    def draw(self, number: int, story, seed: int):
        """A link to the images of a panel that follows a story: Apply Synchronizer, KSampler, VAE Decode."""
        conditioned = self.graph.node(
            "MMInterleavedSynchronize",
            f"synchronize {number}",
            **self.given(*BLOCKS),
            story=story,
            strength=1.0,
            start=0.0,
            end=1.0,
            pictures=-1,
        )
        return draw_panel(
            self.graph, number, conditioned, self.latent, self.links["vae"], seed=seed, **self.sampling
        ).out(0)

    def batch(self, images: list):
        """A link to several panels' images as one batch."""
        batch, *others = images
        for number, image in enumerate(others, 1):
            batch = self.graph.node("ImageBatch", f"batch {number}", image1=batch, image2=image).out(0)
        return batch

    def output(self, node, count: int) -> io.NodeOutput:
        """The node's output: what the graph's last node gives."""
        return io.NodeOutput(*(node.out(k) for k in range(count)), expand=self.graph.finalize())


def draw_panel(graph: GraphBuilder, number: int, conditioned, latent, vae, **sampling):
    """The image of a panel: KSampler on a node that gives MODEL, positive and negative, and VAE Decode."""
    samples = graph.node(
        "KSampler",
        f"draw {number}",
        model=conditioned.out(0),
        positive=conditioned.out(1),
        negative=conditioned.out(2),
        latent_image=latent.out(0),
        **{"denoise": 1.0, **sampling},
    )
    return graph.node("VAEDecode", f"decode {number}", samples=samples.out(0), vae=vae)
