"""Pictures and batches of the picture-book world, the same for the same seed whatever the machine."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from comfy_mminterleaved.config import Config
from comfy_mminterleaved.files import atomic_path
from comfy_mminterleaved.generation.tokens import StoryTokens, tokenize_story
from comfy_mminterleaved.stories.story import ImageSegment, Story
from comfy_mminterleaved.tokenizer import Tokenizer

from . import renderer, world
from .targets import APPEARANCE_HEADS, ATTRIBUTES, COAT_HEADS, IGNORE_INDEX, REFERENTS, attribute_labels

CAPTION, ASK = "Caption:", "Question: {question} Answer:"
STORY_BATCH_PROB = 0.65  # of the batches; the rest are captions and questions on single pictures
FOREGROUND_CROP_PROB = 0.6  # of the quarters that the VAE learns from, such as are about a hero or the prop
# Shares of the batches that are drills of names and texts without images, and their number of sequences.
COREF_DRILL_PROB, TEXT_ONLY_PROB, TEXT_BATCH_SIZE = 0.2, 0.15, 40
FILLERS = sorted(word for word in world.words() if word.title() not in world.NAMES)  # between the names of a drill
SMALL_AREA, MAX_SMALL_WEIGHT = 3400, 3.0  # square px below which a hero weighs more, and how much more at most
IMAGE_FIRST_PROB = 0.15  # of the stories: their pictures are drawn without being told what they show
HISTORY_CORRUPTION_PROB = 0.25  # of a story's images after the first: they are encoded with other heroes


@dataclass(frozen=True)
class Batch:
    """Sequences of N stories that all have P pictures.

    pixels: float (N, P, 3, side, side). ids: (N, L). targets: (N, L), the next token where it is learned, else IGNORE.
    visible: bool (N, L, P). starts: (N, P), where each picture's start-of-image token is. rows: (N, P), the pictures'
    numbers in the cache. shown: (N, P, heads) of `labels.ATTRIBUTES`, what the pictures show. labels: the same, IGNORE
    where a drawing cannot know. meant: (N, P), where the text names one or both of two heroes, a number of `REFERENTS`.
    draws: whether the pictures are to be drawn.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    visible: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor
    shown: torch.Tensor
    labels: torch.Tensor
    meant: torch.Tensor
    draws: bool

    def to(self, device) -> Batch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Batch(**moved, draws=self.draws)


@dataclass(frozen=True)
class TextBatch:
    """Stories of two heroes without their pictures, or drills of names.

    ids: (N, L). meant: (N, L), whom the text that a token belongs to names, a number of `REFERENTS`, or IGNORE.
    """

    ids: torch.Tensor
    meant: torch.Tensor

    def to(self, device) -> TextBatch:
        return TextBatch(**{k: v.to(device) for k, v in vars(self).items()})


def _paint_story(job: tuple[int, bool | None, int]) -> np.ndarray:
    seed, held_out, side = job
    return np.stack([renderer.paint(page.scene, side) for page in world.make_story(seed, held_out)])


class StoryDataset:
    """Stories with their pictures painted once, kept in one memory-mapped file.

    Args:
        folder: where the file is, or will be made; it is kept if it has as many stories already.
        stories: how many.
        held_out: of combinations that training never sees, or of all there are, as in `world.make_story`.
        first: the seed of the first story; the others' follow.
    """

    ABLATIONS = {False: "pictures", True: "held-out", None: "any"}

    def __init__(
        self,
        folder: str | Path,
        stories: int,
        held_out: bool | None = False,
        side: int = renderer.SIDE,
        workers: int = 2,
        first: int = 0,
    ):
        seeds = range(first, first + stories)
        self.stories = [world.make_story(seed, held_out) for seed in seeds]
        self.first = np.cumsum([0, *map(len, self.stories)])
        path = Path(folder) / f"{self.ABLATIONS[held_out]}-{side}-{stories}{f'-from-{first}' if first else ''}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            jobs = [(seed, held_out, side) for seed in seeds]
            with atomic_path(path) as temp_path, ProcessPoolExecutor(workers) as pool:
                pixels = np.lib.format.open_memmap(temp_path, "w+", np.uint8, (int(self.first[-1]), side, side, 3))
                for number, pictures in enumerate(pool.map(_paint_story, jobs, chunksize=16)):
                    pixels[self.first[number] : self.first[number + 1]] = pictures
                pixels.flush()
                del pixels
        self.name, self.pixels = path.stem, np.load(path, mmap_mode="r")
        scenes = [page.scene for story in self.stories for page in story]
        self.labels = torch.tensor([list(attribute_labels(scene).values()) for scene in scenes])  # (pictures, heads)
        self.two = [row for row, scene in enumerate(scenes) if len(scene.heroes) > 1]
        self.hard = list(accumulate(map(difficulty, scenes)))
        self.by_length: dict[int, list[int]] = {}
        self.two_by_length: dict[int, list[int]] = {}  # of these, the stories of two heroes
        for number, story in enumerate(self.stories):
            self.by_length.setdefault(len(story), []).append(number)
            if len(story[0].scene.heroes) > 1:
                self.two_by_length.setdefault(len(story), []).append(number)

    def __len__(self) -> int:
        return len(self.pixels)

    def page(self, row: int) -> world.ScenePanel:
        """The page of a picture's number."""
        story = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.stories[story][row - int(self.first[story])]

    def pictures(self, rows) -> torch.Tensor:
        """Pictures by number, float (len(rows), 3, side, side) in [0, 1]."""
        return torch.from_numpy(self.pixels[np.asarray(rows)]).permute(0, 3, 1, 2).float() / 255

    def random_crops(self, rows, rng: random.Random) -> torch.Tensor:
        """A quarter of each picture, float (len(rows), 3, side / 2, side / 2): some at random, most about its heroes.

        An autoencoder is convolutional, so quarters teach it as much as whole pictures, at a quarter of the cost; and
        most of a picture is sky and grass, which are learned at once.
        """
        side = self.pixels.shape[1]
        half, unit, chosen = side // 2, side / renderer.SIDE, []
        for row in rows:
            corner = [rng.uniform(0, half) for _ in range(2)]
            if rng.random() < FOREGROUND_CROP_PROB:
                box = rng.choice(renderer.boxes(self.page(row).scene))
                centre = [(box[i] + box[i + 2]) / 2 + rng.uniform(-0.19, 0.19) * renderer.SIDE for i in (0, 1)]
                corner = [min(max(c * unit - half / 2, 0), half) for c in centre]
            x, y = map(int, corner)
            chosen.append(self.pixels[row, y : y + half, x : x + half])
        return torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).float() / 255

    def emphasis(self, rows, side: int) -> torch.Tensor:
        """How much of each cell of a grid is about a hero or the prop, float (len(rows), 1, side, side).

        Up to 1 for most, up to OF_SMALL for heroes who take less than SMALL, in proportion: an error of theirs is as
        wrong, in fewer cells.
        """
        found = torch.zeros(len(rows), 1, side, side)
        for grid, row in zip(found[:, 0], rows):
            for number, (left, top, right, bottom) in enumerate(renderer.boxes(self.page(row).scene)):
                across, down = _overlap(left, right, side), _overlap(top, bottom, side)
                share = SMALL_AREA / ((right - left) * (bottom - top)) if number else 1.0  # the first box is the prop's
                torch.maximum(grid, down[:, None] * across * min(max(share, 1.0), MAX_SMALL_WEIGHT), out=grid)
        return found

    def evenly_spaced(self, count: int) -> list[int]:
        """Numbers of pictures from all over the book."""
        return [row * len(self) // count for row in range(count)]

    def random_rows(self, count: int, rng: random.Random, of_two: float = 0.0) -> list[int]:
        """Numbers of pictures, a share `of_two` of them only of those that show two heroes."""
        chosen = (self.two if self.two and rng.random() < of_two else range(len(self)) for _ in range(count))
        return sorted(rng.choice(rows) for rows in chosen)

    def weighted_indices(self, count: int, rng: random.Random) -> list[int]:
        """Numbers of pictures at random, each as often as its `difficulty`."""
        return sorted(rng.choices(range(len(self)), cum_weights=self.hard, k=count))


def difficulty(scene: world.Scene) -> int:
    """How often a picture is to be met to learn its heroes, against an easy one: of sleepers, of heroes far away and of
    two the faces are small."""
    return (2 if scene.action == "sleep" else 1) * (2 if scene.far else 1) * len(scene.heroes)


def _overlap(low: float, high: float, cells: int) -> torch.Tensor:
    """How much of each of `cells` equal parts of a picture's side lies between two places in px."""
    edges = torch.linspace(0, renderer.SIDE, cells + 1).clamp(low, high)
    return edges.diff() * cells / renderer.SIDE


class StoryBatches:
    """Batches of sequences from a Book: stories text first and picture first, captions, questions.

    Args:
        pictures: how many pictures a batch has, about.
        drawn_only: only stories text first, as learning to draw needs them.
        names: whether to teach whom of two heroes a name means, by drills and by texts.
        of_two: the share of the stories that are drawn only from those of two heroes.
        slips: whether some pictures after a story's first are read with heroes who look otherwise, as a model reads
            what it has drawn wrong; what is to be drawn stays as it is. So the first is believed.
    """

    def __init__(
        self,
        book: StoryDataset,
        config: Config,
        tokenizer: Tokenizer,
        pictures: int,
        drawn_only: bool = False,
        names: bool = False,
        slips: bool = False,
        of_two: float = 0.0,
    ):
        self.book, self.config, self.tokenizer = book, config, tokenizer
        self.pictures, self.drawn_only, self.names, self.slips, self.of_two = pictures, drawn_only, names, slips, of_two
        self.blank = ImageSegment(torch.zeros(3, 8, 8))  # the layout of a story needs no pixels

    def make(self, seed: int) -> Batch | TextBatch:
        """The batch of a seed."""
        rng = random.Random(f"batch {seed}")
        kind = rng.random() if self.names else 1.0
        if kind < COREF_DRILL_PROB:
            return self.drills(seed, TEXT_BATCH_SIZE)
        if kind < COREF_DRILL_PROB + TEXT_ONLY_PROB and self.book.two_by_length:
            return self.texts(seed, TEXT_BATCH_SIZE)
        if self.drawn_only or rng.random() < STORY_BATCH_PROB:
            panels = rng.choice(sorted(self.book.by_length))
            count = max(1, round(self.pictures / panels))
            every = self.book.by_length[panels]
            two = self.book.two_by_length.get(panels, every)
            numbers = [rng.choice(two if rng.random() < self.of_two else every) for _ in range(count)]
            first = not self.drawn_only and rng.random() < IMAGE_FIRST_PROB
            sequences = [self._story(number, first) for number in numbers]
            rows = [[int(self.book.first[number]) + i for i in range(panels)] for number in numbers]
            batch = self._collate(sequences, rows, draws=True, told=not first)
            return self._slipped(batch, rng) if self.slips else batch
        rows = [rng.randrange(len(self.book)) for _ in range(self.pictures)]
        return self._collate([self._single(row, rng) for row in rows], [[row] for row in rows], draws=False)

    def _slipped(self, batch: Batch, rng: random.Random) -> Batch:
        pixels = batch.pixels.clone()
        for i, row in enumerate(batch.rows.tolist()):
            for k, number in enumerate(row):
                if k and rng.random() < HISTORY_CORRUPTION_PROB:
                    scene = world.swap_appearance(self.book.page(number).scene, rng)
                    painted = torch.from_numpy(renderer.paint(scene, pixels.shape[-1]).copy())
                    pixels[i, k] = painted.permute(2, 0, 1) / 255
        return replace(batch, pixels=pixels)

    def texts(self, seed: int, stories: int) -> TextBatch:
        """Texts of stories of two heroes; they cost a tenth of what stories with pictures do."""
        rng, t = random.Random(f"texts {seed}"), self.config.llm.special_tokens
        panels = rng.choice(sorted(self.book.two_by_length))
        numbers = [rng.choice(self.book.two_by_length[panels]) for _ in range(stories)]
        rows = [[id for id in self._story(number, False)[0].input_ids if id != t.image] for number in numbers]
        ids = torch.full((stories, max(map(len, rows))), t.pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        meant = self._meant([[int(self.book.first[n]) + i for i in range(panels)] for n in numbers])
        panel = (ids == t.soi).cumsum(1) - (ids == t.soi).long()  # a start-of-image token ends its text
        unknown = torch.full((stories, 1), IGNORE_INDEX)
        return TextBatch(ids, torch.cat([meant, unknown], 1).gather(1, panel))

    def drills(self, seed: int, count: int) -> TextBatch:
        """Two names joined by "and", then one or the other again and again, sometimes with a word of the world between.

        Which name was the first is what has to be learned: a story asks it a few times in a hundred words, a drill with
        every second.
        """
        rng, t = random.Random(f"drills {seed}"), self.config.llm.special_tokens
        encode = self.tokenizer.encode
        rows: list[list[tuple[int, int]]] = []  # of (token, whom it means)
        for _ in range(count):
            cast = rng.sample(world.NAMES, 2)
            row = [(id, IGNORE_INDEX) for id in (t.bos, *encode(" and ".join(cast), after_text=rng.random() < 0.5))]
            for filler in rng.sample(FILLERS, rng.randrange(4)):
                row += [(id, IGNORE_INDEX) for id in encode(filler, after_text=True)]
            row.append((t.soi, REFERENTS.index("both")))
            for _ in range(10):
                who = rng.randrange(2)
                said = encode(cast[who], after_text=rng.random() < 0.5)
                if rng.random() < 0.5:
                    said = [*said, *encode(rng.choice(FILLERS), after_text=True)]
                row += [(id, who + 1) for id in said]
            rows.append(row)
        longest = max(map(len, rows))
        filled = [[*row, *[(t.pad, IGNORE_INDEX)] * (longest - len(row))] for row in rows]
        ids, meant = torch.tensor(filled).unbind(-1)
        return TextBatch(ids, meant)

    def _meant(self, rows: list[list[int]]) -> torch.Tensor:
        """Which of two heroes each text names, by numbers of `REFERENTS`; IGNORE in stories of one."""
        found = torch.full((len(rows), len(rows[0])), IGNORE_INDEX)
        for i, row in enumerate(rows):
            cast = self.book.page(row[0]).scene.heroes
            if len(cast) > 1:
                who = [self.book.page(number).scene.heroes for number in row]
                found[i] = torch.tensor([(cast, cast[:1], cast[1:]).index(heroes) for heroes in who])
        return found

    def _story(self, number: int, picture_first: bool) -> tuple[StoryTokens, int]:
        story = Story()
        for page in self.book.stories[number]:
            story = story.add(self.blank, page.text) if picture_first else story.add(page.text, self.blank)
        return self._layout(story), 1

    def _single(self, row: int, rng: random.Random) -> tuple[StoryTokens, int]:
        """A caption or an answer; only what comes after the prompt is learned."""
        scene = self.book.page(row).scene
        if rng.random() < 0.6:
            prompt, text = CAPTION, world.caption(scene)
        else:
            question, text = rng.choice(world.questions(scene))
            prompt = ASK.format(question=question)
        prompted = self._layout(Story.of(self.blank, prompt))
        ids = (*prompted.input_ids, *self.tokenizer.encode(text, after_text=True))
        return StoryTokens(ids, prompted.images, prompted.image_ends), len(prompted)

    def _layout(self, story: Story) -> StoryTokens:
        return tokenize_story(story, self.tokenizer, self.config.llm)

    def _labels(self, shown: torch.Tensor, rows: list[list[int]], told: bool) -> torch.Tensor:
        """What the states are to tell of what is shown.

        What the text says, if it was told before. How heroes look, if the text has introduced them; else, after the
        first picture, species and accessory, and where two heroes must be told apart all of it; but which of them comes
        back only the text can say. The colour of a lone hero's coat is for the sites to find in the pictures.
        """
        labels = shown.clone()
        for i, row in enumerate(rows):
            first = self.book.page(row[0])
            introduced, two = told and bool(world.parse(first.text).heroes), len(first.scene.heroes) > 1
            for k in range(len(ATTRIBUTES)):
                if k not in APPEARANCE_HEADS:
                    labels[i, :, k] = labels[i, :, k] if told else IGNORE_INDEX
                elif not introduced:
                    never = not told if two else k in COAT_HEADS
                    labels[i, : None if never else 1, k] = IGNORE_INDEX
        return labels

    def _collate(
        self, sequences: list[tuple[StoryTokens, int]], rows: list[list[int]], draws: bool, told: bool = False
    ) -> Batch:
        c, t = self.config.llm, self.config.llm.special_tokens
        longest = max(len(found) for found, _ in sequences) + 1
        n, p = len(sequences), len(rows[0])
        ids = torch.full((n, longest), t.pad)
        targets = torch.full((n, longest), IGNORE_INDEX)
        visible = torch.zeros(n, longest, p, dtype=torch.bool)
        for i, (found, learned_from) in enumerate(sequences):
            tokens = torch.tensor([*found.input_ids, t.eos])
            ids[i, : len(tokens)] = tokens
            visible[i, : len(found)] = found.image_mask(c)
            following = tokens[1:].clone()
            following[following == t.image] = IGNORE_INDEX
            following[: learned_from - 1] = IGNORE_INDEX
            if following[0] == t.soi:  # a story that opens with a picture is the user's choice (`is_bos2soi_token`)
                following[0] = IGNORE_INDEX
            targets[i, : len(following)] = following
        starts = torch.tensor([[end - c.num_img_token - 1 for end in found.image_ends] for found, _ in sequences])
        shown = self.book.labels[torch.tensor(rows)]
        labels = self._labels(shown, rows, told) if draws else torch.full_like(shown, IGNORE_INDEX)
        meant = self._meant(rows) if told else torch.full((n, p), IGNORE_INDEX)
        rows = torch.tensor(rows)
        pixels = self.book.pictures(rows.flatten().tolist()).unflatten(0, (n, p))
        return Batch(pixels, ids, targets, visible, starts, rows, shown, labels, meant, draws)
