"""Renders scenes of the picture-book world as SVG and as pixels.

A scene has a sky, a horizon, a place and a ground; heroes with a drawn body, so that coats and poses show, under a head
from an icon set; and a prop beside them. Everything in a text is visible, and only exact positions are random.
"""

from __future__ import annotations

import functools
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .world import Hero, Scene

SIDE = 128
ART = Path(__file__).parent / "art" / "fluent-emoji-flat.json"

FUR = {
    "bear": "#A56953",
    "fox": "#FF822D",
    "cat": "#FFB02E",
    "dog": "#F3AD61",
    "rabbit": "#CDC4D6",
    "panda": "#433B6B",
    "koala": "#998EA4",
    "lion": "#FFB02E",
    "tiger": "#FF822D",
    "pig": "#FF8687",
    "monkey": "#7D4533",
    "mouse": "#CDC4D6",
    "frog": "#00D26A",
    "cow": "#FFFFFF",
    "wolf": "#9B9B9B",
    "raccoon": "#9B9B9B",
}
HEAD_ICONS = {name: name for name in FUR} | {
    name: f"{name}-face" for name in ("cat", "dog", "rabbit", "tiger", "pig", "monkey", "mouse", "cow")
}
COAT_COLOURS = {  # the coat and its hem
    "red": ("#E8222F", "#A8101F"),
    "orange": ("#FF8A1F", "#C65F00"),
    "yellow": ("#FFD93B", "#D9A400"),
    "green": ("#2FA84A", "#177332"),
    "blue": ("#2B7DE9", "#1553A8"),
    "purple": ("#9146D8", "#6423A3"),
}
PROP_ICONS = {
    "balloon": "balloon",
    "kite": "kite",
    "gift": "wrapped-gift",
    "cake": "birthday-cake",
    "apple": "red-apple",
    "book": "closed-book",
    "guitar": "guitar",
    "drum": "drum",
    "bicycle": "bicycle",
    "tulip": "tulip",
    "mushroom": "mushroom",
    "pumpkin": "jack-o-lantern",
    "teddy": "teddy-bear",
    "ball": "soccer-ball",
    "bucket": "bucket",
    "melon": "watermelon",
    "trumpet": "trumpet",
    "lollipop": "lollipop",
    "rocket": "rocket",
    "umbrella": "umbrella",
}
ACCESSORY_SVG = {"hat": "top-hat", "crown": "crown", "bow": "ribbon", "glasses": "sunglasses", "flower": "hibiscus"}
SCENERY = (
    "palm-tree",
    "umbrella-on-ground",
    "evergreen-tree",
    "deciduous-tree",
    "sunflower",
    "blossom",
    "cactus",
    "rock",
    "office-building",
    "house",
    "house-with-garden",
    "snowman",
    "sailboat",
    "castle",
    "tent",
    "wood",
    "ferris-wheel",
    "circus-tent",
    "crescent-moon",
    "sun",
    "cloud",
)
HORIZON = 70


@functools.cache
def _icons() -> dict[str, str]:
    return json.loads(ART.read_text(encoding="utf-8"))["icons"]


def icon(name: str, x: float, y: float, size: float, flip: bool = False) -> str:
    """Places an icon, `size` wide, with its bottom centre at (x, y)."""
    scale = size / 32
    mirrored = f"translate({x + size / 2:.2f} {y - size:.2f}) scale({-scale:.4f} {scale:.4f})"
    upright = f"translate({x - size / 2:.2f} {y - size:.2f}) scale({scale:.4f})"
    return f'<g transform="{mirrored if flip else upright}">{_icons()[name]}</g>'


def _rect(x, y, w, h, fill, more="") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" {more}/>'


def _oval(x, y, rx, ry, fill, more="") -> str:
    return f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="{fill}" {more}/>'


def _line(x1, y1, x2, y2, colour, width) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" '
        'stroke-linecap="round"/>'
    )


# ---- places ----

SKY = {"day": "#9ED8F5", "night": "#27336B", "rain": "#8FA3B5", "snowfall": "#B9CBDD"}
GROUND = {
    "beach": "#F6DC9B",
    "forest": "#4C9A4A",
    "meadow": "#8FD05A",
    "desert": "#F0B45F",
    "mountains": "#79B35F",
    "city": "#9A9CA6",
    "village": "#A7CE6B",
    "snow": "#EEF4FA",
    "lake": "#84C46A",
    "castle": "#7CC071",
    "camp": "#5FA35A",
    "fair": "#C9D97A",
}


def _hills(colour: str, rng: random.Random, height: float) -> str:
    x = rng.uniform(20, 60)
    return _oval(x, HORIZON + 6, 55, height, colour) + _oval(x + 70, HORIZON + 8, 60, height * 0.8, colour)


def _row(name: str, rng: random.Random, count: int, size: float, y: float, jitter: float = 5) -> str:
    step = SIDE / count
    return "".join(
        icon(
            name,
            (i + 0.5) * step + rng.uniform(-jitter, jitter),
            y + rng.uniform(-1.5, 1.5),
            size * rng.uniform(0.88, 1.12),
        )
        for i in range(count)
    )


def _place(scene: Scene, rng: random.Random) -> str:
    """Draws the place, from the horizon to the ground."""
    ground = _rect(0, HORIZON, SIDE, SIDE - HORIZON, GROUND[scene.place])
    side = rng.choice((-1, 1))
    x = 64 + side * rng.uniform(28, 42)
    y = HORIZON
    match scene.place:
        case "beach":
            sea = _rect(0, y - 14, SIDE, 20, "#3E9FDC") + _rect(0, y - 8, SIDE, 2, "#7CC3EA")
            return (
                ground
                + sea
                + icon("palm-tree", x, y + 14, 58, side > 0)
                + icon("umbrella-on-ground", 128 - x, y + 16, 26)
            )
        case "forest":
            back = _row("deciduous-tree", rng, 6, 42, y + 3)
            return _hills("#3B7F3F", rng, 20) + ground + back + _row("evergreen-tree", rng, 5, 48, y + 10)
        case "meadow":
            flowers = _row("sunflower", rng, 7, 17, y + 9) + _row("blossom", rng, 6, 12, y + 17)
            return _hills("#74BC4A", rng, 24) + ground + flowers
        case "desert":
            dunes = _hills("#DE9A48", rng, 16)
            return dunes + ground + icon("cactus", x, y + 12, 40) + icon("cactus", 128 - x, y + 4, 24)
        case "mountains":
            peaks = ""
            for px, top, half in ((24, 18, 42), (104, 24, 40), (66, 8, 46)):
                px += rng.uniform(-6, 6)
                peaks += f'<path d="M{px - half} {y + 2}L{px} {top}L{px + half} {y + 2}Z" fill="#7A7F94"/>'
                cap = (y + 2 - top) * 0.28
                w = half * 0.28
                snow = f"M{px - w} {top + cap}L{px} {top}L{px + w} {top + cap}L{px} {top + cap * 0.8}Z"
                peaks += f'<path d="{snow}" fill="#FFF"/>'
            return peaks + ground + icon("rock", x, y + 13, 24)
        case "city":
            blocks = "".join(
                _rect(bx, y - h, 17, h + 2, c)
                for bx, h, c in zip(range(0, 128, 18), rng.sample(range(26, 56), 8), ["#5E6F92", "#7587AD"] * 4)
            )
            street = _rect(0, y + 26, SIDE, 3, "#E9E5CF", 'opacity=".8"')
            return (
                blocks
                + ground
                + street
                + icon("office-building", x, y + 5, 46)
                + icon("office-building", 128 - x, y + 3, 38)
            )
        case "village":
            houses = (
                icon("house", x, y + 9, 42) + icon("house-with-garden", 128 - x, y + 6, 38) + icon("house", 64, y, 26)
            )
            return _hills("#8CBB55", rng, 22) + ground + houses
        case "snow":
            trees = _row("evergreen-tree", rng, 5, 34, y + 4)
            return _hills("#D7E3EF", rng, 22) + ground + trees + icon("snowman", x, y + 18, 34)
        case "lake":
            water = _oval(64, y + 13, 62, 15, "#4BA7DE") + _oval(64, y + 11, 50, 9, "#6FBCE8")
            return (
                _hills("#63AC55", rng, 24)
                + ground
                + water
                + icon("sailboat", 64 - side * rng.uniform(16, 34), y + 15, 26)
            )
        case "castle":
            return _hills("#67AC5F", rng, 18) + ground + icon("castle", 64 + rng.uniform(-14, 14), y + 10, 68)
        case "camp":
            trees = _row("evergreen-tree", rng, 6, 38, y + 3)
            return trees + ground + icon("tent", x, y + 16, 44, side < 0) + icon("wood", 128 - x, y + 18, 20)
        case "fair":
            wheel = icon("ferris-wheel", x, y + 8, 60)
            return _hills("#AFC463", rng, 14) + ground + wheel + icon("circus-tent", 128 - x, y + 10, 46)
    raise ValueError(scene.place)


def _above(scene: Scene, rng: random.Random) -> str:
    """Draws sun, moon, stars and clouds."""
    x = rng.uniform(18, 110)
    if scene.sky == "night":
        stars = "".join(_oval(rng.uniform(3, 125), rng.uniform(3, 45), 0.9, 0.9, "#FFF6CF") for _ in range(22))
        return stars + icon("crescent-moon", x, 32, 22)
    if scene.sky == "day":
        return icon("sun", x, 27, 23) + icon("cloud", 128 - x, 29, 26)
    return icon("cloud", x, 26, 34) + icon("cloud", (x + 55) % 128, 32, 40)


def _weather(scene: Scene, rng: random.Random) -> str:
    if scene.sky == "rain":
        drops = ((rng.uniform(0, 132), rng.uniform(-4, 124)) for _ in range(55))
        return f'<g opacity=".75">{"".join(_line(x, y, x - 2.2, y + 7, "#DCEBFA", 1.1) for x, y in drops)}</g>'
    if scene.sky == "snowfall":
        return "".join(_oval(rng.uniform(0, 128), rng.uniform(0, 128), 1.5, 1.5, "#FFF") for _ in range(60))
    return ""


# ---- heroes ----


def _limbs(action: str) -> tuple[tuple, tuple]:
    """Returns the ends of both arms and of both legs; shoulders are at +-(10, 27), hips at +-(5, 9)."""
    return {
        "wave": (((-16, -14), (19, -44)), ((-6, 0), (6, 0))),
        "jump": (((-20, -42), (20, -42)), ((-13, -4), (13, -4))),
        "sleep": (((-14, -15), (14, -15)), ((-5, 0), (5, 0))),
        "run": (((-19, -22), (17, -20)), ((-15, -3), (13, 0))),
        "sit": (((-15, -14), (15, -14)), ((-15, -2), (15, -2))),
        "dance": (((-20, -38), (19, -17)), ((-6, 0), (15, -9))),
    }[action]


def _hero(hero: Hero, action: str) -> str:
    """Draws a hero, about 66 units tall, with its feet at the origin."""
    fur, (coat, shade) = FUR[hero.species], COAT_COLOURS[hero.colour]
    (left_arm, right_arm), (left_leg, right_leg) = _limbs(action)
    legs = _line(-5, -9, *left_leg, fur, 6.5) + _line(5, -9, *right_leg, fur, 6.5)
    shoes = _oval(left_leg[0] - 1, left_leg[1], 4.6, 3, "#4A3A3A") + _oval(
        right_leg[0] + 1, right_leg[1], 4.6, 3, "#4A3A3A"
    )
    outline = "M-10 -32H10Q12 -32 13 -28L15 -9Q15 -6 12 -6H-12Q-15 -6 -15 -9L-13 -28Q-12 -32 -10 -32Z"
    body = f'<path d="{outline}" fill="{coat}"/>'
    body += _rect(-15, -11, 30, 4, shade, 'rx="2"') + _oval(0, -24, 1.4, 1.4, "#FFF") + _oval(0, -17, 1.4, 1.4, "#FFF")
    arms = _line(-10, -27, *left_arm, coat, 6.5) + _line(10, -27, *right_arm, coat, 6.5)
    paws = _oval(*left_arm, 3.6, 3.6, fur) + _oval(*right_arm, 3.6, 3.6, fur)
    head = icon(HEAD_ICONS[hero.species], 0, -29, 37)
    match hero.accessory:
        case "hat":
            accessory = icon("top-hat", 0, -55, 26)
        case "crown":
            accessory = icon("crown", 0, -56, 25)
        case "bow":
            accessory = icon("ribbon", 11, -49, 20)
        case "glasses":
            accessory = icon("sunglasses", 0, -36, 30)
        case "flower":
            accessory = icon("hibiscus", -12, -49, 18)
        case _:
            accessory = _rect(-13, -34, 26, 7, "#FFF4DC", 'rx="3.5"') + _rect(4, -30, 7, 16, "#FFF4DC", 'rx="2"')
            accessory += "".join(_rect(dx, -34, 2.6, 7, "#C9302C") for dx in (-9, -2)) + _rect(
                4, -20, 7, 2.6, "#C9302C"
            )
    return legs + shoes + body + arms + paws + head + accessory


def _posed(hero: Hero, action: str, x: float, y: float, scale: float) -> str:
    """Draws a hero in the pose of an action, feet or back on the ground at (x, y)."""
    figure = _hero(hero, action)
    shadow = _oval(x, y + 0.5, 17 * scale, 3.4 * scale, "#000", 'opacity=".22"')
    lift, turn, extra = 0.0, 0.0, ""
    if action == "jump":
        lift = -15
        extra = "".join(_line(dx, -3, dx, -9, "#FFF", 1.8) for dx in (-9, 0, 9))
    elif action == "sleep":
        shadow = _oval(x, y + 1, 33 * scale, 4 * scale, "#000", 'opacity=".22"')
        zs = "".join(
            f'<path d="M{a} {b}h{s}l-{s} {s}h{s}" stroke="#FFF" stroke-width="2" fill="none"/>'
            for a, b, s in ((2, -36, 5), (10, -46, 7), (20, -58, 9))
        )
        lying = f'<g transform="translate(-32 -15) rotate(-90) translate(0 64) scale(-1 1)">{figure}</g>'
        return shadow + f'<g transform="translate({x:.1f} {y:.1f}) scale({scale:.3f})">{lying}{zs}</g>'
    elif action == "run":
        turn = 9
        extra = _oval(-25, -4, 5, 3.6, "#FFF", 'opacity=".85"') + _oval(-33, -8, 3.6, 2.8, "#FFF", 'opacity=".7"')
    elif action == "sit":
        lift = 6
    elif action == "dance":
        turn = -7
        ink = "#2B2450"
        note = f'<path d="M0 0v-11l7 -2v11" stroke="{ink}" stroke-width="1.8" fill="none"/>'
        note += _oval(-1.6, 0, 2.6, 2, ink) + _oval(5.4, -2, 2.6, 2, ink)
        extra = "".join(f'<g transform="translate({a} {b})">{note}</g>' for a, b in ((24, -52), (-29, -58)))
    inner = f'<g transform="translate(0 {lift}) rotate({turn})">{figure}</g>{extra}'
    return shadow + f'<g transform="translate({x:.1f} {y:.1f}) scale({scale:.3f})">{inner}</g>'


@dataclass(frozen=True)
class Composition:
    """Layout of a scene: background and foreground as SVG, positions of the feet and sizes in px of 128."""

    background: str
    foreground: str
    heroes: tuple[tuple[float, float], ...]
    scale: float
    prop: tuple[float, float]
    prop_size: float
    ground: float


def compose(scene: Scene) -> Composition:
    """Lays out a scene."""
    rng = random.Random(scene.seed)
    parts = [_rect(0, 0, SIDE, SIDE, SKY[scene.sky]), _above(scene, rng), _place(scene, rng)]
    if scene.sky == "night":
        parts.append(_rect(0, 0, SIDE, SIDE, "#10194A", 'opacity=".38"'))
    elif scene.sky != "day":
        parts.append(_rect(0, 0, SIDE, SIDE, "#51617A", 'opacity=".16"'))

    two, lying = len(scene.heroes) > 1, scene.action == "sleep"
    y = rng.uniform(97, 101) if scene.far else rng.uniform(117, 121)
    scale = (0.82 if scene.far else 1.12) * (0.9 if two else 1) * (0.82 if lying and two else 1)
    direction = -1 if scene.left else 1
    if two:
        places = (
            [rng.uniform(27, 31), rng.uniform(69, 74)] if scene.left else [rng.uniform(54, 59), rng.uniform(97, 101)]
        )
        prop_x = rng.uniform(110, 114) if scene.left else rng.uniform(14, 18)
    else:
        places = [64 + direction * rng.uniform(14, 24)]
        prop_x = 64 - direction * rng.uniform(24, 32)
        if lying:
            places, prop_x = [64 + direction * rng.uniform(18, 22)], 64 - direction * rng.uniform(36, 42)
    size = (30 if scene.far else 38) * (0.86 if two else 1)
    flies = scene.prop in ("balloon", "kite")
    prop_y = y - rng.uniform(22, 34) if flies else y + 2
    heroes = []
    for i, x in enumerate(places):
        # Side by side, two lying heroes would not fit: one lies behind the other.
        dx, dy = ((64 - x) * 0.5, -22 * scale if i == 0 else 0) if lying and two else (0, 0)
        heroes.append((x + dx, y + dy))
    return Composition("".join(parts), _weather(scene, rng), tuple(heroes), scale, (prop_x, prop_y), size, y)


def bounding_boxes(scene: Scene) -> list[tuple[float, float, float, float]]:
    """Returns approximate boxes of the prop and then of each hero: (left, top, right, bottom) in px of 128."""
    layout = compose(scene)
    x, y = layout.prop
    boxes = [(x - layout.prop_size / 2, y - layout.prop_size, x + layout.prop_size / 2, y)]
    left, top, right = (-38, -34, 38) if scene.action == "sleep" else (-22, -96 if scene.action == "jump" else -82, 22)
    for x, y in layout.heroes:
        boxes.append(tuple(a + layout.scale * b for a, b in zip((x, y, x, y), (left, top, right, 3))))
    return boxes


def svg(scene: Scene) -> str:
    """Renders a scene as an SVG of 128 x 128 units."""
    layout = compose(scene)
    (x, y), size = layout.prop, layout.prop_size
    parts = [layout.background, _oval(x, layout.ground + 1, size * 0.36, 2.6, "#000", 'opacity=".2"')]
    parts.append(icon(PROP_ICONS[scene.prop], x, y, size))
    parts += [_posed(hero, scene.action, *feet, layout.scale) for hero, feet in zip(scene.heroes, layout.heroes)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}" width="{SIDE}" height="{SIDE}">'
        + "".join([*parts, layout.foreground])
        + "</svg>"
    )


def paint(scene: Scene, side: int = SIDE) -> np.ndarray:
    """Renders a scene to pixels, uint8 (side, side, 3); deterministic."""
    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg(scene), width=side, height=side))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
