"""Writes stories with any chat model: a local one, or one behind a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import SettingError, StoryError
from ..generation.config import GeneratedText, RankedOption, TextGenerationConfig
from ..stories.story import ImageSegment, Story, TextSegment
from .answers import parse_answer, parse_panel, parse_ranking, parse_script, whole_sentences
from .prompts import Parts, Prompts, load_prompts, number_of_panels

OnText = Callable[[str], object]  # the answer so far; what it raises ends the answer

WRITING = TextGenerationConfig(
    max_new_tokens=160, min_new_tokens=1, temperature=0.8, top_k=0, top_p=0.95, repetition_penalty=1.0
)
ANSWERING = TextGenerationConfig(max_new_tokens=80, min_new_tokens=1, do_sample=False, repetition_penalty=1.0)
ATTEMPTS = 3  # at a text, before a writer that gives none is an error
PANELS_AT_ONCE = 16  # that a script is asked for: an answer must fit the model's context


class ChatModel(Protocol):
    """A language model that answers a prompt of texts and images.

    One that also has `score`, as `local.LocalChat` does, ranks answers by their likelihood.

    Args:
        label: What messages call it.
        sees_images: Whether prompts may have images.
    """

    label: str
    sees_images: bool

    def chat(self, parts: Parts, config: TextGenerationConfig, on_text: OnText | None = None) -> GeneratedText: ...


@dataclass(frozen=True)
class ChatWriter:
    """A `storyteller.Writer`: asks a chat model for the next text, or for all texts of a story.

    Args:
        idea, style: What the story is to be about, and how its images look; for the prompts.
        panels: How many panels the story is to have; None leaves it open.
        heroes: A story that says, and shows, who is in it; no panel of its own.
    """

    model: ChatModel
    prompts: Prompts = field(default_factory=load_prompts)
    config: TextGenerationConfig = WRITING
    idea: str = ""
    style: str = ""
    panels: int | None = None
    heroes: Story | None = None

    @property
    def sees_images(self) -> bool:
        return self.model.sees_images

    def write(self, story: Story, seed: int, on_text: OnText | None = None) -> TextSegment:
        """The text of the next panel; raises StoryError if the model gives none."""
        number = number_of_panels(story) + 1
        total = "several" if self.panels is None else str(max(number, self.panels))
        parts = self._prompt("panel", story, panel=str(number), panels=total, idea=self.idea, style=self.style)
        for attempt in range(ATTEMPTS):
            answer = self._chat(parts, self.config.max_new_tokens, seed, attempt, on_text)
            text = parse_panel(answer.text, number)
            if text:
                return TextSegment(whole_sentences(text) if answer.finish_reason == "length" else text)
        raise self._no_text(f"panel {number}")

    def write_script(self, story: Story, panels: int, seed: int, on_text: OnText | None = None) -> list[str]:
        """The texts of the next panels, exactly as many as asked for; raises StoryError if the model gives too few.

        They are asked for together; those that an answer lacks are asked for again.
        """
        texts: list[str] = []
        known = {segment.text.strip() for segment in story.segments if isinstance(segment, TextSegment)}
        total, failures, attempt = number_of_panels(story) + panels, 0, 0
        while len(texts) < panels:
            so_far = Story((*story.segments, *map(TextSegment, texts)))
            number = total - panels + len(texts) + 1
            count = min(PANELS_AT_ONCE, panels - len(texts))
            numbers = {"panel": str(number), "last": str(number + count - 1), "panels": str(total)}
            parts = self._prompt("script", so_far, **numbers, idea=self.idea, style=self.style)
            written = "".join(f"{text}\n\n" for text in texts)
            answer = self._chat(
                parts,
                self.config.max_new_tokens * count,
                seed,
                attempt,
                on_text and (lambda text, written=written: on_text(written + text)),
            )
            new = parse_script(answer.text, number)
            if failures < ATTEMPTS - 1:  # a writer that says the same again is asked again, but not for ever
                new = [text for n, text in enumerate(new) if text not in (*known, *texts, *new[:n])]
            if new and answer.finish_reason == "length":
                new[-1] = whole_sentences(new[-1])
            failures, attempt = 0 if new else failures + 1, attempt + 1
            if failures == ATTEMPTS:
                raise self._no_text(f"panel {number} of {total}")
            texts += new
        return texts[:panels]

    def answer(self, story: Story, question: str, max_tokens: int, on_text: OnText | None = None) -> str:
        """The answer to a question about a story; raises SettingError for images alone if the model does not see."""
        if not self.sees_images and not story.text.strip():
            raise SettingError(f"{self.model.label} does not see images, and the story has no text; use one that sees.")
        return self._answer(self._prompt("question", story, question=question), max_tokens, on_text)

    def caption(self, image, max_tokens: int, on_text: OnText | None = None) -> str:
        """One sentence about an image, anything that `ImageSegment.of` takes.

        Raises:
            SettingError: If the model does not see.
        """
        if not self.sees_images:
            raise SettingError(f"{self.model.label} does not see images; use a vision-language model to describe them.")
        parts = self.prompts.parts("caption", Story.of(ImageSegment.of(image)))
        return self._answer(parts, max_tokens, on_text)

    def _answer(self, parts: Parts, max_tokens: int, on_text: OnText | None) -> str:
        config = dataclasses.replace(ANSWERING, max_new_tokens=max_tokens)
        text = parse_answer(self.model.chat(parts, config, on_text).text)
        if not text:
            raise StoryError(
                f"{self.model.label} gave no answer in {max_tokens} tokens; if it thinks first, raise max_tokens or "
                "turn its thinking off."
            )
        return text

    def rank(
        self, story: Story, options: Sequence[str], question: str = "", on_text: OnText | None = None
    ) -> list[RankedOption]:
        """Options with the best first: by their likelihood as an answer if the model scores, else as it orders them.

        Then `log_prob` is 0, -1, -2, ...; raises StoryError if its answer names none of them.
        """
        if not options:
            raise StoryError("There are no options to rank; give at least one.")
        if hasattr(self.model, "score"):
            parts = self._prompt("question", story, question=question or "What comes next?")
            ranked = zip(options, self.model.score(parts, options, on_text))
            return sorted((RankedOption(*pair) for pair in ranked), key=lambda option: -option.log_prob)
        listed = "\n".join(f"{number}. {option}" for number, option in enumerate(options, 1))
        parts = self._prompt("rank", story, question=question, options=listed)
        config = dataclasses.replace(ANSWERING, max_new_tokens=max(80, 4 * len(options)))
        answer = self.model.chat(parts, config, on_text)
        order = parse_ranking(answer.text, len(options))
        return [RankedOption(options[number], -float(place)) for place, number in enumerate(order)]

    def _prompt(self, name: str, story: Story, **values: str) -> Parts:
        parts = self.prompts.parts(name, story, self.heroes, **values)
        return parts if self.sees_images else ["".join(part for part in parts if isinstance(part, str))]

    def _chat(self, parts: Parts, max_tokens: int, seed: int, attempt: int, on_text) -> GeneratedText:
        # Another attempt needs another seed, far from those of other panels.
        config = dataclasses.replace(self.config, max_new_tokens=max_tokens, seed=(seed + attempt * 1_000_003) % 2**63)
        return self.model.chat(parts, config, on_text)

    def _no_text(self, label: str) -> StoryError:
        return StoryError(
            f"{self.model.label} wrote no text for {label} in {ATTEMPTS} attempts of {self.config.max_new_tokens} "
            "tokens; if it thinks first, raise max_tokens or turn its thinking off."
        )
