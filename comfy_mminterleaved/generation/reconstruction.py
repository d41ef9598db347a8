"""Reconstruction: an image is described by the caption that redraws it best (2212.12249)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.nn.functional as F

from ..errors import SettingError, StoryError
from ..models.visual_tokenizer import ImageFeatures
from ..stories.story import ImageSegment, Story, TextSegment
from ..stories.storyboard import Step
from .config import ImageGenerationConfig, Introduction, TextGenerationConfig

if TYPE_CHECKING:
    from ..pipeline import MMInterleavedPipeline

GREEDY = TextGenerationConfig(max_new_tokens=60, min_new_tokens=4, do_sample=False, repetition_penalty=1.0)
SAMPLED = TextGenerationConfig(max_new_tokens=60, min_new_tokens=4, top_k=0, top_p=1.0, repetition_penalty=1.0)
REDRAWING = ImageGenerationConfig(num_inference_steps=8, scheduler="dpm++", guidance_scale=3.0)


@dataclass(frozen=True)
class Description:
    """A caption of an image and how well it redraws it.

    Args:
        text: The caption.
        story: The caption retold as the opening of a story (`retell`), which the model draws from.
        redrawn: The drawing that is most alike to the image; None if nothing was drawn, because all captions agree.
        similarity: Its `token_similarity` to the image. The best counts, not the mean: what can be drawn again once was
            said, though other drawings fail.
        log_prob: Summed log-probability of the caption.
    """

    text: str
    story: str
    redrawn: ImageSegment | None
    similarity: float | None
    log_prob: float


def token_similarity(features: ImageFeatures, others: ImageFeatures) -> float:
    """Cosine of two images' visual tokens, each token normed: 1 for the same image."""
    a, b = (F.layer_norm(each.visual_tokens.float(), each.visual_tokens.shape[-1:]) for each in (features, others))
    return float(F.cosine_similarity(a.flatten(), b.flatten().to(a.device), dim=0))


def retell(captions: Sequence[str], introduction: Introduction | None) -> list[str]:
    """Captions retold as the texts of a story's panels: who is described gets a name, and is introduced once.

    Models whose stories introduce their characters draw from an introduction far better than from a bare caption. A
    model without `Introduction.subject` gets the captions as they are.
    """
    if introduction is None or introduction.subject is None:
        return list(captions)
    names: dict[str, str] = {}
    texts = []
    for caption in captions:
        new: list[str] = []

        def named(match: re.Match, new=new) -> str:
            look = match.group()[0].lower() + match.group()[1:]
            if look not in names and len(names) < len(introduction.names):
                names[look] = introduction.names[len(names)]
                new.append(f"{introduction.prompt.format(name=names[look])} {look}.")
            return names.get(look, match.group())

        text = re.sub(introduction.subject, named, caption)
        texts.append(" ".join([*new, text]))
    return texts


def caption_candidates(pipeline: MMInterleavedPipeline, image: ImageSegment, count: int, seed: int = 0) -> list[str]:
    """The likeliest caption and others, each once: `count` are written, `count` - 1 of them sampled."""
    if not 1 <= count <= 64:
        raise SettingError(f"The number of captions must be at least 1 and at most 64, not {count}.")
    texts = [text.text for text in pipeline.caption(image, GREEDY)]
    if count > 1:
        sampled = SAMPLED.with_seed_offset(seed)
        texts += [text.text for text in pipeline.caption(image, sampled, count - 1)]
    return distinct_captions(texts)


def distinct_captions(texts: Sequence[str]) -> list[str]:
    """Captions, each once; raises StoryError if all are empty."""
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not texts:
        raise StoryError("The model writes nothing about this image.")
    return texts


def describe(
    pipeline: MMInterleavedPipeline,
    image: ImageSegment,
    num_captions: int = 7,
    num_drawings: int = 3,
    config: ImageGenerationConfig = REDRAWING,
    on_drawn: Callable[[int, int], object] | None = None,
) -> list[Description]:
    """Captions of an image, the one that redraws it best first.

    Captions that differ are drawn `num_drawings` times each, all from the same noise. Where all agree nothing is drawn.

    Args:
        on_drawn: Called with the number of captions that were drawn, and of all.

    Raises:
        StoryError: If the model writes nothing about the image.
    """
    config = replace(config, best_of=1, refine=False)
    (image,) = pipeline.encode_images(Story.of(image)).images
    captions = caption_candidates(pipeline, image, num_captions, config.seed)
    log_probs = pipeline.score(pipeline.text.caption_story(Story.of(image)), captions)
    openings = [retell([caption], pipeline.generation_config.introduction)[0] for caption in captions]
    if len(captions) == 1:
        return [Description(captions[0], openings[0], None, None, log_probs[0])]
    seeds, out = range(config.seed, config.seed + num_drawings), []
    for number, (caption, opening, log_prob) in enumerate(zip(captions, openings, log_probs)):
        drawn = [
            pipeline.generate_image(Story.of(opening), config.with_seed_offset(seed - config.seed)) for seed in seeds
        ]
        features = [each.features for each in pipeline.encode_images(Story.of(*drawn)).images]
        similarities = [token_similarity(image.features, each) for each in features]
        best = max(range(len(drawn)), key=lambda n: similarities[n])
        out.append(Description(caption, opening, drawn[best], similarities[best], log_prob))
        if on_drawn is not None:
            on_drawn(number + 1, len(captions))
    return sorted(out, key=lambda each: (-each.similarity, -each.log_prob))


@dataclass(frozen=True)
class RoundTrip:
    """A story retold again from its images alone, and how alike each image is to the first one of its panel."""

    story: Story
    similarities: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.similarities) / len(self.similarities)


def round_trip(
    pipeline: MMInterleavedPipeline,
    story: Story,
    config: ImageGenerationConfig | None = None,
    on_panel: Callable[[int, int], object] | None = None,
) -> RoundTrip:
    """Captions a story's images, tells the captions as a story, and draws that: what is lost was not understood.

    Raises:
        StoryError: For a story without images, or an image that the model writes nothing about.
        StoryTooLongError: If the LLM cannot hold the story that comes out.
    """
    if not story.images:
        raise StoryError("The story has no images to tell again; add one.")
    images = pipeline.encode_images(story).images
    captions = [caption_candidates(pipeline, image, 1)[0] for image in images]
    config = replace(config or pipeline.generation_config.image, best_of=1, refine=False)
    texts = retell(captions, pipeline.generation_config.introduction)
    pipeline.text.check_context_length(Story(), [[TextSegment(text), Step.IMAGE] for text in texts])
    retold, similarities = Story(), []
    for number, (text, image) in enumerate(zip(texts, images)):
        retold = retold.add(text)
        drawn = pipeline.generate_image(retold, config.with_seed_offset(number))
        retold = pipeline.encode_images(retold.add(drawn))
        similarities.append(token_similarity(image.features, retold.images[-1].features))
        if on_panel is not None:
            on_panel(number + 1, len(images))
    return RoundTrip(retold, tuple(similarities))
