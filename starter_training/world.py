"""The picture-book world: endless short illustrated stories, deterministic by seed.

A story has one or two heroes with names. Their species, coat colour and accessory are visible in the images; the text
has names, action, place and prop. Names are assigned anew for every story, so an image of a hero can only be right if
the model attends to the images before it. In a third of the stories the first text describes the heroes' looks.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, replace

SPECIES = (
    "bear",
    "fox",
    "cat",
    "dog",
    "rabbit",
    "panda",
    "koala",
    "lion",
    "tiger",
    "pig",
    "monkey",
    "mouse",
    "frog",
    "cow",
    "wolf",
    "raccoon",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
ACCESSORIES = ("hat", "crown", "bow", "glasses", "flower", "scarf")
NAMES = (
    "Mia",
    "Otto",
    "Lena",
    "Finn",
    "Nora",
    "Max",
    "Ida",
    "Leo",
    "Emma",
    "Tom",
    "Ella",
    "Ben",
    "Lucy",
    "Sam",
    "Anna",
    "Hugo",
    "Rosa",
    "Jack",
    "Zoe",
    "Paul",
    "Ruby",
    "Carl",
    "Alma",
    "Theo",
)
# Action -> (singular, plural).
ACTIONS = {
    "wave": ("waves", "wave"),
    "jump": ("jumps", "jump"),
    "sleep": ("sleeps", "sleep"),
    "run": ("runs", "run"),
    "sit": ("sits", "sit"),
    "dance": ("dances", "dance"),
}
PLACES = {
    "beach": "on the beach",
    "forest": "in the forest",
    "meadow": "in the meadow",
    "desert": "in the desert",
    "mountains": "in the mountains",
    "city": "in the city",
    "village": "in the village",
    "snow": "in the snow",
    "lake": "by the lake",
    "castle": "by the castle",
    "camp": "at the camp",
    "fair": "at the fair",
}
PROPS = {
    "balloon": "a balloon",
    "kite": "a kite",
    "gift": "a gift",
    "cake": "a cake",
    "apple": "an apple",
    "book": "a book",
    "guitar": "a guitar",
    "drum": "a drum",
    "bicycle": "a bicycle",
    "tulip": "a tulip",
    "mushroom": "a mushroom",
    "pumpkin": "a pumpkin",
    "teddy": "a teddy",
    "ball": "a ball",
    "bucket": "a bucket",
    "melon": "a melon",
    "trumpet": "a trumpet",
    "lollipop": "a lollipop",
    "rocket": "a rocket",
    "umbrella": "an umbrella",
}
SKIES = {"day": "", "night": "It is night.", "rain": "It rains.", "snowfall": "It snows."}


@dataclass(frozen=True)
class Hero:
    """A hero's looks, and the name in one story."""

    species: str
    colour: str
    accessory: str
    name: str = ""

    @property
    def look(self) -> tuple[str, str, str]:
        return self.species, self.colour, self.accessory


@dataclass(frozen=True)
class Scene:
    """Content of one image; heroes are ordered from left to right."""

    heroes: tuple[Hero, ...]
    action: str
    place: str
    prop: str
    sky: str = "day"
    far: bool = False
    left: bool = False
    seed: int = 0


@dataclass(frozen=True)
class ScenePanel:
    """A scene and its text."""

    scene: Scene
    text: str


# ---- held-out combinations ----


def _hash(*words: str) -> float:
    """Hashes a combination to [0, 1); unlike Python's hash, the same in every run."""
    return zlib.crc32(" ".join(words).encode()) / 2**32


def is_held_out_appearance(species: str, colour: str, accessory: str) -> bool:
    """Whether training never sees these looks, which holds for one in eight."""
    return _hash("look", species, colour, accessory) < 1 / 8


def is_held_out_pair(place: str, prop: str) -> bool:
    """Whether training never sees this pair, which holds for one in eight."""
    return _hash("pair", place, prop) < 1 / 8


# ---- making stories ----


def make_story(
    seed: int, held_out: bool | None = False, panels: int | None = None, heroes: int | None = None
) -> list[ScenePanel]:
    """Makes a story of 3 to 6 panels.

    Args:
        held_out: True uses looks and pairs that training never sees, False those that it does, None all.
        panels, heroes: how many; None draws them.
    """
    rng = random.Random(f"story {seed} {held_out}")
    panels = panels or rng.randint(3, 6)
    heroes = heroes or (1 if rng.random() < 0.6 else 2)
    cast = make_cast(rng, heroes, held_out)
    introduced = rng.random() < 1 / 3
    story, used = [], set()
    for number in range(panels):
        present = cast if number == 0 or len(cast) == 1 else rng.choice([cast, cast[:1], cast[1:]])
        scene = make_scene(rng, present, held_out, used)
        text = introduction(cast) + " " if number == 0 and introduced else ""
        story.append(ScenePanel(scene, text + describe(scene, rng)))
    return story


def make_cast(rng: random.Random, count: int, held_out: bool | None) -> tuple[Hero, ...]:
    """Draws heroes of different species with different names."""
    cast: list[Hero] = []
    names = rng.sample(NAMES, count)
    while len(cast) < count:
        look = rng.choice(SPECIES), rng.choice(COLOURS), rng.choice(ACCESSORIES)
        if held_out in (None, is_held_out_appearance(*look)) and look[0] not in {hero.species for hero in cast}:
            cast.append(Hero(*look, names[len(cast)]))
    return tuple(cast)


def make_scene(
    rng: random.Random, heroes: tuple[Hero, ...], held_out: bool | None = False, used: set | None = None
) -> Scene:
    """Draws a scene, without the places and props in `used` while there are others, and adds its own to `used`."""
    used = set() if used is None else used
    pairs = [(a, b) for a in PLACES for b in PROPS if held_out in (None, is_held_out_pair(a, b))]
    fresh = [pair for pair in pairs if pair[0] not in used and pair[1] not in used]
    place, prop = rng.choice(fresh or pairs)
    used |= {place, prop}
    skies = ["day"] * 5 + ["night"] * 2 + (["snowfall"] * 2 if place == "snow" else ["rain"] * 2)
    return Scene(
        heroes,
        rng.choice(list(ACTIONS)),
        place,
        prop,
        rng.choice(skies),
        rng.random() < 0.25,
        rng.random() < 0.5,
        rng.randrange(2**31),
    )


def swap_appearance(scene: Scene, rng: random.Random) -> Scene:
    """Replaces about half of each hero's species, coat and accessory; the new looks are not held out."""
    heroes: list[Hero] = []
    for hero in scene.heroes:
        other = hero
        used = {h.species for h in (*scene.heroes, *heroes)} - {hero.species}
        while other.look == hero.look or is_held_out_appearance(*other.look) or other.species in used:
            parts = zip(hero.look, (SPECIES, COLOURS, ACCESSORIES))
            other = Hero(*(rng.choice(values) if rng.random() < 0.5 else part for part, values in parts), hero.name)
        heroes.append(other)
    return replace(scene, heroes=tuple(heroes))


# ---- text ----

# Every sentence has exactly these four.
TEMPLATES = (
    "{who} {does} {where} with {prop}.",
    "{who} {does} {where} near {prop}.",
    "{Where}, {who} {does} next to {prop}.",
    "{who} {does} next to {prop} {where}.",
    "{Where}, {who} {does} with {prop}.",
)


def describe(scene: Scene, rng: random.Random, template: str | None = None) -> str:
    """Writes the text of a panel: who does what, where and with what, and the sky unless it is plain day."""
    template = template or rng.choice(TEMPLATES)
    text = _sentence(template, " and ".join(hero.name for hero in scene.heroes), scene)
    return f"{text} {SKIES[scene.sky]}".strip()


def _sentence(template: str, who: str, scene: Scene) -> str:
    does = ACTIONS[scene.action][len(scene.heroes) > 1] + (" far away" if scene.far else "")
    where = PLACES[scene.place]
    return template.format(who=who, does=does, where=where, Where=where.capitalize(), prop=PROPS[scene.prop])


def looks(hero: Hero) -> str:
    """Describes a hero's looks: a fox in a red coat with a hat."""
    accessory = "glasses" if hero.accessory == "glasses" else f"a {hero.accessory}"
    return f"a {hero.species} in {'an' if hero.colour[0] in 'aeiou' else 'a'} {hero.colour} coat with {accessory}"


def introduction(cast: tuple[Hero, ...]) -> str:
    return " ".join(f"{hero.name} is {looks(hero)}." for hero in cast)


OMISSIBLE = ("colour", "accessory", "far", "sky", "place", "prop")


def partial_caption(scene: Scene, omitted: frozenset[str] = frozenset()) -> str:
    """A caption that leaves out what is in `omitted`, of all heroes."""
    who = []
    for hero in scene.heroes:
        look = looks(hero)
        start, rest = look.split(f" in a{'n' if hero.colour[0] in 'aeiou' else ''} {hero.colour} coat")
        coat = look[len(start) : len(look) - len(rest)]
        who.append(start + coat * ("colour" not in omitted) + rest * ("accessory" not in omitted))
    does = ACTIONS[scene.action][len(scene.heroes) > 1] + " far away" * (scene.far and "far" not in omitted)
    where, prop = f" {PLACES[scene.place]}", f" with {PROPS[scene.prop]}"
    text = f"{' and '.join(who)} {does}{where * ('place' not in omitted)}{prop * ('prop' not in omitted)}."
    return f"{text[0].upper()}{text[1:]} {SKIES[scene.sky] * ('sky' not in omitted)}".strip()


def caption(scene: Scene, template: str = TEMPLATES[0]) -> str:
    """Describes an image without names."""
    who = " and ".join(looks(hero) for hero in scene.heroes)
    text = _sentence(template, who, scene)
    text = text[0].upper() + text[1:]
    return f"{text} {SKIES[scene.sky]}".strip()


# ---- parsing ----


@dataclass(frozen=True)
class ParsedText:
    """Facts in a text."""

    names: tuple[str, ...] = ()
    heroes: tuple[tuple[str, str, str], ...] = ()
    action: str = ""
    place: str = ""
    prop: str = ""
    sky: str = "day"
    far: bool = False


def expected_facts(scene: Scene) -> ParsedText:
    """Returns the facts of a scene, with names and looks."""
    return ParsedText(
        tuple(h.name for h in scene.heroes),
        tuple(h.look for h in scene.heroes),
        scene.action,
        scene.place,
        scene.prop,
        scene.sky,
        scene.far,
    )


_LOOK = rf"[Aa] ({'|'.join(SPECIES)}) in an? ({'|'.join(COLOURS)}) coat with (?:a )?({'|'.join(ACCESSORIES)})"
_NAME = "|".join(NAMES)


def _pattern(template: str) -> re.Pattern:
    does = "|".join(form for forms in ACTIONS.values() for form in forms)
    where = "|".join(PLACES.values())
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(
        pattern.format(
            who=rf"(?P<who>(?:{_NAME})(?: and (?:{_NAME}))?|{_LOOK}(?: and {_LOOK})?)",
            does=rf"(?P<does>{does})(?P<far> far away)?",
            where=f"(?P<where>{where})",
            Where=f"(?P<where>{where.replace('on the', 'On the').replace('in the', 'In the')})".replace(
                "by the", "By the"
            ).replace("at the", "At the"),
            prop=f"(?P<prop>{'|'.join(PROPS.values())})",
        )
    )


_PATTERNS = tuple(_pattern(template) for template in TEMPLATES)
_SKY = {text: sky for sky, text in SKIES.items() if text}
_INTRODUCTION = re.compile(rf"({_NAME}) is {_LOOK}\.")


def parse(text: str) -> ParsedText | None:
    """Parses a text in the world's grammar; None if it is not in it."""
    text = text.strip()
    introduced = []
    while match := _INTRODUCTION.match(text):
        introduced.append(match.groups()[1:])
        text = text[match.end() :].strip()
    for pattern in _PATTERNS:
        if match := pattern.match(text):
            remainder = text[match.end() :].strip()
            if remainder and remainder not in _SKY:
                return None
            who, does = match["who"], match["does"]
            action = next(name for name, forms in ACTIONS.items() if does in forms)
            captioned = tuple(re.findall(_LOOK, who))
            names = () if captioned else tuple(who.split(" and "))
            if does != ACTIONS[action][max(len(names), len(captioned)) > 1]:
                return None
            return ParsedText(
                names,
                captioned or tuple(introduced),
                action,
                _key(PLACES, match["where"].lower()),
                _key(PROPS, match["prop"]),
                _SKY.get(remainder, "day"),
                bool(match["far"]),
            )
    return None


def _key(table: dict[str, str], value: str) -> str:
    return next(key for key, text in table.items() if text == value)


def words() -> set[str]:
    """Returns every word of the world's texts, in lower case."""
    texts = [*NAMES, *SPECIES, *COLOURS, *ACCESSORIES, *PLACES.values(), *PROPS.values(), *SKIES.values(), *TEMPLATES]
    texts += [form for forms in ACTIONS.values() for form in forms]
    texts += ["is", "a", "an", "in", "coat", "with", "and", "far", "away"]
    return set(re.findall(r"[a-z]+", " ".join(texts).lower())) - {"who", "does", "where", "prop"}


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Returns questions about an image with their answers; about the looks only if it has one hero."""
    pairs = [
        ("Where is it?", PLACES[scene.place].capitalize() + "."),
        ("What is there?", PROPS[scene.prop].capitalize() + "."),
        (
            "What happens?",
            f"{'They' if len(scene.heroes) > 1 else 'Someone'} {ACTIONS[scene.action][len(scene.heroes) > 1]}.",
        ),
    ]
    if len(scene.heroes) == 1:
        (hero,) = scene.heroes
        accessory = hero.accessory if hero.accessory == "glasses" else f"a {hero.accessory}"
        pairs += [
            ("Who is it?", f"A {hero.species}."),
            ("Which colour is the coat?", hero.colour.capitalize() + "."),
            ("What is worn?", accessory.capitalize() + "."),
        ]
    else:
        pairs.append(("Who is it?", " and ".join(f"a {hero.species}" for hero in scene.heroes).capitalize() + "."))
    return pairs
