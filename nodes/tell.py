"""Tell Story: a whole story in one node, that unfolds into the small ones."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.refine import check_size
from ..comfy_mminterleaved.stories.story import Story, TextSegment
from ..comfy_mminterleaved.stories.storyboard import Step, panel_seeds, plan_panels
from .drawing import draw_panel
from .segments import ORDERS
from .synchronize import check_blocks
from .types import (
    CATEGORY,
    CONTEXT_IMAGES,
    DEFAULTS,
    HEIGHT,
    WIDTH,
    ContrastiveSocket,
    DreamSocket,
    EncoderSocket,
    LLMSocket,
    PlanSocket,
    RefinerSocket,
    StorySocket,
    SynchronizerSocket,
    advanced,
    drop_oldest_input,
    former,
    model_default_input,
    sampler_inputs,
    sampling_inputs,
    seed_input,
    strength_input,
)
from .write import text_config_from_inputs

SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "repetition_penalty")


def chosen_seeds(seed: int, seeds: str, numbers: list[int]) -> list[int]:
    """The seed of each panel: seed + its number in the story, or what `seeds` says at its place.

    Args:
        seeds: numbers separated by commas or line ends; an empty place keeps the panel's own.
        numbers: of the panels, from 0 (`storyboard.panel_seeds`).

    Raises:
        SettingError: for what is no number, or more numbers than panels.
    """
    chosen, panels = [(seed + number) % 2**63 for number in numbers], len(numbers)
    places = [place.strip() for place in seeds.replace("\n", ",").split(",")] if seeds.strip() else []
    if len(places) > panels:
        raise SettingError(f"There are {len(places)} seeds for {panels} panels; give at most one per panel.")
    for number, place in enumerate(places):
        if place and not (place.isdecimal() and len(place) < 20 and int(place) < 2**63):
            raise SettingError(
                f"The seed of panel {number + 1} must be a whole number from 0 to {2**63 - 1}, not {place!r:.60}."
            )
        if place:
            chosen[number] = int(place)
    return chosen


class TellStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedTellStory",
            display_name="Tell Story",
            category=CATEGORY,
            description="Tells a story panel by panel; each text and image takes all earlier panels into account. It expands to Write Story Text, "
            "Apply Synchronizer, KSampler, VAE Decode and Add Story Image, so a new seed for a panel leaves the earlier ones alone.",
            enable_expand=True,
            inputs=[
                EncoderSocket.Input("encoder", tooltip="Encodes the images as they are made."),
                LLMSocket.Input("llm", tooltip="Continues the story with text."),
                SynchronizerSocket.Input("synchronizer", tooltip="Lets the U-Net attend to the earlier images."),
                io.Model.Input("model", tooltip="The U-Net, with LoRAs if you like."),
                io.Vae.Input("vae", tooltip="Decodes the images."),
                StorySocket.Input(
                    "story", optional=True, tooltip="A story to continue: text, images or both. May be left out."
                ),
                io.String.Input(
                    "opening",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="The text of the first panel. If empty, the model writes it.",
                ),
                io.Int.Input("panels", default=3, min=0, max=64, tooltip="How many images are drawn, exactly."),
                seed_input("the whole story: panel k uses it plus k, and a new one makes every panel anew"),
                io.String.Input(
                    "seeds",
                    default="",
                    tooltip="Seeds of single panels, such as '7, , 42' for the first and third. A new number at the "
                    "fourth place makes panel 4 anew: panels 1 to 3 stay, those after it follow it.",
                ),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.image.num_inference_steps,
                    min=1,
                    max=1000,
                    tooltip="Sampling steps per image.",
                ),
                io.Float.Input(
                    "cfg",
                    default=DEFAULTS.image.guidance_scale,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strictly the images follow the story.",
                ),
                *advanced(
                    *sampler_inputs(),
                    former(WIDTH, "width", 0, 0, 4096, 8),
                    former(HEIGHT, "height", 0, 0, 4096, 8),
                    strength_input(),
                    former(CONTEXT_IMAGES, "pictures", -1, -1, 64),
                    io.Boolean.Input(
                        "picture_first",
                        default=False,
                        tooltip="On: each panel's image comes before its text. Off: the order of the story or its "
                        "storyboard, else the model's own.",
                    ),
                    *sampling_inputs(),
                ),
                PlanSocket.Input(
                    "plan",
                    optional=True,
                    tooltip="From Load Storyboard: the panels and their texts; replaces the number of panels.",
                ),
                *advanced(drop_oldest_input()),
                model_default_input(WIDTH, "image_width", 8, 4096, 8),
                model_default_input(HEIGHT, "image_height", 8, 4096, 8),
                model_default_input(CONTEXT_IMAGES, "context_images", 0, 64),
                *advanced(
                    io.Int.Input(
                        "best_of",
                        default=1,
                        min=1,
                        max=16,
                        optional=True,
                        tooltip="How many drawings are made of each panel; the contrastive model keeps the one that fits "
                        "text and heroes best.",
                    )
                ),
                ContrastiveSocket.Input(
                    "contrastive", optional=True, tooltip="Chooses among the drawings; needed if best_of is over 1."
                ),
                RefinerSocket.Input(
                    "refiner", optional=True, tooltip="Gives each image a form of twice the size, for pages and books."
                ),
                DreamSocket.Input(
                    "dream", optional=True, tooltip="From Load Dream Queries: the LLM itself says what to draw."
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
        drop_oldest=False,
        image_width=None,
        image_height=None,
        context_images=None,
        best_of=1,
        contrastive=None,
        refiner=None,
        dream=None,
        **settings,
    ) -> io.NodeOutput:
        if plan is None and panels < 1:
            raise SettingError(f"The number of panels must be at least 1, not {panels}.")
        if best_of > 1 and contrastive is None:
            raise SettingError(f"best_of is {best_of}, but nothing chooses; connect Load Contrastive Model.")
        check_blocks(llm, synchronizer, model)
        opening_story = (story or Story()).add(TextSegment(opening.strip()))
        if story is not None:
            llm.check(story)
        is_open = plan is None or plan.steps is None
        if is_open:
            image_first = llm.generator.resolve_image_first(opening_story, picture_first or None)
            opening_story = opening_story.arrange(image_first)
        panel_steps = plan_panels(opening_story, panels) if plan is None else plan.steps_after(opening_story)
        llm.generator.check_context_length(
            opening_story, panel_steps, text_config_from_inputs(seed, **settings), drop_oldest
        )
        if best_of > 1 and not opening_story.segments and panel_steps and panel_steps[0][0] is Step.IMAGE:
            raise SettingError("With best_of the first image needs a text or an image before it; give an opening.")
        seeds = chosen_seeds(seed, seeds, panel_seeds(opening_story, panel_steps))
        size = synchronizer.config.synchronizer.image_size
        if refiner is not None:
            check_size(image_width or width or size, image_height or height or size)

        # Links rather than values: a step whose links lead to the same things is not run again.
        links = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"]
        graph = GraphBuilder()
        story = links.get("story")
        if opening.strip():
            story = graph.node("MMInterleavedStoryText", "opening", text=opening, **_optional(story=story)).out(0)
        if opening_story.images and is_open:
            order = next(name for name, value in ORDERS.items() if value is opening_story.image_first)
            story = graph.node("MMInterleavedIntroduce", "introduce", llm=links["llm"], story=story, order=order).out(0)
        latent = graph.node(
            "EmptyLatentImage",
            "latent",
            width=links.get("image_width", width or size),
            height=links.get("image_height", height or size),
            batch_size=best_of,
        )
        for number, (seed, panel) in enumerate(zip(seeds, panel_steps), 1):
            has_text = False  # of the panel, before its image
            for step in panel:
                has_text |= step is not Step.IMAGE
                if isinstance(step, TextSegment):
                    text = graph.node(
                        "MMInterleavedStoryText", f"text {number}", text=step.text, **_optional(story=story)
                    )
                    story = text.out(0)
                    continue
                if step is Step.TEXT:
                    text = graph.node(
                        "MMInterleavedWrite",
                        f"write {number}",
                        llm=links["llm"],
                        seed=seed,
                        drop_oldest=drop_oldest,
                        **_optional(story=story),
                        **settings,
                    )
                    story = text.out(0)
                    continue
                conditioned = graph.node(
                    "MMInterleavedSynchronize",
                    f"synchronize {number}",
                    llm=links["llm"],
                    synchronizer=links["synchronizer"],
                    model=links["model"],
                    strength=strength,
                    start=0.0,
                    end=1.0,
                    pictures=pictures if context_images is None else context_images,
                    drop_oldest=drop_oldest,
                    **_optional(story=story, dream=links.get("dream")),
                )
                sampling = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
                image = draw_panel(graph, number, conditioned, latent, links["vae"], seed=seed, **sampling)
                if best_of > 1:
                    image = graph.node(
                        "MMInterleavedBestPanel",
                        f"best {number}",
                        contrastive=links["contrastive"],
                        story=story,
                        images=image.out(0),
                        references=0.0,
                    )
                refined = {}
                if refiner is not None:
                    larger = graph.node(
                        "MMInterleavedRefine",
                        f"refine {number}",
                        refiner=links["refiner"],
                        image=image.out(0),
                        positive=conditioned.out(1),
                        **(_optional(story=story) if has_text else {}),
                    )
                    refined["refined"] = larger.out(0)
                story = graph.node(
                    "MMInterleavedStoryPicture",
                    f"add {number}",
                    encoder=links["encoder"],
                    image=image.out(0),
                    seed=seed,
                    origin="drawn",
                    **refined,
                    **_optional(story=story),
                ).out(0)
        split = graph.node("MMInterleavedPanelsInside", "panels", story=story)
        return io.NodeOutput(story, split.out(0), split.out(1), expand=graph.finalize())


def _optional(**links):
    return {name: link for name, link in links.items() if link is not None}
