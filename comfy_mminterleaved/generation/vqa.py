"""Prompts around stories, and the introduction of a character by completing them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ..stories.story import Story, TextSegment
from .config import Introduction, TextGenerationConfig
from .ranking import has_panel_text, look_of

if TYPE_CHECKING:
    from .text import TextGenerator

MAX_INTRODUCED = 2  # by one image


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
    """Puts sentences before a story that describe the characters whom its last text names and no text describes.

    Each is described from the first image whose text has the name. The generator's cache keeps what it has.
    """
    c = generator.generation_config.introduction
    if c is None or not has_panel_text(story):
        return story
    panels = replace(story, image_first=False).panels()
    missing = {name for name in _names(c, panels[-1].text) if look_of(name, story.text) is None}
    if not missing:
        return story
    cache, introductions = generator.cache, []
    generator.clear_cache()
    try:
        for panel in panels:
            names = _names(c, panel.text)[:MAX_INTRODUCED]
            if panel.image is not None and missing.intersection(names):
                described = {name: look_of(name, story.text) for name in names}
                known = {name: f"{c.prompt.format(name=name)} {look}." for name, look in described.items() if look}
                for sentence in _sentences(generator, Story((panel.image,)), names, known):
                    name = next((name for name in missing if look_of(name, sentence) is not None), None)
                    if name is not None and sentence.endswith("."):
                        introductions.append(sentence)
                        missing.remove(name)
    finally:
        generator.cache = cache
    return replace(story, segments=(TextSegment(" ".join(introductions)), *story.segments)) if introductions else story


def _names(c: Introduction, text: str) -> list[str]:
    """The names in a text that the model knows, each once."""
    return list(dict.fromkeys(word for word in re.findall(r"\w+", text) if word in c.names))


def _sentences(generator: TextGenerator, image: Story, names: list[str], known: dict[str, str]) -> list[str]:
    """A sentence about each character in an image; `known` ones are not generated again."""
    prompt, sentences = generator.generation_config.introduction.prompt, []
    for name in names:
        sentence = known.get(name) or _complete(generator, image, sentences, prompt.format(name=name))
        if sentence.replace(name, names[0], 1) not in sentences:  # the same description twice is one character
            sentences.append(sentence)
    return sentences


def _introduction(generator: TextGenerator, image: Story, described: str) -> str:
    """The sentences of `introduce`; empty if the story has them, or the model ends none."""
    c = generator.generation_config.introduction
    names = _names(c, described)[:MAX_INTRODUCED] or list(c.names[:1])
    if any(c.prompt.format(name=name) in described for name in names):
        return ""
    sentences = _sentences(generator, image, names, {})
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
