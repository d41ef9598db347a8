"""Images as codes, and drafts of a story's next image by sampling them (VQ-VAE-2, 1906.00446; DALL-E, 2102.12092)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..config import Config
from ..errors import CheckpointError, SettingError
from ..models.llama_mmfs import KVCache
from ..models.mmfs import fuse_mmfs
from ..models.token_decoder import CELL_CODES, TokenDecoder, TokenDecoderConfig, from_cells, to_cells
from ..models.vqvae import FACTOR, VQVAE, ImageCodes, VQVAEConfig
from ..stories.story import Story
from .dream import DreamConditioner
from .embedders import read_system
from .text import TextGenerator

TEMPERATURE, TOP_K = 1.0, 128


class ImageTokenizer:
    """Latents to codes and back.

    Args:
        model: In float32: the nearest code is a matter of small differences.
    """

    def __init__(self, model: VQVAE):
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.conv_in.weight.device

    def encode(self, latents: torch.Tensor) -> ImageCodes:
        """The VAE's own latents `(N, C, h, w)` to codes.

        Raises:
            SettingError: For latents of another VAE, or with odd sides.
        """
        c = self.model.config
        if latents.ndim != 4 or latents.shape[1] != c.latent_channels:
            raise SettingError(
                f"The latents have the shape {tuple(latents.shape)}, but the image tokens are for {c.latent_channels} "
                "channels; use the VAE that they were trained with."
            )
        if any(side % FACTOR for side in latents.shape[2:]):
            raise SettingError(
                f"The latents are {latents.shape[3]} x {latents.shape[2]}; both sides must be multiples of {FACTOR}."
            )
        if not latents.isfinite().all():
            raise SettingError("The latents are not numbers; the image or the VAE's weights hold NaN.")
        return self.model.encode(latents.to(self.device, torch.float32) * c.scaling_factor)

    def decode(self, codes: ImageCodes) -> torch.Tensor:
        """Codes to the VAE's own latents `(N, C, h, w)`."""
        codes = ImageCodes(*(each.to(self.device) for each in codes))
        return self.model.decode(codes) / self.model.config.scaling_factor

    def num_bytes(self, codes: ImageCodes) -> int:
        """Size of one image's codes."""
        count = codes.top[0].numel() + codes.bottom[0].numel()
        return math.ceil(count * math.log2(self.model.config.num_codes) / 8)


class TokenSampler:
    """Samples the codes of a story's next image, cell by cell, behind the story and its dream queries."""

    def __init__(self, model: TokenDecoder, dream: DreamConditioner):
        self.model, self.dream = model, dream

    @property
    def device(self) -> torch.device:
        return self.model.start.device

    @property
    def num_tokens(self) -> int:
        """Of the LLM's context, that an image takes."""
        return self.model.num_cells + self.dream.model.config.num_queries + 1

    @torch.no_grad()
    def sample(
        self,
        text: TextGenerator,
        story: Story,
        count: int = 1,
        seed: int = 0,
        temperature: float = TEMPERATURE,
        top_k: int = TOP_K,
        guidance_scale: float | None = None,
        given: torch.Tensor | None = None,
        on_step: Callable[[int, int], object] | None = None,
    ) -> ImageCodes:
        """Codes of `count` drafts.

        Args:
            story: Encoded; everything before the image.
            seed: Of the first; the others' follow, and none depends on how many there are.
            top_k: Sample among this many likeliest codes; 0 for all.
            guidance_scale: 1 for none; None for the model's own.
            given: The first cells `(k, CELL_CODES)` of all drafts.
            on_step: Called with the number of cells so far, and their number.

        Raises:
            SettingError: For a setting out of its range, or too many given cells.
            StoryTooLongError: If the story does not leave room for the image.
        """
        model, cells_total = self.model, self.model.num_cells
        guidance_scale = model.config.guidance_scale if guidance_scale is None else guidance_scale
        if count < 1:
            raise SettingError(f"The number of drafts must be at least 1, not {count}.")
        if not temperature > 0:
            raise SettingError(f"The temperature must be over 0, not {temperature:g}.")
        if top_k < 0:
            raise SettingError(f"top_k must be at least 0, not {top_k}.")
        if not guidance_scale >= 1:
            raise SettingError(f"The guidance scale must be at least 1, not {guidance_scale:g}.")
        k = 0 if given is None else len(given)
        if k >= cells_total:
            raise SettingError("All rows of the image are given; leave at least one to draw.")
        contexts = self._contexts(text, story, count, guidance_scale)
        generators = [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(count)]
        cells = torch.zeros(count, cells_total, CELL_CODES, dtype=torch.long, device=self.device)
        if k:
            cells[:, :k] = given.to(self.device)
        for number in range(k, cells_total):
            first = 0 if number == k else number  # the given cells are read at once
            hidden = []
            for context in contexts:
                x = model.inputs(cells[:, max(first - 1, 0) : number], first)
                hidden.append(model.hidden_states(x, *context)[:, -1])
            for place in range(CELL_CODES):
                logits = [model.code_logits(h, cells[:, number, :place])[:, -1].float() for h in hidden]
                if len(logits) > 1:
                    logits = [logits[1] + guidance_scale * (logits[0] - logits[1])]
                cells[:, number, place] = _sample(logits[0] / temperature, top_k, generators)
            if on_step is not None:
                on_step(number + 1, cells_total)
        return from_cells(cells)

    def _contexts(self, text: TextGenerator, story: Story, count: int, guidance_scale: float) -> list[tuple]:
        """What the trunk continues: the story, and with guidance nothing."""
        story = text.truncate_to_context(story, self.num_tokens, None)
        cache, image_values, image_mask = text.fork([story], [0] * count)
        self.dream.read(text.llm, cache, image_values, image_mask)
        maps = list(zip(*(image.features.feature_maps for image in story.images)))
        maps = [torch.stack(level).unsqueeze(0).to(self.device, self.model.trunk.dtype) for level in maps]
        image_values = self.model.trunk.project_images(maps) if maps else None
        contexts = [(cache, image_values, image_mask if maps else None)]
        if guidance_scale > 1:
            llm, empty = text.llm, KVCache(count)
            ids = torch.full((count, 1), llm.config.special_tokens.bos, device=llm.device)
            llm(llm.embed_inputs(ids), cache=empty)
            contexts.append((empty, None, None))
        return contexts


def _sample(logits: torch.Tensor, top_k: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One index for each row of logits `(N, V)`, each by its own generator."""
    if 0 < top_k < logits.shape[-1]:
        limit = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < limit, -torch.inf)
    noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=g) for g in generators])
    return (logits.softmax(-1) / noise.to(logits)).argmax(-1)


def rows_of(codes: ImageCodes, rows: int) -> torch.Tensor:
    """The first rows of cells of one image's codes, `(cells, CELL_CODES)`.

    Raises:
        SettingError: For a number of rows that the image does not have.
    """
    side = codes.top.shape[-1]
    if not 1 <= rows < codes.top.shape[-2]:
        raise SettingError(f"The number of rows must be from 1 to {codes.top.shape[-2] - 1}, not {rows}.")
    return to_cells(codes)[0, : rows * side]


def _built(make, tensors: dict[str, torch.Tensor], label: str):
    from ..models.build import check_shapes, param_shapes

    try:
        with torch.device("meta"):
            model = make()
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError):
        raise CheckpointError(f"{label} has settings that no model of this kind can have.") from None
    check_shapes(param_shapes(model), {name: tuple(t.shape) for name, t in tensors.items()}, label)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def build_tokenizer(tensors: dict[str, torch.Tensor], about: dict, label: str, **host) -> VQVAE:
    """VQVAE with these weights; raises CheckpointError.

    Args:
        about: From `embedders.parse_system_metadata`.
        host: `operations` of the host.
    """
    config = VQVAEConfig.from_dict(about["config"], label)
    return _built(lambda: VQVAE(config, **host), tensors, label)


def build_token_decoder(
    tensors: dict[str, torch.Tensor], about: dict, config: Config, label: str, **host
) -> TokenDecoder:
    """TokenDecoder with these weights for a model's LLM; raises CheckpointError.

    Args:
        host: `operations` and `attention` of the host.
    """
    c = TokenDecoderConfig.from_dict(about["config"], label)
    return fuse_mmfs(_built(lambda: TokenDecoder(c, config.llm, **host), tensors, label))


def load_image_tokenizer(path: Path, device="cpu") -> ImageTokenizer:
    """The codes of a system's file; raises CheckpointError."""
    tensors, about = read_system(path, "codes")
    tensors = {name: t.to(device, torch.float32) for name, t in tensors.items()}
    return ImageTokenizer(build_tokenizer(tensors, about, repr(path.name)))


def load_token_sampler(
    path: Path, config: Config, dream: DreamConditioner, device="cpu", dtype: torch.dtype = torch.float32
) -> TokenSampler:
    """The token decoder of a system's file; raises CheckpointError."""
    tensors, about = read_system(path, "tokens")
    tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
    return TokenSampler(build_token_decoder(tensors, about, config, repr(path.name)), dream)


def check_tokens(tokenizer: VQVAE, decoder: TokenDecoder, label: str) -> None:
    """Raises CheckpointError unless codes and decoder belong together."""
    if tokenizer.config.num_codes != decoder.config.num_codes:
        raise CheckpointError(
            f"{label} predicts {decoder.config.num_codes} codes, but the image tokens have "
            f"{tokenizer.config.num_codes}; use those of one model."
        )
