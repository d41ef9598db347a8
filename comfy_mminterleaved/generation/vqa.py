"""Prompts around stories, and the introduction of a character by completing them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ..stories.story import Story, TextSegment
from .config import Introduction, TextGenerationConfig
from .ranking import has_panel_text

if TYPE_CHECKING:
    from .text import TextGenerator


def prompted(prompt: str, story: Story, **values: str) -> Story:
    """A story inside a prompt: `{story}` is where its segments go, other fields come from `values`."""
    head, _, tail = prompt.partition("{story}")
    head, tail = (part.format(**values).strip() for part in (head, tail))
    return Story.of(head).add(*story.segments, tail)


def introduce(generator: TextGenerator, story: Story) -> Story:
    """Returns the story with a text that says who is in its only image, unless it has one.

    A model whose stories introduce their characters (`GenerationConfig.introduction`) draws an introduced one the same
    in every panel, whatever the image was. The sentence is put before the text of the image's panel. If that text holds
    words that the model does not know, or there is none, a sentence about the scene follows. Other models generate the
    text of an image that has none, for stories with the text first.
    """
    panels = story.panel_segments()
    index = next((i for i, (_, image) in enumerate(panels) if image is not None), None)
    if len(story.images) != 1 or any(isinstance(s, TextSegment) and s.token_ids for s in story.segments):
        return story
    texts, image = panels[index]
    described = " ".join(text.text for segments, _ in panels for text in segments)
    if generator.generation_config.introduction is not None:
        text = _introduction(generator, Story((image,)), described)
    elif not texts and not story.image_first:
        config = replace(generator.generation_config.text, do_sample=False, num_beams=1)
        text = generator.generate_text(Story((image,)), config).text
    else:
        return story
    generator.clear_cache()
    if not text:
        return story
    panels[index] = [TextSegment(text), *texts], image
    return Story.from_panels(panels, story.is_image_first)


def introduce_named(generator: TextGenerator, story: Story) -> Story:
    """Returns the story behind sentences about those whom its last text names and whom it shows, but does not describe.

    Each is introduced by the first image whose text has the name. The generator's cache keeps what it has.
    """
    c = generator.generation_config.introduction
    if c is None or not has_panel_text(story):
        return story
    described = story.text
    missing = {n for n in _names(c, story.panels()[-1].text) if c.prompt.format(name=n) not in described}
    cache, introductions = generator.cache, []
    generator.clear_cache()
    for panel in story.panels():
        names = missing.intersection(_names(c, panel.text))
        if panel.image is not None and names:
            introductions.append(_introduction(generator, Story((panel.image,)), panel.text))
            missing -= names
    generator.cache = cache
    text = " ".join(filter(None, introductions))
    return replace(story, segments=(TextSegment(text), *story.segments)) if text else story


def _names(c: Introduction, text: str) -> list[str]:
    """The names in a text that the model knows, each once."""
    return list(dict.fromkeys(word for word in re.findall(r"\w+", text) if word in c.names))


def _introduction(generator: TextGenerator, image: Story, described: str) -> str:
    """The sentences of `introduce`; empty if the story has them, or the model ends none."""
    c = generator.generation_config.introduction
    names = _names(c, described)[:2] or list(c.names[:1])
    if any(c.prompt.format(name=name) in described for name in names):
        return ""
    sentences: list[str] = []
    for name in names:
        sentence = _complete(generator, image, sentences, c.prompt.format(name=name))
        if sentence.replace(name, names[0], 1) not in sentences:  # the same description twice is one character
            sentences.append(sentence)
    if len(names) == 1 and (not described or generator.find_unknown_words(Story.of(described))):
        prompts = [prompt.format(name=names[0]) for prompt in c.scene_prompts]
        scores = generator.score(image.add(" ".join(sentences)), prompts)
        sentences.append(_complete(generator, image, sentences, prompts[scores.index(max(scores))]))
    return " ".join(sentences) if all(s.endswith(".") for s in sentences) else ""


def _complete(generator: TextGenerator, image: Story, sentences: list[str], prompt: str) -> str:
    """The likeliest sentence that begins with `prompt`, after other sentences about the image."""
    greedy = TextGenerationConfig(max_new_tokens=40, min_new_tokens=1, do_sample=False, repetition_penalty=1.0)
    begun = image.add(" ".join([*sentences, prompt]))
    return f"{prompt} {generator.generate_text(begun, greedy, lambda text: text.endswith('.')).text}"
