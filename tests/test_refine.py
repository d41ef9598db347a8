"""Refining: images at twice their size, beside those that later panels see."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfy_mminterleaved.books.render import fitted
from comfy_mminterleaved.cli import main
from comfy_mminterleaved.cli.commands import COMMANDS
from comfy_mminterleaved.cli.parser import make_parser
from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryError
from comfy_mminterleaved.generation.config import ImageGenerationConfig, to_file, usable_generation_config
from comfy_mminterleaved.generation.embedders import FeatureEmbedder, system_metadata
from comfy_mminterleaved.generation.ranking import panel_text
from comfy_mminterleaved.generation.refine import ImageRefiner, load_refiner
from comfy_mminterleaved.models.contrastive import ContrastiveConfig, ContrastiveModel
from comfy_mminterleaved.models.refiner import Refiner, RefinerConfig, enlarge
from comfy_mminterleaved.presets import STARTER_DIR
from comfy_mminterleaved.stories.page import displayed_images, load_story, save_story
from comfy_mminterleaved.stories.story import ImageSegment, Story, TextSegment

SMALL = RefinerConfig(8, 2, 8, 2, num_attention_heads=2, word_dim=16, prompt_dim=12)
QUICK = ImageGenerationConfig(num_inference_steps=1, guidance_scale=1.0)


def make_refiner(config=SMALL, seed=0):
    torch.manual_seed(seed)
    refiner = Refiner(config).eval()
    for parameter in refiner.parameters():  # the last convolution starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return refiner


@pytest.fixture
def embedder(tiny_random):
    torch.manual_seed(0)
    config = ContrastiveConfig(hidden_size=16, num_hidden_layers=1, vocab_size=tiny_random.config.llm.vocab_size)
    return FeatureEmbedder(ContrastiveModel(config).eval(), tiny_random.tokenizer, lambda images: images)


@pytest.fixture
def pipeline(tiny_random, embedder, monkeypatch):
    """The tiny model with a refiner of its widths."""
    config = RefinerConfig(8, 2, 8, 2, 2, 16, tiny_random.config.synchronizer.perceiver.hidden_size)
    monkeypatch.setitem(vars(tiny_random.systems), "refiner", ImageRefiner(make_refiner(config), embedder))
    return tiny_random


# ---- the model ----


def test_a_new_refiner_is_bicubic():
    images = torch.rand(2, 3, 16, 24)
    assert torch.allclose(Refiner(SMALL)(images), enlarge(images), atol=1e-6)


def test_rows_do_not_see_each_other():
    refiner, images = make_refiner(), torch.rand(2, 3, 16, 16)
    words, mask = torch.randn(2, 5, 16), torch.tensor([[True] * 5, [True, True, False, False, False]])
    prompts, seen = torch.randn(2, 4, 12), torch.tensor([False, True])
    with torch.no_grad():
        both = refiner(images, words, mask, prompts, seen)
        first = refiner(images[:1], words[:1])
        second = refiner(images[1:], words[1:, :2], None, prompts[1:])
    assert torch.allclose(both[:1], first, atol=1e-4) and torch.allclose(both[1:], second, atol=1e-4)


def test_words_and_states_count():
    refiner, images = make_refiner(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        outputs = [
            refiner(images),
            refiner(images, torch.randn(1, 3, 16)),
            refiner(images, prompt_embeds=torch.randn(1, 3, 12)),
        ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[a] - outputs[b]).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (4, 4), (1, 1), (33, 8)])
def test_any_size_is_doubled(size):
    refined = ImageRefiner(make_refiner()).refine(torch.rand(3, *size))
    assert refined.shape == (3, 2 * size[0], 2 * size[1])
    assert refined.dtype == torch.float32 and refined.min() >= 0 and refined.max() <= 1


def test_what_does_not_fit(embedder):
    refiner = ImageRefiner(make_refiner())
    with pytest.raises(SettingError, match="1024 px a side at most, not 1025 x 8"):
        refiner.refine(torch.zeros(3, 8, 1025))
    with pytest.raises(SettingError, match="width 5, but the refiner takes 12"):
        refiner.refine(torch.zeros(3, 8, 8), prompt_embeds=torch.zeros(4, 5))
    with pytest.raises(SettingError, match="width 16, but the refiner takes 9"):
        ImageRefiner(make_refiner(RefinerConfig(8, 2, 8, 2, 2, 9, 12)), embedder)


def test_files(tmp_path):
    refiner, path = make_refiner(), tmp_path / "refiner.safetensors"
    save_file(refiner.state_dict(), path, system_metadata(SMALL.to_dict(), "refiner"))
    image = torch.rand(3, 16, 16)
    assert load_refiner(path).refine(image).equal(ImageRefiner(refiner).refine(image))
    save_file(refiner.state_dict(), path, system_metadata({**SMALL.to_dict(), "num_blocks": 3}, "refiner"))
    with pytest.raises(CheckpointError, match="blocks.2"):
        load_refiner(path)
    save_file(refiner.state_dict(), path, system_metadata({"depth": 1}, "refiner"))
    with pytest.raises(CheckpointError, match="settings that this release does not know: depth"):
        load_refiner(path)
    save_file(refiner.state_dict(), path, system_metadata(SMALL.to_dict(), "prior"))
    with pytest.raises(CheckpointError, match="holds 'prior', not 'refiner'"):
        load_refiner(path)


# ---- drawing ----


def test_drawn_images_are_refined_and_the_story_goes_on_from_the_small_ones(pipeline):
    story = Story.of("Mia waves.")
    plain = pipeline.generate_story(story, 2, image_config=QUICK, introduce=False)
    refined = pipeline.generate_story(
        story, 2, image_config=ImageGenerationConfig(num_inference_steps=1, guidance_scale=1.0, refine=True)
    )
    assert [s.text for s in plain.segments if hasattr(s, "text")] == [
        s.text for s in refined.segments if hasattr(s, "text")
    ]
    for a, b in zip(plain.images, refined.images):
        assert a.pixels.equal(b.pixels) and a.refined is None
        assert b.refined.shape == (3, *(2 * side for side in a.pixels.shape[1:])) and b.display_pixels is b.refined
    pipeline.clear_cache()


def test_a_panel_is_told_its_text_and_its_states(pipeline):
    story = Story.of("Mia waves.")
    image = pipeline.generate_image(story, QUICK)
    (context,) = pipeline.context_features([story])
    (prompt_embeds,) = pipeline.synchronizer.conditioner.prompt_embeds([context])
    expected = pipeline.refiner.refine(image.pixels, "Mia waves.", prompt_embeds)
    assert torch.allclose(pipeline.refine_image(image, story).refined, expected, atol=1e-5)
    assert not torch.allclose(pipeline.refine_image(image).refined, expected, atol=1e-3)
    first = Story.of("Mia waves.", image_first := ImageSegment(image.pixels), "She runs.").arrange(True)
    assert pipeline.refine_image(image, first).refined is not None and image_first.refined is None
    pipeline.clear_cache()


def test_models_without_a_refiner_say_so_before_they_draw(tiny_random, monkeypatch):
    monkeypatch.setattr(tiny_random.image, "generate", None)
    monkeypatch.setattr(tiny_random.text, "generate", None)
    config = ImageGenerationConfig(refine=True)
    with pytest.raises(CheckpointError, match="no refiner"):
        tiny_random.generate_image(Story.of("Mia."), config)
    with pytest.raises(CheckpointError, match="no refiner"):
        tiny_random.generate_story(Story.of("Mia."), 1, image_config=config)


def test_sizes_that_cannot_be_refined_are_said_before_they_are_drawn(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.image, "generate", None)
    config = ImageGenerationConfig(refine=True, size=(1152, 1024))
    with pytest.raises(SettingError, match="not 1152 x 1024"):
        pipeline.generate_image(Story.of("Mia."), config)


def test_an_empty_text_is_none(pipeline):
    image = pipeline.generate_image(Story.of("Mia waves."), QUICK)
    story = Story.of("Mia waves.", image).add(TextSegment("", (5,)))
    assert panel_text(story) == "" and pipeline.refine_image(image, story).refined is not None
    pipeline.clear_cache()


def test_settings():
    assert "refine" not in to_file(ImageGenerationConfig()) and to_file(ImageGenerationConfig(refine=True))["refine"]
    with pytest.raises(SettingError, match="refine must be true or false, not 1"):
        ImageGenerationConfig(refine=1)
    parse = make_parser(COMMANDS).parse_args
    assert [parse(["draw", *flag]).refine for flag in ([], ["--refine"], ["--no-refine"])] == [None, True, False]


# ---- files of a story ----


@pytest.fixture
def told(pictures):
    large = torch.rand(3, 256, 256)
    return Story.of("Mia waves.", ImageSegment(pictures[0].pixels, refined=large), "She runs.", pictures[1])


def test_a_story_keeps_both_forms(tmp_path, told):
    files = save_story(tmp_path, told, "Mia")
    assert [path.name for path in files] == ["01.png", "01-refined.png", "02.png", "story.json", "story.html"]
    assert Image.open(tmp_path / "01-refined.png").size == (256, 256)
    loaded = load_story(tmp_path)
    assert torch.allclose(loaded.images[0].refined, told.images[0].refined, atol=1 / 255)
    assert displayed_images([path.name for path in files]) == ["01-refined.png", "02.png"]
    assert loaded.images[0].digest == told.images[0].digest and loaded.images[1].refined is None
    written = (tmp_path / "01-refined.png").stat().st_mtime_ns
    save_story(tmp_path, loaded, "Mia")
    assert (tmp_path / "01-refined.png").stat().st_mtime_ns == written
    (tmp_path / "01-refined.png").unlink()
    assert load_story(tmp_path).images[0].refined is None  # it can be refined again
    plain = loaded.map_images(lambda image: ImageSegment(image.pixels))
    save_story(tmp_path, plain, "Mia")
    assert not (tmp_path / "01-refined.png").exists() and "refined" not in (tmp_path / "story.json").read_text()


def test_pages_and_books_show_the_refined_one(tmp_path, told):
    image = told.images[0]
    plain = ImageSegment(image.pixels)
    assert image.page_url != plain.page_url
    assert fitted(image, 256, 256).tobytes() != fitted(plain, 256, 256).tobytes()
    story = Story.from_json(json.dumps(told.to_json()))
    assert torch.allclose(story.images[0].refined, image.refined, atol=1 / 255)


@pytest.mark.parametrize("value, sentence", [(5, "refined must name an image"), ("../x.png", "below the story's own")])
def test_story_files_with_a_bad_name(told, tmp_path, value, sentence):
    data = told.to_json()
    data["segments"][1]["refined"] = value
    with pytest.raises(StoryError, match=sentence):
        Story.from_json(data, tmp_path)


def test_the_starters_stories_are_refined_and_other_models_are_not(tmp_path):
    """By default, where there is a refiner; a story that was not stays so, and `draw` keeps the size asked for."""
    fast = ["--steps", "1", "--max-new-tokens", "4", "--device", "cpu", "--quiet"]
    starter, bare = usable_generation_config(STARTER_DIR), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(STARTER_DIR / "generation_config.json", bare)
    assert starter.image.refine and not usable_generation_config(bare).image.refine
    assert main(["tell", "--text", "Mia waves.", "--panels", "1", "--out", str(tmp_path / "a"), *fast]) == 0
    assert Image.open(tmp_path / "a" / "01-refined.png").size == (256, 256)
    plain = ["--panels", "1", "--no-refine", "--out", str(tmp_path / "b")]
    assert main(["tell", "--text", "Mia waves.", *plain, *fast]) == 0
    going_on = ["--story", str(tmp_path / "b"), "--panels", "1", "--out", str(tmp_path / "c")]
    assert main(["tell", *going_on, *fast]) == 0
    assert not [*(tmp_path / "b").glob("*refined*"), *(tmp_path / "c").glob("*refined*")]
    for flag, size in (([], (128, 128)), (["--refine"], (256, 256))):
        assert (
            main(["draw", "--text", "Mia waves.", "--out", str(tmp_path / "d.png"), *flag, *fast[:2], *fast[4:]]) == 0
        )
        assert Image.open(tmp_path / "d.png").size == size
