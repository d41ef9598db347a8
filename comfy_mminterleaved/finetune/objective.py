"""What fine-tuning minimizes: text and diffusion loss on stories, and reconstruction as their regularizer.

Reconstruction (2212.12249) ties reading and drawing together. A step from texts also has the LLM caption the image that
the U-Net predicts in one step; a step from images also has the U-Net draw the image from the caption as the LLM reads
it, as soft tokens. Captioner and text encoder are one LLM here, so soft tokens are probabilities times its embeddings.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..generation.latents import decode_latents, encode_latents
from ..generation.reconstruction import retell
from ..generation.schedulers import make_scheduler
from ..generation.tokens import StoryTokens
from ..generation.unet_hooks import attach_mmfs
from ..models.image_processor import preprocess_image
from ..models.visual_tokenizer import ImageFeatures
from ..stories.images import fit_image
from ..stories.story import ImageSegment, Story
from .dataset import IGNORE_INDEX, Panel, TokenBatch, collate

if TYPE_CHECKING:
    from ..pipeline import MMInterleavedPipeline

IMAGE_WEIGHT = 10.0  # of the diffusion loss; that of text is 1 (paper, section 4)
COND_DROPOUT = 0.1  # share of images that are conditioned on nothing, for guidance
# Timesteps, as shares of all, from which an image is predicted in one step: with more noise it shows nothing.
PREDICTED = 0.1, 0.7


class FinetuneObjective:
    """Losses of a batch of panels.

    Args:
        reconstruction_weight: Of the losses through the other direction; 0 leaves them out.
        num_predicted: Of a batch's images that are predicted and captioned; None for half.
    """

    def __init__(
        self, pipeline: MMInterleavedPipeline, reconstruction_weight: float = 1.0, num_predicted: int | None = None
    ):
        self.pipeline, self.weight, self.num_predicted = pipeline, reconstruction_weight, num_predicted
        self.llm, self.conditioner = pipeline.llm, pipeline.synchronizer.conditioner
        self.noise_scheduler = make_scheduler("ddpm", pipeline.config.scheduler)
        self._latents: dict[str, torch.Tensor] = {}

    def from_texts(self, panels: Sequence[Panel]) -> dict[str, torch.Tensor]:
        """Losses of writing and drawing the panels; with reconstruction, of captioning what is drawn."""
        stories = self.encoded([panel.story for panel in panels])
        batch = self.story_batch(stories)
        hidden = self.hidden_states(batch)
        latents = self.latents([panel.image for panel in panels])
        timesteps = torch.rand(len(panels), device=latents.device)
        count = self.count_predicted(len(panels))
        if count:
            low, high = PREDICTED
            timesteps = torch.cat([low + (high - low) * timesteps[:count], timesteps[count:]])
        contexts = [hidden[i, :length] for i, length in enumerate(batch.lengths)]
        losses = {"text": self.text_loss(hidden, batch)}
        losses["image"], predicted = self.draw(contexts, latents, timesteps, stories)
        if count:
            images = self.encoder_pixels(decode_latents(self.pipeline.vae, predicted[:count]))
            features = self.pipeline.encoder(images.to(self.dtype))
            captions = [panel.caption for panel in panels[:count]]
            losses["caption_of_predicted"] = self.caption_loss(captions, [features[i] for i in range(count)])[0]
        return self.total(losses)

    def from_images(self, panels: Sequence[Panel]) -> dict[str, torch.Tensor]:
        """Loss of captioning the panels' images; with reconstruction, of drawing them from these captions."""
        images, captions = [panel.image for panel in panels], [panel.caption for panel in panels]
        loss, probs = self.caption_loss(captions, self.features(images))
        losses = {"caption": loss}
        if self.weight:
            contexts = self.soft_contexts(captions, probs)
            latents = self.latents(images)
            timesteps = torch.rand(len(panels), device=latents.device)
            losses["image_of_caption"], _ = self.draw(contexts, latents, timesteps, [Story()] * len(panels))
        return self.total(losses)

    def total(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights = {
            "text": 1.0,
            "image": IMAGE_WEIGHT,
            "caption": 1.0,
            "caption_of_predicted": self.weight,
            "image_of_caption": self.weight * IMAGE_WEIGHT,
        }
        return {"loss": sum(weights[name] * loss for name, loss in losses.items()), **losses}

    def count_predicted(self, size: int) -> int:
        if not self.weight:
            return 0
        return min(size, max(1, size // 2) if self.num_predicted is None else self.num_predicted)

    # ---- reading ----

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.soi_token.dtype

    @torch.no_grad()
    def features(self, images: Sequence[ImageSegment]) -> list[ImageFeatures]:
        """The encoder's features, each distinct image once. They are not kept: at full size they fill a card."""
        distinct = {image.features_key: image for image in images}
        size = self.pipeline.config.encoder.image_size
        pixels = torch.stack([preprocess_image(image.pixels, size) for image in distinct.values()])
        features = self.pipeline.encoder(pixels.to(self.llm.device, self.dtype))
        rows = {key: features[i] for i, key in enumerate(distinct)}
        return [rows[image.features_key] for image in images]

    def encoder_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(N, 3, H, W)` as the encoder takes them, with gradients; those read from disk are preprocessed."""
        size = (self.pipeline.config.encoder.image_size,) * 2
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)

    def encoded(self, stories: Sequence[Story]) -> list[Story]:
        """The stories with features on their images."""
        images = [image for story in stories for image in story.images]
        features = iter(self.features(images) if images else ())
        return [story.with_features([next(features) for _ in story.images]) for story in stories]

    def story_batch(self, stories: Sequence[Story]) -> TokenBatch:
        """Rows of encoded stories, each with a start-of-image token at its end."""
        soi = self.llm.config.special_tokens.soi
        rows = [self.pipeline.text.tokenize(story) for story in stories]
        rows = [replace(tokens, input_ids=(*tokens.input_ids, soi)) for tokens in rows]
        # The user decides whether a story opens with an image, so its first token has no loss if it starts one.
        firsts = [1 if tokens.input_ids[1] != soi else 2 for tokens in rows]
        return collate(rows, firsts, [[image.features for image in tokens.images] for tokens in rows], self.llm)

    def hidden_states(self, batch: TokenBatch) -> torch.Tensor:
        tokens = None if batch.visual_tokens is None else batch.visual_tokens.flatten(0, 1)
        inputs_embeds = self.llm.embed_inputs(batch.input_ids, tokens)
        if tokens is None:
            return self.llm(inputs_embeds)
        return self.llm(inputs_embeds, self.llm.project_images(batch.feature_maps), batch.image_mask)

    def text_loss(self, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """Mean cross-entropy of the next tokens."""
        logits = self.llm.logits(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX)

    def caption_loss(self, captions: Sequence[str], features: Sequence[ImageFeatures]):
        """Mean cross-entropy of captions of images, and the probabilities `(tokens, vocab_size)` of each caption."""
        text, special = self.pipeline.text, self.llm.config.special_tokens
        prompt = text.tokenize(text.caption_story(Story.of(ImageSegment(torch.zeros(3, 8, 8)))))
        ids = [text.tokenizer.encode(caption, after_text=True) for caption in captions]
        rows = [replace(prompt, input_ids=(*prompt.input_ids, *caption, special.eos)) for caption in ids]
        start = len(prompt)
        batch = collate(rows, [start] * len(rows), [[each] for each in features], self.llm)
        hidden = self.hidden_states(batch)
        logits = self.llm.logits(hidden[:, start - 1 :]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets[:, start - 1 :].flatten(), ignore_index=IGNORE_INDEX)
        return loss, [row[: len(caption)].softmax(-1) for row, caption in zip(logits, ids)]

    def soft_contexts(self, captions: Sequence[str], probs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Hidden states of stories that retell the captions; tokens that come from a caption are soft.

        Args:
            probs: Of each caption's tokens: `(tokens, vocab_size)`.
        """
        text, special = self.pipeline.text, self.llm.config.special_tokens
        stories = [retell([caption], text.generation_config.introduction)[0] for caption in captions]
        rows = [text.tokenize(Story.of(story)) for story in stories]
        rows = [StoryTokens((*tokens.input_ids, special.soi), (), ()) for tokens in rows]
        batch = collate(rows, [None] * len(rows), [[]] * len(rows), self.llm)
        embeds = []
        for ids, length, caption, prob in zip(batch.input_ids, batch.lengths, captions, probs):
            soft = (prob.to(self.dtype) @ self.llm.embed_tokens.weight).to(self.dtype)
            sources = matching_tokens(text.tokenizer.encode(caption, after_text=True), ids[:length].tolist())
            hard = self.llm.embed_inputs(ids[None])[0]
            embeds.append(torch.stack([hard[i] if k is None else soft[k] for i, k in enumerate(sources)]))
            embeds[-1] = torch.cat([embeds[-1], hard[length:]])
        hidden = self.llm(torch.stack(embeds))
        return [hidden[i, :length] for i, length in enumerate(batch.lengths)]

    # ---- drawing ----

    @torch.no_grad()
    def latents(self, images: Sequence[ImageSegment]) -> torch.Tensor:
        """Scaled latents `(N, C, h, w)`, computed once per image."""
        side = self.pipeline.config.synchronizer.image_size
        for image in images:
            if image.digest not in self._latents:
                pixels = fit_image(image.pixels, (side, side))
                self._latents[image.digest] = encode_latents(self.pipeline.vae, pixels[None])[0]
        latents = torch.stack([self._latents[image.digest] for image in images])
        return latents.to(self.pipeline.unet.device, self.pipeline.unet.dtype)

    def draw(self, contexts, latents, timesteps, stories: Sequence[Story]) -> tuple[torch.Tensor, torch.Tensor]:
        """The diffusion loss, and the latents predicted in one step.

        Args:
            contexts: LLM hidden states `(L, hidden_size)` of each image to draw.
            timesteps: Shares of all timesteps, in [0, 1).
            stories: Encoded; their last images are what MMFS attends to.
        """
        pipeline, scheduler = self.pipeline, self.noise_scheduler
        prompt_embeds = self.conditioner.prompt_embeds(contexts)
        is_dropped = torch.rand(len(prompt_embeds), 1, 1, device=prompt_embeds.device) < COND_DROPOUT
        prompt_embeds = torch.where(is_dropped, self.conditioner.neg_prompt_embeds.to(prompt_embeds), prompt_embeds)
        count = pipeline.config.synchronizer.num_context_images
        mmfs = pipeline.synchronizer.mmfs_module
        image_values = mmfs.project_images(*pipeline.image.context_feature_maps(stories, count))
        t = (timesteps * scheduler.config.num_train_timesteps).long()
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, t)
        with attach_mmfs(pipeline.unet, mmfs, image_values):
            pred = pipeline.unet(noisy, t, encoder_hidden_states=prompt_embeds.to(latents)).sample
        loss = F.mse_loss(pred.float(), diffusion_target(scheduler, latents, noise, t).float())
        return loss, predicted_latents(scheduler, noisy, pred, t)


def diffusion_target(scheduler, latents, noise, timesteps) -> torch.Tensor:
    """What the U-Net is to predict for noised latents, by the scheduler's `prediction_type`: noise, or velocity."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


def predicted_latents(scheduler, noisy, pred, timesteps) -> torch.Tensor:
    """The latents without noise that a prediction implies."""
    alpha = scheduler.alphas_cumprod.to(noisy)[timesteps].view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "v_prediction":
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * pred
    return (noisy - (1 - alpha).sqrt() * pred) / alpha.sqrt()


def matching_tokens(source: Sequence[int], target: Sequence[int]) -> list[int | None]:
    """For each token of `target` the position in `source` that it comes from, in order; None for a new one."""
    out: list[int | None] = [None] * len(target)
    for block in difflib.SequenceMatcher(None, list(source), list(target), autojunk=False).get_matching_blocks():
        for k in range(block.size):
            out[block.b + k] = block.a + k
    return out
