"""The stage `dream`: queries that the LLM reads in the place of an image to draw (DreamLLM, 2309.11499).

The LLM itself stays as it is: a LoRA changes how it reads the queries, and nothing before them, so stories keep their
cache and their texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from comfy_mminterleaved.config import Config
from comfy_mminterleaved.generation.dream import REFERENCE, in_context_story
from comfy_mminterleaved.generation.tokens import tokenize_story
from comfy_mminterleaved.models.dream import DreamQueries, continue_rows
from comfy_mminterleaved.models.llama_mmfs import KVCache, LlamaMMFS
from comfy_mminterleaved.stories.story import ImageSegment

from . import world
from .batches import StoryBatch, StoryBatches
from .dataset import StoryDataset
from .drawn_training import LoRAState
from .story_features import StoryFeatures
from .targets import ConditioningTargets, attribute_labels

LAYERS = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
STORY_PROB = 0.3  # of the batches; the others are drawings in context
TWO_CHARACTER_PROB = 0.3


# ---- drawing in context ----


@dataclass(frozen=True)
class Task:
    """A text with images in it, `{A}` and `{B}`, and the scene that it asks for."""

    text: str
    images: tuple[world.Scene, ...]
    scene: world.Scene


def subject(rng: random.Random, a: world.Scene, b: world.Scene, held_out: bool | None = False) -> Task:
    """{A} waves in the village with a kite: the hero of A."""
    scene = world.make_scene(rng, a.heroes, held_out)
    return Task(_sentence(scene, "{A}", rng), (a,), scene)


def placed(rng: random.Random, a: world.Scene, b: world.Scene, held_out: bool | None = False) -> Task:
    """{A} waves in {B} with a kite: the hero of A, place and sky of B."""
    scene = replace(_with_place_of(world.make_scene(rng, a.heroes, held_out), b), sky=b.sky)
    text = _sentence(replace(scene, sky="day"), "{A}", rng)
    where = world.PLACES[scene.place]
    text = text.replace(where.capitalize(), "In {B}").replace(where, "in {B}")
    return Task(text, (a, b), scene)


def composition(rng: random.Random, a: world.Scene, b: world.Scene, held_out: bool | None = False) -> Task:
    """{A} in {B}: the hero of A, as he is, and everything else of B."""
    scene = replace(_with_place_of(a, b), prop=b.prop, sky=b.sky)
    return Task("{A} in {B}.", (a, b), scene)


def pair(rng: random.Random, a: world.Scene, b: world.Scene, held_out: bool | None = False) -> Task:
    """{A} and {B} wave in the village: a hero of each."""
    if a.heroes[0].species == b.heroes[0].species:
        return subject(rng, a, b, held_out)
    heroes = (replace(a.heroes[0], name="A"), replace(b.heroes[0], name="B"))
    if len(a.heroes) + len(b.heroes) > 2:
        return composition(rng, a, b, held_out)
    scene = world.make_scene(rng, heroes, held_out)
    return Task(_sentence(scene, "{A} and {B}", rng), (a, b), scene)


def edit(rng: random.Random, a: world.Scene, b: world.Scene, held_out: bool | None = False) -> Task:
    """{A} in a red coat: A with one other fact."""
    facts = ("sky", "place", "prop", "action") + ("coat", "coat") * (len(a.heroes) == 1)
    return edited(rng, a, rng.choice(facts))


def edited(rng: random.Random, a: world.Scene, fact: str) -> Task:
    """A scene with one fact changed, and the text that asks for it."""

    def other(values, value):
        return rng.choice([each for each in values if each != value])

    if fact == "coat":
        (hero,) = a.heroes
        colour = other(world.COLOURS, hero.colour)
        text = f"in {'an' if colour[0] in 'aeiou' else 'a'} {colour} coat"
        return Task(f"{{A}} {text}.", (a,), replace(a, heroes=(replace(hero, colour=colour),)))
    if fact == "sky":
        sky = other(("night", "snowfall" if a.place == "snow" else "rain"), a.sky)
        return Task(f"{{A}} {world.SKIES[sky]}", (a,), replace(a, sky=sky))
    if fact == "place":
        places = [place for place in world.PLACES if a.sky not in ("rain", "snowfall") or place != "snow"]
        if a.sky == "snowfall":
            places = ["snow"] if a.place != "snow" else []
        if not places:
            return edited(rng, a, "prop")
        place = other(places, a.place)
        return Task(f"{{A}} {world.PLACES[place]}.", (a,), replace(a, place=place))
    if fact == "prop":
        prop = other(world.PROPS, a.prop)
        return Task(f"{{A}} with {world.PROPS[prop]}.", (a,), replace(a, prop=prop))
    action = other(world.ACTIONS, a.action)
    return Task(f"{{A}} {world.ACTIONS[action][len(a.heroes) > 1]}.", (a,), replace(a, action=action))


TASKS: dict[Callable, float] = {subject: 0.15, placed: 0.15, composition: 0.25, pair: 0.1, edit: 0.35}


def _with_place_of(scene: world.Scene, other: world.Scene) -> world.Scene:
    return replace(scene, place=other.place)


def _sentence(scene: world.Scene, who: str, rng: random.Random) -> str:
    """The text of a panel, with images in the place of names."""
    named = tuple(replace(hero, name="NAME") for hero in scene.heroes)
    return world.describe(replace(scene, heroes=named), rng).replace(" and ".join("NAME" for _ in named), who)


# ---- batches ----


@dataclass(frozen=True)
class DreamBatch:
    """N sequences, and Q places in them where an image is to be drawn.

    Args:
        input_ids: `(N, L)`.
        image_mask: bool `(N, L, P)`.
        visual_tokens: `(images, T, C)`, in the order of the image tokens.
        feature_maps: Of each level, `(N, P, C, side, side)`.
        rows, lengths: `(Q,)`, the sequence of each drawing, and how much of it comes before.
        visible: bool `(Q, P)`, the images before.
        labels: `(Q, attributes)`, with IGNORE_INDEX for what cannot be known.
    """

    input_ids: torch.Tensor
    image_mask: torch.Tensor
    visual_tokens: torch.Tensor
    feature_maps: tuple[torch.Tensor, ...]
    rows: torch.Tensor
    lengths: torch.Tensor
    visible: torch.Tensor
    labels: torch.Tensor

    def to(self, device) -> DreamBatch:
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return DreamBatch(**moved, feature_maps=tuple(level.to(device) for level in self.feature_maps))


class DreamBatches:
    """Stories, and drawings in context of one or two images each, by seed.

    Args:
        has_reserved: Whether drawings may show what training never sees.
    """

    def __init__(
        self,
        dataset: StoryDataset,
        features: StoryFeatures,
        config: Config,
        tokenizer,
        batch_size: int,
        has_reserved: bool = False,
    ):
        self.has_reserved = has_reserved
        self.dataset, self.features, self.config, self.tokenizer = dataset, features, config, tokenizer
        self.batch_size, self.blank = batch_size, ImageSegment(torch.zeros(3, 8, 8))
        self.stories = StoryBatches(
            dataset, config, tokenizer, batch_size, image_loss_only=True, two_character_prob=TWO_CHARACTER_PROB
        )

    def build(self, seed: int, is_story: bool | None = None) -> DreamBatch:
        rng = random.Random(f"dream {seed}")
        is_story = rng.random() < STORY_PROB if is_story is None else is_story
        return self._of_stories(self.stories.build(seed)) if is_story else self.context_batch(rng)

    def _of_stories(self, batch: StoryBatch) -> DreamBatch:
        """Every image of some stories, each in view of all that comes before it."""
        tokens, maps = self.features(batch.image_indices)
        n, p = batch.soi_positions.shape
        return DreamBatch(
            batch.input_ids,
            batch.image_mask,
            tokens.flatten(0, 1),
            tuple(maps),
            torch.arange(n).repeat_interleave(p),
            batch.soi_positions.flatten(),
            torch.ones(p, p, dtype=torch.bool).tril(-1).repeat(n, 1),
            batch.inferable_labels.flatten(0, 1),
        )

    def context_batch(self, rng: random.Random) -> DreamBatch:
        pairs = self.dataset.two_character_indices
        tasks, indices = [], []
        while len(tasks) < self.batch_size:
            row = [rng.choice(pairs if pairs and rng.random() < 0.15 else range(len(self.dataset))) for _ in range(2)]
            make = rng.choices(list(TASKS), list(TASKS.values()))[0]
            task = make(rng, *(self.dataset.panel(index).scene for index in row))
            if self.has_reserved or not is_reserved(task.scene):
                tasks.append(task)
                indices.append(row[: len(task.images)])
        return self.collate([task.text for task in tasks], indices, [task.scene for task in tasks])

    def collate(self, texts: list[str], given: list[list[int]], scenes: list[world.Scene]) -> DreamBatch:
        """Of texts, the dataset's images A and B of each, and the scenes that they ask for."""
        c = self.config.llm
        names = [REFERENCE.findall(text) for text in texts]  # in the order of the images
        stories = [in_context_story(text, dict.fromkeys(row, self.blank)) for text, row in zip(texts, names)]
        rows = [tokenize_story(story, self.tokenizer, c) for story in stories]
        indices = [[row["AB".index(name)] for name in order] for order, row in zip(names, given)]
        longest, most = max(map(len, rows)), max(map(len, indices))
        input_ids = torch.full((len(rows), longest), c.special_tokens.pad)
        image_mask = torch.zeros(len(rows), longest, most, dtype=torch.bool)
        for i, tokens in enumerate(rows):
            input_ids[i, : len(tokens)] = torch.tensor(tokens.input_ids)
            image_mask[i, : len(tokens), : len(tokens.images)] = tokens.image_mask(c)
        padded = torch.tensor([[*row, *[row[0]] * (most - len(row))] for row in indices])
        visible = torch.tensor([[k < len(row) for k in range(most)] for row in indices])
        tokens, maps = self.features(padded)
        return DreamBatch(
            input_ids,
            image_mask,
            tokens[visible],
            tuple(maps),
            torch.arange(len(rows)),
            torch.tensor([len(row) for row in rows]),
            visible,
            torch.tensor([list(attribute_labels(scene).values()) for scene in scenes]),
        )


def is_reserved(scene: world.Scene) -> bool:
    """Whether a scene shows what training never sees."""
    looks = any(world.is_held_out_appearance(*hero.look) for hero in scene.heroes)
    return looks or world.is_held_out_pair(scene.place, scene.prop)


# ---- the objective ----


class DreamObjective(nn.Module):
    """Prompt embeddings of the queries against those that the U-Net was pretrained with.

    The LLM, with its LoRA off, reads what comes before; with the LoRA on, it reads the queries.
    """

    def __init__(self, model: DreamQueries, llm: LlamaMMFS, lora: LoRAState, targets: ConditioningTargets):
        super().__init__()
        self.model, self.llm, self.lora, self.targets = model, llm, [lora], targets

    def forward(self, batch: DreamBatch) -> dict[str, torch.Tensor]:
        prompt_embeds = self.prompt_embeds(batch)
        squares, attributes = self.targets.losses(prompt_embeds, batch.labels)
        right = self.targets.share_right(prompt_embeds, batch.labels)
        return {"loss": squares + 0.1 * attributes, "squares": squares, "attributes": attributes, "right": right}

    def prompt_embeds(self, batch: DreamBatch) -> torch.Tensor:
        """`(Q, num_queries, C)`."""
        (lora,), llm, count = self.lora, self.llm, len(batch.input_ids)
        lora.switch(False)
        cache = KVCache(count)
        with torch.no_grad():
            image_values = llm.project_images(batch.feature_maps)
            x = llm.embed_inputs(batch.input_ids, batch.visual_tokens.flatten(0, 1))
            llm(x, image_values, batch.image_mask, cache)
        lora.switch(True)
        rest = continue_rows(cache, image_values, batch.rows.tolist(), batch.lengths.tolist())
        return self.model(llm, *rest, batch.visible)


class DreamState(nn.Module):
    """What the stage saves: the queries, the projector and the LoRA, under the names of the system's file."""

    def __init__(self, model: DreamQueries, lora: LoRAState):
        super().__init__()
        self.parts = [model, lora]

    def state_dict(self, *_, **__) -> dict[str, torch.Tensor]:
        model, lora = self.parts
        return {**model.state_dict(), **{f"lora.{name}": p for name, p in lora.state_dict().items()}}
