"""Images as codes, and drafts of a story's next image by sampling them (VQ-VAE-2, 1906.00446; DALL-E, 2102.12092)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import Config
from ..errors import CheckpointError, SettingError, StoryError
from ..models.llama_mmfs import KVCache, LlamaImageValues
from ..models.mmfs import fuse_mmfs
from ..models.token_decoder import CELL_CODES, TokenDecoder, TokenDecoderConfig, from_cells, to_cells
from ..models.vqvae import FACTOR, VQVAE, ImageCodes, VQVAEConfig
from ..stories.story import Story
from .embedders import read_system

TEMPERATURE, TOP_K = 0.3, 64


class ImageTokenizer:
    """Latents to codes and back.

    Args:
        model: In float32: the nearest code is a matter of small differences.
        device: Where it computes, for a host that keeps weights elsewhere; None for where they are.
    """

    def __init__(self, model: VQVAE, device: torch.device | None = None):
        self.model, self._device = model, device

    @property
    def device(self) -> torch.device:
        return self._device or self.model.conv_in.weight.device

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
    """Samples the codes of a story's next image, cell by cell, from what the U-Net would be conditioned on.

    Args:
        encoder_id: Of the encoder whose features it attends to; None accepts any whose features have the right sizes.
        device: Where it computes, for a host that keeps weights elsewhere; None for where they are.
    """

    def __init__(self, model: TokenDecoder, encoder_id: str | None = None, device: torch.device | None = None):
        self.model, self.encoder_id, self._device = model, encoder_id, device

    @property
    def device(self) -> torch.device:
        return self._device or self.model.start.device

    @torch.no_grad()
    def sample(
        self,
        prompt_embeds: torch.Tensor,
        story: Story = Story(),
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
            prompt_embeds: `(1, num_queries, C)`, of the Perceiver or of dream queries.
            story: Encoded; its images are attended to, its texts are not read.
            seed: Of the first; the others' follow. A draft depends on its seed alone, but for last bits of a batch.
            top_k: Sample among this many likeliest codes; 0 for all.
            guidance_scale: 1 for none; None for the model's own.
            given: The first cells `(k, CELL_CODES)` of all drafts.
            on_step: Called with the number of cells so far, and their number.

        Raises:
            SettingError: For a setting out of its range, given cells or prompt embeddings of another model.
            StoryError: For a story whose images are not encoded, or by another encoder.
        """
        model, num_cells = self.model, self.model.num_cells
        self.check(count, temperature, top_k, guidance_scale, given)
        self.check_prompt(prompt_embeds)
        self.check_images(story)
        guidance_scale = model.config.guidance_scale if guidance_scale is None else guidance_scale
        k = 0 if given is None else len(given)
        generators = [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(count)]
        cells = torch.zeros(count, num_cells, CELL_CODES, dtype=torch.long, device=self.device)
        if k:
            cells[:, :k] = given.to(self.device)
        is_guided = guidance_scale > 1
        hidden, *context = self._prefill(prompt_embeds, story, cells[:1, :k], count, is_guided)
        cache = KVCache(len(hidden))
        for number in range(k, num_cells):
            if number > k:
                x = model.inputs(cells[:, number - 1 : number], number)
                hidden = model.hidden_states(torch.cat([x, x]) if is_guided else x, *context)[:, -1]
            noise = torch.stack([torch.rand(CELL_CODES, model.config.num_codes, generator=g) for g in generators])
            noise = noise.to(self.device)
            for place in range(CELL_CODES):
                known = cells[:, number, :place]
                logits = model.next_code_logits(hidden, torch.cat([known, known]) if is_guided else known, cache)
                logits = logits.float()
                if is_guided:
                    logits, without = logits.chunk(2)
                    logits = without + guidance_scale * (logits - without)
                cells[:, number, place] = _sample(logits / temperature, top_k, noise[:, place])
            if on_step is not None:
                on_step(number + 1, num_cells)
        return from_cells(cells)

    def check(
        self,
        count: int = 1,
        temperature: float = TEMPERATURE,
        top_k: int = TOP_K,
        guidance_scale: float | None = None,
        given: torch.Tensor | None = None,
    ) -> None:
        """Raises SettingError for settings that `sample` refuses."""
        if count < 1:
            raise SettingError(f"The number of drafts must be at least 1, not {count}.")
        if not 0 < temperature < math.inf:
            raise SettingError(f"The temperature must be over 0, not {temperature:g}.")
        if top_k < 0:
            raise SettingError(f"top_k must be at least 0, not {top_k}.")
        if guidance_scale is not None and not 1 <= guidance_scale < math.inf:
            raise SettingError(f"The guidance scale must be at least 1, not {guidance_scale:g}.")
        if given is None:
            return
        if given.ndim != 2 or given.shape[1] != CELL_CODES:
            raise SettingError(f"The given cells have the shape {tuple(given.shape)}, not (cells, {CELL_CODES}).")
        if len(given) >= self.model.num_cells:
            raise SettingError("All rows of the image are given; leave at least one to draw.")
        num_codes = self.model.config.num_codes
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < num_codes:
            raise SettingError(
                f"The given cells have codes up to {int(given.max())}, but drafts have {num_codes}; use image tokens "
                "of one model."
            )

    def check_prompt(self, prompt_embeds: torch.Tensor) -> None:
        """Raises SettingError for prompt embeddings of another model."""
        c = self.model.config
        if tuple(prompt_embeds.shape) != (1, c.num_queries, c.prompt_dim):
            raise SettingError(
                f"The conditioning has the shape {tuple(prompt_embeds.shape)}, but drafts are sampled from one of "
                f"(1, {c.num_queries}, {c.prompt_dim}); use the image tokens of the model that made it."
            )

    def check_images(self, story: Story) -> None:
        """Raises StoryError for images that are not encoded by the encoder that the decoder was trained with."""
        mmfs = self.model.trunk.config.mmfs
        expected = {(mmfs.d_value, side, side) for side in mmfs.spatial_shapes}
        for image in story.images:
            if image.features is None:
                raise StoryError("An image of the story was not encoded; connect an encoder where it is added.")
            shapes = {tuple(level.shape) for level in image.features.feature_maps}
            if not expected <= shapes or not image.features.is_from(self.encoder_id):
                raise StoryError(
                    "The story's images have features of another encoder than the image tokens were trained with; use "
                    "that one."
                )

    def _prefill(self, prompt_embeds, story: Story, given: torch.Tensor, count: int, is_guided: bool) -> tuple:
        """Reads the prompt and given cells once for all drafts; rows without prompt and images follow, for guidance.

        Returns:
            The states `(rows, hidden_size)` at the next cell, and the rest of the arguments of `hidden_states`.
        """
        model = self.model
        prompt, rows = model.embed_prompt(prompt_embeds.to(self.device)), [0] * count
        image_values, image_mask = self._images(story)
        if is_guided:
            prompt = torch.cat([prompt, model.no_prompt.to(prompt)])
            rows, given = rows + [1] * count, given.repeat(2, 1, 1)
            if image_mask is not None:
                image_mask = torch.cat([image_mask, torch.zeros_like(image_mask)])
        cache = KVCache(len(prompt))
        x = torch.cat([prompt, model.inputs(given)], dim=1)
        hidden = model.hidden_states(x, cache, image_values, image_mask)[:, -1]
        image_mask = None if image_mask is None else image_mask[rows]
        return hidden[rows], cache.select_rows(rows), image_values, image_mask

    def _images(self, story: Story) -> tuple[LlamaImageValues | None, torch.Tensor | None]:
        """The newest images of a story, projected, and which of them are there, `(1, P)`."""
        images = story.images[-self.model.trunk.config.mmfs.max_num_image_per_seq + 1 :]
        if not images:
            return None, None
        maps = [torch.stack(level)[None] for level in zip(*(image.features.feature_maps for image in images))]
        image_values = self.model.trunk.project_images([level.to(self.device) for level in maps])
        return image_values, torch.ones(1, len(images), dtype=torch.bool, device=self.device)


def _sample(logits: torch.Tensor, top_k: int, noise: torch.Tensor) -> torch.Tensor:
    """One index for each row of logits, by the Gumbel-max trick: `(N, V)` -> `(N,)`.

    Args:
        noise: `(N, V)`, uniform in [0, 1).
    """
    likeliest, codes = logits.topk(min(top_k, logits.shape[-1]) or logits.shape[-1], dim=-1)
    gumbel = -(-noise.gather(-1, codes).log()).log()
    return codes.gather(-1, (likeliest + gumbel).argmax(-1, keepdim=True))[:, 0]


def rows_of(codes: ImageCodes, rows: int) -> torch.Tensor:
    """The first rows of cells of one image's codes, `(cells, CELL_CODES)`.

    Raises:
        SettingError: For codes of several images, and a number of rows that the image does not have.
    """
    if len(codes.top) != 1:
        raise SettingError(f"The tokens are those of {len(codes.top)} images; drafts go on from one.")
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


def load_token_sampler(path: Path, config: Config, device="cpu", dtype: torch.dtype = torch.float32) -> TokenSampler:
    """The token decoder of a system's file; raises CheckpointError."""
    tensors, about = read_system(path, "tokens")
    tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
    decoder = build_token_decoder(tensors, about, config, repr(path.name))
    return TokenSampler(decoder, about.get("encoder_id"))


def check_tokens(tokenizer: VQVAE, decoder: TokenDecoder, label: str) -> None:
    """Raises CheckpointError unless codes and decoder belong together."""
    if tokenizer.config.num_codes != decoder.config.num_codes:
        raise CheckpointError(
            f"{label} predicts {decoder.config.num_codes} codes, but the image tokens have "
            f"{tokenizer.config.num_codes}; use those of one model."
        )
