"""Stories of the starter: each text beside its own picture, one hero whatever the opening, stopped and gone on with."""

import json
import random

import pytest
import torch
from PIL import Image

from comfy_mminterleaved import ImageSegment, MMInterleavedPipeline, Story
from comfy_mminterleaved.generation.ranking import looks
from comfy_mminterleaved.stories.page import load_story, save_story
from starter_training import renderer, world


@pytest.fixture(scope="module")
def starter():
    return MMInterleavedPipeline.load("starter", "cpu")


def scene_picture(seed, heroes=1):
    """A picture of heroes of the world, as somebody else's story might have drawn it."""
    page = world.make_story(seed, held_out=True, heroes=heroes)[0]
    return page, ImageSegment.of(Image.fromarray(renderer.paint(page.scene)))


def facts(text):
    found = world.parse(text)
    return found and (found.place, found.prop, found.action)


def agreement(model, story):
    """Of the panels with a text in the world's words, how many show what it says, by the model's own caption."""
    right = []
    for panel in story.panels():
        said = facts(panel.text)
        if said is not None and panel.image is not None:
            seen = facts(model.caption(Story.of(panel.image))[0].text)
            right.append(said == seen)
    return right


def openings():
    page, picture = scene_picture(70_004)
    plain = world.describe(page.scene, random.Random(0))
    return {
        "text only": Story.of("Mia is a fox in a red coat with a crown. Mia jumps on the beach with a ball."),
        "picture only": Story.of(picture),
        "picture, text": Story.of(picture, plain),
        "text, picture": Story.of(plain, picture),
        "unknown words": Story.of("Alice found an old map.", picture),
        "a photograph": Story.of(ImageSegment.of(Image.effect_noise((96, 96), 90).convert("RGB"))),
    }


def told_openings(model, image_first, names=None):
    for number, (name, opening) in enumerate(openings().items()):
        if names is not None and name not in names:
            continue
        settings = (
            c.with_seed_offset(7 * number) for c in (model.generation_config.text, model.generation_config.image)
        )
        told = model.generate_story(opening, 3, image_first, *settings)
        assert len(told.images) == len(opening.images) + 3
        assert all(panel.text for panel in told.panels() if panel.image is not None), name
        yield told


def test_each_text_stands_beside_its_own_picture(starter, tmp_path):
    """Case 1. At least nine of ten in all; measured over four times as many: 110 of 112."""
    right = []
    for told in told_openings(starter, None):
        right += agreement(starter, told)
    save_story(tmp_path, told)
    again = starter.generate_story(load_story(tmp_path), 3)
    assert [p.digest for p in again.images[:4]] == [p.digest for p in told.images]
    right += agreement(starter, again)
    assert len(right) >= 20 and sum(right) >= 0.9 * len(right), (sum(right), len(right))


def test_picture_first_too_the_text_is_of_its_own_picture_and_not_of_the_next(starter, pytestconfig):
    """The starter is weaker there: 96 of 112. A text one page off agrees with next to none."""
    own, next_page = [], []
    names = None if pytestconfig.getoption("--long") else ("text only", "picture only", "picture, text")
    for told in told_openings(starter, True, names):
        own += agreement(starter, told)
        panels = told.panels()
        shifted = [panel for a, b in zip(panels, panels[1:]) for panel in (b.image, a.text)]
        next_page += agreement(starter, Story(image_first=True).add(*shifted))
    assert sum(own) / len(own) > 0.6 > 0.2 > sum(next_page) / len(next_page), (own, next_page)


def test_an_opening_picture_is_introduced_in_the_text(starter):
    page, picture = scene_picture(70_004)
    (hero,) = page.scene.heroes
    story = starter.introduce(starter_order(starter, Story.of(picture, "Mia waves by the lake with a kite.")))
    assert story.text == f"Mia is {world.looks(hero)}. Mia waves by the lake with a kite."
    assert starter.introduce(story).text == story.text  # once is enough
    alone = starter.introduce(starter_order(starter, Story.of(picture)))
    said = world.parse(alone.text)
    assert said.heroes == (hero.look,) and (said.place, said.prop) == (page.scene.place, page.scene.prop)
    named = starter.introduce(starter_order(starter, Story.of("Otto found an old map.", picture)))
    assert named.text.startswith(f"Otto is {world.looks(hero)}. Otto ")
    assert named.text.endswith(". Otto found an old map.")
    told = f"Mia is {world.looks(hero)}. Mia runs in the snow with a drum."
    assert starter.introduce(Story.of(told, picture)).text == told
    assert starter.introduce(Story.of("Mia waves.")).text == "Mia waves."


def test_those_whom_only_images_show_are_introduced_by_them(starter):
    """By the first image whose text names them; who is described, or not shown, is left alone."""
    page, picture = scene_picture(70_004, heroes=2)
    left, right = (world.looks(hero) for hero in page.scene.heroes)
    story = starter.encode_images(Story.of("Otto and Mia wave in the snow.", picture, "Mia runs."))
    starter.text.prefill(story)
    cache = starter.text.cache
    introduced = starter.text.introduce_named(story)
    assert introduced.segments[1:] == story.segments and starter.text.cache is cache
    assert introduced.segments[0].text == f"Mia is {right}."
    assert looks(introduced) == right[0].upper() + right[1:]
    for opening, last, sentences in (
        (f"Mia is {left}. Mia and Otto wave.", "Otto and Mia run.", f"Otto is {right}."),  # Mia is described
        ("Otto and Mia wave.", "Mia is happy.", f"Mia is {right}."),
        ("Otto and Mia wave.", "Mia and Otto run.", f"Otto is {left}. Mia is {right}."),
        ("Otto, Mia and Leo wave.", "Leo and Otto run.", f"Otto is {left}."),  # an image introduces two
    ):
        story = starter.encode_images(Story.of(opening, picture, last))
        assert starter.text.introduce_named(story).segments[0].text == sentences
    for left_alone in (
        Story.of("Mia is a fox in a red coat with a hat. Mia waves.", picture, "Mia runs."),
        Story.of("Otto waves in the snow.", picture, "Mia runs."),
        Story.of(picture, "Otto waves in the snow.", picture, "Otto is a bear."),
        Story.of("Otto waves in the snow.", picture),
        Story.of("Mia runs."),
    ):
        left_alone = starter.encode_images(left_alone)
        assert starter.text.introduce_named(left_alone) is left_alone


def starter_order(model, story):
    return story.arrange(model.text.resolve_image_first(story))


def test_a_model_without_introductions_writes_the_text_of_an_opening_picture(tiny_random, pictures):
    story = tiny_random.introduce(Story((pictures[0],), image_first=False))
    assert story.text and isinstance(story.segments[1], ImageSegment)
    first = Story((pictures[0],), image_first=True)
    assert tiny_random.introduce(first).text == ""  # its text comes by the plan


@pytest.mark.parametrize("opening, stop", [("text", "picture"), ("text", "text"), ("picture", "picture")])
@pytest.mark.parametrize("image_first", [False, True])
def test_stopped_and_gone_on_with_is_never_stopped(starter, tmp_path, opening, stop, image_first):
    """Case 5, to the pixel: seeds, settings and states are those of the story told at once."""
    from dataclasses import replace

    page, picture = scene_picture(70_004)
    begun = Story.of("Mia waves in the village with a kite." if opening == "text" else picture)
    text = replace(starter.generation_config.text, seed=3)
    image = replace(starter.generation_config.image, seed=3, num_inference_steps=2)
    starter.clear_cache()
    whole = starter.generate_story(begun, 3, image_first, text, image)

    class Stop(Exception):
        pass

    def watch(story):
        save_story(tmp_path, story)
        kind = "picture" if isinstance(story.segments[-1], ImageSegment) else "text"
        if len(story.images) == len(begun.images) + 2 and kind == stop:
            raise Stop

    if (stop, image_first) == ("text", False):  # the third text, before its picture

        def watch(story):
            save_story(tmp_path, story)
            if len(story.images) == 2 and not isinstance(story.segments[-1], ImageSegment):
                raise Stop

    starter.clear_cache()
    with pytest.raises(Stop):
        starter.generate_story(begun, 3, image_first, text, image, on_segment=watch)
    starter.clear_cache()
    part = load_story(tmp_path)
    left = 3 + len(begun.images) - len(part.images)
    again = starter.generate_story(part, left, None, text, image, introduce=False)
    assert [p.text for p in again.panels()] == [p.text for p in whole.panels()]
    assert [p.digest for p in again.images] == [p.digest for p in whole.images]


def test_reading_depends_on_the_story_alone(starter):
    """To the bit, whatever was read before."""
    page, picture = scene_picture(70_004)
    written = starter.generate_text(Story.of("Mia waves.", picture))
    story = starter.encode_images(Story.of("Mia waves.", picture, written_text(written), picture))
    starter.clear_cache()
    starter.prefill(story)
    want = starter.context_features([story])[0]
    for before in (Story.of("Mia runs."), Story.of("Mia waves.", picture, "Otto sleeps."), story):
        starter.prefill(before)
        starter.prefill(story)
        assert torch.equal(starter.context_features([story])[0], want)


def written_text(written):
    from comfy_mminterleaved import TextSegment

    return TextSegment(written.text, written.tokens)


def test_ids_of_another_vocabulary_are_not_used(starter, tiny_random):
    from comfy_mminterleaved import TextSegment

    foreign = Story((TextSegment("Mia waves.", (700, 701, 9999)),))
    plain = Story.of("Mia waves.")
    assert starter.text.tokenize(foreign).input_ids == starter.text.tokenize(plain).input_ids
    ids = tuple(starter.tokenizer.encode("Mia waves."))
    told = Story((TextSegment("Mia waves.", ids),))
    assert starter.text.tokenize(told).input_ids == starter.text.tokenize(plain).input_ids
    assert json.dumps(foreign.to_json())
