"""The contrastive model, ranking by it, and its training and evaluation on the picture-book world."""

import json
import random
from dataclasses import replace

import pytest
import torch

from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryError
from comfy_mminterleaved.generation.ranking import ContrastiveScorer, rank_images, ranking_text
from comfy_mminterleaved.models.contrastive import ContrastiveConfig, ContrastiveModel, pad_ids
from comfy_mminterleaved.models.visual_tokenizer import ImageFeatures
from comfy_mminterleaved.stories.story import ImageSegment, Story

pytest.importorskip("resvg_py")
from starter_training import evaluate_systems, world
from starter_training.__main__ import main
from starter_training.contrastive_training import ContrastiveObjective, text_of

TINY = ContrastiveConfig(
    projection_dim=8,
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
    num_img_token=3,
    llm_hidden_size=6,
    num_channels=8,
    grid_size=4,
    image_hidden_size=12,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ContrastiveModel(TINY).eval()


def features(count, seed=0, width=6):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 3, width, generator=generator)
    maps = tuple(torch.randn(count, 8, side, side, generator=generator) for side in (8, 4, 2))
    return ImageFeatures(tokens, maps)


def test_embeddings_have_unit_length(model):
    images, (ids, mask) = model.encode_image(features(3)), pad_ids([[1, 2], [3], [4, 5, 6]], 12)
    texts = model.encode_text(ids, mask)
    for embeds in (images, texts):
        assert embeds.shape == (3, 8) and torch.allclose(embeds.norm(dim=1), torch.ones(3), atol=1e-5)
    assert model.logits(images, texts).shape == (3, 3)


def test_a_text_does_not_depend_on_its_batch(model):
    alone, together = (
        model.encode_text(*pad_ids([[1, 2, 3]], 12)),
        model.encode_text(*pad_ids([[1, 2, 3], [4] * 9], 12)),
    )
    assert torch.allclose(alone[0], together[0], atol=1e-6)
    ids, mask = pad_ids([list(range(20)), []], 12)
    assert ids.shape == (2, 12) and ids[0, -1] == 19 and mask[1].sum() == 1


def test_training_brings_pairs_together(model):
    objective, optimizer = ContrastiveObjective(model.train()), torch.optim.AdamW(model.parameters(), 1e-2)
    given = features(6)
    ids, mask = pad_ids([[n, n + 6] for n in range(6)], 12)
    losses = []
    for _ in range(60):
        out = objective(given.visual_tokens, given.feature_maps[1], ids, mask)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(float(out["loss"].detach()))
    assert losses[-1] < 0.2 * losses[0] and float(out["r1"]) == 1.0


def test_configs_are_checked():
    assert ContrastiveConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(CheckpointError, match="does not know: colour"):
        ContrastiveConfig.from_dict({"colour": 1})


# ---- ranking ----


class ByBrightness:
    def score_images(self, text, images):
        return [float(image.pixels.mean()) for image in images]


def image(value):
    return ImageSegment(torch.full((3, 16, 16), value))


def test_candidates_are_ranked():
    ranked = rank_images(ByBrightness(), Story.of("Mia waves."), [image(0.2), image(0.9), image(0.5)])
    assert [each.index for each in ranked] == [1, 2, 0] and ranked[0].score == pytest.approx(0.9)
    with pytest.raises(SettingError, match="There are no images to rank"):
        rank_images(ByBrightness(), Story.of("Mia waves."), [])
    with pytest.raises(StoryError, match="does not end with a text"):
        rank_images(ByBrightness(), Story.of("Mia waves.", image(0.5)), [image(0.1)])


@pytest.mark.parametrize(
    "parts, text",
    [
        (["Mia waves."], "Mia waves."),
        (["Mia is a fox in a red coat. Mia waves.", "image", "Mia runs."], "Mia is a fox in a red coat. Mia runs."),
        (
            ["Mia is a fox. Otto is a bear. They wave.", "image", "Otto runs.", "image", "Mia sleeps."],
            "Mia is a fox. Mia sleeps.",
        ),
        (
            ["Mia is a fox. Otto is a bear.", "image", "Mia and Otto run.", "It rains."],
            "Mia is a fox. Otto is a bear. Mia and Otto run. It rains.",
        ),
    ],
)
def test_the_text_that_images_are_ranked_by_says_who_is_who(parts, text):
    story = Story.of(*(image(0.5) if part == "image" else part for part in parts))
    assert ranking_text(story) == text


class Words:
    def encode(self, text):
        return [len(word) for word in text.split()]


def scorer_of(model, width=6):
    def encode(images):
        return [replace(each, features=features(1, n, width)[0]) for n, each in enumerate(images)]

    return ContrastiveScorer(model, Words(), encode)


def test_the_scorer_compares_embeddings(model):
    scorer, images = scorer_of(model), [image(0.1), image(0.2)]
    scores = scorer.score_images("Mia waves.", images)
    expected = scorer.image_embeds(images) @ scorer.text_embeds(["Mia waves."])[0]
    assert scores == pytest.approx(expected.tolist()) and all(-1.01 < score < 1.01 for score in scores)
    with pytest.raises(StoryError, match="features of width 5, but the contrastive model takes 6"):
        scorer_of(model, 5).score_images("Mia waves.", images)


# ---- training and evaluation ----


def test_texts_of_an_image():
    panel = world.make_story(3, heroes=1)[1]
    texts = {text_of(panel, random.Random(seed)) for seed in range(60)}
    facts = [world.parse(text) for text in texts]
    assert all(fact is not None and (fact.place, fact.prop) == (panel.scene.place, panel.scene.prop) for fact in facts)
    kinds = {(bool(fact.names), bool(fact.heroes)) for fact in facts}
    assert kinds == {(True, False), (False, True), (True, True)} and len(texts) > 10


def test_captions_with_one_fact_changed():
    for number, scene in evaluate_systems.scenes_of(20, 40):
        assert number >= 20 * 100_000
        for fact, text in evaluate_systems.changed_captions(scene, random.Random(0)).items():
            own, changed = world.parse(world.caption(scene)), world.parse(text)
            differing = [
                name for name in ("heroes", "action", "place", "prop") if getattr(own, name) != getattr(changed, name)
            ]
            assert differing == ["heroes" if fact in ("species", "coat", "accessory") else fact]


def test_intervals_resample_stories():
    certain = evaluate_systems.bootstrap_by_story([(n, 1.0) for n in range(50)])
    assert certain == {"mean": 1.0, "cases": 50, "low": 1.0, "high": 1.0}
    alike = evaluate_systems.bootstrap_by_story([(n // 10, float(n // 10 % 2)) for n in range(100)])
    apart = evaluate_systems.bootstrap_by_story([(n, float(n // 10 % 2)) for n in range(100)])
    assert alike["high"] - alike["low"] > 2 * (apart["high"] - apart["low"])


def test_cases_for_the_best_of_several():
    for heroes in (None, 2):
        cases = evaluate_systems.best_of_cases(20, 12, heroes)
        assert len(cases) == 12 and all(k > 0 and not world.parse(story[0].text).heroes for _, story, k in cases)
    assert all(len(story[k].scene.heroes) == 2 for _, story, k in cases)


def test_the_stage_trains_on_cached_features_and_goes_on(tmp_path):
    run = tmp_path / "run"
    assert main(["begin", "--out", str(run)]) == 0
    command = ["contrastive", "--out", str(run), "--stories", "3", "--batch", "8", "--steps", "2"]
    assert main([*command, "--minutes", "0"]) == 0
    assert main(command) == 0
    weights = read_tensors(run / "contrastive" / "contrastive.safetensors")
    model = ContrastiveModel(ContrastiveConfig())
    model.load_state_dict(weights)
    records = [json.loads(line) for line in (run / "contrastive" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2 and len(list(run.glob("tokens-*.npy"))) == 4
