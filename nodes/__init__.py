"""The ComfyUI nodes, one idea a file; the only code that imports comfy."""

from comfy_api.latest import ComfyExtension

from .ask import AskStory, CaptionPicture, ChooseOption
from .load import LoadEncoder, LoadMMInterleaved, LoadStoryLLM, LoadSynchronizer
from .panels import PanelsInside, PanelsToStory, StoryToPanels
from .save import SaveStory
from .segments import IntroduceCharacter, StoryPicture, StoryText
from .storyboard import LoadStoryboard
from .synchronize import Synchronize
from .tell import TellStory
from .write import WriteText

NODES = [
    LoadMMInterleaved,
    LoadEncoder,
    LoadStoryLLM,
    LoadSynchronizer,
    StoryText,
    StoryPicture,
    IntroduceCharacter,
    WriteText,
    AskStory,
    CaptionPicture,
    ChooseOption,
    Synchronize,
    TellStory,
    StoryToPanels,
    PanelsToStory,
    PanelsInside,
    SaveStory,
    LoadStoryboard,
]


class MMInterleavedExtension(ComfyExtension):
    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    return MMInterleavedExtension()
