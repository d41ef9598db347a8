"""TextGenerator: text and context features from interleaved stories, with a single LLM and a prefix cache."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..config import Config
from ..errors import SettingError, StoryError, StoryTooLongError
from ..models.llama_mmfs import KVCache, LlamaImageValues, LlamaMMFS
from ..stories.story import ImageSegment, Story, TextSegment
from ..stories.storyboard import Step
from .config import GeneratedText, GenerationConfig, RankedOption, TextGenerationConfig
from .decoding import generate, score_after_each, score_options
from .prefix_cache import PrefixCache, prefill
from .tokens import StoryTokens, require_tokenizer, tokenize_story
from .vqa import introduce, introduce_named, prompted


class TextGenerator:
    """Generates text and context features from interleaved stories with a single LLM.

    Caches the most recent stories, so extending one costs only its new tokens. Images must already carry
    `ImageFeatures`.

    Args:
        known_words: Words that a model of a small world was trained on, in lower case; None for an open vocabulary.
        generation_config: The model's own defaults.
    """

    def __init__(
        self,
        llm: LlamaMMFS,
        config: Config,
        tokenizer=None,
        known_words: frozenset[str] | None = None,
        generation_config: GenerationConfig = GenerationConfig(),
    ):
        self.llm, self.config, self.tokenizer = llm, config, tokenizer
        self.known_words, self.generation_config = known_words, generation_config
        self.cache: PrefixCache | None = None
        self._tokenized: weakref.WeakKeyDictionary[Story, StoryTokens] = weakref.WeakKeyDictionary()

    def clear_cache(self) -> None:
        """Frees the cache of the most recent stories."""
        self.cache = None

    def find_unknown_words(self, story: Story) -> list[str]:
        """Words of a story that the model was not taught, each once; none for a model of open vocabulary."""
        if self.known_words is None:
            return []
        words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", story.text)
        return list(dict.fromkeys(word for word in words if word.lower() not in self.known_words))

    # ---- tokens ----

    def tokenize(self, story: Story) -> StoryTokens:
        """Tokenizes a story, once per story. Token ids that another vocabulary gave to a text are ignored."""
        if story not in self._tokenized:
            segments = (self._checked(s) if isinstance(s, TextSegment) and s.token_ids else s for s in story.segments)
            tokens = tokenize_story(replace(story, segments=tuple(segments)), self.tokenizer, self.config.llm)
            self._tokenized[story] = tokens
        return self._tokenized[story]

    def _checked(self, text: TextSegment) -> TextSegment:
        """The text, without its ids if they are not this tokenizer's for it."""
        if self.tokenizer is None or not text.text:
            return text
        is_known = max(text.token_ids) < self.tokenizer.vocab_size
        return text if is_known and self.decode(text.token_ids) == text.text else TextSegment(text.text)

    def decode(self, token_ids) -> str:
        return self.tokenizer.decode(token_ids).strip() if self.tokenizer is not None else ""

    def truncate_to_context(
        self,
        story: Story,
        reserve_tokens: int,
        drop_oldest: bool | None = False,
        label: str = "The story",
        reserve_images: int = 0,
    ) -> Story:
        """The story if it leaves `reserve_tokens` of the LLM's context free, else without its oldest panels.

        Args:
            drop_oldest: Whether panels may be dropped; None forbids it too, and the error does not name the switch.

        Raises:
            StoryTooLongError: If the story does not fit and no panel may, or can, be dropped.
        """
        c = self.config.llm
        max_images = c.mmfs.max_num_image_per_seq - 1  # row 0 of the table stands for an image that is not visible
        while True:
            length, num_images = len(self.tokenize(story)), len(story.images) + reserve_images
            excess = length + reserve_tokens - c.max_position_embeddings
            if excess <= 0 and num_images <= max_images:
                return story
            if not drop_oldest or len(story) <= 1:
                if num_images > max_images:
                    fault = (
                        f"has {num_images} images, {num_images - max_images} more than the {max_images} that the LLM "
                        "can tell apart"
                    )
                else:
                    fault = (
                        f"needs {length + reserve_tokens} tokens ({length} of the story and up to {reserve_tokens} new)"
                        f", {excess} more than the LLM's context of {c.max_position_embeddings}"
                    )
                advice = "make it shorter"
                if drop_oldest is False:
                    advice += ", or let its oldest panels be dropped (drop_oldest, --drop-oldest-panels)"
                raise StoryTooLongError(f"{label} {fault}; {advice}.")
            story = story.drop_oldest_panel()

    def check_context_length(
        self, story: Story, plan, config: TextGenerationConfig | None = None, drop_oldest: bool = False
    ) -> None:
        """Raises StoryTooLongError if the LLM cannot hold a story that is extended as planned."""
        config = config or self.generation_config.text
        steps = [step for panel in plan for step in panel]
        for step in steps:
            if not isinstance(step, (TextSegment, Step)):
                raise SettingError(f"A step must be Step.TEXT, Step.IMAGE or a TextSegment, not {step!r}.")
        num_images = steps.count(Step.IMAGE)
        lengths = [len(self.tokenize(Story((text,)))) for text in steps if isinstance(text, TextSegment)]
        reserve = steps.count(Step.TEXT) * config.max_new_tokens + sum(lengths)
        reserve += num_images * (self.config.llm.num_img_token + self.config.llm.special_tokens.image_length)
        if drop_oldest:  # panels are dropped before each step; only the longest step must fit
            reserve, num_images = max(config.max_new_tokens, *lengths, 0), 0
        self.truncate_to_context(story, reserve, drop_oldest, f"A story with {len(plan)} more panels", num_images)

    # ---- prefill ----

    def prefill(self, story: Story, on_progress: Callable[[int, int], object] | None = None) -> None:
        """Runs the LLM on a story ahead of its use, piece by piece, and caches the result.

        Pieces depend on the story alone: `PIECE` tokens of a given text, each token of a generated text, an image after
        its start-of-image token. So a resumed story has bit-identical states to one that was never interrupted.

        Args:
            on_progress: Called with the number of cached tokens and of all; if it raises, finished pieces stay cached.
        """
        self._require_features(story)
        num_img_token, tokens = self.config.llm.num_img_token, self.tokenize(story)
        starts = (0, *tokens.segment_ends)
        pieces = [_pieces(*item) for item in zip(story.segments, starts, tokens.segment_ends)]
        cached = 0 if self.cache is None else self.cache.common_prefix_length(tokens, num_img_token)
        cached = max((end for ends in pieces for end in ends if end <= cached), default=0)
        if cached:
            self.cache.truncate(cached)
        else:
            self.cache = None
        for end in (end for ends in pieces for end in ends if end > cached):
            self._prefill([tokens.prefix(end, num_img_token)])
            if on_progress is not None:
                on_progress(end, len(tokens))

    def _prefill(self, batch: list[StoryTokens]) -> PrefixCache:
        cached, self.cache = self.cache, None  # after an error the old cache is in no known state
        if cached is not None:
            cached = cached.match(batch, self.config.llm.num_img_token)
        self.cache = prefill(self.llm, batch, cached)
        return self.cache

    def _prefill_stories(self, stories: Sequence[Story]) -> None:
        """One story is prefilled in its pieces; several are prefilled together, when they are used."""
        for story in stories:
            self._require_features(story)
        if len(stories) == 1:
            self.prefill(stories[0])

    @staticmethod
    def _require_features(story: Story) -> None:
        if any(image.features is None for image in story.images):
            raise StoryError("An image of the story has no features; encode it first.")

    # ---- generation ----

    def generate(
        self,
        stories: Sequence[Story],
        config: TextGenerationConfig | None = None,
        num_outputs: int = 1,
        on_token: Callable[[int, str], object] | None = None,
        drop_oldest: bool | None = False,
        seeds: Sequence[int] | None = None,
    ) -> list[list[GeneratedText]]:
        """Continues each story with `num_outputs` texts, up to where the model ends them or requests an image.

        Args:
            config: None for the model's own (`generation_config`).
            on_token: Called with the number of the text (num_outputs * story + k) and the text so far; a true result
                ends that text.
            seeds: Of each story's first text, instead of `config.seed` for all.
        """
        config = config or self.generation_config.text
        stories = [self.truncate_to_context(story, config.max_new_tokens, drop_oldest) for story in stories]
        self._prefill_stories(stories)
        cache = self._prefill([self.tokenize(story) for story in stories])
        callback = on_token and (lambda i, ids: on_token(i, self.decode(ids)))
        texts = generate(self.llm, cache, config, num_outputs, callback, seeds)
        return [[replace(text, text=self.decode(text.tokens)) for text in row] for row in texts]

    def generate_text(
        self,
        story: Story,
        config: TextGenerationConfig | None = None,
        on_token: Callable[[str], object] | None = None,
        drop_oldest: bool | None = False,
    ) -> GeneratedText:
        """Continues one story with text (see `generate`)."""
        return self.generate([story], config, 1, on_token and (lambda _, text: on_token(text)), drop_oldest)[0][0]

    def context_features(self, stories: Sequence[Story]) -> list[torch.Tensor]:
        """Returns the hidden states `(L, hidden_size)` of each story, up to and including a start-of-image token."""
        self._prefill_stories(stories)
        soi = self.config.llm.special_tokens.soi
        batch = [self.tokenize(story) for story in stories]
        batch = [replace(tokens, input_ids=(*tokens.input_ids, soi)) for tokens in batch]
        return list(self._prefill(batch).hidden_states)

    def fork(
        self, stories: Sequence[Story], rows: Sequence[int] | None = None
    ) -> tuple[KVCache, LlamaImageValues, torch.Tensor]:
        """A cache that continues stories, their projected images, and bool `(N, P)` which of these are there.

        What is written to it leaves the generator's own cache as it is.

        Args:
            rows: The story of each row; None for one row a story.
        """
        self._prefill_stories(stories)
        cache = self._prefill([self.tokenize(story) for story in stories])
        fork = cache.fork(list(range(len(stories)) if rows is None else rows))
        image_mask = torch.zeros(len(fork.input_ids), fork.image_values.num_images, dtype=torch.bool)
        for row, visible in zip(image_mask, fork.visible_images):
            row[: len(visible)] = torch.tensor(visible, dtype=torch.bool)
        return fork.kv_cache, fork.image_values, image_mask.to(self.llm.device)

    def score(
        self,
        story: Story,
        options: Sequence[str | list[int]],
        on_progress: Callable[[int, int], object] | None = None,
    ) -> list[float]:
        """Summed log-probability of each option after a story, in the order given.

        Args:
            on_progress: Called with the number of scored options and the number of all.
        """
        if not options:
            raise StoryError("There are no options to score; give at least one.")
        tokenizer = self.tokenizer
        encoded = [
            require_tokenizer(tokenizer).encode(o, after_text=True) if isinstance(o, str) else list(o) for o in options
        ]
        if not all(encoded):
            raise StoryError("An option must not be empty.")
        story = self.truncate_to_context(story, max(map(len, encoded)), None)
        self._prefill_stories([story])
        return score_options(self.llm, self._prefill([self.tokenize(story)]), encoded, on_progress)

    # ---- questions ----

    def answer(
        self,
        story: Story,
        question: str,
        config: TextGenerationConfig | None = None,
        prompt: str | None = None,
        on_token=None,
    ) -> GeneratedText:
        """Answers a question about a story's images; `prompt` has {story} and {question}, None is the model's own."""
        story = self.question_story(story, question, prompt)
        return self.generate_text(story, config or ANSWER_CONFIG, on_token, None)

    def question_story(self, story: Story, question: str, prompt: str | None = None) -> Story:
        """Returns a story inside the prompt of a question, for `generate_text` or `score` to continue."""
        if not question.strip():
            raise StoryError("A question must not be empty.")
        return prompted(prompt or self.config.prompts["ask"], story, question=question.strip())

    def caption(
        self, story: Story, config: TextGenerationConfig | None = None, num_outputs: int = 1, prompt: str | None = None
    ) -> list[GeneratedText]:
        """Writes `num_outputs` captions of a story's last image; the default is the reference's five beams."""
        config = config or replace(CAPTION_CONFIG, num_beams=max(5, num_outputs))
        return self.generate([self.caption_story(story, prompt)], config, num_outputs, drop_oldest=None)[0]

    def caption_story(self, story: Story, prompt: str | None = None) -> Story:
        """Returns a story inside the prompt of a caption, for `generate` to continue."""
        if not story.images:
            raise StoryError("There is no image to caption; add one to the story.")
        return prompted(prompt or self.config.prompts["caption"], story)

    def caption_scores(self, images: Sequence[ImageSegment], text: str, batch_size: int = 16) -> list[float]:
        """Summed log-probability of a text as the caption of each image (CogView, 2105.13290, section 3.2).

        The cache keeps what it has.

        Args:
            batch_size: How many images share a pass of the LLM; memory grows with it, results do not change.
        """
        option = require_tokenizer(self.tokenizer).encode(text, after_text=True)
        if not option:
            raise StoryError("A caption to score must not be empty.")
        stories = [self.caption_story(Story.of(image)) for image in images]
        for story in stories:
            self._require_features(story)
            self.truncate_to_context(story, len(option), None)
        scores: list[float] = []
        for start in range(0, len(stories), batch_size):
            batch = stories[start : start + batch_size]
            scores += score_after_each(self.llm, prefill(self.llm, [self.tokenize(s) for s in batch]), option)
        return scores

    def rank(
        self, story: Story, options: Sequence[str], question: str = "", prompt: str | None = None, on_progress=None
    ) -> list[RankedOption]:
        """Ranks options, likeliest first, as the next text of a story, or as answers to a question about it."""
        story = self.question_story(story, question, prompt) if question.strip() else story
        scores = self.score(story, options, on_progress)
        ranked = [RankedOption(text, log_prob) for text, log_prob in zip(options, scores)]
        return sorted(ranked, key=lambda option: -option.log_prob)

    # ---- openings ----

    def resolve_image_first(self, story: Story, image_first: bool | None = None) -> bool:
        """Whether panels have their image before their text.

        Decided by `image_first`, else by the story, else by the model, else by the order of the opening.
        """
        for choice in (image_first, story.image_first, self.generation_config.image_first):
            if choice is not None:
                return choice
        return story.opens_image_first

    def introduce(self, story: Story) -> Story:
        """Returns the story with a text that says who is in its only image, unless it has one (`vqa.introduce`)."""
        return introduce(self, story)

    def introduce_named(self, story: Story) -> Story:
        """Puts descriptions of the characters whom its last text names before a story (`vqa.introduce_named`)."""
        return introduce_named(self, story)


PIECE = 256  # tokens of a given text that are prefilled at once: bounds memory, and how long Cancel takes
ANSWER_CONFIG = TextGenerationConfig(max_new_tokens=30, min_new_tokens=1, do_sample=False, repetition_penalty=1.0)
CAPTION_CONFIG = TextGenerationConfig(max_new_tokens=30, min_new_tokens=8, repetition_penalty=1.0, num_beams=5)


def _pieces(segment: TextSegment | ImageSegment, start: int, end: int) -> list[int]:
    """Ends of the pieces in which a segment is prefilled; empty if it was joined to the segment before."""
    if start == end:
        return []
    if isinstance(segment, ImageSegment):
        return [max(start, 1) + 1, end]
    if segment.token_ids is None:
        return [*range(start + PIECE, end, PIECE), end]
    return list(range(start + 1, end + 1))
