"""What a pipeline draws beside a story's next panel: images in texts, image embeddings, sounds, drafts, codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from .errors import SettingError
from .generation.config import ImageGenerationConfig, OnStep
from .generation.dream import in_context_story
from .generation.latents import decode_latents, encode_latents
from .generation.prior import check_embeds, turn
from .generation.ranking import RankedImage, looks, panel_text, rank_images
from .generation.sound import SOUND_STRENGTH
from .models.gmail_adapter import DRAWN
from .models.vqvae import ImageCodes
from .stories.story import ImageSegment, Story

# Weights of likeness to earlier images when drafts are ranked: where characters are described, and where they are not.
LIKENESS, LIKENESS_ALONE = 0.5, 2.0


class DrawingMixin:
    """Methods of `MMInterleavedPipeline`, which has the blocks and `systems`."""

    def draw_in_context(
        self,
        text: str,
        images: Mapping[str, ImageSegment],
        config: ImageGenerationConfig | None = None,
        on_step: OnStep | None = None,
    ) -> ImageSegment:
        """Draws what a text with images in it asks for, by dream queries alone: "{A} in {B}." (DreamLLM, 2309.11499).

        The U-Net attends to no image, so what it takes from which one is as the text says.

        Args:
            images: By the letters that the text has in braces.

        Raises:
            SettingError: For an image that the text does not name, or one that it names and that is not there.
        """
        config = config or self.generation_config.image
        story = in_context_story(text, images)
        return self.generate_image(story, replace(config, conditioner="dream", num_context_images=0), on_step=on_step)

    @torch.no_grad()
    def generate_from_embeds(
        self,
        image_embeds: torch.Tensor,
        config: ImageGenerationConfig | None = None,
        story: Story = Story(),
        init_image: ImageSegment | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 8,
        seeds: Sequence[int] | None = None,
    ) -> list[ImageSegment]:
        """Draws an image for each image embedding (unCLIP, 2204.06125, section 2.1).

        One vector does not say which of two heroes wears what; the images of a story do.

        Args:
            image_embeds: `(N, D)`, from `embedder.image_embeds`, `prior.sample`, or made of such.
            story: Its images are attended to; its texts are not read.
            init_image: To start from, with `config.denoise`.
            seeds: One per embedding; by default the config's and those after it.

        Raises:
            SettingError: For embeddings of another model, and for a config with best_of.
        """
        config = config or self.generation_config.image
        conditioner = self.systems.embedding_conditioner
        if image_embeds.ndim != 2 or not len(image_embeds):
            raise SettingError(
                f"Image embeddings must be one a row, (N, D), not of the shape {tuple(image_embeds.shape)}."
            )
        check_embeds(image_embeds, conditioner.proj.weight)
        if config.best_of > 1:
            raise SettingError("An image embedding has no text to choose an image by; set best_of to 1.")
        if seeds is not None and len(seeds) != len(image_embeds):
            raise SettingError(f"Each of {len(image_embeds)} embeddings needs a seed; there are {len(seeds)} seeds.")
        self.image.check(config)
        self.check_refine(config)
        story, n = self.encode_images(story), len(image_embeds)
        self._place("draw")
        weight = conditioner.proj.weight
        prompt_embeds = conditioner(image_embeds.to(weight.device, weight.dtype)).to(self.llm.soi_token.dtype)
        outputs = self.image.generate(
            [story] * n,
            None,
            config,
            1,
            None if init_image is None else [init_image] * n,
            on_step,
            1 if self.placement is not None else batch_size,
            [config.seed + i for i in range(n)] if seeds is None else seeds,
            prompt_embeds,
        )
        images = [image for (image,) in outputs]
        if not config.refine:
            return images
        rows = zip(images, prompt_embeds)
        return [replace(i, refined=self.refiner.refine(i.pixels, prompt_embeds=row)) for i, row in rows]

    @torch.no_grad()
    def draft_images(
        self,
        story: Story,
        count: int = 16,
        seed: int = 0,
        given: torch.Tensor | None = None,
        conditioner: str = "perceiver",
        on_step: Callable[[int, int], object] | None = None,
        **sampling,
    ) -> list[ImageSegment]:
        """Drafts of a story's next image, sampled as tokens (DALL-E, 2102.12092), those that fit best first.

        Args:
            given: The first cells of all drafts (`image_tokens.rows_of`).
            conditioner: As in `prompt_embeds`.
            sampling: Of `TokenSampler.sample`: temperature, top_k, guidance_scale.
        """
        sampler = self.systems.token_sampler
        sampler.check(count, given=given, **sampling)
        encoded = self.encode_images(story)
        prompt_embeds = self.prompt_embeds([encoded], conditioner)
        self._place("draw")
        codes = sampler.sample(prompt_embeds, encoded, count, seed, given=given, on_step=on_step, **sampling)
        drafts = [
            ImageSegment(each, seed=(seed + i) % 2**63, origin=DRAWN) for i, each in enumerate(self.decode_codes(codes))
        ]
        if count == 1 or not panel_text(story).strip():
            return drafts
        return [ranked.image for ranked in self.rank_drafts(encoded, drafts)]

    def rank_drafts(self, story: Story, drafts: Sequence[ImageSegment]) -> list[RankedImage]:
        """Drafts for the panel whose text a story ends with, the best first.

        Many drafts show the wrong characters. So the LLM describes those whom only images of the story show, and scores
        the description as a caption of each draft (`ranking.rank_images`). Where nobody is described, likeness counts.
        """
        story, drafts = self._encoded(story, self.text.introduce_named), self._encode_all(drafts)
        text = looks(story)
        if not text:
            return rank_images(self.embedder, story, drafts, LIKENESS_ALONE)
        self._place("text")
        log_probs = self.text.caption_scores(drafts, text, 16 if self.placement is None else 1)
        return rank_images(self.embedder, story, drafts, LIKENESS, log_probs)

    @torch.no_grad()
    def image_codes(self, image: ImageSegment) -> ImageCodes:
        """An image as codes, and with `decode_codes` what they keep of it."""
        self._place("draw")
        pixels = image.pixels[None].to(self.device, self.llm.soi_token.dtype)
        return self.systems.image_tokenizer.encode(encode_latents(self.vae, pixels) / self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode_codes(self, codes: ImageCodes) -> torch.Tensor:
        """Images `(N, 3, H, W)` of codes."""
        latents = self.systems.image_tokenizer.decode(codes) * self.vae.config.scaling_factor
        return decode_latents(self.vae, latents).cpu()

    def draw_sound_over(
        self,
        image: ImageSegment,
        waveform: torch.Tensor,
        sampling_rate: int,
        config: ImageGenerationConfig | None = None,
        amount: float = SOUND_STRENGTH,
        on_step: OnStep | None = None,
    ) -> ImageSegment:
        """Draws an image again as it would sound: rain over it, night over it (2112.00007).

        Args:
            waveform: `(channels, samples)`.
            config: With `denoise` below 1, layout is kept too.
            amount: How far its embedding is turned towards the sound, 0 to 1.
        """
        embed = self.embedder.image_embeds([image])
        moved = turn(embed, self.systems.sounds.direction(waveform, sampling_rate), amount)
        return self.generate_from_embeds(moved, config, Story.of(image), image, on_step)[0]
