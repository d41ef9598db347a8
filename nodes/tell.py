"""Tell Story: a whole story in one node, that unfolds into the small ones."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.stories.story import Story, Text
from ..comfy_mminterleaved.stories.storyboard import panel_seeds, plan_panels
from .segments import ORDERS
from .sockets import (
    CATEGORY,
    DEFAULTS,
    EncoderSocket,
    LLMSocket,
    PlanSocket,
    StorySocket,
    SynchronizerSocket,
    sampling_inputs,
    seed_input,
)
from .synchronize import check_blocks
from .write import sampling_of

SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "repetition_penalty")


def chosen_seeds(seed: int, seeds: str, numbers: list[int]) -> list[int]:
    """The seed of each panel: seed + its number in the story, or what `seeds` says at its place.

    Args:
        seeds: numbers separated by commas or line ends; an empty place keeps the panel's own.
        numbers: of the panels, from 0 (`storyboard.panel_seeds`).

    Raises:
        SettingError: for what is no number, or more numbers than panels.
    """
    found, panels = [(seed + number) % 2**63 for number in numbers], len(numbers)
    places = [place.strip() for place in seeds.replace("\n", ",").split(",")] if seeds.strip() else []
    if len(places) > panels:
        raise SettingError(f"There are {len(places)} seeds for {panels} panels; give at most one a panel.")
    for number, place in enumerate(places):
        if place and not (place.isdecimal() and len(place) < 20 and int(place) < 2**63):
            raise SettingError(
                f"The seed of panel {number + 1} must be a whole number from 0 to {2**63 - 1}, not {place!r:.60}."
            )
        if place:
            found[number] = int(place)
    return found


class TellStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedTellStory",
            display_name="Tell Story",
            category=CATEGORY,
            description="Tells a story: each panel is written and drawn in view of all before it. It unfolds into Write, "
            "Synchronize, KSampler, VAE Decode and Story Picture, so a panel with a new seed leaves those before it alone.",
            enable_expand=True,
            inputs=[
                EncoderSocket.Input("encoder", tooltip="Sees the pictures as they are made."),
                LLMSocket.Input("llm", tooltip="Reads and writes."),
                SynchronizerSocket.Input("synchronizer", tooltip="Shows the earlier pictures to the U-Net."),
                io.Model.Input("model", tooltip="The U-Net, with LoRAs if you like."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                StorySocket.Input(
                    "story", optional=True, tooltip="A story to go on with: text, pictures or both. It may be left out."
                ),
                io.String.Input(
                    "opening",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="The text of the first panel. If it is empty, the model begins by itself.",
                ),
                io.Int.Input(
                    "panels", default=3, min=0, max=64, tooltip="How many pictures are made. It is a promise."
                ),
                seed_input("the whole story; each panel has this plus its number"),
                io.String.Input(
                    "seeds",
                    default="",
                    tooltip="Panels with seeds of their own, as '7, , 42': the first has 7, the third 42. To "
                    "draw only panel 4 anew, put a new number at the fourth place.",
                ),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.image.steps,
                    min=1,
                    max=1000,
                    tooltip="Steps of the sampler for each picture.",
                ),
                io.Float.Input(
                    "cfg",
                    default=DEFAULTS.image.guidance,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strictly the pictures follow the story.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="dpmpp_2m",
                    tooltip="Any of ComfyUI's samplers.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="karras",
                    tooltip="Any of ComfyUI's schedules.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="In pixels; 0 for the size the model was trained at.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="In pixels; 0 for the size the model was trained at.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much the earlier pictures count in the U-Net.",
                ),
                io.Int.Input(
                    "pictures",
                    default=-1,
                    min=-1,
                    max=64,
                    tooltip="How many of the last pictures are looked at; -1 for as many as the model is used to.",
                ),
                io.Boolean.Input(
                    "picture_first",
                    default=False,
                    tooltip="On: each panel's picture is made before its text. Off: as the story or its "
                    "storyboard says, else as the model's stories are.",
                ),
                *sampling_inputs(),
                PlanSocket.Input(
                    "plan",
                    optional=True,
                    tooltip="Of Load Storyboard: instead of the number of panels, with their texts.",
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
        encoder,
        llm,
        synchronizer,
        model,
        vae,
        opening,
        panels,
        seed,
        seeds,
        steps,
        cfg,
        sampler_name,
        scheduler,
        width,
        height,
        strength,
        pictures,
        picture_first,
        story=None,
        plan=None,
        **settings,
    ) -> io.NodeOutput:
        if plan is None and panels < 1:
            raise SettingError(f"The number of panels must be at least 1, not {panels}.")
        check_blocks(llm, synchronizer, model)
        begun = (story or Story()).add(Text(opening.strip()))
        if story is not None:
            llm.check(story)
        arranged = begun
        if plan is None or plan.steps is None:
            arranged = begun.arrange(llm.model.order(begun, picture_first or None))
        panel_steps = plan_panels(arranged, panels) if plan is None else plan.steps_after(arranged)
        llm.model.check_room(arranged, panel_steps, sampling_of(seed, **settings))
        found = chosen_seeds(seed, seeds, panel_seeds(arranged, panel_steps))
        size = synchronizer.config.decoder.picture_size

        # Links rather than values: a step whose links lead to the same things is not run again.
        wires = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"]
        graph = GraphBuilder()
        told = wires.get("story")
        if opening.strip():
            told = graph.node("MMInterleavedStoryText", "opening", text=opening, **_maybe(story=told)).out(0)
        if begun.pictures and (plan is None or plan.steps is None):
            order = next(name for name, value in ORDERS.items() if value is arranged.image_first)
            told = graph.node("MMInterleavedIntroduce", "introduce", llm=wires["llm"], story=told, order=order).out(0)
        latent = graph.node("EmptyLatentImage", "latent", width=width or size, height=height or size, batch_size=1).out(
            0
        )
        for number, (seed, panel) in enumerate(zip(found, panel_steps), 1):
            for step in panel:
                if isinstance(step, Text):
                    told = graph.node(
                        "MMInterleavedStoryText", f"text {number}", text=step.text, **_maybe(story=told)
                    ).out(0)
                    continue
                if step == "write":
                    told = graph.node(
                        "MMInterleavedWrite",
                        f"write {number}",
                        llm=wires["llm"],
                        seed=seed,
                        **_maybe(story=told),
                        **settings,
                    ).out(0)
                    continue
                ready = graph.node(
                    "MMInterleavedSynchronize",
                    f"synchronize {number}",
                    llm=wires["llm"],
                    synchronizer=wires["synchronizer"],
                    model=wires["model"],
                    strength=strength,
                    start=0.0,
                    end=1.0,
                    pictures=pictures,
                    **_maybe(story=told),
                )
                drawn = graph.node(
                    "KSampler",
                    f"draw {number}",
                    model=ready.out(0),
                    positive=ready.out(1),
                    negative=ready.out(2),
                    latent_image=latent,
                    seed=seed,
                    steps=steps,
                    cfg=cfg,
                    sampler_name=sampler_name,
                    scheduler=scheduler,
                    denoise=1.0,
                )
                image = graph.node("VAEDecode", f"decode {number}", samples=drawn.out(0), vae=wires["vae"])
                told = graph.node(
                    "MMInterleavedStoryPicture",
                    f"add {number}",
                    encoder=wires["encoder"],
                    image=image.out(0),
                    **_maybe(story=told),
                ).out(0)
        taken = graph.node("MMInterleavedPanelsInside", "panels", story=told)
        return io.NodeOutput(told, taken.out(0), taken.out(1), expand=graph.finalize())


def _maybe(**wires):
    return {name: wire for name, wire in wires.items() if wire is not None}
