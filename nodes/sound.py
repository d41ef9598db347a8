"""Load Sound Model, Describe Sound, Sound to Embedding, Sound over Panel, Example Sound (2112.00007)."""

from __future__ import annotations

import wave
from pathlib import Path

import comfy.model_management
import comfy.ops
import numpy as np
import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.prior import turn
from ..comfy_mminterleaved.generation.sound import (
    SOUND_STRENGTH,
    ClapSounds,
    SoundEmbedder,
    build_sound,
    is_clap_folder,
)
from .blocks import load_whole, system_patcher
from .contrastive import PatchedReader
from .drawing import Drawing, draw_panel
from .load import SystemModels, model_folder, read_system, sentence
from .prior import as_output, embeds_of
from .synchronize import check_unet
from .types import (
    CATEGORY,
    DEFAULTS,
    ContrastiveSocket,
    EncoderSocket,
    PriorSocket,
    SoundSocket,
    SynchronizerSocket,
    advanced,
    sampler_inputs,
    seed_input,
)

EXAMPLES = Path(__file__).with_name("sounds")
PHRASES = "A dog barks.\nA cat meows.\nIt rains.\nWaves break on the beach.\nIt is night.\nA bell rings.\nMusic plays."
CHANGED = 0.12  # mean difference of a pixel from which it counts as changed


class PatchedSounds(SoundEmbedder):
    """A model's audio encoder, and the text tower that reads phrases for it."""

    def __init__(self, folder: Path):
        reader = PatchedReader(folder)
        model, phrases = build_sound(*read_system(folder, "sound"), "sound", comfy.ops.manual_cast)
        super().__init__(model, reader, phrases)
        self.patcher = system_patcher(model, reader.model)
        reader.device = self.device

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def embed(self, waveform, sampling_rate: int) -> torch.Tensor:
        comfy.model_management.load_models_gpu([self.patcher])
        return super().embed(waveform, sampling_rate)


class PatchedClap(ClapSounds):
    """A CLAP of transformers that ComfyUI loads and unloads."""

    def __init__(self, model, processor, embedder, phrases):
        super().__init__(model, processor, embedder, phrases)
        self.patcher = system_patcher(model)

    def hear(self, waveform, sampling_rate: int, phrases=()):
        load_whole(self.patcher)
        return super().hear(waveform, sampling_rate, phrases)


SOUND_MODELS = SystemModels("audio_encoders", is_clap_folder, "contrastive", "sound")


def waveform_of(audio) -> tuple[torch.Tensor, int]:
    """The first sound of ComfyUI's AUDIO: `(channels, samples)` and its rate; raises SettingError for none."""
    if audio is None or not len(audio["waveform"]):
        raise SettingError("There is no sound in this AUDIO; give one that can be heard.")
    return audio["waveform"][0], int(audio["sample_rate"])


class LoadSoundModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedLoadSound",
            display_name="Load Sound Model",
            category=CATEGORY,
            description="Loads what hears sounds in the space of images and texts: the starter's own, or a CLAP of transformers.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=SOUND_MODELS.names(),
                    tooltip="'starter' comes with the package and knows the forty sounds of its picture-book world; others are "
                    "folders of transformers' CLAP in models/audio_encoders.",
                ),
                ContrastiveSocket.Input(
                    "contrastive", optional=True, tooltip="For a CLAP: reads the phrases in the space of images."
                ),
                *advanced(
                    io.String.Input(
                        "phrases",
                        multiline=True,
                        default=PHRASES,
                        dynamic_prompts=False,
                        optional=True,
                        tooltip="For a CLAP: what there is to hear, one phrase a line, in words that the contrastive model "
                        "knows.",
                    )
                ),
            ],
            outputs=[SoundSocket.Output("sound_out", display_name="sound model")],
        )

    @classmethod
    def validate_inputs(cls, model):
        return model is None or sentence(lambda: SOUND_MODELS.check(model))

    @classmethod
    def execute(cls, model, contrastive=None, phrases=PHRASES) -> io.NodeOutput:
        folder = SOUND_MODELS.path(model)
        if folder is None:
            return io.NodeOutput(PatchedSounds(model_folder(model)))
        if contrastive is None:
            raise SettingError("A CLAP has a space of its own; connect a contrastive model, which reads the phrases.")
        device = comfy.model_management.text_encoder_offload_device()
        return io.NodeOutput(PatchedClap.load(folder, contrastive, phrases.splitlines(), device))


class DescribeSound(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedDescribeSound",
            display_name="Describe Sound",
            category=CATEGORY,
            description="Says what is heard: the phrase that fits a sound best, for Add Story Text or a prompt.",
            is_output_node=True,
            inputs=[
                SoundSocket.Input("sound_model", tooltip="From Load Sound Model."),
                io.Audio.Input("audio", tooltip="From Load Audio; of a batch, the first."),
                io.String.Input(
                    "phrases",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="What it could be, one phrase a line. Empty for those that the sound model knows.",
                ),
            ],
            outputs=[
                io.String.Output("text_out", display_name="text"),
                io.Float.Output("score_out", display_name="score", tooltip="The cosine of phrase and sound, -1 to 1."),
            ],
        )

    @classmethod
    def execute(cls, sound_model, audio, phrases) -> io.NodeOutput:
        heard = sound_model.hear(*waveform_of(audio), phrases.splitlines())
        rows = "\n".join(f"{score:6.3f}  {phrase}" for phrase, score in heard[:8])
        return io.NodeOutput(heard[0][0], heard[0][1], ui=ui.PreviewText(rows))


class SoundToEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedSoundToEmbedding",
            display_name="Sound to Embedding",
            category=CATEGORY,
            description="Turns an image's embedding towards a sound: the same image, but with rain. Without an embedding, gives the "
            "sound's own, to find images by it.",
            inputs=[
                SoundSocket.Input("sound_model", tooltip="Of the model that embedded the image."),
                io.Audio.Input("audio", tooltip="From Load Audio; of a batch, the first."),
                io.Float.Input(
                    "amount",
                    default=SOUND_STRENGTH,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How far to turn; much changes more than the sound says.",
                ),
                io.ClipVisionOutput.Input("embedding", optional=True, tooltip="From Embed Image."),
            ],
            outputs=[io.ClipVisionOutput.Output("embedding_out", display_name="embedding")],
        )

    @classmethod
    def execute(cls, sound_model, audio, amount, embedding=None) -> io.NodeOutput:
        if embedding is None:
            return io.NodeOutput(as_output(sound_model.embed(*waveform_of(audio))[None]))
        embeds = embeds_of(embedding)
        direction = sound_model.direction(*waveform_of(audio)).to(embeds.device)
        return io.NodeOutput(as_output(turn(embeds, direction, amount)))


class SoundOverPanel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedSoundOverPanel",
            display_name="Sound over Panel",
            category=CATEGORY,
            description="Draws an image again as it would sound: rain over it, night over it. Heroes, place and things stay.",
            enable_expand=True,
            inputs=[
                io.Image.Input("image", tooltip="The panel; of a batch, the first."),
                io.Audio.Input("audio", tooltip="From Load Audio."),
                SoundSocket.Input("sound_model", tooltip="From Load Sound Model."),
                ContrastiveSocket.Input("contrastive", tooltip="Embeds the image."),
                PriorSocket.Input("prior", tooltip="Has the U-Net draw embeddings."),
                EncoderSocket.Input(
                    "encoder", tooltip="Shows the image to the U-Net, so that heroes keep their looks."
                ),
                SynchronizerSocket.Input("synchronizer", tooltip="Of the same model."),
                io.Model.Input("model", tooltip="The U-Net, with LoRAs if you like."),
                io.Vae.Input("vae", tooltip="Encodes and decodes the image."),
                io.Float.Input(
                    "amount",
                    default=SOUND_STRENGTH,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How far the image goes towards the sound.",
                ),
                seed_input("the drawing"),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg",
                    default=DEFAULTS.image.guidance_scale,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strictly the drawing follows the embedding.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much is drawn anew; below 1, the layout is kept too.",
                ),
                *advanced(*sampler_inputs()),
            ],
            outputs=[
                io.Image.Output("image_out", display_name="image"),
                io.Mask.Output("mask_out", display_name="changed", tooltip="Where the image is another one now."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, image, audio, synchronizer, model, seed, steps, cfg, denoise, amount, **options) -> io.NodeOutput:
        check_unet(synchronizer, model)
        options["sound_model"].embed(*waveform_of(audio))  # what cannot be heard is an error before anything is drawn
        sampling = {name: options[name] for name in ("sampler_name", "scheduler")}
        drawing = Drawing(cls.hidden, synchronizer, 1, steps=steps, cfg=cfg, denoise=denoise, **sampling)
        graph, size = drawing.graph, synchronizer.config.synchronizer.image_size
        first = graph.node("ImageFromBatch", "first", image=drawing.links["image"], batch_index=0, length=1).out(0)
        small = graph.node(
            "ImageScale", "small", image=first, upscale_method="area", width=size, height=size, crop="center"
        ).out(0)
        embedded = graph.node("MMInterleavedEmbedImage", "embed", image=small, contrastive=drawing.links["contrastive"])
        turned = graph.node(
            "MMInterleavedSoundToEmbedding",
            "turn",
            amount=amount,
            embedding=embedded.out(0),
            **drawing.given("sound_model", "audio"),
        )
        story = graph.node("MMInterleavedStoryPicture", "story", image=small, encoder=drawing.links["encoder"])
        conditioned = graph.node(
            "MMInterleavedApplyImageEmbedding",
            "apply",
            embedding=turned.out(0),
            story=story.out(0),
            strength=1.0,
            **drawing.given("prior", "synchronizer", "model"),
        )
        latent = graph.node("VAEEncode", "encoded", pixels=small, vae=drawing.links["vae"])
        drawn = draw_panel(graph, 1, conditioned, latent, drawing.links["vae"], seed=seed, **drawing.sampling)
        changed = graph.node("MMInterleavedSoundOverInside", "changed", before=small, image=drawn.out(0))
        return drawing.output(changed, 2)


class SoundOverInside(io.ComfyNode):
    """Last node of Sound over Panel's expansion."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedSoundOverInside",
            display_name="Changed (inside Sound over Panel)",
            category=f"{CATEGORY}/internal",
            description="A part of Sound over Panel.",
            inputs=[
                io.Image.Input("before", tooltip="The image as it was."),
                io.Image.Input("image", tooltip="The image as it is now."),
            ],
            outputs=[
                io.Image.Output("image_out", display_name="image"),
                io.Mask.Output("mask_out", display_name="changed"),
            ],
        )

    @classmethod
    def execute(cls, before, image) -> io.NodeOutput:
        difference = (image - before.to(image)).abs().mean(-1)[:, None]
        smooth = F.avg_pool2d(difference, 5, 1, 2, count_include_pad=False)[:, 0]
        return io.NodeOutput(image, (smooth > CHANGED).to(image))


class ExampleSound(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedExampleSound",
            display_name="Example Sound",
            category=CATEGORY,
            description="A sound of the starter model's world, to try a workflow with; replace it by Load Audio.",
            inputs=[
                io.Combo.Input("sound", options=sorted(path.stem for path in EXAMPLES.glob("*.wav")), tooltip="Which.")
            ],
            outputs=[io.Audio.Output("audio_out", display_name="audio")],
        )

    @classmethod
    def execute(cls, sound) -> io.NodeOutput:
        with wave.open(str(EXAMPLES / f"{sound}.wav"), "rb") as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
            audio = {"waveform": torch.from_numpy(samples)[None, None], "sample_rate": file.getframerate()}
        return io.NodeOutput(audio)
