"""Training batches of the picture-book world: the same seed gives the same batch on every machine."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from comfy_mminterleaved.config import Config
from comfy_mminterleaved.generation.tokens import StoryTokens, tokenize_story
from comfy_mminterleaved.stories.story import ImageSegment, Story
from comfy_mminterleaved.tokenizer import Tokenizer

from . import renderer, world
from .dataset import StoryDataset
from .targets import APPEARANCE_HEADS, ATTRIBUTES, COAT_HEADS, IGNORE_INDEX, REFERENTS

CAPTION, ASK = "Caption:", "Question: {question} Answer:"
STORY_BATCH_PROB = 0.65  # of the batches; the others are captions and questions on single images
CAPTION_PROB = 0.6  # of the sequences on single images; the others are questions
# Share of the batches that are coreference drills, share that are texts without images, and their sequences.
COREF_DRILL_PROB, TEXT_ONLY_PROB, TEXT_BATCH_SIZE = 0.2, 0.15, 40
FILLERS = sorted(word for word in world.words() if word.title() not in world.NAMES)  # between the names of a drill
DRILL_LENGTH = 10  # names in a drill, after the first two
IMAGE_FIRST_PROB = 0.15  # of the stories; their prompt embeddings have no text to predict the scene from
HISTORY_CORRUPTION_PROB = 0.25  # of a story's images after the first: they are encoded with other heroes


@dataclass(frozen=True)
class StoryBatch:
    """Tokenized sequences of N stories with P images each.

    Args:
        images: float (N, P, 3, side, side).
        input_ids: (N, L).
        targets: (N, L), the next token, or IGNORE_INDEX.
        image_mask: bool (N, L, P), the images that a token may attend to.
        soi_positions: (N, P), position of each image's start-of-image token.
        image_indices: (N, P), index of each image in the dataset.
        image_labels: (N, P, attributes), `targets.ATTRIBUTES` of each image.
        inferable_labels: the same, with IGNORE_INDEX where text and earlier images do not determine the attribute.
        referents: (N, P), index into `REFERENTS` of the heroes that the text names, or IGNORE_INDEX.
        has_image_loss: whether the images are generated, not just encoded.
    """

    images: torch.Tensor
    input_ids: torch.Tensor
    targets: torch.Tensor
    image_mask: torch.Tensor
    soi_positions: torch.Tensor
    image_indices: torch.Tensor
    image_labels: torch.Tensor
    inferable_labels: torch.Tensor
    referents: torch.Tensor
    has_image_loss: bool

    def to(self, device) -> StoryBatch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return StoryBatch(**moved, has_image_loss=self.has_image_loss)


@dataclass(frozen=True)
class TextBatch:
    """Texts without images, of stories with two heroes or of coreference drills.

    Args:
        input_ids: (N, L).
        referents: (N, L), index into `REFERENTS` of the heroes named in the token's text, or IGNORE_INDEX.
    """

    input_ids: torch.Tensor
    referents: torch.Tensor

    def to(self, device) -> TextBatch:
        return TextBatch(**{k: v.to(device) for k, v in vars(self).items()})


class StoryBatches:
    """Builds batches from a `StoryDataset`: stories with text or image first, captions, questions, texts, drills.

    Args:
        images_per_batch: approximate.
        image_loss_only: builds only stories with text first, the ones that have an image loss and inferable labels.
        with_coref: adds coreference drills and texts without images.
        corrupt_history: encodes some images after a story's first with other heroes, like a model's own mistakes; the
            targets do not change, so the first image is what counts.
        two_character_prob: share of the stories drawn only from those with two heroes.
    """

    def __init__(
        self,
        dataset: StoryDataset,
        config: Config,
        tokenizer: Tokenizer,
        images_per_batch: int,
        image_loss_only: bool = False,
        with_coref: bool = False,
        corrupt_history: bool = False,
        two_character_prob: float = 0.0,
    ):
        self.dataset, self.config, self.tokenizer = dataset, config, tokenizer
        self.images_per_batch, self.image_loss_only, self.with_coref = images_per_batch, image_loss_only, with_coref
        self.corrupt_history, self.two_character_prob = corrupt_history, two_character_prob
        self.blank = ImageSegment(torch.zeros(3, 8, 8))  # tokenizing a story needs no pixels

    def build(self, seed: int) -> StoryBatch | TextBatch:
        """Builds the batch of a seed."""
        rng = random.Random(f"batch {seed}")
        draw = rng.random() if self.with_coref else 1.0
        if draw < COREF_DRILL_PROB:
            return self.coref_drills(seed, TEXT_BATCH_SIZE)
        if draw < COREF_DRILL_PROB + TEXT_ONLY_PROB and self.dataset.two_character_by_length:
            return self.texts(seed, TEXT_BATCH_SIZE)
        if self.image_loss_only or rng.random() < STORY_BATCH_PROB:
            panels = rng.choice(sorted(self.dataset.by_length))
            num_stories = max(1, round(self.images_per_batch / panels))
            stories = self.dataset.by_length[panels]
            pairs = self.dataset.two_character_by_length.get(panels, stories)
            numbers = [
                rng.choice(pairs if rng.random() < self.two_character_prob else stories) for _ in range(num_stories)
            ]
            image_first = not self.image_loss_only and rng.random() < IMAGE_FIRST_PROB
            sequences = [self._story(number, image_first) for number in numbers]
            indices = [[int(self.dataset.offsets[number]) + i for i in range(panels)] for number in numbers]
            batch = self._collate(sequences, indices, has_image_loss=True, text_first=not image_first)
            return self._corrupt_history(batch, rng) if self.corrupt_history else batch
        rows = [rng.randrange(len(self.dataset)) for _ in range(self.images_per_batch)]
        sequences = [self._single(index, rng) for index in rows]
        return self._collate(sequences, [[index] for index in rows], has_image_loss=False)

    def _corrupt_history(self, batch: StoryBatch, rng: random.Random) -> StoryBatch:
        images = batch.images.clone()
        for i, row in enumerate(batch.image_indices.tolist()):
            for k, index in enumerate(row):
                if k and rng.random() < HISTORY_CORRUPTION_PROB:
                    scene = world.swap_appearance(self.dataset.panel(index).scene, rng)
                    pixels = torch.from_numpy(renderer.paint(scene, images.shape[-1]).copy())
                    images[i, k] = pixels.permute(2, 0, 1) / 255
        return replace(batch, images=images)

    def texts(self, seed: int, num_stories: int) -> TextBatch:
        """Builds texts of stories with two heroes; they cost a tenth of stories with images."""
        rng, t = random.Random(f"texts {seed}"), self.config.llm.special_tokens
        panels = rng.choice(sorted(self.dataset.two_character_by_length))
        numbers = [rng.choice(self.dataset.two_character_by_length[panels]) for _ in range(num_stories)]
        rows = [[id for id in self._story(number, False)[0].input_ids if id != t.image] for number in numbers]
        input_ids = torch.full((num_stories, max(map(len, rows))), t.pad)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
        referents = self._referents([[int(self.dataset.offsets[n]) + i for i in range(panels)] for n in numbers])
        panel = (input_ids == t.soi).cumsum(1) - (input_ids == t.soi).long()  # a start-of-image token ends its text
        unknown = torch.full((num_stories, 1), IGNORE_INDEX)
        return TextBatch(input_ids, torch.cat([referents, unknown], 1).gather(1, panel))

    def coref_drills(self, seed: int, num_drills: int) -> TextBatch:
        """Builds drills: two names joined by "and", then either name several times, sometimes with a filler word.

        The task is which name came first. A story poses it a few times in a hundred words, a drill with every second.
        """
        rng, t = random.Random(f"drills {seed}"), self.config.llm.special_tokens
        encode = self.tokenizer.encode
        rows: list[list[tuple[int, int]]] = []  # (token, referent)
        for _ in range(num_drills):
            cast = rng.sample(world.NAMES, 2)
            row = [(id, IGNORE_INDEX) for id in (t.bos, *encode(" and ".join(cast), after_text=rng.random() < 0.5))]
            for filler in rng.sample(FILLERS, rng.randrange(4)):
                row += [(id, IGNORE_INDEX) for id in encode(filler, after_text=True)]
            row.append((t.soi, REFERENTS.index("both")))
            for _ in range(DRILL_LENGTH):
                referent = rng.randrange(2)
                token_ids = encode(cast[referent], after_text=rng.random() < 0.5)
                if rng.random() < 0.5:
                    token_ids = [*token_ids, *encode(rng.choice(FILLERS), after_text=True)]
                row += [(id, referent + 1) for id in token_ids]
            rows.append(row)
        longest = max(map(len, rows))
        padded = [[*row, *[(t.pad, IGNORE_INDEX)] * (longest - len(row))] for row in rows]
        input_ids, referents = torch.tensor(padded).unbind(-1)
        return TextBatch(input_ids, referents)

    def _referents(self, indices: list[list[int]]) -> torch.Tensor:
        """Returns the referents (N, P) of each text; IGNORE_INDEX in stories of one hero."""
        referents = torch.full((len(indices), len(indices[0])), IGNORE_INDEX)
        for i, row in enumerate(indices):
            cast = self.dataset.panel(row[0]).scene.heroes
            if len(cast) > 1:
                present = [self.dataset.panel(index).scene.heroes for index in row]
                referents[i] = torch.tensor([(cast, cast[:1], cast[1:]).index(heroes) for heroes in present])
        return referents

    def _story(self, number: int, image_first: bool) -> tuple[StoryTokens, int]:
        """Tokenizes a story; the second value is the number of tokens without a loss."""
        story = Story()
        for panel in self.dataset.stories[number]:
            story = story.add(self.blank, panel.text) if image_first else story.add(panel.text, self.blank)
        return self._tokenize(story), 1

    def _single(self, index: int, rng: random.Random) -> tuple[StoryTokens, int]:
        """Tokenizes a caption or an answer; only the tokens after the prompt have a loss."""
        scene = self.dataset.panel(index).scene
        if rng.random() < CAPTION_PROB:
            prompt, text = CAPTION, world.caption(scene)
        else:
            question, text = rng.choice(world.questions(scene))
            prompt = ASK.format(question=question)
        prompted = self._tokenize(Story.of(self.blank, prompt))
        input_ids = (*prompted.input_ids, *self.tokenizer.encode(text, after_text=True))
        return StoryTokens(input_ids, prompted.images, prompted.image_ends), len(prompted)

    def _tokenize(self, story: Story) -> StoryTokens:
        return tokenize_story(story, self.tokenizer, self.config.llm)

    def _inferable_labels(self, labels: torch.Tensor, indices: list[list[int]], text_first: bool) -> torch.Tensor:
        """Sets the labels that the prompt embeddings are not to contain to IGNORE_INDEX.

        They contain what the text says, if it comes first. They contain the looks of heroes whom the text introduces;
        otherwise, from the second image on, species and accessory, and everything where there are two heroes: only the
        text says which of them appears. The coat colour of a lone hero is left to MMFS.
        """
        labels = labels.clone()
        for i, row in enumerate(indices):
            first = self.dataset.panel(row[0])
            introduced, two = text_first and bool(world.parse(first.text).heroes), len(first.scene.heroes) > 1
            for k in range(len(ATTRIBUTES)):
                if k not in APPEARANCE_HEADS:
                    labels[i, :, k] = labels[i, :, k] if text_first else IGNORE_INDEX
                elif not introduced:
                    never = not text_first if two else k in COAT_HEADS
                    labels[i, : None if never else 1, k] = IGNORE_INDEX
        return labels

    def _collate(
        self,
        sequences: list[tuple[StoryTokens, int]],
        indices: list[list[int]],
        has_image_loss: bool,
        text_first: bool = False,
    ) -> StoryBatch:
        c, t = self.config.llm, self.config.llm.special_tokens
        longest = max(len(tokens) for tokens, _ in sequences) + 1
        n, p = len(sequences), len(indices[0])
        input_ids = torch.full((n, longest), t.pad)
        targets = torch.full((n, longest), IGNORE_INDEX)
        image_mask = torch.zeros(n, longest, p, dtype=torch.bool)
        for i, (tokens, num_given) in enumerate(sequences):
            row = torch.tensor([*tokens.input_ids, t.eos])
            input_ids[i, : len(row)] = row
            image_mask[i, : len(tokens)] = tokens.image_mask(c)
            following = row[1:].clone()
            following[following == t.image] = IGNORE_INDEX
            following[: num_given - 1] = IGNORE_INDEX
            if following[0] == t.soi:  # the user chooses whether a story opens with an image (`is_bos2soi_token`)
                following[0] = IGNORE_INDEX
            targets[i, : len(following)] = following
        soi_positions = torch.tensor([[end - c.num_img_token - 1 for end in seq.image_ends] for seq, _ in sequences])
        image_labels = self.dataset.labels[torch.tensor(indices)]
        inferable_labels = torch.full_like(image_labels, IGNORE_INDEX)
        if has_image_loss:
            inferable_labels = self._inferable_labels(image_labels, indices, text_first)
        referents = self._referents(indices) if text_first else torch.full((n, p), IGNORE_INDEX)
        image_indices = torch.tensor(indices)
        return StoryBatch(
            self.dataset.images(image_indices.flatten().tolist()).unflatten(0, (n, p)),
            input_ids,
            targets,
            image_mask,
            soi_positions,
            image_indices,
            image_labels,
            inferable_labels,
            referents,
            has_image_loss,
        )
