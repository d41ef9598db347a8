import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("resvg_py")
from comfy_mminterleaved import ImageGenerationConfig
from comfy_mminterleaved.errors import CheckpointError
from comfy_mminterleaved.presets import STARTER_DIR
from starter_training import classifier, evaluate, targets, world
from starter_training.dataset import StoryDataset

FAST = ImageGenerationConfig(num_inference_steps=1, scheduler="ddim")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return StoryDataset(tmp_path_factory.mktemp("book"), 6)


@pytest.fixture(scope="module")
def trained(book):
    """The judge that ships: it is right about every drawing of these few stories."""
    shipped = classifier.load()
    assert classifier.accuracy(shipped, book)["all"] == 1.0
    return shipped


def true_pictures(stories):
    return [[evaluate.render_scene(page.scene) for page in pages[1:]] for pages in stories]


def test_a_judge_learns_what_it_is_shown(tmp_path):
    book = StoryDataset(tmp_path, 2)
    before = classifier.accuracy(classifier.train_classifier(book, steps=1, batch=8), book)
    trained = classifier.train_classifier(book, steps=60, batch=8)
    found = classifier.accuracy(trained, book)
    assert set(found) == {*targets.ATTRIBUTES, "all"} and found["all"] > 0.8 > 0.3 > before["all"], (before, found)
    classifier.save(trained, tmp_path / "classifier.safetensors")
    again = classifier.load(tmp_path / "classifier.safetensors")
    pictures = book.images(range(5))
    assert again.predict(pictures) == trained.predict(pictures)
    with pytest.raises(CheckpointError, match="There is no judge"):
        classifier.load(tmp_path / "none")
    with pytest.raises(
        CheckpointError, match="is no judge, or one of another size; python -m starter_training.classifier makes one.$"
    ):
        classifier.load(STARTER_DIR / "unet.safetensors")


def test_softened_drawings_are_the_same_ones_with_less_detail(book):
    def edges(pictures):
        return pictures.diff(dim=-1).abs().mean((1, 2, 3))

    pictures = book.images(range(20))
    assert torch.equal(classifier.random_blur(pictures, random.Random(0), 0.0), pictures)
    soft = classifier.random_blur(pictures, random.Random(0), 1.0)
    assert soft.shape == pictures.shape and soft.min() >= 0 and soft.max() <= 1
    assert (edges(soft) < edges(pictures)).all() and (soft - pictures).abs().mean() < 0.03
    some = classifier.random_blur(pictures, random.Random(0), 0.5)
    changed = (some != pictures).flatten(1).any(1)
    assert 4 <= changed.sum() <= 16


def test_the_judge_that_ships_knows_the_world(tmp_path):
    held_out = StoryDataset(tmp_path, 25, held_out=True)
    found = classifier.accuracy(classifier.load(), held_out)
    assert found["all"] > 0.85 and all(found[head] > 0.93 for head in targets.ATTRIBUTES)


def test_labels_say_all_of_a_scene():
    scene = world.make_story(1, heroes=2)[0].scene
    found = targets.attribute_labels(scene)
    assert found.keys() == targets.ATTRIBUTES.keys()
    assert targets.ATTRIBUTES["species1"][found["species1"]] == scene.heroes[1].species
    alone = targets.attribute_labels(replace(scene, heroes=scene.heroes[:1]))
    assert (
        targets.ATTRIBUTES["species1"][alone["species1"]] == targets.ABSENT and alone["species0"] == found["species0"]
    )


def test_true_drawings_pass_and_others_fail(trained, book):
    found = evaluate.evaluate_images(trained, book.stories, true_pictures(book.stories))
    assert all(f["share"] > 0.9 for f in found.values() if f["cases"])
    swapped = true_pictures(book.stories[1:] + book.stories[:1])
    swapped = [row[: len(pages) - 1] for row, pages in zip(swapped, book.stories)]
    stories = [pages[: len(row) + 1] for pages, row in zip(book.stories, swapped)]
    worse = evaluate.evaluate_images(trained, stories, swapped)
    assert all(f["share"] < 0.5 for f in worse.values() if f["cases"])


def test_identity_is_told_by_scene(trained, book):
    drawn = true_pictures(book.stories)
    drawn[0] = [torch.zeros_like(picture) for picture in drawn[0]]
    found = evaluate.evaluate_scenes(trained, book.stories, drawn)
    later = [page.scene for pages in book.stories for page in pages[1:]]
    panels = len(later)
    assert sum(f["cases"] for f in found["distance"].values()) == panels
    assert sum(f["cases"] for f in found["action"].values()) == panels
    assert sum(f["cases"] for f in found["species"].values()) == sum(len(scene.heroes) for scene in later)
    assert set(found["distance"]) <= {"near", "far"} and set(found["action"]) == {scene.action for scene in later}
    wrong = sum(f["cases"] - round(f["share"] * f["cases"]) for f in found["distance"].values())
    assert len(drawn[0]) <= wrong < 0.2 * panels + len(drawn[0])


def test_the_frechet_distance_is_nought_to_itself_and_grows(trained, book):
    pictures = list(book.images(range(len(book))))
    noisy = [(p + torch.randn_like(p) * 0.3).clamp(0, 1) for p in pictures]
    same, other = (evaluate.frechet_distance(trained, kind, pictures) for kind in (pictures, noisy))
    assert abs(same) < 1e-4 * other


def test_intervals():
    found = evaluate.bootstrap_interval([True] * 30 + [False] * 10)
    assert found["share"] == 0.75 and found["cases"] == 40 and 0.55 < found["low"] < 0.75 < found["high"] < 0.92
    assert evaluate.bootstrap_interval([])["cases"] == 0


def test_evaluated_stories_show_their_heroes_only_in_pictures():
    for pages in evaluate.held_out_stories(0, 10):
        assert not any(world.parse(page.text).heroes for page in pages)
        assert all(world.is_held_out_appearance(*hero.look) for page in pages for hero in page.scene.heroes)


def test_a_whole_evaluation_of_any_model(tiny_random, trained, tmp_path):
    """With random weights nothing is right, but every figure is there with its cases."""
    kept = [
        layer.llama_cross_attn.gate.clone() for layer in tiny_random.llm.layers if layer.llama_cross_attn is not None
    ]
    found = evaluate.evaluate(tiny_random, trained, seed=1, num_stories=2, steps=1, sheet=tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pages = evaluate.held_out_stories(1, 2)
        assert sheet.size == (180 + 128 * max(map(len, pages)), 2 * 5 * 132)
        first = np.asarray(sheet)[:, 180:308].reshape(10, -1)
    white = [number for number, row in enumerate(first) if row.min() == 255]
    assert white == [4, 9]  # where earlier pictures are hidden there is no first one
    assert set(found["pictures"]) == set(evaluate.ABLATIONS)
    panels = sum(len(pages) - 1 for pages in evaluate.held_out_stories(1, 2))
    for kind in evaluate.ABLATIONS:
        assert found["pictures"][kind]["place and prop"]["cases"] == panels
    assert found["captions"] == {"share": 0.0, "cases": 4, "low": 0.0, "high": 0.0}
    assert found["texts in the grammar"]["cases"] == 8 and found["texts in the grammar"]["share"] == 0
    assert found["frechet distance"] > 0
    assert sum(f["cases"] for f in found["same hero by scene"]["action"].values()) == panels
    gates = [layer.llama_cross_attn.gate for layer in tiny_random.llm.layers if layer.llama_cross_attn is not None]
    assert all(torch.equal(a, b) for a, b in zip(gates, kept))


@pytest.mark.parametrize(
    "arguments, said",
    [(["--stories", "0"], "stories must be at least 1, not 0"), (["--judge", "none"], "There is no judge 'none'")],
)
def test_bad_input_is_told_in_a_sentence(arguments, said, tmp_path, capsys):
    assert evaluate.main([*arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_judge_to_train_on_that_is_not_there(tmp_path, capsys):
    assert classifier.main(["--judge", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert "Error: There is no judge" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_hidden_pictures_are_not_looked_at(tiny_random):
    """The same text with other heroes in the first picture: hidden, the drawings are the same; else they differ."""
    pages = evaluate.held_out_stories(0, 1)[0][:2]
    other = [world.ScenePanel(replace(pages[0].scene, seed=5, place="desert"), pages[0].text), pages[1]]
    for hidden in (True, False):
        (a,), (b,) = (evaluate.generate_from_gold_text(tiny_random, [story], FAST, hidden) for story in (pages, other))
        assert torch.allclose(a[0], b[0], atol=1e-4) == hidden
