"""Look inside: which earlier image a drawing took a fact from, by drawing it again without each image.

What an image causes is measured, not read off attention weights: in a model whose feature maps are deep every cell
knows what its image shows, so weights say little (`attention_maps`).
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import SettingError, StoryError
from ..stories.images import to_pil
from ..stories.story import ImageSegment, Story, TextSegment
from .attention_maps import gradient_maps, record_attention, record_calls
from .config import ImageGenerationConfig

if TYPE_CHECKING:
    from .text import TextGenerator

MAX_LOSS = 5.0  # nats of one answer, so that no single one outweighs all others
CHANGED = 1.0  # nats from which on an answer counts as changed


@dataclass(frozen=True)
class Influence:
    """What one earlier image means for a drawing, all from the same noise.

    Args:
        index: Of the image in the story, from 0.
        without: The drawing without it.
        alone: The drawing with it as the only earlier image.
        lost: For each question, by how many nats the drawing's own answer is less likely without the image.
        missing: The same, where it is the only image.
    """

    index: int
    without: ImageSegment
    alone: ImageSegment
    lost: tuple[float, ...]
    missing: tuple[float, ...]

    @property
    def score(self) -> float:
        """Positive if the image is needed and suffices; what is needed only by its place cancels out."""
        return sum(self.lost) - sum(self.missing)

    @property
    def changed(self) -> tuple[int, ...]:
        """Questions whose answer changes without the image, the most changed first."""
        order = sorted(range(len(self.lost)), key=lambda k: -self.lost[k])
        return tuple(k for k in order if self.lost[k] >= CHANGED)


@dataclass(frozen=True)
class Inspection:
    """A drawing, its answers, and what each earlier image means for it."""

    drawn: ImageSegment
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    influences: tuple[Influence, ...]

    @property
    def source(self) -> Influence:
        """The image that the drawing took most from."""
        return max(self.influences, key=lambda each: each.score)

    @property
    def verdict(self) -> str:
        """One sentence on where the answers come from."""
        needed = [each for each in self.influences if each.changed]
        enough = [each.index + 1 for each in self.influences if sum(each.missing) < CHANGED]
        if needed:
            source, number = self.source, self.source.index + 1
            if source.changed and sum(source.missing[k] for k in source.changed) >= CHANGED:
                return f"It changes most without image {number}, which alone does not bring it: it comes of several."
            return f"It takes most from image {number}."
        if len(enough) > 1:
            return f"No image is needed by itself: each of images {', '.join(map(str, enough))} alone brings the same."
        return "No answer depends on an earlier image: the text says it all."

    def to_text(self) -> str:
        """A few lines: the source, and for each image what changes without it."""
        asked = "; ".join(f"{q} {a}" for q, a in zip(self.questions, self.answers))
        lines = [f"In the drawing: {asked}", self.verdict]
        for each in self.influences:
            changed = ", ".join(f"{self.questions[k]} ({each.lost[k]:.1f} nats)" for k in each.changed)
            lines.append(
                f"Without image {each.index + 1} " + (f"changes: {changed}" if changed else "nothing changes.")
            )
        return "\n".join([*lines, CAVEAT])


CAVEAT = (
    "Which image gave a fact can be measured so; where in that image it is cannot, for every cell of its feature maps "
    "knows what the whole image shows."
)


def without_images(story: Story, numbers: Sequence[int]) -> Story:
    """The story without some of its images, counted from 0; their texts stay."""
    kept, index = [], -1
    for segment in story.segments:
        index += isinstance(segment, ImageSegment)
        if not (isinstance(segment, ImageSegment) and index in numbers):
            kept.append(segment)
    return Story(tuple(kept), story.image_first)


def check_inspectable(story: Story, questions: Sequence[str]) -> None:
    """Raises before anything is drawn."""
    if not story.images:
        raise StoryError("The story has no earlier images to look at; add one before the panel's text.")
    if not story.segments or not isinstance(story.segments[-1], TextSegment):
        raise StoryError("The story does not end with a text; add the text of the panel to look inside of.")
    if not [question for question in questions if question.strip()]:
        raise SettingError("There are no questions to ask about the drawings; give at least one.")


def variants(story: Story) -> list[Story]:
    """What is drawn: the whole story; without each image; with each image alone."""
    count = len(story.images)
    if count == 1:
        return [story, without_images(story, [0])]
    without = [without_images(story, [k]) for k in range(count)]
    alone = [without_images(story, [n for n in range(count) if n != k]) for k in range(count)]
    return [story, *without, *alone]


def compare(generator: TextGenerator, drawn: Sequence[ImageSegment], questions: Sequence[str]) -> Inspection:
    """Asks the model about drawings of `variants`, whose images are encoded."""
    questions = tuple(question.strip() for question in questions if question.strip())
    full, *others = drawn
    answers, base = [], []
    for question in questions:
        answers.append(generator.answer(Story.of(full), question).text)
        base.append(_score(generator, full, question, answers[-1]))

    def loss(image: ImageSegment) -> tuple[float, ...]:
        scores = (_score(generator, image, q, a) for q, a in zip(questions, answers))
        return tuple(min(MAX_LOSS, max(0.0, b - s)) for b, s in zip(base, scores))

    if len(others) == 1:  # a single image: alone it is the whole story
        influences = (Influence(0, others[0], full, loss(others[0]), (0.0,) * len(questions)),)
    else:
        half = len(others) // 2
        influences = tuple(
            Influence(k, without, alone, loss(without), loss(alone))
            for k, (without, alone) in enumerate(zip(others[:half], others[half:]))
        )
    generator.clear_cache()
    return Inspection(full, questions, tuple(answers), influences)


def _score(generator: TextGenerator, image: ImageSegment, question: str, answer: str) -> float:
    if not answer:
        return 0.0
    return generator.score(generator.question_story(Story.of(image), question), [answer])[0]


def inspect(
    pipeline,
    story: Story,
    questions: Sequence[str],
    config: ImageGenerationConfig | None = None,
    on_drawn: Callable[[int, int], object] | None = None,
) -> Inspection:
    """Draws a story's next panel as it is, without each earlier image, and with each alone; and compares.

    For n images it takes 2n + 1 drawings, from the same noise. The source of a fact is the image without which it is
    lost and which alone brings it.

    Args:
        pipeline: An `MMInterleavedPipeline`.
        story: Ends with the text of the panel to draw.
        questions: What to ask about the drawings, such as "Which colour is the coat?".
        on_drawn: Called with the number of drawings done, and of all.

    Raises:
        StoryError: For a story without images, or that does not end with a text.
        SettingError: For no questions.
    """
    check_inspectable(story, questions)
    config = replace(config or pipeline.generation_config.image, best_of=1, refine=False)
    stories, drawn = variants(pipeline.encode_images(story)), []
    for each in stories:
        drawn.append(pipeline.generate_image(each, config))
        if on_drawn is not None:
            on_drawn(len(drawn), len(stories))
    drawn = pipeline.encode_images(Story.of(*drawn)).images
    return compare(pipeline.placed_text_generator(), drawn, questions)


def report(story: Story, inspection: Inspection, title: str = "Look inside") -> str:
    """An HTML page: the earlier images, the drawing, and what becomes of it without each."""

    def figure(image: ImageSegment, caption: str) -> str:
        return f'<figure><img src="{image.page_url}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'

    source = inspection.source.index if any(each.changed for each in inspection.influences) else None
    rows = []
    for each, image in zip(inspection.influences, story.images):
        changed = ", ".join(inspection.questions[k] for k in each.changed) or "nothing"
        rows.append(
            "<section>"
            + figure(image, f"Image {each.index + 1}" + (", the source" if each.index == source else ""))
            + figure(each.without, f"drawn without it; changes: {changed}")
            + figure(each.alone, "drawn with it alone")
            + "</section>"
        )
    head = "".join(f"<th>{html.escape(question)}</th>" for question in inspection.questions)
    table = [
        f"<tr><td>without image {each.index + 1}</td>" + "".join(f"<td>{v:.1f}</td>" for v in each.lost) + "</tr>"
        for each in inspection.influences
    ]
    answers = "".join(f"<td>{html.escape(answer)}</td>" for answer in inspection.answers)
    return (
        "<!doctype html><html><head><meta charset='utf-8'><title>" + html.escape(title) + "</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "section{display:flex;gap:1rem;flex-wrap:wrap;border-top:1px solid #ddd;padding:1rem 0}"
        "figure{margin:0;width:15rem}img{width:100%;border-radius:.4rem}figcaption{font-size:.85rem;color:#555}"
        "td,th{padding:.2rem .8rem .2rem 0;text-align:left;font-weight:400}th{color:#555}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(story.segments[-1].text)}</p>"
        + figure(inspection.drawn, f"The drawing. {inspection.verdict}")
        + f"<table><tr><th></th>{head}</tr><tr><td>the drawing</td>{answers}</tr>{''.join(table)}</table>"
        f"<p>Numbers say by how many nats the drawing's answer is less likely. {html.escape(CAVEAT)}</p>"
        + "".join(rows)
        + "</body></html>"
    )


def attended(pipeline, story: Story, config: ImageGenerationConfig | None = None):
    """Draws a story's next panel and records what the MMFS blocks do with the earlier images.

    Returns:
        The drawing, its `AttentionMaps`, and the `gradient_maps` of its last step.
    """
    config = replace(config or pipeline.generation_config.image, best_of=1, refine=False)
    story = pipeline.encode_images(story)
    net = pipeline.synchronizer.mmfs_module
    with record_attention(net) as attention, record_calls(net) as calls:
        drawn = pipeline.generate_image(story, config)
    if attention.maps is None:
        raise StoryError("The U-Net attends to no image in this drawing; add one, or raise num_context_images.")
    maps, mask = pipeline.image.context_feature_maps([story], pipeline.image.num_context_images(config))
    return drawn, attention, gradient_maps(net, calls, maps, mask)


def contact_sheet(story: Story, inspection: Inspection, side: int = 192):
    """A PIL image: the drawing, and for each earlier image a row of it, the drawing without it, and with it alone."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font, line = ImageFont.load_default(size=13), 56  # three lines
    rows = [[(inspection.drawn, "the drawing")]]
    for each, image in zip(inspection.influences, story.images):
        changed = ", ".join(inspection.questions[k].rstrip("?") for k in each.changed) or "nothing"
        rows.append([(image, f"image {each.index + 1}"), (each.without, f"without: {changed}"), (each.alone, "alone")])
    gap = 10
    sheet = Image.new("RGB", (3 * (side + gap) + gap, len(rows) * (side + line + gap) + gap), "white")
    canvas = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (image, caption) in enumerate(row):
            left, top = gap + x * (side + gap), gap + y * (side + line + gap)
            sheet.paste(ImageOps.fit(to_pil(image.pixels), (side, side)), (left, top))
            lines = textwrap.wrap(caption, side // 7)[:3]
            canvas.multiline_text((left, top + side + 3), "\n".join(lines), fill="#333", font=font)
    return sheet
