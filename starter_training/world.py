"""The picture-book world: endless short illustrated stories, each the same for the same seed.

A story has one or two heroes with names. Species, coat colour and accessory are visible in the pictures; text says
names, action, place and prop. Names are dealt anew for every story, so a picture of a hero can only be right if the
pictures before it were looked at. In a third of the stories the first text introduces the heroes by their looks.
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
# Action -> (one does it, two do it).
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
    """What a hero looks like, and the name of one story."""

    species: str
    colour: str
    accessory: str
    name: str = ""

    @property
    def look(self) -> tuple[str, str, str]:
        return self.species, self.colour, self.accessory


@dataclass(frozen=True)
class Scene:
    """One picture: who does what where with which prop, under which sky; heroes stand from left to right."""

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
    """A scene and the text beside it."""

    scene: Scene
    text: str


# ---- what training never sees ----


def _share(*words: str) -> float:
    """A fixed number in [0, 1) for a combination; not Python's hash, which changes from run to run."""
    return zlib.crc32(" ".join(words).encode()) / 2**32


def is_held_out_appearance(species: str, colour: str, accessory: str) -> bool:
    """One in eight looks is never in training."""
    return _share("look", species, colour, accessory) < 1 / 8


def pair_held_out(place: str, prop: str) -> bool:
    """One in eight pairs of place and prop is never in training."""
    return _share("pair", place, prop) < 1 / 8


# ---- making stories ----


def make_story(
    seed: int, held_out: bool | None = False, panels: int | None = None, heroes: int | None = None
) -> list[ScenePanel]:
    """A story of 3 to 6 pages.

    Args:
        held_out: of looks and pairs that training never sees, instead of those it does; None is of all there are.
        panels, heroes: how many; None draws them.
    """
    rng = random.Random(f"story {seed} {held_out}")
    panels = panels or rng.randint(3, 6)
    heroes = heroes or (1 if rng.random() < 0.6 else 2)
    cast = make_cast(rng, heroes, held_out)
    introduced = rng.random() < 1 / 3
    pages, used = [], set()
    for number in range(panels):
        who = cast if number == 0 or len(cast) == 1 else rng.choice([cast, cast[:1], cast[1:]])
        scene = make_scene(rng, who, held_out, used)
        text = introduction(cast) + " " if number == 0 and introduced else ""
        pages.append(ScenePanel(scene, text + describe(scene, rng)))
    return pages


def make_cast(rng: random.Random, count: int, held_out: bool | None) -> tuple[Hero, ...]:
    """Heroes of different species, with different names."""
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
    """A scene; places and props in `used` are not used again while there are others."""
    used = set() if used is None else used
    pairs = [(a, b) for a in PLACES for b in PROPS if held_out in (None, pair_held_out(a, b))]
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
    """The same scene, but of each hero about half of species, coat and accessory are others, as in no held-out look."""
    heroes: list[Hero] = []
    for hero in scene.heroes:
        other = hero
        taken = {known.species for known in (*scene.heroes, *heroes)} - {hero.species}
        while other.look == hero.look or is_held_out_appearance(*other.look) or other.species in taken:
            parts = zip(hero.look, (SPECIES, COLOURS, ACCESSORIES))
            other = Hero(*(rng.choice(every) if rng.random() < 0.5 else part for part, every in parts), hero.name)
        heroes.append(other)
    return replace(scene, heroes=tuple(heroes))


# ---- text ----

# {who} {does} {where} {prop}; every sentence says all four, and only these.
TEMPLATES = (
    "{who} {does} {where} with {prop}.",
    "{who} {does} {where} near {prop}.",
    "{Where}, {who} {does} next to {prop}.",
    "{who} {does} next to {prop} {where}.",
    "{Where}, {who} {does} with {prop}.",
)


def describe(scene: Scene, rng: random.Random, template: str | None = None) -> str:
    """The text of a page: who does what, where and with what, and the sky if it is not a plain day."""
    template = template or rng.choice(TEMPLATES)
    text = _sentence(template, " and ".join(hero.name for hero in scene.heroes), scene)
    return f"{text} {SKIES[scene.sky]}".strip()


def _sentence(template: str, who: str, scene: Scene) -> str:
    does = ACTIONS[scene.action][len(scene.heroes) > 1] + (" far away" if scene.far else "")
    where = PLACES[scene.place]
    return template.format(who=who, does=does, where=where, Where=where.capitalize(), prop=PROPS[scene.prop])


def looks(hero: Hero) -> str:
    """A hero by looks: a fox in a red coat with a hat."""
    with_ = "glasses" if hero.accessory == "glasses" else f"a {hero.accessory}"
    return f"a {hero.species} in {'an' if hero.colour[0] in 'aeiou' else 'a'} {hero.colour} coat with {with_}"


def introduction(cast: tuple[Hero, ...]) -> str:
    return " ".join(f"{hero.name} is {looks(hero)}." for hero in cast)


def caption(scene: Scene) -> str:
    """What a picture shows, without names."""
    who = " and ".join(looks(hero) for hero in scene.heroes)
    text = _sentence(TEMPLATES[0], who[0].upper() + who[1:], scene)
    return f"{text} {SKIES[scene.sky]}".strip()


# ---- reading text back ----


@dataclass(frozen=True)
class ParsedText:
    """What a text says of a picture."""

    names: tuple[str, ...] = ()
    heroes: tuple[tuple[str, str, str], ...] = ()
    action: str = ""
    place: str = ""
    prop: str = ""
    sky: str = "day"
    far: bool = False


def expected_facts(scene: Scene) -> ParsedText:
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
    """The facts of a text in the world's grammar, or None if it is not in it."""
    text = text.strip()
    introduced = []
    while match := _INTRODUCTION.match(text):
        introduced.append(match.groups()[1:])
        text = text[match.end() :].strip()
    for pattern in _PATTERNS:
        if match := pattern.match(text):
            rest = text[match.end() :].strip()
            if rest and rest not in _SKY:
                return None
            who, does = match["who"], match["does"]
            action = next(name for name, forms in ACTIONS.items() if does in forms)
            shown = tuple(re.findall(_LOOK, who))
            names = () if shown else tuple(who.split(" and "))
            if does != ACTIONS[action][max(len(names), len(shown)) > 1]:
                return None
            return ParsedText(
                names,
                shown or tuple(introduced),
                action,
                _key(PLACES, match["where"].lower()),
                _key(PROPS, match["prop"]),
                _SKY.get(rest, "day"),
                bool(match["far"]),
            )
    return None


def _key(table: dict[str, str], value: str) -> str:
    return next(key for key, said in table.items() if said == value)


def words() -> set[str]:
    """Every word that the world's texts use, in lower case."""
    said = [*NAMES, *SPECIES, *COLOURS, *ACCESSORIES, *PLACES.values(), *PROPS.values(), *SKIES.values(), *TEMPLATES]
    said += [form for forms in ACTIONS.values() for form in forms]
    said += ["is", "a", "an", "in", "coat", "with", "and", "far", "away"]
    return set(re.findall(r"[a-z]+", " ".join(said).lower())) - {"who", "does", "where", "prop"}


def questions(scene: Scene) -> list[tuple[str, str]]:
    """What can be asked of a picture, with the answers; of the looks only where one hero is alone."""
    asked = [
        ("Where is it?", PLACES[scene.place].capitalize() + "."),
        ("What is there?", PROPS[scene.prop].capitalize() + "."),
        (
            "What happens?",
            f"{'They' if len(scene.heroes) > 1 else 'Someone'} {ACTIONS[scene.action][len(scene.heroes) > 1]}.",
        ),
    ]
    if len(scene.heroes) == 1:
        (hero,) = scene.heroes
        worn = hero.accessory if hero.accessory == "glasses" else f"a {hero.accessory}"
        asked += [
            ("Who is it?", f"A {hero.species}."),
            ("Which colour is the coat?", hero.colour.capitalize() + "."),
            ("What is worn?", worn.capitalize() + "."),
        ]
    else:
        asked.append(("Who is it?", " and ".join(f"a {hero.species}" for hero in scene.heroes).capitalize() + "."))
    return asked
