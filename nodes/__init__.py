"""The ComfyUI nodes, one idea a file; the only code that imports comfy."""

from comfy_api.latest import ComfyExtension

from .ask import AskAboutStory, CaptionImage, RankAnswers
from .example import ExampleImage
from .inputs import check_inputs
from .load import LoadEncoder, LoadMMInterleaved, LoadStoryLLM, LoadSynchronizer
from .panels import PanelsInside, PanelsToStory, StoryToPanels
from .save import SaveStory
from .segments import AddStoryImage, AddStoryText, IntroduceCharacter
from .storyboard import LoadStoryboard
from .synchronize import ApplySynchronizer
from .tell import TellStory
from .write import WriteStoryText

NODES = [
    LoadMMInterleaved,
    LoadEncoder,
    LoadStoryLLM,
    LoadSynchronizer,
    AddStoryText,
    AddStoryImage,
    ExampleImage,
    IntroduceCharacter,
    WriteStoryText,
    AskAboutStory,
    CaptionImage,
    RankAnswers,
    ApplySynchronizer,
    TellStory,
    StoryToPanels,
    PanelsToStory,
    PanelsInside,
    SaveStory,
    LoadStoryboard,
]


class MMInterleavedExtension(ComfyExtension):
    async def get_node_list(self):
        return [check_inputs(node) for node in NODES]


async def comfy_entrypoint():
    return MMInterleavedExtension()
