"""The ComfyUI nodes, one idea a file; the only code that imports comfy."""

from comfy_api.latest import ComfyExtension

from .adapt import AdaptEncoder
from .ask import AskAboutStory, CaptionImage, RankAnswers
from .compose import ComposePages
from .context_images import SelectContextImages
from .contrastive import BestPanel, CLIPScore, ContrastiveFromClip, FindImage, LoadContrastive
from .dream import DrawInContext, LoadDreamQueries
from .edit import EditPanels, SetPanel, StoryPanel
from .example import ExampleImage
from .image_tokens import DraftImages, EncodeImageTokens, LoadImageTokens
from .inputs import check_inputs
from .load import LoadEncoder, LoadMMInterleaved, LoadStoryLLM, LoadSynchronizer
from .load_story import LoadStory
from .load_writer import LoadWriter
from .look_inside import InspectInside, LookInside, VariantInside
from .lora import ApplyStoryLoRA
from .panels import PanelsInside, PanelsToStory, StoryToPanels
from .pick import PickImage
from .prior import (
    ApplyImageEmbedding,
    BlendEmbeddings,
    EmbedImage,
    LoadPrior,
    MoveEmbedding,
    TextToImageEmbedding,
)
from .probe_story import ChangedInside, ProbedInside, ProbeStory
from .reconstruct import DescribedInside, DescribeForRedrawing, RoundTrip, RoundTripInside
from .references import ApplyStoryReferences
from .refine import LoadRefiner, RefineImage
from .save import SaveStory
from .segments import AddStoryImage, AddStoryText, IntroduceCharacter
from .sound import (
    DescribeSound,
    ExampleSound,
    LoadSoundModel,
    SoundOverInside,
    SoundOverPanel,
    SoundToEmbedding,
)
from .storyboard import LoadStoryboard
from .synchronize import ApplySynchronizer
from .tell import TellStory
from .tell_any import TellStoryAnyModel
from .word_mask import WordMask
from .write import WriteStoryText
from .write_script import ScriptPanel, WriteScript
from .writer_from_clip import WriterFromClip
from .writer_from_server import WriterFromServer

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
    ApplyStoryReferences,
    SelectContextImages,
    PickImage,
    AdaptEncoder,
    ApplyStoryLoRA,
    LoadRefiner,
    RefineImage,
    LoadContrastive,
    ContrastiveFromClip,
    CLIPScore,
    BestPanel,
    FindImage,
    WordMask,
    LoadPrior,
    TextToImageEmbedding,
    EmbedImage,
    BlendEmbeddings,
    MoveEmbedding,
    ApplyImageEmbedding,
    LoadDreamQueries,
    DrawInContext,
    LoadImageTokens,
    EncodeImageTokens,
    DraftImages,
    LoadSoundModel,
    ExampleSound,
    DescribeSound,
    SoundToEmbedding,
    SoundOverPanel,
    SoundOverInside,
    DescribeForRedrawing,
    DescribedInside,
    RoundTrip,
    RoundTripInside,
    LookInside,
    VariantInside,
    InspectInside,
    ProbeStory,
    ChangedInside,
    ProbedInside,
    TellStoryAnyModel,
    LoadWriter,
    WriterFromClip,
    WriterFromServer,
    WriteScript,
    ScriptPanel,
    StoryToPanels,
    PanelsToStory,
    PanelsInside,
    StoryPanel,
    SetPanel,
    EditPanels,
    ComposePages,
    SaveStory,
    LoadStory,
    LoadStoryboard,
]


class MMInterleavedExtension(ComfyExtension):
    async def get_node_list(self):
        return [check_inputs(node) for node in NODES]


async def comfy_entrypoint():
    return MMInterleavedExtension()
