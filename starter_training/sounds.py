"""Forty sounds of the picture-book world, made from noise, tones and filters: no recordings, deterministic by seed.

Four skies, twelve places, sixteen species, eight props. Each draws its pitches, rates and filters anew; training never
draws from the middle fifth of a range, which is kept for evaluation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np

RATE = 16_000
SECONDS = 2.0
SAMPLES = int(RATE * SECONDS)
HELD_OUT = (0.4, 0.6)  # of each parameter's range


class Knobs:
    """Draws the parameters of one sound, each log-uniform in its range.

    Args:
        held_out: True draws from the middle of each range, False from the rest, None from all of it.
    """

    def __init__(self, seed: int | str, held_out: bool | None = None):
        self.rng, self.held_out = random.Random(f"sound {seed}"), held_out
        self.noise = np.random.default_rng(self.rng.randrange(2**32))

    def __call__(self, low: float, high: float) -> float:
        position = self.rng.random()
        start, end = HELD_OUT
        if self.held_out is True:
            position = start + position * (end - start)
        elif self.held_out is False:
            position *= 1 - (end - start)
            position += (end - start) * (position >= start)
        return low * (high / low) ** position

    def times(self, per_second: float, jitter: float = 0.3) -> list[float]:
        """Moments in seconds, about evenly spaced."""
        step, at, out = 1 / per_second, self.rng.random() / per_second, []
        while at < SECONDS:
            out.append(at)
            at += step * (1 + jitter * (2 * self.rng.random() - 1))
        return out

    def hiss(self, count: int = SAMPLES) -> np.ndarray:
        return self.noise.standard_normal(count)


# ---- parts ----


def clock(seconds: float = SECONDS) -> np.ndarray:
    return np.arange(int(seconds * RATE)) / RATE


def band(x: np.ndarray, low: float, high: float, slope: float = 0.25) -> np.ndarray:
    """Only what lies between two frequencies, with soft edges of `slope` octaves."""
    frequencies = np.fft.rfftfreq(len(x), 1 / RATE).clip(1)
    octaves = np.maximum(np.log2(low / frequencies), np.log2(frequencies / high)).clip(0)
    return np.fft.irfft(np.fft.rfft(x) * np.exp(-((octaves / slope) ** 2)), len(x))


def tone(frequency, seconds: float = SECONDS, harmonics=(1.0,)) -> np.ndarray:
    """A tone with harmonics up to 7.5 kHz; `frequency` in Hz, a number or an array over time."""
    t = clock(seconds)
    frequency = np.broadcast_to(frequency, t.shape)
    phase = 2 * math.pi * np.cumsum(frequency) / RATE
    return sum(a * np.sin(k * phase) * (k * frequency < 7500) for k, a in enumerate(harmonics, 1))


def saw(frequency, seconds: float = SECONDS, count: int = 24) -> np.ndarray:
    return tone(frequency, seconds, [1 / k for k in range(1, count + 1)])


def fade(x: np.ndarray, attack: float, decay: float) -> np.ndarray:
    """A rise over `attack` seconds and an exponential fall with time constant `decay`."""
    t = np.arange(len(x)) / RATE
    return x * np.minimum(t / attack, 1) * np.exp(-np.maximum(t - attack, 0) / decay)


def place_at(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Sounds that begin at their times."""
    out = np.zeros(SAMPLES)
    for at, part in parts:
        start = int(at * RATE)
        part = part[: SAMPLES - start]
        out[start : start + len(part)] += part
    return out


def glide(start: float, end: float, seconds: float) -> np.ndarray:
    return np.geomspace(start, end, len(clock(seconds)))


def formants(x: np.ndarray, *peaks: float) -> np.ndarray:
    """A voice's vowel: narrow bands around each peak."""
    return sum(band(x, peak / 1.1, peak * 1.1, 0.3) / k for k, peak in enumerate(peaks, 1))


# ---- skies ----


def day(k: Knobs) -> np.ndarray:
    chirps = []
    for at in k.times(k(3, 6)):
        low = k(2200, 3400)
        chirps.append((at, fade(tone(glide(low, low * k(1.3, 1.8), 0.09), 0.09), 0.01, 0.05)))
    return place_at(chirps)


def night(k: Knobs) -> np.ndarray:
    pitch, rate = k(4000, 5000), k(12, 20)
    crickets = (
        tone(pitch) * (np.sin(2 * math.pi * rate * clock()) > 0.2) * (np.sin(2 * math.pi * k(0.8, 1.6) * clock()) > 0)
    )
    owl = fade(tone(glide(k(380, 480), k(300, 370), 0.5), 0.5), 0.08, 0.2)
    return 0.4 * crickets + place_at([(k(0.3, 1.2), owl)])


def rain(k: Knobs) -> np.ndarray:
    drops = [(at, fade(tone(k(1500, 4000), 0.03), 0.001, 0.006)) for at in k.times(k(30, 60), 0.9)]
    return 0.5 * band(k.hiss(), k(700, 1200), k(5000, 7000)) + place_at(drops)


def snowfall(k: Knobs) -> np.ndarray:
    swell = 1 + 0.5 * np.sin(2 * math.pi * k(0.2, 0.5) * clock() + k(0.1, 6))
    return band(k.hiss(), k(150, 220), k(450, 650)) * swell


# ---- places ----


def beach(k: Knobs) -> np.ndarray:
    wave = np.clip(np.sin(2 * math.pi * k(0.4, 0.7) * clock() + k(0.1, 6)), 0, 1) ** 1.5
    return band(k.hiss(), k(250, 400), k(2500, 4000)) * (0.1 + wave)


def forest(k: Knobs) -> np.ndarray:
    leaves = 0.25 * band(k.hiss(), 2500, k(5000, 6500)) * (1 + 0.6 * np.sin(2 * math.pi * k(0.7, 1.4) * clock()))
    knock, start = k(700, 1100), k(0.2, 0.9)
    knocks = [(start + i / k(16, 22), fade(tone(knock, 0.04), 0.001, 0.01)) for i in range(10)]
    return leaves + place_at([(at, x) for at, x in knocks if at < SECONDS])


def meadow(k: Knobs) -> np.ndarray:
    pitch = k(180, 240) * (1 + 0.06 * np.sin(2 * math.pi * k(2, 4) * clock()))
    return saw(pitch, count=12) * (0.6 + 0.4 * np.sin(2 * math.pi * k(0.5, 1.2) * clock()))


def desert(k: Knobs) -> np.ndarray:
    centre = k(900, 1300)
    low, high = band(k.hiss(), centre * 0.8, centre, 0.1), band(k.hiss(), centre, centre * 1.5, 0.1)
    mix = 0.5 + 0.5 * np.sin(2 * math.pi * k(0.3, 0.6) * clock())
    return low * mix + high * (1 - mix)


def mountains(k: Knobs) -> np.ndarray:
    bells = []
    for at in k.times(k(1.5, 3), 0.6):
        pitch = k(500, 800)
        partials = sum(tone(pitch * r, 0.5) / (i + 1) for i, r in enumerate((1, 2.32, 3.85, 5.1)))
        bells.append((at, fade(partials, 0.002, 0.12)))
    return place_at(bells)


def city(k: Knobs) -> np.ndarray:
    motor = band(saw(k(45, 65)), 40, 400)
    pitch = k(350, 430)
    horn = saw(pitch, 0.35, 10) + saw(pitch * 1.26, 0.35, 10)
    return 0.8 * motor + 0.2 * band(k.hiss(), 100, 800) + place_at([(k(0.2, 0.6), horn), (k(1.1, 1.5), horn)])


def village(k: Knobs) -> np.ndarray:
    pitch = k(280, 360)
    bell = fade(sum(tone(pitch * r, 1.2) / (i + 1) for i, r in enumerate((0.5, 1, 1.2, 1.5, 2))), 0.005, 0.6)
    return place_at([(at, bell) for at in k.times(k(0.8, 1.2), 0.1)])


def snow(k: Knobs) -> np.ndarray:
    steps = [
        (at, fade(band(k.hiss(2400), k(900, 1300), k(3000, 4500)), 0.03, 0.05)) for at in k.times(k(1.8, 2.6), 0.1)
    ]
    return place_at(steps)


def lake(k: Knobs) -> np.ndarray:
    plunks = []
    for at in k.times(k(2, 4), 0.6):
        low = k(350, 600)
        plunks.append((at, fade(tone(glide(low, low * k(1.6, 2.2), 0.12), 0.12), 0.005, 0.05)))
    return place_at(plunks)


def castle(k: Knobs) -> np.ndarray:
    pitch, length = k(420, 520), k(0.16, 0.22)
    notes = [fade(saw(pitch * r, length * 1.5, 14), 0.02, 0.3) for r in (1, 1, 1.26, 1.5, 1.26, 1.5)]
    return place_at([(i * length * 1.4, note) for i, note in enumerate(notes) if i * length * 1.4 < SECONDS])


def camp(k: Knobs) -> np.ndarray:
    crackles = [(at, fade(k.hiss(300) * k(0.5, 2), 0.0005, 0.004)) for at in k.times(k(14, 24), 0.95)]
    return 0.25 * band(k.hiss(), 60, k(200, 300)) + place_at(crackles)


def fair(k: Knobs) -> np.ndarray:
    pitch, length = k(900, 1200), k(0.14, 0.2)
    tune = [k.rng.choice((1, 1.125, 1.26, 1.5, 1.68)) for _ in range(16)]
    notes = [fade(tone(pitch * r, 0.4, (1, 0, 0.4, 0.2)), 0.002, 0.15) for r in tune]
    return place_at([(i * length, note) for i, note in enumerate(notes) if i * length < SECONDS])


# ---- species ----


def _call(k: Knobs, per_second: float, make: Callable[[], np.ndarray]) -> np.ndarray:
    return place_at([(at, make()) for at in k.times(per_second, 0.15)])


def bear(k: Knobs) -> np.ndarray:
    pitch = k(70, 90)
    return _call(k, 0.8, lambda: fade(formants(saw(pitch * (1 + 0.1 * k.hiss(RATE)), 1.0), 300, 600), 0.2, 0.4))


def fox(k: Knobs) -> np.ndarray:
    low = k(700, 900)
    return _call(k, k(2.2, 3), lambda: fade(formants(saw(glide(low * 1.6, low, 0.15), 0.15), 1400, 2600), 0.01, 0.07))


def cat(k: Knobs) -> np.ndarray:
    low, length = k(450, 600), k(0.6, 0.8)

    def meow() -> np.ndarray:
        pitch = np.concatenate([glide(low, low * 1.4, length * 0.4), glide(low * 1.4, low * 0.9, length * 0.6)])
        pitch = np.resize(pitch, len(clock(length)))
        return fade(formants(saw(pitch, length), 900, 1800, 3000), 0.12, 0.35)

    return _call(k, 1.0, meow)


def dog(k: Knobs) -> np.ndarray:
    low = k(250, 350)
    return _call(k, k(2.5, 3.5), lambda: fade(formants(saw(glide(low * 1.5, low, 0.14), 0.14), 700, 1200), 0.008, 0.06))


def rabbit(k: Knobs) -> np.ndarray:
    return _call(k, k(5, 8), lambda: fade(band(k.hiss(640), k(250, 350), 700), 0.004, 0.015))


def panda(k: Knobs) -> np.ndarray:
    pitch = k(280, 340)
    bleat = 1 + 0.15 * np.sign(np.sin(2 * math.pi * 24 * clock(0.7)))
    return _call(k, 1.1, lambda: fade(formants(saw(pitch * bleat, 0.7), 700, 1700), 0.05, 0.4))


def koala(k: Knobs) -> np.ndarray:
    pitch = k(32, 42)
    return _call(k, k(1.3, 1.7), lambda: fade(band(saw(pitch, 0.45, 60), 150, 1500), 0.15, 0.2))


def lion(k: Knobs) -> np.ndarray:
    high = k(160, 200)
    return _call(k, 0.6, lambda: fade(formants(saw(glide(high, high * 0.45, 1.4), 1.4, 40), 400, 900, 2200), 0.25, 0.6))


def tiger(k: Knobs) -> np.ndarray:
    pitch = k(110, 140)
    rough = 0.5 + 0.5 * np.sign(np.sin(2 * math.pi * k(38, 50) * clock(0.9)))
    return _call(k, 0.9, lambda: fade(formants(saw(pitch, 0.9, 40) * rough, 500, 1300), 0.3, 0.4))


def pig(k: Knobs) -> np.ndarray:
    pitch = k(130, 170)
    return _call(k, k(2.6, 3.6), lambda: fade(band(saw(pitch, 0.2, 30) + 2 * k.hiss(3200), 500, 2000), 0.02, 0.1))


def monkey(k: Knobs) -> np.ndarray:
    low = k(500, 650)
    return _call(k, k(3.5, 5), lambda: fade(tone(glide(low, low * 2.2, 0.16), 0.16, (1, 0.3)), 0.03, 0.12))


def mouse(k: Knobs) -> np.ndarray:
    high = k(5200, 6200)
    return _call(k, k(3, 5), lambda: fade(tone(glide(high * 0.85, high, 0.07), 0.07), 0.01, 0.04))


def frog(k: Knobs) -> np.ndarray:
    pitch, croak = k(300, 400), k(28, 38)
    gate = (np.sin(2 * math.pi * croak * clock(0.4)) > 0.3).astype(float)
    return _call(k, k(1.6, 2.2), lambda: fade(saw(pitch, 0.4, 12) * gate, 0.02, 0.3))


def cow(k: Knobs) -> np.ndarray:
    pitch = k(140, 180)
    return _call(k, 0.7, lambda: fade(formants(saw(glide(pitch * 0.8, pitch, 1.2), 1.2), 350, 800), 0.3, 0.7))


def wolf(k: Knobs) -> np.ndarray:
    low = k(330, 420)
    rise = np.concatenate([glide(low, low * 1.9, 0.5), np.full(int(0.9 * RATE), low * 1.9)])
    return _call(k, 0.6, lambda: fade(tone(rise, len(rise) / RATE, (1, 0.25, 0.1)), 0.2, 1.0))


def raccoon(k: Knobs) -> np.ndarray:
    pitch = k(900, 1200)
    trill = 1 + 0.25 * np.sin(2 * math.pi * k(26, 34) * clock(0.6))
    return _call(k, 1.4, lambda: fade(tone(pitch * trill, 0.6, (1, 0.5, 0.3)), 0.05, 0.3))


# ---- props ----


def drum(k: Knobs) -> np.ndarray:
    low = k(90, 130)
    return _call(k, k(3, 5), lambda: fade(tone(glide(low * 2, low, 0.2), 0.2) + 0.2 * k.hiss(3200), 0.002, 0.06))


def trumpet(k: Knobs) -> np.ndarray:
    pitch = k(300, 380) * (1 + 0.015 * np.sin(2 * math.pi * 5.5 * clock(0.8)))
    return _call(k, 1.1, lambda: fade(saw(pitch, 0.8, 20), 0.06, 1.0))


def guitar(k: Knobs) -> np.ndarray:
    """Karplus-Strong: a burst of noise in a delay line that averages."""

    def pluck() -> np.ndarray:
        period = int(RATE / (k(110, 150) * k.rng.choice((1, 1.26, 1.5, 2))))
        line, out = k.hiss(period), []
        for _ in range(RATE // 2 // period + 1):
            out.append(line)
            line = 0.498 * (line + np.roll(line, 1))
        return np.concatenate(out)

    return _call(k, k(3, 5), pluck)


def bicycle(k: Knobs) -> np.ndarray:
    pitch = k(2400, 3000)

    def ring() -> np.ndarray:
        strokes = [(i * 0.04, fade(tone(pitch, 0.5) + tone(pitch * 1.51, 0.5), 0.001, 0.15)) for i in range(6)]
        return place_at(strokes)[: int(0.7 * RATE)]

    return _call(k, 1.1, ring)


def ball(k: Knobs) -> np.ndarray:
    bounces, at, gap = [], 0.0, k(0.4, 0.6)
    while at < SECONDS and gap > 0.03:
        bounces.append((at, fade(tone(k(180, 240), 0.1, (1, 0.3)), 0.001, 0.025)))
        at, gap = at + gap, gap * 0.78
    return place_at(bounces)


def rocket(k: Knobs) -> np.ndarray:
    return band(k.hiss(), k(60, 100), k(1200, 1800)) * np.linspace(0.2, 1, SAMPLES) + 0.3 * tone(
        glide(200, k(900, 1400), SECONDS)
    )


def kite(k: Knobs) -> np.ndarray:
    flap = 0.5 + 0.5 * np.sign(np.sin(2 * math.pi * k(9, 14) * clock()))
    return band(k.hiss(), k(350, 500), k(1600, 2200)) * (0.15 + flap)


def book(k: Knobs) -> np.ndarray:
    return _call(k, k(1.2, 1.8), lambda: fade(band(k.hiss(4800), k(2000, 2600), 7000) * glide(0.2, 1, 0.3), 0.15, 0.06))


SOUNDS: dict[str, dict[str, Callable[[Knobs], np.ndarray]]] = {
    "sky": {f.__name__: f for f in (day, night, rain, snowfall)},
    "place": {
        f.__name__: f for f in (beach, forest, meadow, desert, mountains, city, village, snow, lake, castle, camp, fair)
    },
    "species": {
        f.__name__: f
        for f in (bear, fox, cat, dog, rabbit, panda, koala, lion, tiger, pig, monkey, mouse, frog, cow, wolf, raccoon)
    },
    "prop": {f.__name__: f for f in (drum, trumpet, guitar, bicycle, ball, rocket, kite, book)},
}
NAMES = tuple((kind, name) for kind, sounds in SOUNDS.items() for name in sounds)


def make_sound(kind: str, name: str, seed: int | str, held_out: bool | None = None, snr: float = 30.0) -> np.ndarray:
    """A sound of the world: float32 `(SAMPLES,)` at 16 kHz, peak 0.8 at most, with hiss `snr` dB below it."""
    knobs = Knobs(f"{kind} {name} {seed}", held_out)
    x = SOUNDS[kind][name](knobs)
    x = x / max(1e-9, math.sqrt(float((x**2).mean())))
    x = x + knobs.hiss() * 10 ** (-snr / 20)
    return (0.8 * x / np.abs(x).max()).astype(np.float32)
