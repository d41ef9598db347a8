import random
from dataclasses import replace

import numpy as np
import pytest

from starter_training import world
from starter_training.world import make_story, parse

pytest.importorskip("resvg_py")
from starter_training import renderer


@pytest.mark.parametrize("held_out", [False, True])
def test_stories_are_what_they_promise(held_out):
    for seed in range(300):
        pages = make_story(seed, held_out)
        assert 3 <= len(pages) <= 6
        cast = {hero.look for page in pages for hero in page.scene.heroes}
        assert len(cast) <= 2 and cast == {hero.look for hero in pages[0].scene.heroes}
        assert all(world.is_held_out_appearance(*look) == held_out for look in cast)
        assert all(world.is_held_out_pair(page.scene.place, page.scene.prop) == held_out for page in pages)
        assert len({page.scene.place for page in pages}) == len({page.scene.prop for page in pages}) == len(pages)


def test_a_seed_is_a_story():
    assert make_story(5) == make_story(5) != make_story(6)
    assert make_story(5) != make_story(5, held_out=True)


def test_other_looks():
    rng = random.Random(0)
    for seed in range(100):
        scene = make_story(seed)[0].scene
        other = world.swap_appearance(scene, rng)
        assert [hero.name for hero in other.heroes] == [hero.name for hero in scene.heroes]
        assert all(a.look != b.look for a, b in zip(other.heroes, scene.heroes))
        assert len({hero.species for hero in other.heroes}) == len(scene.heroes)
        assert not any(world.is_held_out_appearance(*hero.look) for hero in other.heroes)
        assert replace(other, heroes=scene.heroes) == scene


def test_stories_of_all_combinations():
    looks = [hero.look for seed in range(100) for hero in make_story(seed, None)[0].scene.heroes]
    share = sum(world.is_held_out_appearance(*look) for look in looks) / len(looks)
    assert 0.04 < share < 0.25  # one in eight, as in the world


def test_looks_are_only_in_pictures_after_the_first_page():
    said = set(world.SPECIES) | set(world.COLOURS) | set(world.ACCESSORIES)
    introduced = 0
    for seed in range(300):
        first, *rest = (set(page.text.lower().replace(".", "").split()) for page in make_story(seed))
        introduced += bool(first & said)
        assert not any(words & said for words in rest)
    assert 70 < introduced < 130  # a third of the stories say them on the first page


def test_names_teach_nothing():
    looks = {}
    for seed in range(2000):
        for hero in make_story(seed)[0].scene.heroes:
            looks.setdefault(hero.name, set()).add(hero.species)
    assert all(len(species) > 12 for species in looks.values())


@pytest.mark.parametrize("template", world.TEMPLATES)
def test_every_text_reads_back(template):
    rng = random.Random(template)
    for seed in range(60):
        for page in make_story(seed):
            text = world.describe(page.scene, rng, template)
            facts, want = parse(text), world.expected_facts(page.scene)
            assert facts == replace(want, heroes=())
            shown = parse(world.caption(page.scene))
            assert shown == replace(want, names=())
        opening = make_story(seed)[0]
        assert parse(opening.text).names == tuple(hero.name for hero in opening.scene.heroes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mia.",
        "Mia waves on the moon with a kite.",
        "Mia and Otto waves on the beach with a kite.",
        "Mia waves on the beach with a kite. It is noon.",
        "Mia waves on the beach with a kite and a drum.",
        "mia waves on the beach with a kite.",
        "Mia waves on the beach.",
    ],
)
def test_what_is_not_in_the_grammar(text):
    assert parse(text) is None


def test_the_words_are_those_of_the_texts():
    texts = " ".join(page.text + " " + world.caption(page.scene) for seed in range(200) for page in make_story(seed))
    assert set(texts.lower().replace(".", "").replace(",", "").split()) == world.words()


def test_the_same_scene_is_the_same_picture_and_everything_shows():
    scene = make_story(3, heroes=1)[0].scene
    picture = renderer.paint(scene).astype(int)
    assert picture.shape == (128, 128, 3) and (picture == renderer.paint(scene)).all()
    hero = scene.heroes[0]

    def differs(**changes):
        return np.abs(renderer.paint(replace(scene, **changes)).astype(int) - picture).sum()

    for name, values in (("species", world.SPECIES), ("colour", world.COLOURS), ("accessory", world.ACCESSORIES)):
        for value in values:
            if value != getattr(hero, name):
                assert differs(heroes=(replace(hero, **{name: value}),)) > 3000, (name, value)
    for name, values in (("action", world.ACTIONS), ("place", world.PLACES), ("prop", world.PROPS)):
        for value in values:
            if value != getattr(scene, name):
                assert differs(**{name: value}) > 3000, (name, value)
    assert differs(far=not scene.far) > 3000 < differs(left=not scene.left)
    assert differs(heroes=(replace(hero, name="Zoe"),)) == 0
