"""Load Storyboard: reads one story of a storyboard file."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError, StoryError
from ..comfy_mminterleaved.files import path_below
from ..comfy_mminterleaved.stories.storyboard import TABLES, load_storyboard
from .segments import encode_story
from .types import CATEGORY, EncoderSocket, PlanSocket, StorySocket

EXAMPLE = "example (three stories)"
EXAMPLE_PATH = Path(__file__).parents[1] / "workflows" / "example storyboard" / "storyboard.json"


def storyboards() -> list[str]:
    """The storyboards of ComfyUI's input folder and the folders in it, by their suffix, and the package's example."""
    folder = Path(folder_paths.get_input_directory())
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in (".json", *TABLES))
    return [EXAMPLE, *sorted(path.relative_to(folder).as_posix() for path in paths)]


def storyboard_path(name: str) -> Path:
    if name == EXAMPLE:
        return EXAMPLE_PATH
    path = path_below(folder_paths.get_input_directory(), name)
    if path is None:
        raise StoryError(f"The storyboard {name!r:.80} must be a file in ComfyUI's input folder.")
    if not path.is_file():
        raise StoryError(f"The storyboard {name!r:.80} is not in ComfyUI's input folder.")
    return path


class LoadStoryboard(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadStoryboard",
            display_name="Load Storyboard",
            category=CATEGORY,
            description="Reads one story of a storyboard file, in the project's format or the reference's.",
            inputs=[
                io.Combo.Input(
                    "storyboard",
                    options=storyboards(),
                    tooltip="A JSON, Markdown or CSV file in ComfyUI's input folder.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=100000,
                    control_after_generate=True,
                    tooltip="Which story of the file, from 0; 'increment' and a batch count queue them all.",
                ),
                EncoderSocket.Input("encoder", optional=True, tooltip="Needed if the story opens with images."),
                io.Boolean.Input(
                    "start_over",
                    default=False,
                    optional=True,
                    tooltip="On: the first story follows the last, with other seeds. Off: the run after the last ends at once.",
                ),
            ],
            outputs=[
                StorySocket.Output("story_out", display_name="story", tooltip="What the story opens with."),
                io.Int.Output("panels_out", display_name="panels", tooltip="How many panels to add."),
                io.Int.Output("seed_out", display_name="seed"),
                io.String.Output("title_out", display_name="title"),
                PlanSocket.Output(
                    "plan_out",
                    display_name="plan",
                    tooltip="For Tell Story: the texts given for panels, and stories of text alone.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, storyboard):
        return True

    @classmethod
    def fingerprint_inputs(cls, storyboard, index, encoder=None, start_over=False):
        path = storyboard_path(storyboard)
        return f"{path.stat().st_mtime_ns} {path.stat().st_size} {index} {start_over}"

    @classmethod
    def execute(cls, storyboard, index, encoder=None, start_over=False) -> io.NodeOutput:
        plans = load_storyboard(storyboard_path(storyboard))
        rounds, index = divmod(index, len(plans)) if start_over else (0, index)
        if index == len(plans):
            raise SettingError(
                f"The last of the {len(plans)} stories in {storyboard!r:.80} is told; set index to 0, or turn start_over on."
            )
        if index > len(plans):
            raise SettingError(
                f"The storyboard {storyboard!r:.80} has {len(plans)} stories, 0 to {len(plans) - 1}, not {index}."
            )
        plan = plans[index]
        seed = (plan.seed + 1000 * rounds) % 2**63  # told once more, a story is another one
        return io.NodeOutput(encode_story(encoder, plan.opening), plan.panels, seed, plan.title, plan)
