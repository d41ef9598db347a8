"""Loading: a whole model, or one block's file from ComfyUI's own folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..comfy_mminterleaved.checkpoints.gguf_files import read_gguf
from ..comfy_mminterleaved.checkpoints.load import known_words, read_config
from ..comfy_mminterleaved.checkpoints.native import block_file, check_formats, parse_block_metadata
from ..comfy_mminterleaved.config import BLOCKS
from ..comfy_mminterleaved.errors import CheckpointError
from ..comfy_mminterleaved.generation.config import GenerationConfig, read_generation_config
from ..comfy_mminterleaved.generation.embedders import parse_system_metadata, system_path
from ..comfy_mminterleaved.presets import STARTER_DIR
from .blocks import PatchedEncoder, PatchedLLM, PatchedSynchronizer
from .native import load_unet, load_vae, set_preview_factors
from .types import CATEGORY, EncoderSocket, LLMSocket, SynchronizerSocket

STARTER = "starter"
FOLDER = "mm_interleaved"
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def models() -> list[str]:
    """The starter, and every folder in models/mm_interleaved that holds a checkpoint."""
    names = []
    for folder in map(Path, folder_paths.get_folder_paths(FOLDER)):
        # Models are often links to another disk; Path.glob does not follow them.
        names += [
            Path(path).relative_to(folder).as_posix()
            for path, _, files in sorted(os.walk(folder, followlinks=True))
            if "config.json" in files and not {"llm.safetensors", "llm.gguf"}.isdisjoint(files)
        ]
    return [STARTER, *dict.fromkeys(names)]


def model_folder(name: str) -> Path:
    if name == STARTER:
        return STARTER_DIR
    if name in models():
        for folder in map(Path, folder_paths.get_folder_paths(FOLDER)):
            if (folder / name / "config.json").is_file():
                return folder / name
    raise CheckpointError(
        f"The model {name!r:.80} is not in models/{FOLDER}; it must be {STARTER!r} or a folder there. How to get the 13B "
        "model: docs/full-size.md of this package."
    )


def read(path: str | Path) -> tuple[dict, dict | None]:
    """Tensors and metadata of a safetensors or GGUF file; raises CheckpointError."""
    if Path(path).suffix == ".gguf":
        return read_gguf(Path(path))
    try:
        return comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except Exception as error:  # ComfyUI and safetensors raise what they like for a file that is cut off
        reason = str(error).splitlines()[0].rstrip(".")
        raise CheckpointError(f"The file {str(path)!r} cannot be read as safetensors: {reason}.") from None


def read_system(folder: Path, name: str) -> tuple[dict, dict]:
    """Float32 tensors and metadata of what stands beside a model's blocks; raises CheckpointError."""
    path = system_path(folder, name)
    tensors, metadata = read(path)
    return {key: t.float() for key, t in tensors.items()}, parse_system_metadata(metadata, name, repr(path.name))


def models_with(*systems: str) -> list[str]:
    """The models that have all these systems."""
    return [name for name in models() if sentence(lambda name=name: check_systems(name, *systems)) is True]


def check_systems(name: str, *systems: str) -> None:
    """Raises CheckpointError for a model that lacks one of these systems."""
    for system in systems:
        system_path(model_folder(name), system)


class SystemModels:
    """What a loader of a system offers: models that have it, and folders of another library in one of ComfyUI's.

    Args:
        category: ComfyUI's name of the folder.
        is_model: Whether a folder in it is one to offer.
        systems: That a model must have.
    """

    def __init__(self, category: str, is_model: Callable[[Path], bool], *systems: str):
        self.category, self.is_model, self.systems = category, is_model, systems

    def _folders(self) -> list[Path]:
        try:
            return list(map(Path, folder_paths.get_folder_paths(self.category)))
        except KeyError:  # an older core, which has no such folder
            return []

    def names(self) -> list[str]:
        names = models_with(*self.systems)
        for folder in self._folders():
            for path, _, _ in sorted(os.walk(folder, followlinks=True)):
                if Path(path) != folder and self.is_model(Path(path)):
                    names.append(f"{self.category}/{Path(path).relative_to(folder).as_posix()}")
        return list(dict.fromkeys(names))

    def path(self, name: str) -> Path | None:
        """The other library's folder by its name in the list; None for a model. Raises CheckpointError."""
        kind, _, rest = name.partition("/")
        if kind != self.category or not rest:
            return None
        for folder in self._folders():
            if self.is_model(folder / rest) and name in self.names():
                return folder / rest
        raise CheckpointError(f"The folder {rest!r:.80} is not in models/{self.category}.")

    def check(self, name: str) -> None:
        """Raises CheckpointError for what is not there."""
        if self.path(name) is None:
            check_systems(name, *self.systems)


def load_block(kind, path: str | Path):
    """One block from its own file."""
    label = repr(Path(path).name)
    tensors, metadata = read(path)
    config, about = parse_block_metadata(metadata, kind.name, label)
    if kind is not PatchedLLM:
        return kind(config, tensors, label)
    check_formats(tensors, config, label)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
    words = frozenset(about["words"]) if about.get("words") else None
    generation = GenerationConfig.from_dict(about.get("generation_config") or {}, label)
    return PatchedLLM(config, tensors, label, about.get("tokenizer"), words, generation)


def file_names(category: str) -> list[str]:
    """What one of ComfyUI's model folders holds; of text encoders, GGUF files too, which core does not list."""
    names = folder_paths.get_filename_list(category)
    if category != "text_encoders":
        return names
    for folder in folder_paths.get_folder_paths(category):
        files, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
        names = [*names, *folder_paths.filter_files_extensions(files, {".gguf"})]
    return sorted(dict.fromkeys(names))


def native_path(category: str, name: str) -> str:
    """A file of one of ComfyUI's model folders, by the name that its list shows; raises CheckpointError."""
    path = folder_paths.get_full_path(category, name) if name in file_names(category) else None
    if path is None:
        raise CheckpointError(f"The file {name!r:.80} is not in models/{category}.")
    return path


def check_files(folder: Path) -> None:
    """Raises CheckpointError for a folder without the files that its config asks for."""
    config = read_config(folder)
    missing = [name for name in (block_file(config, block) for block in BLOCKS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"The model {folder.name!r} lacks {', '.join(missing)}; copy all files that `convert` wrote into one folder."
        )


def sentence(check) -> bool | str:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return True


class LoadMMInterleaved(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoad",
            display_name="Load MM-Interleaved",
            category=CATEGORY,
            description="Loads all blocks of a model: the starter that comes with the package, or a folder of your own.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=models(),
                    default=STARTER,
                    tooltip="'starter' comes with the package and knows one picture-book world; your own "
                    f"models are folders in models/{FOLDER}.",
                ),
            ],
            outputs=[
                EncoderSocket.Output("encoder_out", display_name="encoder", tooltip="Encodes images."),
                LLMSocket.Output("llm_out", display_name="LLM", tooltip="Continues the story with text."),
                SynchronizerSocket.Output(
                    "synchronizer_out",
                    display_name="synchronizer",
                    tooltip="Lets the U-Net attend to the earlier images.",
                ),
                io.Model.Output("model_out", display_name="MODEL", tooltip="The U-Net, ready for Apply Synchronizer."),
                io.Vae.Output("vae_out", display_name="VAE", tooltip="For VAE Decode."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model):
        """Core marks the node and shows the sentence before anything runs."""
        return model is None or sentence(lambda: check_files(model_folder(model)))  # None comes from a link

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        folder = model_folder(model)
        config = read_config(folder)
        encoder, llm, synchronizer = (
            load_block(kind, folder / block_file(config, kind.name))
            for kind in (PatchedEncoder, PatchedLLM, PatchedSynchronizer)
        )
        llm.generator.known_words = known_words(folder)
        llm.generator.generation_config = read_generation_config(folder)
        unet, vae = (read(folder / f"{name}.safetensors")[0] for name in ("unet", "vae"))
        model, vae = load_unet(config, unet), load_vae(config, vae)
        if config.vae.get("_class_name") == "AutoencoderTiny":
            set_preview_factors(model, vae)
        return io.NodeOutput(encoder, llm, synchronizer, model, vae)


def _one_block(node_id, title, kind, category, socket, output, label):
    class LoadBlock(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=node_id,
                display_name=title,
                category=CATEGORY,
                description=f"Loads {label} from its own file, to be combined with other loaders.",
                inputs=[
                    io.Combo.Input(
                        "file",
                        options=file_names(category),
                        tooltip=f"A file in models/{category}, written by this project's converter.",
                    ),
                ],
                outputs=[socket.Output(f"{output}_out", display_name=output)],
            )

        @classmethod
        def validate_inputs(cls, file):
            return file is None or sentence(lambda: native_path(category, file))

        @classmethod
        def execute(cls, file) -> io.NodeOutput:
            return io.NodeOutput(load_block(kind, native_path(category, file)))

    LoadBlock.__name__ = LoadBlock.__qualname__ = node_id
    return LoadBlock


LoadEncoder = _one_block(
    "MMInterleavedLoadEncoder",
    "Load Story Encoder",
    PatchedEncoder,
    "clip_vision",
    EncoderSocket,
    "encoder",
    "the encoder",
)
LoadStoryLLM = _one_block(
    "MMInterleavedLoadLLM", "Load Story LLM", PatchedLLM, "text_encoders", LLMSocket, "LLM", "the story's LLM"
)
LoadSynchronizer = _one_block(
    "MMInterleavedLoadSynchronizer",
    "Load Story Synchronizer",
    PatchedSynchronizer,
    "model_patches" if "model_patches" in folder_paths.folder_names_and_paths else "diffusion_models",
    SynchronizerSocket,
    "synchronizer",
    "the synchronizer",
)
