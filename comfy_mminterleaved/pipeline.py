"""MMInterleaved: the four blocks together. Stories in, text and pictures out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .checkpoints import load as checkpoint
from .config import Config
from .errors import CheckpointError, SettingError, StoryError, StoryTooLong
from .generation.config import GenerationConfig, read_generation_config
from .generation.image import Drawing, draw, make_scheduler, picture_multiple
from .generation.prefix_cache import Reading, read
from .generation.text import Sampling, Written, score, write
from .models.mmfs import fold
from .stories.images import preprocess
from .stories.story import Picture, Story, Text, TokenLayout, layout, require
from .stories.storyboard import panel_seeds, plan_panels


@dataclass(frozen=True)
class Choice:
    """An option and its summed log-probability after a story."""

    option: str
    log_probability: float


class MMInterleaved:
    """The model: `load` one, then `tell`, `write`, `draw`, `ask`, `caption`, `choose`.

    What the LLM read last is kept, so that a story that goes on costs only what is new; `forget` lets go of it.
    """

    def __init__(self, config: Config, blocks: dict[str, torch.nn.Module], tokenizer=None):
        self.config, self.tokenizer = config, tokenizer
        self.encoder, self.llm, self.decoder, self.unet, self.vae = (blocks.get(name) for name in checkpoint.BLOCKS)
        self.words: frozenset[str] | None = None
        self.generation = GenerationConfig()
        self._read: Reading | None = None
        self._decoded: dict[tuple[int, ...], str] = {}

    @classmethod
    def load(
        cls,
        source: str | Path = "starter",
        device: str = "auto",
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> MMInterleaved:
        """Loads a checkpoint folder of either layout, or a model that comes with the package.

        Args:
            source: a folder; "starter", the small model that ships with the package and knows one picture-book world;
                or "untrained", the same code with random weights, for trying out everything else.
            device: "auto" takes CUDA if there is one.
            dtype: None for float32 on the CPU and float16 on CUDA.
            compile: have `torch.compile` make the U-Net's blocks and the LLM's token step. The first picture and the
                first text wait for it, so it pays for many; it needs a compiler (Triton on CUDA, C++ on the CPU).

        Raises:
            CheckpointError: naming everything that is missing, unexpected or of the wrong shape.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with _sentence(device):
            torch.empty(0, device=device)
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
        folder = checkpoint.model_folder(source)
        if folder is None:
            model = untrained()
            for block in (model.encoder, model.llm, model.decoder, model.unet):
                torch.nn.Module.to(block, device, dtype)  # diffusers' own `to` warns of every cast
            model.vae.to(device)
            return model.compiled() if compile else model
        config, blocks = checkpoint.load_blocks(folder, dtype, device)
        model = cls(config, blocks, checkpoint.read_tokenizer(folder, config))
        model.words = checkpoint.read_words(folder)
        model.generation = read_generation_config(folder)
        return model.compiled() if compile else model

    def compiled(self, **options) -> MMInterleaved:
        """This model with `torch.compile` (and its `options`) at the U-Net's blocks and the LLM's token step."""
        self.unet.compile_repeated_blocks(**options)
        self.llm.compile_step(**options)
        return self

    def unknown_words(self, story: Story) -> list[str]:
        """Words of a story that the model was not taught, each once; none for a model of open vocabulary."""
        if self.words is None:
            return []
        said = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", story.text)
        return list(dict.fromkeys(word for word in said if word.lower() not in self.words))

    @property
    def device(self) -> torch.device:
        return self.llm.device

    def forget(self) -> None:
        """Frees what was kept of the story read last."""
        self._read = None

    # ---- reading ----

    @torch.no_grad()
    def encode(self, story: Story) -> Story:
        """The same story, its pictures with this model's features; those that have them keep them."""

        def known(picture: Picture) -> bool:
            return picture.features is not None and picture.features.made_by is self.encoder.identity

        pending = {p.key: p for p in story.pictures if not known(p)}
        if not pending:
            return story
        size = self.config.encoder.image_size
        found = {}
        for key, picture in pending.items():  # one at a time: the memory of one, and the same result in any company
            pixels = preprocess(picture.pixels, size).unsqueeze(0).to(self.device, self.llm.soi.dtype)
            found[key] = self.encoder(pixels)[0]
        return story.with_features([p.features if known(p) else found[p.key] for p in story.pictures])

    def layout(self, story: Story) -> TokenLayout:
        """The story as token ids. Ids that another vocabulary gave to a text are left out of account."""
        segments = (self._checked(s) if isinstance(s, Text) and s.tokens else s for s in story.segments)
        return layout(replace(story, segments=tuple(segments)), self.tokenizer, self.config.llm)

    def _checked(self, text: Text) -> Text:
        """The text, without its ids if they are not this tokenizer's for it."""
        if self.tokenizer is None or not text.text:
            return text
        if text.tokens not in self._decoded:
            known = max(text.tokens) < self.tokenizer.vocab_size
            self._decoded[text.tokens] = self._decode(text.tokens) if known else ""
        return text if self._decoded[text.tokens] == text.text else Text(text.text)

    def fit(
        self, story: Story, room: int, drop_oldest: bool = False, what: str = "The story", pictures_to_come: int = 0
    ) -> Story:
        """The story if it leaves `room` tokens of the LLM's context free, else without its oldest panels.

        Raises:
            StoryTooLong: if `drop_oldest` is off, or nothing that is left fits.
        """
        c = self.config.llm
        most = c.max_pictures - 1  # row 0 of the table of relative positions stands for a picture not seen
        while True:
            length, pictures = len(self.layout(story)), len(story.pictures) + pictures_to_come
            over = length + room - c.context_length
            if over <= 0 and pictures <= most:
                return story
            if not drop_oldest or len(story) <= 1:
                if pictures > most:
                    fault = (
                        f"has {pictures} pictures, {pictures - most} more than the {most} that the LLM can tell apart"
                    )
                else:
                    fault = (
                        f"needs {length + room} tokens ({length} to read and up to {room} to come), {over} more than "
                        f"the LLM's context of {c.context_length}"
                    )
                raise StoryTooLong(
                    f"{what} {fault}; make it shorter, or let its oldest panels be dropped "
                    "(drop_oldest, on the command line --drop-oldest-panels)."
                )
            story = story.without_oldest()

    def read(self, story: Story, on_segment: Callable[[int, int], object] | None = None) -> None:
        """Reads a story ahead of its use, segment by segment, and keeps what was read.

        The pieces are always the same: a given text at once, a text of the model's own token by token, a picture after
        its start-of-image token. So a story that is gone on with has the same states, to the bit, as one that was never
        stopped.

        Args:
            on_segment: called with how many segments are read, and how many there are; what it raises ends the reading,
                and what was read until then is kept.
        """
        story = self.encode(story)
        slots, whole = self.config.llm.slots, self.layout(story)
        pieces = [
            self._pieces(story.segments[i], start, end)
            for i, (start, end) in enumerate(zip((0, *whole.segment_ends), whole.segment_ends))
        ]
        held = 0 if self._read is None else self._read.shared(whole, slots)
        held = max((end for ends in pieces for end in ends if end <= held), default=0)
        if held:
            self._read.truncate(max(held, 1))
        else:
            self._read = None
        for count, ends in enumerate(pieces, 1):
            for end in ends:
                if end > held:
                    self._layouts_read([whole.prefix(end, slots)])
            if on_segment is not None:
                on_segment(count, len(story))

    @staticmethod
    def _pieces(segment: Text | Picture, start: int, end: int) -> list[int]:
        """Where the pieces end in which a segment is read; none if it was joined to the one before."""
        if start == end:
            return []
        if isinstance(segment, Picture):
            return [max(start, 1) + 1, end]
        return [end] if segment.tokens is None else list(range(start + 1, end + 1))

    def _prefill(self, stories: list[Story]) -> list[Story]:
        """The stories, encoded; one alone is also read, in its pieces."""
        stories = [self.encode(story) for story in stories]
        if len(stories) == 1:
            self.read(stories[0])
        return stories

    def _layouts_read(self, layouts: list[TokenLayout]) -> Reading:
        before, self._read = self._read, None  # on an error what was kept is in no known state
        self._read = read(self.llm, layouts, before)
        return self._read

    # ---- writing ----

    def write(
        self, story: Story, sampling: Sampling | None = None, on_token=None, drop_oldest: bool = False
    ) -> Written:
        """Continues a story with text, up to where the model ends it or asks for a picture.

        Args:
            sampling: None for the model's own (`generation`).
            on_token: called with the text so far; returning a true value stops the writing.
        """
        return self.write_all([story], sampling, 1, on_token and (lambda _, text: on_token(text)), drop_oldest)[0][0]

    def write_all(
        self,
        stories: list[Story],
        sampling: Sampling | None = None,
        count: int = 1,
        on_token=None,
        drop_oldest: bool = False,
    ) -> list[list[Written]]:
        """`count` texts for each of several stories at once; each as if it was alone.

        Args:
            on_token: called with the number of the text (count * story + k) and the text so far.
        """
        sampling = sampling or self.generation.text
        stories = self._prefill([self.fit(story, sampling.max_new_tokens, drop_oldest) for story in stories])
        reading = self._layouts_read([self.layout(story) for story in stories])
        texts = write(self.llm, reading, sampling, count, on_token and (lambda i, ids: on_token(i, self._decode(ids))))
        return [[replace(written, text=self._decode(written.tokens)) for written in row] for row in texts]

    def _decode(self, tokens) -> str:
        return self.tokenizer.decode(tokens).strip() if self.tokenizer is not None else ""

    # ---- drawing ----

    def draw(
        self,
        story: Story,
        drawing: Drawing | None = None,
        begin: Picture | None = None,
        on_step=None,
        drop_oldest: bool = False,
    ) -> Picture:
        """Draws the picture that comes next in a story.

        Args:
            drawing: None for the model's own settings (`generation`).
            begin: a picture to start from (image to image), with `drawing.denoise`.
            on_step: called with the step, their number, and a function that gives a small preview (1, 3, h, w).
        """
        return self.draw_all([story], drawing, 1, begin and [begin], on_step, drop_oldest)[0][0]

    def draw_all(
        self,
        stories: list[Story],
        drawing: Drawing | None = None,
        count: int = 1,
        begin: list[Picture] | None = None,
        on_step=None,
        drop_oldest: bool = False,
        rows_at_once: int = 8,
        seeds: list[int] | None = None,
    ) -> list[list[Picture]]:
        """`count` pictures for each of several stories; each as if it was alone.

        Args:
            begin: a picture to start from for each story.
            seeds: of each story's first picture, instead of `drawing.seed` for all.
            rows_at_once: how many pictures share a pass of the U-Net; memory grows with it, results do not change.
        """
        drawing = drawing or self.generation.image
        if count < 1:
            raise SettingError(f"The number of pictures must be at least 1, not {count}.")
        firsts = [drawing.seed] * len(stories) if seeds is None else seeds
        if len(firsts) != len(stories):
            raise SettingError(f"Of {len(stories)} stories each needs a seed; there are {len(firsts)} seeds.")
        scheduler, size = self._check_drawing(drawing)
        stories = self._prefill([self.fit(story, 1, drop_oldest) for story in stories])
        contexts = self.contexts(stories)
        with torch.no_grad():
            states = self.decoder.condition(contexts)
        wanted = [(i, first + k) for i, first in enumerate(firsts) for k in range(count)]
        pictures = []
        for start in range(0, len(wanted), rows_at_once):
            rows, row_seeds = map(list, zip(*wanted[start : start + rows_at_once]))
            maps, visible = self.looked_at([stories[i] for i in rows], self._look_back(drawing))
            with torch.no_grad():
                prepared = self.decoder.prepare(maps, visible)
            drawn = draw(
                self.unet,
                self.vae,
                scheduler,
                self.decoder,
                states[rows],
                prepared,
                drawing,
                row_seeds,
                size,
                [begin[i].pixels for i in rows] if begin else None,
                on_step,
            )
            pictures += [Picture(pixels.cpu()) for pixels in drawn]
        return [pictures[i : i + count] for i in range(0, len(pictures), count)]

    def contexts(self, stories: list[Story]) -> list[torch.Tensor]:
        """The LLM's hidden states (L, width) of each encoded story and the start-of-image token behind it."""
        soi = self.config.llm.tokens.soi
        layouts = [self.layout(story) for story in stories]
        layouts = [replace(found, ids=(*found.ids, soi)) for found in layouts]
        return list(self._layouts_read(layouts).hidden)

    def looked_at(self, stories: list[Story], look_back: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Maps (N, P, C, h, w) and visibility (N, P) of the last `look_back` pictures of encoded stories."""
        pictures = [story.pictures[-look_back:] if look_back else () for story in stories]
        most = max(map(len, pictures))
        c, sizes = self.config.decoder, self.config.encoder.map_sizes
        maps = [self.llm.soi.new_zeros(len(stories), most, c.feature_width, size, size) for size in sizes]
        visible = torch.zeros(len(stories), most, dtype=torch.bool, device=self.device)
        for i, row in enumerate(pictures):
            visible[i, : len(row)] = True
            for j, picture in enumerate(row):
                for level, found in zip(maps, picture.features.maps):
                    level[i, j] = found
        return maps, visible

    def _check_drawing(self, drawing: Drawing):
        """The scheduler and size of a drawing; raises SettingError."""
        most = self.config.decoder.max_pictures - 1
        if self._look_back(drawing) > most:
            raise SettingError(f"look_back must be at most {most} for this model, not {drawing.look_back}.")
        scheduler = make_scheduler(drawing.scheduler, self.config.scheduler, drawing.steps)
        return scheduler, self.picture_size(drawing.size)

    def _look_back(self, drawing: Drawing) -> int:
        return self.config.decoder.look_back if drawing.look_back is None else drawing.look_back

    def picture_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """A checked (width, height); raises SettingError."""
        if size is None:
            return (self.config.decoder.picture_size,) * 2
        unit = picture_multiple(self.unet, self.vae)
        if min(size) < unit or any(side % unit for side in size) or max(size) > 4096:
            raise SettingError(f"The picture size {size[0]} x {size[1]} must be in multiples of {unit} px, up to 4096.")
        return tuple(size)

    # ---- stories ----

    def tell(
        self,
        story: Story = Story(),
        panels: int = 3,
        picture_first: bool | None = None,
        sampling: Sampling | None = None,
        drawing: Drawing | None = None,
        seeds: list[int] | None = None,
        on_token=None,
        on_step=None,
        on_segment: Callable[[Story], object] | None = None,
        drop_oldest: bool = False,
        introduce: bool = True,
    ) -> Story:
        """Goes on with a story for `panels` more panels, each text and picture made in view of all before it.

        A story that ends with text has, for text first, the text of its next panel already. Where a text ends is the
        model's own choice; that a picture follows is not.

        Args:
            panels: how many pictures to add.
            picture_first: whether a panel's picture comes before its text; None goes on as the story and the model do
                (`order`). Panels of `story` that have the other order are put into this one.
            seeds: for each panel, added to those of `sampling` and `drawing`; by default the number of the panel in the
                story, from 0, so that a story which is gone on with has the panels of one told at once.
            on_segment: called with the story after each text and each picture.
            introduce: whether a model whose stories introduce their characters says who is in an opening picture
                (`introduce`).

        Returns:
            The whole story. Its texts and pictures are segments of their own, behind those of `story`.
        """
        if panels < 1:
            raise SettingError(f"The number of panels must be at least 1, not {panels}.")
        sampling, drawing = sampling or self.generation.text, drawing or self.generation.image
        opening = story.arrange(self.order(story, picture_first))
        self.check_plan(opening, plan_panels(opening, panels), sampling, drawing, drop_oldest)
        if introduce:
            opening = self.introduce(opening)
            if on_segment is not None and opening.text != story.text:
                on_segment(opening)
        plan = plan_panels(opening, panels)
        if seeds is not None:
            if len(seeds) != panels:
                raise SettingError(f"There must be one seed a panel, {panels}, not {len(seeds)}.")
            seeds = panel_seeds(opening, plan)[: len(plan) - panels] + list(seeds)
        return self.follow(opening, plan, sampling, drawing, seeds, on_token, on_step, on_segment, drop_oldest)

    def order(self, story: Story, image_first: bool | None = None) -> bool:
        """Whether panels have their image before their text: as asked, else as the story says, as the model's stories
        are, or as the opening is."""
        for choice in (image_first, story.image_first, self.generation.image_first):
            if choice is not None:
                return choice
        return story.opens_image_first

    @torch.no_grad()
    def introduce(self, story: Story) -> Story:
        """The story with a text that says who is in its only picture, where nothing in it does.

        A model whose stories introduce their characters (`GenerationConfig.introduction`) draws one that was introduced
        the same in every panel, whatever the picture was. The sentence, and one about the scene if the story's own text
        holds words that the model does not know, stands in the story, before the text of the picture's panel. Other
        models write the text of a picture that has none, for text first.
        """
        panels = story._panel_segments()
        index = next((i for i, (_, picture) in enumerate(panels) if picture is not None), None)
        if len(story.pictures) != 1 or any(isinstance(s, Text) and s.tokens for s in story.segments):
            return story
        texts, picture = panels[index]
        described = " ".join(text.text for part, _ in panels for text in part)
        if self.generation.introduction is not None:
            text = self._introduction(self.encode(Story.of(picture)), described)
        elif not texts and not story.image_first:
            sampling = replace(self.generation.text, sample=False, beams=1)
            text = self.write(Story.of(picture), sampling).text
        else:
            return story
        self.forget()
        if not text:
            return story
        panels[index] = [Text(text), *texts], picture
        return Story.from_panels(panels, story.is_image_first)

    def _introduction(self, shown: Story, described: str) -> str:
        """The sentences of `introduce`; empty if the story has them, or the model ends none."""
        c = self.generation.introduction
        names = [word for word in re.findall(r"\w+", described) if word in c.names]
        names = list(dict.fromkeys(names))[:2] or list(c.names[:1])
        if any(c.prompt.format(name=name) in described for name in names):
            return ""
        sentences = []
        for name in names:
            sentence = self._complete(shown, sentences, c.prompt.format(name=name))
            if sentence.replace(name, names[0], 1) not in sentences:  # one seen twice is one
                sentences.append(sentence)
        if len(names) == 1 and (not described or self.unknown_words(Story.of(described))):
            prompts = [prompt.format(name=names[0]) for prompt in c.scene_prompts]
            scores = self.score(shown.add(" ".join(sentences)), prompts)
            sentences.append(self._complete(shown, sentences, prompts[scores.index(max(scores))]))
        return " ".join(sentences) if all(s.endswith(".") for s in sentences) else ""

    def _complete(self, shown: Story, sentences: list[str], prompt: str) -> str:
        """The likeliest sentence that begins with `prompt`, behind other sentences about what is shown."""
        greedy = Sampling(max_new_tokens=40, min_new_tokens=1, sample=False, repetition_penalty=1.0)
        begun = shown.add(" ".join([*sentences, prompt]))
        return f"{prompt} {self.write(begun, greedy, lambda text: text.endswith('.')).text}"

    def follow(
        self,
        story: Story,
        plan,
        sampling: Sampling | None = None,
        drawing: Drawing | None = None,
        seeds: list[int] | None = None,
        on_token=None,
        on_step=None,
        on_segment: Callable[[Story], object] | None = None,
        drop_oldest: bool = False,
    ) -> Story:
        """`tell` with the panels spelled out.

        Args:
            plan: for each panel its steps in order: "write", "draw", or a Text that is taken as it is.
            seeds: for each entry of the plan; None for `panel_seeds`.
        """
        sampling, drawing = sampling or self.generation.text, drawing or self.generation.image
        seeds = panel_seeds(story, plan) if seeds is None else seeds
        if len(seeds) != len(plan):
            raise SettingError(f"There must be one seed a panel, {len(plan)}, not {len(seeds)}.")
        self.check_plan(story, plan, sampling, drawing, drop_oldest)
        for seed, steps in zip(seeds, plan):
            for step in steps:
                story = self.encode(story)
                if isinstance(step, Text):
                    story = story.add(step)
                elif step == "draw":
                    story = story.add(self.draw(story, drawing.plus(seed), None, on_step, drop_oldest))
                else:
                    written = self.write(story, sampling.plus(seed), on_token, drop_oldest)
                    story = story.add(Text(written.text, written.tokens))
                if on_segment is not None:
                    on_segment(story)
        return story

    def check_plan(
        self,
        story: Story,
        plan,
        sampling: Sampling | None = None,
        drawing: Drawing | None = None,
        drop_oldest: bool = False,
    ) -> None:
        """Raises what `follow` would, before any work: settings that do not fit, or a story that may not."""
        sampling, drawing = sampling or self.generation.text, drawing or self.generation.image
        if max(sampling.seed, drawing.seed) + len(story) + len(plan) >= 2**63:
            raise SettingError(f"The seed {max(sampling.seed, drawing.seed)} is too large for {len(plan)} panels.")
        self._check_drawing(drawing)
        self.check_room(story, plan, sampling, drop_oldest)

    def check_room(self, story: Story, plan, sampling: Sampling | None = None, drop_oldest: bool = False) -> None:
        """Raises StoryTooLong if the LLM cannot hold a story that is gone on with as planned."""
        sampling = sampling or self.generation.text
        steps = [step for panel in plan for step in panel]
        given = [step for step in steps if isinstance(step, Text)]
        for step in steps:
            if not isinstance(step, Text) and step not in ("write", "draw"):
                raise SettingError(f"A step must be 'write', 'draw' or a Text, not {step!r}.")
        draws = steps.count("draw")
        lengths = [len(self.layout(Story((text,)))) for text in given]
        room = steps.count("write") * sampling.max_new_tokens + sum(lengths) + draws * (self.config.llm.slots + 1)
        if drop_oldest:  # each step makes its own room; one alone must fit
            room = max(sampling.max_new_tokens, *lengths, 0)
        self.fit(story, room, drop_oldest, f"A story with {len(plan)} more panels", 0 if drop_oldest else draws)

    # ---- questions ----

    def _prompted(self, prompt: str, story: Story, **values: str) -> Story:
        before, _, after = prompt.partition("{story}")
        filled = [part.format(**values).strip() for part in (before, after)]
        return Story.of(filled[0]).add(*story.segments, filled[1])

    def _question(self, story: Story, question: str, prompt: str | None) -> Story:
        return self._prompted(prompt or self.config.prompts["ask"], story, question=question.strip())

    def ask(
        self, story: Story, question: str, sampling: Sampling | None = None, prompt: str | None = None, on_token=None
    ) -> Written:
        """Answers a question about a story's pictures; `prompt` has {story} and {question}; None is the model's own."""
        if not question.strip():
            raise StoryError("A question must not be empty.")
        sampling = sampling or Sampling(max_new_tokens=30, min_new_tokens=1, sample=False, repetition_penalty=1.0)
        return self.write(self._question(story, question, prompt), sampling, on_token)

    def caption(
        self, picture, sampling: Sampling | None = None, count: int = 1, prompt: str | None = None
    ) -> list[Written]:
        """`count` captions of a picture (or of a story's last); by default the reference's five beams."""
        story = picture if isinstance(picture, Story) else Story.of(Picture.of(picture))
        if not story.pictures:
            raise StoryError("There is no picture to caption; add one to the story.")
        sampling = sampling or Sampling(
            max_new_tokens=30, min_new_tokens=8, repetition_penalty=1.0, beams=max(5, count)
        )
        return self.write_all([self._prompted(prompt or self.config.prompts["caption"], story)], sampling, count)[0]

    def score(self, story: Story, options: list[str | list[int]]) -> list[float]:
        """Summed log-probability of each option behind a story, in the order given."""
        if not options:
            raise StoryError("There are no options to score; give at least one.")
        tokenized = [
            require(self.tokenizer).encode(o, after_text=True) if isinstance(o, str) else list(o) for o in options
        ]
        if not all(tokenized):
            raise StoryError("An option must not be empty.")
        story = self.encode(self.fit(story, max(map(len, tokenized))))
        return score(self.llm, self._layouts_read([self.layout(story)]), tokenized)

    def choose(self, story: Story, options: list[str], question: str = "", prompt: str | None = None) -> list[Choice]:
        """Ranks options, likeliest first, as the next text of a story, or as the answer to a question about it."""
        story = self._question(story, question, prompt) if question.strip() else story
        ranked = [Choice(option, found) for option, found in zip(options, self.score(story, options))]
        return sorted(ranked, key=lambda choice: -choice.log_probability)


@contextlib.contextmanager
def _sentence(device: str):
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CheckpointError(f"The device {device!r} cannot be used: {reason}.") from None


def untrained(seed: int = 0) -> MMInterleaved:
    """A small model with random weights and a vocabulary of bytes: every path of the code, no sense in what it says."""
    config, blocks, tokenizer = untrained_blocks(seed)
    return MMInterleaved(config, {name: fold(block) for name, block in blocks.items()}, tokenizer)


def untrained_blocks(seed: int = 0):
    """Config, blocks as files hold them, and tokenizer of `untrained`.

    Its biases favour letters as often as English has them, and colours that are not all black, so that a page of it can
    be looked at.
    """
    from .config import small
    from .models.init_weights import new_blocks
    from .tokenizer import Tokenizer, byte_level

    config = small()
    blocks = {name: block.eval().requires_grad_(False) for name, block in new_blocks(config, seed).items()}
    limit = config.llm.vocab_size - config.llm.new_tokens
    tokenizer = Tokenizer(byte_level(limit), config.llm.tokens, limit)
    ids = tokenizer.encode(
        "once there was a small bear who lived near the sea. every morning it went out to see what the tide had left: "
        "a shell, some wood, and one day a letter in a bottle, which it could not read but kept for good, of course."
    )
    counts = torch.bincount(torch.tensor(ids), minlength=config.llm.vocab_size)
    blocks["llm"].head.bias.copy_((counts + 1e-3).log())
    last = [layer for layer in blocks["vae"].decoder.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    last.weight.mul_(8.0)
    last.bias.fill_(0.5)
    return config, blocks, tokenizer
