"""What stands beside a model's blocks, in its folder `systems`: each read when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from ..config import Config
from ..errors import CheckpointError
from ..models.llama_mmfs import LlamaMMFS
from ..models.lora import LoRA
from ..models.prior import EmbeddingConditioner
from ..stories.story import ImageSegment
from .dream import DreamConditioner, load_dream
from .embedders import FeatureEmbedder, load_contrastive, load_lora, system_path
from .image_tokens import ImageTokenizer, TokenSampler, check_tokens, load_image_tokenizer, load_token_sampler
from .prior import ImagePrior, load_prior
from .refine import ImageRefiner, load_refiner
from .sound import SoundEmbedder, load_sound


class Systems:
    """The systems of one model; what it does not have is a CheckpointError of one sentence.

    Args:
        folder: Of the model, None for one that has none.
        encode: Gives images features of the model's encoder.
        placement: The device, and the dtype of what is computed.
    """

    def __init__(
        self,
        folder: Path | None,
        config: Config,
        llm: LlamaMMFS,
        encode: Callable[[Sequence[ImageSegment]], Sequence[ImageSegment]],
        placement: Callable[[], tuple[torch.device, torch.dtype]],
    ):
        self.folder, self.config, self.llm, self.encode, self.placement = folder, config, llm, encode, placement

    def path(self, name: str, sentence: str) -> Path:
        """A system's file.

        Args:
            sentence: For a model without a folder.
        """
        if self.folder is None:
            raise CheckpointError(sentence)
        return system_path(self.folder, name)

    @cached_property
    def embedder(self) -> FeatureEmbedder:
        """The contrastive model."""
        path = self.path("contrastive", "This model has no contrastive model to choose images by; omit best_of.")
        device, dtype = self.placement()
        return load_contrastive(path, self.config.llm.special_tokens, self.encode, dtype, device)

    @cached_property
    def refiner(self) -> ImageRefiner:
        """What doubles the size of images."""
        path = self.path("refiner", "This model has no refiner; omit refine.")
        return load_refiner(path, self.embedder, self.placement()[0])

    @cached_property
    def _prior(self) -> tuple[ImagePrior, EmbeddingConditioner]:
        path = self.path("prior", "This model has no prior, so it cannot draw image embeddings.")
        return load_prior(path, self.embedder, self.placement()[0])

    @property
    def prior(self) -> ImagePrior:
        """Samples image embeddings for texts."""
        return self._prior[0]

    @property
    def embedding_conditioner(self) -> EmbeddingConditioner:
        """Has the U-Net draw image embeddings."""
        return self._prior[1]

    @cached_property
    def dream(self) -> DreamConditioner:
        """Conditions the U-Net by dream queries."""
        path = self.path("dream", "This model has no dream queries; use the conditioner 'perceiver'.")
        device, dtype = self.placement()
        return load_dream(path, self.llm, self.config, device, dtype)

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        """Images as codes."""
        path = self.path("codes", "This model has no image tokens.")
        return load_image_tokenizer(path, self.placement()[0])

    @cached_property
    def token_sampler(self) -> TokenSampler:
        """Drafts images as codes."""
        path = self.path("tokens", "This model has no decoder of image tokens, so it cannot draft.")
        sampler = load_token_sampler(path, self.config, *self.placement())
        check_tokens(self.image_tokenizer.model, sampler.model, repr(path.name))
        return sampler

    @cached_property
    def sounds(self) -> SoundEmbedder:
        """Embeds sounds in the space of the contrastive model."""
        path = self.path("sound", "This model has no audio encoder, so it cannot hear.")
        return load_sound(path, self.embedder, self.placement()[0])

    def load_drawn_adapter(self, encoder) -> LoRA:
        """The encoder's adapter for drawn images (GMAIL); raises CheckpointError for one of another encoder."""
        path = self.path("drawn", "This model has no adapter for drawn images.")
        adapter = load_lora(path, "drawn", encoder.encoder_id)
        adapter.check(encoder, "The adapter for drawn images")
        device, dtype = self.placement()
        return adapter.to(device, dtype)
