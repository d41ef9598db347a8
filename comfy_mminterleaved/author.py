"""One pipeline as the writer and the illustrator of `storyteller.run_plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .models.visual_tokenizer import ImageFeatures
from .stories.story import ImageSegment, Story, TextSegment

if TYPE_CHECKING:
    from .pipeline import MMInterleavedPipeline


class Author:
    """Writer and Illustrator of `storyteller.run_plan` on one pipeline."""

    def __init__(self, pipeline: MMInterleavedPipeline, text_config, image_config, on_token, on_step, drop_oldest):
        defaults = pipeline.generation_config
        self.pipeline = pipeline
        self.text_config, self.image_config = text_config or defaults.text, image_config or defaults.image
        self.on_token, self.on_step, self.drop_oldest = on_token, on_step, drop_oldest
        self.encoded: dict[tuple[str, str], ImageFeatures] = {}

    def encode(self, story: Story) -> Story:
        return self.pipeline.encode_images(story, self.encoded)

    def attach_features(self, story: Story) -> Story:
        """Returns the story with the features computed so far."""
        features = self.encoded
        return story.map_images(
            lambda i: i.with_features(features[i.features_key]) if i.features_key in features else i
        )

    def write(self, story: Story, seed: int) -> TextSegment:
        return self.write_all([story], [seed])[0]

    def illustrate(self, story: Story, seed: int) -> ImageSegment:
        return self.illustrate_all([story], [seed])[0]

    def write_all(self, stories: Sequence[Story], seeds: Sequence[int]) -> list[TextSegment]:
        seeds = [(self.text_config.seed + seed) % 2**63 for seed in seeds]
        on_token = self.on_token and (lambda i, text: self.on_token(text) if i == 0 else None)
        stories = [self.encode(story) for story in stories]
        texts = self.pipeline.generate_texts(stories, self.text_config, 1, on_token, self.drop_oldest, seeds)
        return [TextSegment(text.text, text.tokens) for (text,) in texts]

    def illustrate_all(self, stories: Sequence[Story], seeds: Sequence[int]) -> list[ImageSegment]:
        seeds = [(self.image_config.seed + seed) % 2**63 for seed in seeds]
        stories = [self.encode(story) for story in stories]
        batch_size, best_of = len(stories), self.image_config.best_of
        if best_of > 1:
            batch_size = max(batch_size, min(best_of, self.pipeline.choose_batch_size(self.image_config)))
        images = self.pipeline.generate_images(
            stories, self.image_config, 1, None, self.on_step, self.drop_oldest, batch_size, seeds
        )
        return [image for (image,) in images]
