"""The contrastive model, ranking by it, and its training and evaluation on the picture-book world."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_clip import make_clip

from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryError
from comfy_mminterleaved.generation.config import CANDIDATE_STEP, ImageGenerationConfig
from comfy_mminterleaved.generation.embedders import CLIPEmbedder, FeatureEmbedder, cosines
from comfy_mminterleaved.generation.ranking import find_images, looks, rank_images, ranking_text, score_images
from comfy_mminterleaved.generation.word_masks import grow_mask, occlusion_map, rival_texts, word_mask
from comfy_mminterleaved.models.contrastive import (
    ContrastiveConfig,
    ContrastiveModel,
    match_words,
    pad_ids,
    word_attention,
)
from comfy_mminterleaved.models.visual_tokenizer import ImageFeatures
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story, TextSegment

pytest.importorskip("resvg_py")
from starter_training import world
from starter_training.contrastive_training import ContrastiveObjective, texts_of
from starter_training.drawn_images import neighbour
from starter_training.systems import contrastive as measured
from starter_training.systems.statistics import bootstrap_by_story, paired_difference

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


def test_words_attend_to_regions(model):
    ids, mask = pad_ids([[1, 2, 3], [4, 5]], 12)
    words = model.encode_words(model.text_hidden_states(ids, mask))
    regions = model.encode_regions(features(2).feature_maps[1])
    attention = word_attention(words, regions, mask)
    assert attention.shape == (2, 3, 16) and torch.allclose(attention.sum(-1), torch.ones(2, 3), atol=1e-5)
    longer = pad_ids([[1, 2, 3], [4, 5, 6, 7, 8]], 12)
    alone = word_attention(words[1:, :2], regions[1:], mask[1:, :2])
    assert torch.allclose(attention[1, :2], alone[0], atol=1e-5), "a word does not depend on the padding"
    assert match_words(words, regions, mask).shape == (2, 2) and longer[0].shape == (2, 5)


# ---- ranking ----


class ByColour:
    """Embeds an image by the mean of its channels, a text by the colours that it names."""

    truncates_end = False

    COLOURS = ("red", "green", "blue")

    def image_embeds(self, images):
        return torch.nn.functional.normalize(torch.stack([i.pixels.mean((1, 2)) for i in images]) + 1e-3, dim=-1)

    def text_embeds(self, texts):
        rows = [[float(colour in text) for colour in self.COLOURS] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows) + 1e-3, dim=-1)


def image(*rgb):
    rgb = rgb if len(rgb) == 3 else rgb * 3
    return ImageSegment(torch.tensor(rgb).view(3, 1, 1).expand(3, 16, 16).clone())


RED, GREEN, BLUE, OLIVE = image(0.9, 0.1, 0.1), image(0.1, 0.9, 0.1), image(0.1, 0.1, 0.9), image(0.5, 0.5, 0.1)


def test_candidates_are_ranked():
    ranked = rank_images(ByColour(), Story.of("A green kite."), [RED, GREEN, OLIVE])
    assert [each.index for each in ranked] == [1, 2, 0] and ranked[0].score > ranked[1].score > ranked[2].score
    assert ranked[0].image is GREEN
    with pytest.raises(SettingError, match="There are no images to rank"):
        rank_images(ByColour(), Story.of("Mia waves."), [])
    with pytest.raises(StoryError, match="The story is empty"):
        rank_images(ByColour(), Story(), [RED])


def test_earlier_images_count_beside_the_text():
    story = Story.of("Mia waves.", BLUE, "Mia and a red or blue kite.")
    by_text = rank_images(ByColour(), story, [RED, image(0.9, 0.1, 0.8), BLUE])
    by_both = rank_images(ByColour(), story, [RED, image(0.9, 0.1, 0.8), BLUE], reference_weight=5.0)
    assert by_text[0].index == 1 and by_both[0].index == 2
    shown = rank_images(ByColour(), story, [RED, image(0.9, 0.1, 0.8), BLUE], log_probs=[-0.1, -9.0, -8.0])
    assert shown[0].index == 0 and shown[0].score == next(each.score for each in by_text if each.index == 0)
    assert rank_images(ByColour(), Story.of("A red kite.", BLUE), [RED, BLUE])[0].index == 1, "no text, so likeness"
    image_first = Story((BLUE, TextSegment("A red kite.")), image_first=True)
    assert rank_images(ByColour(), image_first, [RED, BLUE])[0].index == 1, "the text is of the image before"


def test_images_are_found_by_text_and_by_image():
    images = [RED, GREEN, BLUE]
    assert [each.index for each in find_images(ByColour(), "blue", images)][0] == 2
    assert find_images(ByColour(), image(0.2, 0.8, 0.1), images)[0].index == 1
    assert score_images(ByColour(), "red", images) == sorted(score_images(ByColour(), "red", images), reverse=True)


@pytest.mark.parametrize(
    "query, images, message",
    [("red", [], "no images"), (" ", [RED], "is empty"), ("red", [image(float("nan"))], "not a number")],
)
def test_what_cannot_be_scored(query, images, message):
    with pytest.raises(SettingError, match=message):
        score_images(ByColour(), query, images)


def test_embeddings_of_two_models_are_told_apart():
    with pytest.raises(SettingError, match="widths 8 and 5"):
        cosines(torch.ones(1, 8), torch.ones(2, 5))


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
            ["Mia is a fox. Otto is a bear. They wave.", "image", "Mia is tired.", "image", "Mia and Otto run."],
            "Mia is a fox. Otto is a bear. Mia and Otto run.",
        ),
        (
            ["Mia is a fox. Otto is a bear.", "image", "Mia and Otto run.", "It rains."],
            "Mia is a fox. Otto is a bear. Mia and Otto run. It rains.",
        ),
        (["Mia waves. It is night.", "image", "Mia runs. It rains."], "Mia runs. It rains."),
        (["Mia is a fox in a red coat", "image", "Mia runs."], "Mia is a fox in a red coat Mia runs."),
    ],
)
def test_the_text_that_images_are_ranked_by_says_who_is_who(parts, text):
    story = Story.of(*(RED if part == "image" else part for part in parts))
    assert ranking_text(story) == text
    panel = (
        " ".join(part for part in parts[len(parts) - 1 - parts[::-1].index("image") :][1:])
        if "image" in parts
        else text
    )
    assert ranking_text(story, panel_first=True).startswith(panel)


def test_those_whom_a_panel_names_as_a_caption_has_them():
    story = Story.of("Mia is a fox in a red coat. Otto is a bear. It is night.", RED, "Otto and Mia run. It rains.")
    assert looks(story) == "A bear and a fox in a red coat"
    assert looks(Story.of("Mia is an owl. Mia waves.")) == "An owl"
    assert looks(Story.of("Mia is a fox in a red coat", RED, "Mia runs")) == "A fox in a red coat"
    for text in (
        "Mia is happy.",
        "Who is there? Mia runs.",
        "Today is sunny. Mia is in the garden.",
        "Mia isn't a bear.",
    ):
        assert looks(Story.of("Mia waves.", RED, text)) == ""
        assert looks(Story.of("Mia is tired. Mia is an owl.", RED, text)) == "An owl"
    assert looks(Story.of("Mia is a fox.", RED, "Otto runs.")) == looks(Story.of(RED)) == ""


class Words:
    def encode(self, text):
        return [len(word) for word in text.split()]


def embedder_of(model, width=6):
    def encode(images):
        return [replace(each, features=features(1, n, width)[0]) for n, each in enumerate(images)]

    return FeatureEmbedder(model, Words(), encode)


def test_the_contrastive_model_embeds_features(model):
    embedder, images = embedder_of(model), [RED, GREEN]
    scores = score_images(embedder, "Mia waves.", images)
    expected = embedder.image_embeds(images) @ embedder.text_embeds(["Mia waves."])[0]
    assert scores == pytest.approx(expected.tolist()) and all(-1.01 < score < 1.01 for score in scores)
    assert embedder.word_maps("Mia waves.", RED).shape == (2, 4, 4)
    with pytest.raises(StoryError, match="features of width 5, but the contrastive model takes 6"):
        score_images(embedder_of(model, 5), "Mia waves.", images)
    with pytest.raises(StoryError, match="features of another encoder"):
        other = embedder_of(model)
        other.encoder_id = "another"
        other.encode = lambda images: [
            replace(each, features=replace(features(1, n)[0], encoder_id="this one")) for n, each in enumerate(images)
        ]
        other.image_embeds(images)
    with pytest.raises(StoryError, match="has no features"):
        FeatureEmbedder(model, Words(), lambda images: images).image_embeds(images)


@pytest.mark.parametrize("count", [1, 33, 70])
def test_many_images_are_embedded_in_parts(model, count):
    assert embedder_of(model).image_embeds([RED] * count).shape == (count, 8)


# ---- masks of words ----


def patch(colour, left, top, side=24):
    pixels = torch.full((3, 64, 96), 0.05)
    pixels[ByColour.COLOURS.index(colour), top : top + side, left : left + side] = 0.95
    return pixels


def test_a_word_is_found_where_it_is():
    pixels = torch.maximum(patch("red", 4, 30), patch("green", 66, 8))
    for word, (left, top) in {"red": (4, 30), "green": (66, 8)}.items():
        mask = word_mask(ByColour(), ImageSegment(pixels), "A red ball and a green kite.", word)
        assert mask.shape == (64, 96) and set(mask.unique().tolist()) == {0.0, 1.0}
        inside = mask[top : top + 24, left : left + 24].sum()
        assert inside > 0.6 * mask.sum() and inside > 0.5 * 24 * 24, word


@pytest.mark.parametrize("left", [0, 72])
def test_what_is_at_the_edge_of_a_wide_image_is_seen(left):
    class Square(ByColour):
        """Sees the middle square of an image only, as encoders do."""

        def image_embeds(self, images):
            side = min(images[0].size)
            crops = []
            for each in images:
                x, y = ((n - side) // 2 for n in each.size)
                crops.append(ImageSegment(each.pixels[:, y : y + side, x : x + side]))
            return super().image_embeds(crops)

    mask = word_mask(Square(), ImageSegment(patch("red", left, 20)), "A red ball and a green kite.", "red")
    assert mask.shape == (64, 96) and mask[20:44, left : left + 24].sum() > 0.4 * mask.sum()


def test_a_mask_grows_and_shrinks():
    mask = torch.zeros(20, 20)
    mask[8:12, 8:12] = 1
    assert grow_mask(mask, 2).sum() == 64 and grow_mask(mask, -1).sum() == 4 and grow_mask(mask, 0).equal(mask)


def test_a_large_image_is_looked_at_small():
    values = occlusion_map(ByColour(), ImageSegment(torch.rand(3, 700, 300)), "red", "red")
    assert values.shape == (7, 7)


def test_rivals_stand_in_the_place_of_the_word():
    assert rival_texts("A fox and a Fox.", "fox", ["bear", "fox"]) == ["A bear and a bear."]
    assert rival_texts("A red fox runs.", "red") == ["A fox runs."] and rival_texts("Fox", "fox") == ["something"]
    for word in ("bear", "fo", " "):
        with pytest.raises(SettingError, match="is not in the text"):
            rival_texts("A fox.", word)
    pixels = torch.maximum(patch("red", 4, 30), patch("green", 66, 8))
    with pytest.raises(SettingError, match="Nothing is left of the mask of 'red' when it shrinks by 40 px"):
        word_mask(ByColour(), ImageSegment(pixels), "A red ball and a green kite.", "red", grow=-40)
    with pytest.raises(SettingError, match="draw the mask by hand"):
        word_mask(ByColour(), image(0.5), "A red fox.", "fox")


# ---- a CLIP of transformers ----


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_folder_of_transformers_embeds(tmp_path, kind):
    embedder = CLIPEmbedder.load(make_clip(tmp_path, kind))
    images, texts = embedder.image_embeds([RED, GREEN, BLUE]), embedder.text_embeds(["a red kite", "a fox"])
    assert images.shape == (3, 16) and texts.shape == (2, 16)
    assert torch.allclose(images.norm(dim=1), torch.ones(3), atol=1e-4)
    assert torch.allclose(embedder.text_embeds(["a fox"])[0], texts[1], atol=1e-5), "a text alone is the same"
    assert len(rank_images(embedder, Story.of("a red kite"), [RED, GREEN])) == 2
    assert occlusion_map(embedder, RED, "a red kite", "red").shape == (7, 7)


def test_folders_that_hold_no_clip(tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        CLIPEmbedder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read as a CLIP"):
        CLIPEmbedder.load(tmp_path)


# ---- training and evaluation ----


def test_texts_of_an_image():
    panel = world.make_story(3, heroes=1)[1]
    pairs = [texts_of(panel.scene, random.Random(seed)) for seed in range(80)]
    facts = [world.parse(text) for text, _ in pairs]
    assert all(fact is not None and (fact.place, fact.prop) == (panel.scene.place, panel.scene.prop) for fact in facts)
    kinds = {(bool(fact.names), bool(fact.heroes)) for fact in facts}
    assert kinds == {(True, False), (False, True), (True, True)} and len({text for text, _ in pairs}) > 10
    for text, wrong in pairs:
        own, other = world.parse(text), world.parse(wrong)
        differing = [
            name
            for name in ("names", "heroes", "action", "place", "prop", "sky", "far")
            if getattr(own, name) != getattr(other, name)
        ]
        assert len(differing) == 1 and differing[0] in ("heroes", "action", "place", "prop")


def test_neighbours_of_two_heroes_have_their_looks_swapped():
    scene = next(p.scene for p in world.make_story(5, heroes=2) if len(p.scene.heroes) == 2)
    swapped = [neighbour(scene, random.Random(seed), True).heroes for seed in range(60)]
    looks = tuple(hero.look for hero in scene.heroes)
    assert tuple(reversed(looks)) in {tuple(hero.look for hero in heroes) for heroes in swapped}
    assert all([hero.name for hero in heroes] == [hero.name for hero in scene.heroes] for heroes in swapped)


def test_captions_with_one_fact_changed():
    for number, scene in measured.scenes_of(20, 40):
        assert number >= 20 * 100_000
        for fact, text in measured.changed_captions(scene, random.Random(0)).items():
            own, changed = world.parse(world.caption(scene)), world.parse(text)
            differing = [
                name for name in ("heroes", "action", "place", "prop") if getattr(own, name) != getattr(changed, name)
            ]
            assert differing == ["heroes" if fact in ("species", "coat", "accessory") else fact]


def test_intervals_resample_stories():
    certain = bootstrap_by_story([(n, 1.0) for n in range(50)])
    assert certain == {"mean": 1.0, "cases": 50, "low": 1.0, "high": 1.0}
    alike = bootstrap_by_story([(n // 10, float(n // 10 % 2)) for n in range(100)])
    apart = bootstrap_by_story([(n, float(n // 10 % 2)) for n in range(100)])
    assert alike["high"] - alike["low"] > 2 * (apart["high"] - apart["low"])


def test_cases_for_the_best_of_several():
    for heroes in (None, 2):
        cases = measured.best_of_cases(20, 12, heroes)
        assert len(cases) == 12 and all(k > 0 and not world.parse(story[0].text).heroes for _, story, k in cases)
    assert all(len(story[k].scene.heroes) == 2 for _, story, k in cases)


def test_paired_differences():
    better = paired_difference([(0, 1), (1, 1), (2, 0)], [(0, 0), (1, 1), (2, 0)])
    assert better["mean"] == pytest.approx(1 / 3) and better["cases"] == 3
    with pytest.raises(ValueError):
        paired_difference([(0, 1)], [])


def test_a_model_without_a_contrastive_model_says_so():
    pipeline = MMInterleavedPipeline.load("tiny-random")
    with pytest.raises(CheckpointError, match="no contrastive model"):
        pipeline.generate_image(Story.of("Mia waves."), ImageGenerationConfig(best_of=2))
    with pytest.raises(SettingError, match="best_of must be at least 1 and at most 64, not 65"):
        ImageGenerationConfig(best_of=65)


def test_candidates_have_noise_of_their_own():
    """torch's generators look at the lowest 32 bits of a seed."""
    seeds = {(panel + n * CANDIDATE_STEP) % 2**32 for panel in range(100) for n in range(64)}
    assert len(seeds) == 6400
