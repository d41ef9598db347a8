"""Tell Story (any model): a script, drawn by any image model with earlier panels as references."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..comfy_mminterleaved.errors import SettingError, StoryError
from ..comfy_mminterleaved.stories.storyboard import split_script
from ..comfy_mminterleaved.writers.chat import WRITING
from .context_images import ALIKE, CHOICES, FIRST_AND_LAST, choose_panels
from .drawing import draw_panel
from .preview import CONTEXT
from .references import attention_inputs, guidance_input, megapixels_input
from .tell import chosen_seeds
from .types import CATEGORY, StorySocket, WriterSocket, advanced, seed_input
from .write_script import idea_input, writing_inputs

MAX_PANELS = 200
WRITE_SETTINGS = {"min_tokens": 1, "top_k": WRITING.top_k, "top_p": WRITING.top_p, "repetition_penalty": 1.0}


def script_panels(script: str, panels: int, has_writer: bool) -> tuple[list[str], int]:
    """The texts that a script gives, and how many a writer adds; raises StoryError.

    Args:
        panels: How many there are to be; 0 for as many as the script has.
    """
    texts = split_script(script)
    if not texts and not has_writer:
        raise StoryError("The script is empty; write one paragraph per panel, with a blank line between.")
    if not texts and not panels:
        raise StoryError("The script is empty, and panels is 0; say how many panels the writer is to write.")
    if len(texts) > MAX_PANELS:
        raise StoryError(f"The script has {len(texts)} panels; at most {MAX_PANELS} are drawn at once.")
    missing = panels - len(texts) if panels else 0
    if missing > 0 and not has_writer:
        raise StoryError(
            f"The script has {len(texts)} panels, but {panels} are to be drawn; connect a writer, or write the others."
        )
    return texts[: panels or None], max(0, missing)


class TellStoryAnyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedTellAnyModel",
            display_name="Tell Story (any model)",
            category=CATEGORY,
            description="Illustrates a script with any image model, and has a writer continue it: each panel is drawn from its text, with the hero and earlier "
            "panels as references. It expands to Apply Story References, KSampler and VAE Decode, so a new seed for a panel leaves "
            "alone what does not refer to it.",
            enable_expand=True,
            inputs=[
                io.Model.Input("model", tooltip="Any image model, with LoRAs if you like."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.Vae.Input("vae", tooltip="Encodes references and decodes images."),
                StorySocket.Input(
                    "heroes",
                    optional=True,
                    tooltip="Images of the heroes; every panel refers to them, and they are not drawn.",
                ),
                io.String.Input(
                    "script",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="The text of each panel, with a blank line between. A writer continues it.",
                ),
                idea_input(),
                io.Int.Input(
                    "panels",
                    default=0,
                    min=0,
                    max=MAX_PANELS,
                    tooltip="How many panels are drawn, exactly; 0 for as many as the script has. Those that it lacks are "
                    "written by the writer.",
                ),
                io.String.Input(
                    "style",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="Stands before each panel's text in the prompt, not on the page.",
                ),
                io.String.Input(
                    "negative", multiline=True, default="", dynamic_prompts=False, tooltip="What images must not show."
                ),
                seed_input("the whole story: panel k uses it plus k, and a new one makes every panel anew"),
                io.String.Input(
                    "seeds",
                    default="",
                    tooltip="Seeds of single panels, such as '7, , 42' for the first and third.",
                ),
                io.Combo.Input(
                    "context",
                    options=[choice for choice in CHOICES if choice != ALIKE],
                    default=FIRST_AND_LAST,
                    tooltip="Which earlier panels a panel refers to. With heroes, 'first and last' is the last ones alone.",
                ),
                io.Int.Input("references", default=2, min=0, max=16, tooltip="How many panels it refers to, at most."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps per image."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="How strictly to follow the text."
                ),
                io.Int.Input("width", default=1024, min=16, max=8192, step=8, tooltip="Width of the images in pixels."),
                io.Int.Input(
                    "height", default=1024, min=16, max=8192, step=8, tooltip="Height of the images in pixels."
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="Compares images, for best_of."),
                WriterSocket.Input(
                    "writer",
                    optional=True,
                    tooltip="Writes the texts that the script lacks. One that sees writes each in view of the images before it; "
                    "any other writes them all first, and leaves the card.",
                ),
                *advanced(
                    io.Int.Input(
                        "best_of",
                        default=1,
                        min=1,
                        max=16,
                        tooltip="How many images are drawn for each panel; the one most alike to the heroes, or to the first "
                        "panel, is kept. Needs a CLIP vision model.",
                    ),
                    io.Combo.Input(
                        "sampler_name",
                        options=comfy.samplers.KSampler.SAMPLERS,
                        default="euler",
                        tooltip="Any of ComfyUI's samplers.",
                    ),
                    io.Combo.Input(
                        "scheduler",
                        options=comfy.samplers.KSampler.SCHEDULERS,
                        default="simple",
                        tooltip="Any of ComfyUI's schedules.",
                    ),
                    megapixels_input(),
                    guidance_input(),
                    *attention_inputs(),
                    *writing_inputs(),
                ),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story"),
                io.Image.Output("images_out", display_name="images", is_output_list=True),
                io.String.Output("texts_out", display_name="texts", is_output_list=True),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        script,
        idea,
        panels,
        style,
        negative,
        seed,
        seeds,
        context,
        references,
        steps,
        cfg,
        width,
        height,
        sampler_name,
        scheduler,
        megapixels,
        guidance,
        strength,
        fidelity,
        start,
        end,
        max_tokens,
        temperature,
        best_of=1,
        heroes=None,
        clip_vision=None,
        writer=None,
    ) -> io.NodeOutput:
        texts, missing = script_panels(script, panels, writer is not None)
        total = len(texts) + missing
        panel_seeds = chosen_seeds(seed, seeds, list(range(total)))
        if heroes is not None and not heroes.images:
            raise SettingError("The heroes' story has no images; add one, or connect nothing.")
        if best_of > 1 and clip_vision is None:
            raise SettingError(f"The best of {best_of} images is chosen by a CLIP vision model; connect one.")
        num_heroes = len(heroes.images) if heroes is not None else 0
        links = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"]
        graph = GraphBuilder()
        latent = graph.node("EmptyLatentImage", "latent", width=width, height=height, batch_size=best_of)
        writing = {"idea": idea, "style": style, "max_tokens": max_tokens, "temperature": temperature}
        texts = [*texts, *_written(graph, links, texts, missing, writer, seed, writing)]
        story, hero, drawn = None, None, []
        choice = "last" if num_heroes and context == FIRST_AND_LAST else context
        for number, (text, panel_seed) in enumerate(zip(texts, panel_seeds), 1):
            written = None
            if text is None:  # by a writer that sees: in view of all texts and images before
                written = graph.node(
                    "MMInterleavedWrite",
                    f"write {number}",
                    seed=panel_seed,
                    panels=total,
                    **{**WRITE_SETTINGS, **writing},
                    writer=links["writer"],
                    **_link(story),
                    **({"heroes": links["heroes"]} if "heroes" in links else {}),
                )
                text = written.out(1)
            # A small story of what this panel refers to: it changes only if that does, so ComfyUI's cache cuts right.
            referred = links.get("heroes")
            for place in choose_panels(choice, references, len(drawn)):
                referred = graph.node(
                    "MMInterleavedStoryPicture",
                    f"{CONTEXT} {number} {place + 1}",
                    image=drawn[place],
                    **_link(referred),
                ).out(0)
            panel = graph.node("MMInterleavedStoryText", f"{CONTEXT} {number}", text=text, **_link(referred)).out(0)
            conditioned = graph.node(
                "MMInterleavedReferences",
                f"references {number}",
                model=links["model"],
                clip=links["clip"],
                vae=links["vae"],
                story=panel,
                style=style,
                negative=negative,
                references=min(num_heroes + references, 16),
                megapixels=megapixels,
                method="the model's own",
                guidance=guidance,
                strength=strength,
                fidelity=fidelity,
                start=start,
                end=end,
            )
            sampling = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
            image = draw_panel(graph, number, conditioned, latent, links["vae"], seed=panel_seed, **sampling).out(0)
            if best_of > 1:
                alike_to = links.get("heroes")
                if alike_to is None and drawn:
                    hero = hero or graph.node("MMInterleavedStoryPicture", f"{CONTEXT} hero", image=drawn[0])
                    alike_to = hero.out(0)
                if alike_to is None:  # of the first panel, any will do: the others follow it
                    image = graph.node("ImageFromBatch", f"pick {number}", image=image, batch_index=0, length=1).out(0)
                else:
                    image = graph.node(
                        "MMInterleavedPickImage",
                        f"pick {number}",
                        images=image,
                        heroes=alike_to,
                        clip_vision=links["clip_vision"],
                    ).out(0)
            drawn.append(image)
            if written is None:
                written = graph.node("MMInterleavedStoryText", f"text {number}", text=text, **_link(story))
            story = graph.node(
                "MMInterleavedStoryPicture", f"add {number}", image=image, story=written.out(0), seed=panel_seed
            ).out(0)
        split = graph.node("MMInterleavedPanelsInside", "panels", story=story)
        return io.NodeOutput(story, split.out(0), split.out(1), expand=graph.finalize())


def _written(graph, links, texts: list[str], missing: int, writer, seed: int, writing: dict) -> list:
    """The texts that the script lacks: None for a writer that sees, which writes them one by one, else links."""
    if missing == 0:
        return []
    if writer.sees_images:
        return [None] * missing
    story = None
    for number, text in enumerate(texts, 1):
        story = graph.node("MMInterleavedStoryText", f"{CONTEXT} begin {number}", text=text, **_link(story)).out(0)
    script = graph.node(
        "MMInterleavedWriteScript",
        "write",
        writer=links["writer"],
        panels=missing,
        seed=seed,
        **writing,
        **_link(story),
        **({"heroes": links["heroes"]} if "heroes" in links else {}),
    )
    numbers = range(1, missing + 1)
    return [
        graph.node("MMInterleavedScriptPanel", f"script {n}", script=script.out(0), number=n).out(0) for n in numbers
    ]


def _link(story) -> dict:
    return {} if story is None else {"story": story}
