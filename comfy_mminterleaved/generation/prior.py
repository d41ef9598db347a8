"""Image embeddings without an image: from texts by a diffusion prior, and from others by moving them (DALL-E 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..checkpoints.tensors import read_json
from ..errors import CheckpointError, SettingError
from ..models.contrastive import ContrastiveModel
from ..models.prior import DiffusionPrior, EmbeddingConditioner, PriorConfig
from .config import CANDIDATE_STEP
from .embedders import FeatureEmbedder, read_system

NUM_CANDIDATES = 2  # section 2.2: of two samples, the one nearer to the text is kept
TEXT_STRENGTH = 0.3  # section 3.3: 0.25 to 0.5


class TextStates(NamedTuple):
    """What a prior reads of N texts: their embeddings `(N, D)`, hidden states `(N, L, D)`, and which count `(N, L)`."""

    text_embeds: torch.Tensor
    hidden_states: torch.Tensor
    attention_mask: torch.Tensor


class ImagePrior:
    """Samples image embeddings for texts (section 2.2).

    Args:
        model: diffusers' `PriorTransformer`.
        scheduler: diffusers' `UnCLIPScheduler`.
        encode_texts: The states of texts, each `model.config.num_embeddings` tokens long.
        is_unit: Whether embeddings are of unit length, as the starter's; those of Karlo and Kandinsky are as CLIP
            gives them.
        guidance_scale: Of `sample`, by default; 4 is that of the large ones.
    """

    def __init__(
        self,
        model,
        scheduler,
        encode_texts: Callable[[Sequence[str]], TextStates],
        is_unit: bool = False,
        guidance_scale: float = 4.0,
    ):
        self.model, self.scheduler, self.encode_texts = model, scheduler, encode_texts
        self.is_unit, self.guidance_scale = is_unit, guidance_scale

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def embedding_dim(self) -> int:
        return self.model.config.embedding_dim

    @torch.no_grad()
    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """The texts' embeddings `(N, D)` in the space of images; their length means nothing."""
        return self.encode_texts(texts).text_embeds.float()

    @torch.no_grad()
    def sample(
        self,
        text: str,
        count: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int = 25,
        seed: int = 0,
        on_step: Callable[[int, int], object] | None = None,
    ) -> torch.Tensor:
        """Image embeddings for a text, `(count, D)`; each is the better of two samples.

        Args:
            guidance_scale: 1 for no guidance, None for the prior's own.
            seed: Of the first; the others' follow. Drawn on the CPU, so that it does not depend on the device.
            on_step: Called with the step from 1, and their number.

        Raises:
            SettingError: For an empty text, a count below 1, fewer than 2 steps, or a guidance scale below 0.
        """
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if not text.strip():
            raise SettingError("The text to make an image embedding from is empty; write one.")
        if count < 1:
            raise SettingError(f"The number of embeddings must be at least 1, not {count}.")
        if num_inference_steps < 2:
            raise SettingError(f"The prior needs at least 2 steps, not {num_inference_steps}.")
        if not guidance_scale >= 0:
            raise SettingError(f"The guidance scale must be at least 0, not {guidance_scale:g}.")
        model, device, dtype = self.model, self.device, self.model.dtype
        n, has_guidance = count * NUM_CANDIDATES, guidance_scale != 1
        states = self.encode_texts([text, ""] if has_guidance else [text])
        target = states.text_embeds[:1].float()
        rows = [states_of.repeat_interleave(n, dim=0).to(device) for states_of in states]
        rows = [x if x.dtype == torch.bool else x.to(dtype) for x in rows]
        seeds = [(seed + i + k * CANDIDATE_STEP) % 2**63 for i in range(count) for k in range(NUM_CANDIDATES)]
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        noise = torch.cat([torch.randn(1, self.embedding_dim, generator=g) for g in generators])
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps.tolist()
        latents = noise.to(device) * scheduler.init_noise_sigma
        for i, t in enumerate(timesteps):
            inputs = torch.cat([latents, latents]) if has_guidance else latents
            step = torch.full((len(inputs),), t, device=device)
            predicted = model(inputs.to(dtype), step, *rows, return_dict=False)[0].float()
            if has_guidance:
                positive, negative = predicted.chunk(2)
                predicted = negative + guidance_scale * (positive - negative)
            following = timesteps[i + 1] if i + 1 < len(timesteps) else None
            latents = scheduler.step(predicted, t, latents, following, generators, return_dict=False)[0]
            if on_step is not None:
                on_step(i + 1, len(timesteps))
        embeds = model.post_process_latents(latents.to(dtype)).float()
        fit = F.cosine_similarity(embeds, target.to(device)).view(count, NUM_CANDIDATES)
        embeds = embeds.view(count, NUM_CANDIDATES, -1)[torch.arange(count), fit.argmax(1)]
        return F.normalize(embeds, dim=-1) if self.is_unit else embeds


def make_prior_scheduler():
    """diffusers' `UnCLIPScheduler` as priors are trained with it: it predicts the clean embedding."""
    from diffusers import UnCLIPScheduler

    return UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)


def encode_texts(model: ContrastiveModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> TextStates:
    """What a prior reads of token ids and mask `(N, L)`, at the scale of a standard deviation of 1."""
    hidden_states = model.text_hidden_states(input_ids, attention_mask)
    scale = model.config.projection_dim**0.5
    return TextStates(
        scale * model.pool(hidden_states, attention_mask), scale * model.encode_words(hidden_states), attention_mask
    )


def blend(embed: torch.Tensor, other: torch.Tensor, amount: float) -> torch.Tensor:
    """An embedding between two `(..., D)` on the arc between them, its length too (section 3.2).

    Args:
        amount: 0 for the first, 1 for the other.

    Raises:
        SettingError: For embeddings of different widths, and for what is not a number.
    """
    check_embeds(embed, other)
    a, b = F.normalize(embed.float(), dim=-1), F.normalize(other.to(embed.device, torch.float32), dim=-1)
    angle = (a * b).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    direction = (((1 - amount) * angle).sin() * a + (amount * angle).sin() * b) / angle.sin()
    lengths = [x.float().norm(dim=-1, keepdim=True).to(embed.device) for x in (embed, other)]
    return F.normalize(direction, dim=-1) * (lengths[0] * (1 - amount) + lengths[1] * amount)


def move(
    embed: torch.Tensor, text_embed: torch.Tensor, neutral: torch.Tensor, amount: float = TEXT_STRENGTH
) -> torch.Tensor:
    """An image embedding turned towards what a text says more than a neutral one ("text diffs", section 3.3).

    Args:
        text_embed, neutral: Embeddings of the texts, `(D,)` or `(..., D)`.
        amount: Of the turn; 0 leaves the embedding as it is.

    Raises:
        SettingError: For texts that say the same to the model.
    """
    check_embeds(embed, text_embed, neutral)
    difference = F.normalize(text_embed.float(), dim=-1) - F.normalize(neutral.float(), dim=-1)
    return turn(embed, difference, amount)


def turn(embed: torch.Tensor, direction: torch.Tensor, amount: float) -> torch.Tensor:
    """An embedding `(..., D)` turned towards a direction, on the arc between them; it keeps its length."""
    check_embeds(embed, direction)
    if (direction.float().norm(dim=-1) < 1e-4).any():
        raise SettingError("There is no difference to turn an image embedding by; give another text or sound.")
    length = embed.float().norm(dim=-1, keepdim=True)
    return blend(embed, F.normalize(direction.float(), dim=-1).to(embed.device) * length, amount)


def check_embeds(*embeds: torch.Tensor) -> None:
    """Raises SettingError for embeddings of different models, and for what is not a number."""
    widths = [each.shape[-1] for each in embeds]
    if len(set(widths)) > 1:
        raise SettingError(
            f"The embeddings have widths {' and '.join(map(str, dict.fromkeys(widths)))}; take all of them through one "
            "model."
        )
    if not all(each.isfinite().all() for each in embeds):
        raise SettingError("An embedding is not a number; the image or the model's weights hold NaN.")


def of_embedder(embedder: FeatureEmbedder, length: int) -> Callable[[Sequence[str]], TextStates]:
    """Reads texts for a prior by a model's own contrastive model, padded to `length` tokens."""

    def encode(texts: Sequence[str]) -> TextStates:
        ids, mask = embedder.token_ids(texts, length)
        return encode_texts(embedder.model, ids, mask)

    return encode


def build_prior(tensors: dict[str, torch.Tensor], about: dict, label: str, operations=None) -> DiffusionPrior:
    """DiffusionPrior with these weights; raises CheckpointError.

    Args:
        about: From `embedders.parse_system_metadata`.
        operations: Layers of the host, None for `torch.nn`.
    """
    from ..models.build import check_shapes, param_shapes

    config = PriorConfig.from_dict(about["config"], label)
    try:
        model = DiffusionPrior(config, *(() if operations is None else (operations,)))
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{label} has settings that no prior can have.") from None
    check_shapes(param_shapes(model), {name: tuple(t.shape) for name, t in tensors.items()}, label)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def load_prior(path: Path, embedder: FeatureEmbedder, device="cpu") -> tuple[ImagePrior, EmbeddingConditioner]:
    """The prior of a system's file and what has the U-Net draw its embeddings, in float32; raises CheckpointError."""
    tensors, about = read_system(path, "prior")
    model = build_prior({name: t.to(device, torch.float32) for name, t in tensors.items()}, about, repr(path.name))
    check_prior(model, embedder, repr(path.name))
    encode = of_embedder(embedder, model.config.num_embeddings)
    guidance = model.config.guidance_scale
    return ImagePrior(model.prior, make_prior_scheduler(), encode, True, guidance), model.conditioner


def check_prior(model: DiffusionPrior, embedder: FeatureEmbedder, label: str) -> None:
    """Raises CheckpointError unless prior and contrastive model belong together."""
    width, limit = embedder.model.config.projection_dim, embedder.model.config.max_position_embeddings
    if model.config.num_embeddings > limit:
        raise CheckpointError(
            f"{label} reads {model.config.num_embeddings} tokens, but the contrastive model {limit}; use those of one "
            "model."
        )
    if width != model.config.embedding_dim:
        raise CheckpointError(
            f"{label} is for embeddings of width {model.config.embedding_dim}, but the contrastive model gives "
            f"{width}; use those of one model."
        )


def is_prior_folder(folder: Path) -> bool:
    """Whether a folder is a prior as diffusers saves it: Karlo's, or Kandinsky 2.2's."""
    return (folder / "prior" / "config.json").is_file()


def load_prior_folder(folder: str | Path, device: str | torch.device = "cpu", dtype=torch.float32) -> ImagePrior:
    """The prior of a folder of diffusers, never of the network: Karlo v1 alpha, or Kandinsky 2.2's prior.

    Its embeddings are CLIP's: Karlo's are of ViT-L/14, which Stable Diffusion 2.1 unCLIP-L draws.

    Raises:
        CheckpointError: If the folder holds something else.
    """
    from diffusers import PriorTransformer, UnCLIPScheduler
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    folder = Path(folder)
    scheduler = next((name for name in ("prior_scheduler", "scheduler") if (folder / name).is_dir()), None)
    missing = [name for name in ("prior", "text_encoder", "tokenizer") if not (folder / name).is_dir()]
    missing += ["prior_scheduler"] * (scheduler is None)
    if missing:
        raise CheckpointError(
            f"The folder {str(folder)!r} lacks {', '.join(missing)}; it must hold a prior as diffusers saves it, like "
            "karlo-v1-alpha or kandinsky-2-2-prior."
        )
    read_json(folder / "prior" / "config.json")
    options = {"local_files_only": True, "torch_dtype": dtype}
    try:
        model = PriorTransformer.from_pretrained(folder, subfolder="prior", **options)
        steps = UnCLIPScheduler.from_pretrained(folder, subfolder=scheduler, local_files_only=True)
        tower = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=dtype)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # both libraries raise errors of any type
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise CheckpointError(f"The folder {str(folder)!r} cannot be read as a prior: {reason}.") from None
    if tower.config.projection_dim != model.config.embedding_dim:
        raise CheckpointError(
            f"The text encoder of {str(folder)!r} has width {tower.config.projection_dim}, but its prior takes "
            f"{model.config.embedding_dim}."
        )
    model, tower = (each.eval().requires_grad_(False).to(device) for each in (model, tower))
    return ImagePrior(model, steps, CLIPReader(tower, tokenizer, model.config.num_embeddings))


class CLIPReader:
    """Reads texts for a prior by a CLIP of transformers."""

    def __init__(self, tower, tokenizer, length: int):
        self.tower, self.tokenizer, self.length = tower, tokenizer, length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> TextStates:
        inputs = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        out = self.tower(inputs.input_ids.to(self.tower.device))
        return TextStates(out.text_embeds, out.last_hidden_state, inputs.attention_mask.bool())
