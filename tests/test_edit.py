"""Single panels of a story: taken out, set, inserted, removed, moved."""

import pytest
import torch

from comfy_mminterleaved import ImageSegment, Story
from comfy_mminterleaved.errors import StoryError
from comfy_mminterleaved.stories.edit import arrange_panels, insert_panels, panel_of, set_panel


def image(value):
    return ImageSegment(torch.full((3, 8, 8), value / 10))


A, B, C = (image(n) for n in range(3))


@pytest.fixture(params=[False, True], ids=["text first", "image first"])
def story(request):
    parts = ("a", A, "b", B, "c", C) if not request.param else (A, "a", B, "b", C, "c")
    return Story(Story.of(*parts).segments, request.param)


def outline(story):
    return [(panel.text, panel.image) for panel in story.panels()]


def test_a_panel_is_taken_out(story):
    text, picture, before = panel_of(story, 2)
    assert (text, picture, outline(before)) == ("b", B, [("a", A)])
    assert before.image_first == story.image_first
    assert panel_of(story, 1)[2].segments == ()


def test_a_panel_is_set_and_others_stay_the_same_objects(story):
    new = image(9)
    assert outline(set_panel(story, 2, image=new)) == [("a", A), ("b", new), ("c", C)]
    assert outline(set_panel(story, 3, text="z")) == [("a", A), ("b", B), ("z", C)]
    assert outline(story) == [("a", A), ("b", B), ("c", C)]


def test_panels_are_moved_removed_and_inserted(story):
    assert outline(arrange_panels(story, [3, 1])) == [("c", C), ("a", A)]
    other = Story.of("x", image(7))
    texts = [text for text, _ in outline(insert_panels(story, other, 1))]
    assert texts == ["x", "a", "b", "c"]
    assert [text for text, _ in outline(insert_panels(story, other))] == ["a", "b", "c", "x"]
    assert insert_panels(story, other).is_image_first == story.image_first


def test_a_text_without_an_image_is_a_panel_too():
    story = Story.of("a", A, "b")
    assert panel_of(story, 2)[:2] == ("b", None)
    assert outline(set_panel(story, 2, image=B)) == [("a", A), ("b", B)]


@pytest.mark.parametrize("number", [0, 4, -1])
def test_a_panel_that_is_not_there(story, number):
    for change in (panel_of, lambda s, n: set_panel(s, n, "x"), lambda s, n: arrange_panels(s, [1, n])):
        with pytest.raises(StoryError, match=f"The story has 3 panels; there is no panel {number}."):
            change(story, number)
