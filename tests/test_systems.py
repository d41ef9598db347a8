"""What stands beside the story model: reconstruction, looking inside, LoRA, drawn images as a modality."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryError, StoryTooLongError
from comfy_mminterleaved.generation.attention_maps import SIDE
from comfy_mminterleaved.generation.config import ImageGenerationConfig, Introduction
from comfy_mminterleaved.generation.embedders import load_lora, system_metadata
from comfy_mminterleaved.generation.insight import (
    Influence,
    Inspection,
    attended,
    contact_sheet,
    inspect,
    report,
    variants,
    without_images,
)
from comfy_mminterleaved.generation.probes import CHANGES, bias, changed_story, measure_bias, mutual_information, probe
from comfy_mminterleaved.generation.reconstruction import (
    caption_candidates,
    describe,
    retell,
    round_trip,
    token_similarity,
)
from comfy_mminterleaved.models.gmail_adapter import encode_image, features_id
from comfy_mminterleaved.models.lora import LoRA
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

FAST = ImageGenerationConfig(num_inference_steps=2, scheduler="dpm++", guidance_scale=1.0)


@pytest.fixture(scope="module")
def pipeline():
    return MMInterleavedPipeline.load("starter")


@pytest.fixture(scope="module")
def fox():
    from places import HERE

    return ImageSegment.of(HERE.parent / "example.png")


# ---- reconstruction ----

SUBJECT = r"\b[Aa]n? \w+ in an? \w+ coat with (?:an? )?\w+"


@pytest.mark.parametrize(
    "captions, texts",
    [
        (
            ["A fox in a red coat with a hat waves in the snow."],
            ["Mia is a fox in a red coat with a hat. Mia waves in the snow."],
        ),
        (
            [
                "In the city, a fox in an orange coat with glasses and a bear in a red coat with a bow sit.",
                "A bear in a red coat with a bow runs.",
                "A cat in a blue coat with a bow runs.",
            ],
            [
                "Mia is a fox in an orange coat with glasses. Otto is a bear in a red coat with a bow. "
                "In the city, Mia and Otto sit.",
                "Otto runs.",
                "A cat in a blue coat with a bow runs.",
            ],
        ),
        (["A dark wood."], ["A dark wood."]),
    ],
)
def test_captions_are_told_as_a_story(captions, texts):
    assert retell(captions, Introduction("{name} is", (), ("Mia", "Otto"), SUBJECT)) == texts


def test_a_model_that_introduces_nobody_gets_captions_as_they_are():
    assert retell(["A fox."], None) == retell(["A fox."], Introduction("{name} is", (), ("Mia",))) == ["A fox."]


def test_an_image_is_most_alike_to_itself(pipeline, fox):
    other = ImageSegment(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))
    a, b = (image.features for image in pipeline.encode_images(Story.of(fox, other)).images)
    assert token_similarity(a, a) == pytest.approx(1, abs=1e-4)
    assert token_similarity(a, b) < 0.9


def test_captions_that_agree_draw_nothing(pipeline, fox):
    (only,) = describe(pipeline, fox, 3, config=FAST)
    assert only.redrawn is None and only.similarity is None and " coat with " in only.text
    assert only.story.startswith("Mia is a") and re.search(r"\. Mia \w+s? ", only.story)


def test_captions_that_differ_are_drawn_and_ranked(pipeline, fox, monkeypatch):
    texts = ["A pig in a blue coat with a bow sits in the city with a drum.", caption_candidates(pipeline, fox, 1)[0]]
    monkeypatch.setattr("comfy_mminterleaved.generation.reconstruction.caption_candidates", lambda *_: list(texts))
    steps = []
    config = ImageGenerationConfig(num_inference_steps=8, scheduler="dpm++", guidance_scale=3.0)
    best, worst = describe(pipeline, fox, config=config, on_drawn=lambda *a: steps.append(a))
    assert best.text == texts[1] and best.similarity > worst.similarity and steps == [(1, 2), (2, 2)]
    assert best.log_prob > worst.log_prob and best.redrawn.origin == "drawn"


def test_bad_numbers_of_captions(pipeline, fox):
    for count in (0, 65):
        with pytest.raises(SettingError, match=f"at least 1 and at most 64, not {count}"):
            describe(pipeline, fox, count)


def test_a_story_goes_round(pipeline, fox):
    story, calls = Story.of("Mia waves.", fox, "Mia runs.", fox), []
    trip = round_trip(pipeline, story, FAST, lambda *a: calls.append(a))
    assert len(trip.similarities) == len(trip.story.images) == 2 and calls == [(1, 2), (2, 2)]
    assert -1 <= trip.mean <= 1
    first, second = (panel.text for panel in trip.story.panels())
    assert first.startswith("Mia is a") and second.startswith("Mia ") and "coat" not in second
    with pytest.raises(StoryError, match="no images to tell again"):
        round_trip(pipeline, Story.of("Mia waves."))
    with pytest.raises(StoryTooLongError, match="A story with 40 more panels"):
        round_trip(pipeline, Story.of(*[fox] * 40), FAST)


# ---- looking inside ----


def influence(index, lost, missing):
    blank = ImageSegment(torch.zeros(3, 8, 8))
    return Influence(index, blank, blank, lost, missing)


def inspection(*influences):
    return Inspection(influences[0].without, ("Who?", "Coat?"), ("A fox.", "Red."), influences)


def test_the_source_is_needed_and_suffices():
    """Without image 2 images move up, so leaving out 2 or 3 changes as much; but only 2 alone brings the fact."""
    seen = inspection(influence(0, (0, 0), (0, 5)), influence(1, (0, 5), (0, 0)), influence(2, (0, 5), (0, 5)))
    assert seen.source.index == 1 and seen.source.changed == (1,)
    assert "takes most from image 2" in seen.to_text() and "Without image 1 nothing changes." in seen.to_text()


def test_what_no_image_brings_alone_comes_of_several():
    mixed = inspection(influence(0, (0, 5), (0, 5)), influence(1, (0, 0), (0, 5)))
    assert mixed.verdict.startswith("It changes most without image 1, which alone does not bring it")


def test_images_that_all_suffice_are_not_called_a_source():
    same = inspection(influence(0, (0, 0), (0, 0)), influence(1, (0, 0), (0, 0)))
    assert "each of images 1, 2 alone brings the same" in same.verdict
    text = inspection(influence(0, (0, 0), (5, 5)), influence(1, (0, 0.2), (0, 4)))
    assert "the text says it all" in text.verdict


def test_stories_without_some_images(fox):
    story = Story.of("One.", fox, "Two.", fox, "Three.")
    assert [len(each.images) for each in variants(story)] == [2, 1, 1, 1, 1]
    assert [len(each.images) for each in variants(Story.of(fox, "Two."))] == [1, 0]
    left = without_images(story, [0])
    assert left.images == story.images[1:] and [s for s in left if s not in left.images] == [
        s for s in story if s not in story.images
    ]


def test_a_panel_is_looked_inside_of(pipeline, fox):
    story, questions = (
        Story.of("Mia waves.", fox, "Mia runs.", fox, "Mia sits on the beach with a drum."),
        ["Who is it?"],
    )
    calls = []
    seen = inspect(pipeline, story, questions, FAST, lambda *a: calls.append(a))
    assert len(seen.influences) == 2 and calls[-1] == (5, 5) and len(seen.answers) == 1
    assert all(0 <= value <= 5 for each in seen.influences for value in (*each.lost, *each.missing))
    page = report(story, seen, "A <page>")
    assert "A &lt;page&gt;" in page and page.count("<img") == 1 + 3 * 2 and "every cell" in page
    assert contact_sheet(story, seen).size[0] > 300
    (lone,) = inspect(pipeline, Story.of("Mia waves.", fox, "Mia runs."), questions, FAST).influences
    assert lone.missing == (0.0,)


@pytest.mark.parametrize(
    "parts, questions, message",
    [
        (["Mia."], ["Who?"], "no earlier images"),
        (["Mia.", "image"], ["Who?"], "does not end with a text"),
        (["image", "Mia."], [" "], "no questions"),
    ],
)
def test_what_cannot_be_looked_inside_of(pipeline, fox, parts, questions, message):
    story = Story.of(*(fox if part == "image" else part for part in parts))
    with pytest.raises((StoryError, SettingError), match=message):
        inspect(pipeline, story, questions)


@pytest.mark.parametrize("count", [1, 3])
def test_attention_and_gradients_are_recorded(pipeline, fox, count):
    story = Story.of(*[part for n in range(count) for part in (f"Mia waves {'and ' * n}.", fox)], "Mia runs.")
    before = pipeline.generate_image(story, FAST).pixels
    drawn, attention, gradients = attended(pipeline, story, FAST)
    assert drawn.pixels.equal(before), "recording changes nothing"
    assert attention.maps.shape == gradients.shape == (count, SIDE, SIDE) and len(attention.shares) == count
    total = float(attention.maps.sum()) + attention.outside
    assert total == pytest.approx(float(attention.levels.sum()), rel=1e-3) and sum(attention.shares) <= 1 + 1e-4
    assert gradients.isfinite().all() and (gradients >= 0).all() and gradients.sum() > 0
    mmfs = pipeline.synchronizer.mmfs_module.blocks[0]
    assert not mmfs._forward_pre_hooks and not mmfs.mmfs._forward_pre_hooks
    with pytest.raises(StoryError, match="attends to no image"):
        attended(pipeline, Story.of("Mia runs."), FAST)


# ---- probes ----


@pytest.mark.parametrize("change", CHANGES)
def test_stories_are_changed_in_one_way(fox, change):
    story = Story.of("Mia waves.", fox, "Mia jumps on the beach.")
    changed = changed_story(story, change)
    (image,) = changed.images
    assert image.size == fox.size and 0 <= float(image.pixels.min()) <= float(image.pixels.max()) <= 1
    is_text = "text" in change
    assert image.pixels.equal(fox.pixels) is is_text
    assert changed.segments[0].text == "Mia waves." and (changed.segments[2].text != story.segments[2].text) is is_text
    assert changed.segments[2].text.endswith(".")


@pytest.mark.parametrize("word, typo", [("village", "vlilage"), ("balloon", "blaloon"), ("book", "book")])
def test_a_typo_is_one(word, typo):
    story = Story.of(f"Mia is by it: a {word}.")
    if word == typo:
        with pytest.raises(SettingError, match="no word of four letters for a typo"):
            changed_story(Story.of("A coo."), "a typo in the text")
    else:
        assert changed_story(story, "a typo in the text").segments[0].text == f"Mia is by it: a {typo}."


def test_changes_that_cannot_be_made(fox):
    with pytest.raises(SettingError, match="'upside down' is not known"):
        changed_story(Story.of(fox), "upside down")
    with pytest.raises(SettingError, match="no text to change"):
        changed_story(Story.of(fox), "a typo in the text")


def test_a_panel_is_probed(pipeline, fox):
    story = Story.of("Mia waves.", fox, "Mia jumps on the beach with a kite.")
    (probed,) = probe(pipeline, [story], "images darkened", ["Who is it?", "Where is it?"], FAST)
    assert len(probed.answers) == len(probed.kept) == 2 and -1 <= probed.similarity <= 1
    assert probed.to_text().count("\n") == 2
    with pytest.raises(SettingError, match="no questions"):
        probe(pipeline, [story], "images darkened", [""], FAST)


def test_bias_is_told_from_chance():
    even = [(name, answer) for name in ("Mia", "Otto") for answer in ("fox", "bear") for _ in range(8)]
    told = [("Mia", "fox"), ("Otto", "bear")] * 16
    assert mutual_information(even) == pytest.approx(0) and mutual_information(told) == pytest.approx(1)
    assert measure_bias(told).is_biased and not measure_bias(even).is_biased
    assert "tells no more than chance" in measure_bias(even).to_text()


def test_a_template_is_drawn_and_asked_about(pipeline):
    lists = {"name": ["Mia", "Otto"], "place": ["on the beach", "in the city"]}
    result = bias(pipeline, "{name} waves {place} with a kite.", lists, "Who is it?", 2, FAST)
    assert sum(result.counts.values()) == 4 and {value for value, _ in result.counts} == {"Mia", "Otto"}
    for template, values in (("Mia waves.", lists), ("{name} waves.", {"name": ["Mia"]})):
        with pytest.raises(SettingError, match="must have a {blank}"):
            bias(pipeline, template, values, "Who is it?")


# ---- LoRA and drawn images ----


def lora_tensors(rank=2, sizes=((6, 4),), prefix="base_model.model."):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for n, (wide, narrow) in enumerate(sizes):
        tensors[f"{prefix}{n}.lora_A.weight"] = torch.randn(rank, wide, generator=generator)
        tensors[f"{prefix}{n}.lora_B.weight"] = torch.randn(narrow, rank, generator=generator)
    return tensors


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_lora_adds_only_while_it_is_attached(prefix):
    layers, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
    tensors = lora_tensors(prefix=prefix)
    lora = LoRA(tensors)
    lora.check(layers)
    before = layers(x)
    with lora.attached(layers, 0.5):
        inside = layers(x)
    down, up = tensors.values()
    assert torch.allclose(inside, before + 0.5 * x @ down.T @ up.T, atol=1e-5)
    assert layers(x).equal(before) and not layers[0]._forward_hooks


def test_loras_that_do_not_fit():
    with pytest.raises(CheckpointError, match="no matrix of a LoRA"):
        LoRA({"0.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="no matching pair"):
        LoRA({"0.lora_A.weight": torch.zeros(2, 2)})
    for module in (torch.nn.Sequential(torch.nn.Linear(5, 4)), torch.nn.Sequential()):
        with pytest.raises(CheckpointError, match="does not fit this model"):
            LoRA(lora_tensors()).check(module)


def test_peft_trains_what_is_applied():
    """The same numbers as peft's own layers."""
    pytest.importorskip("peft")
    pytest.importorskip("resvg_py")
    from starter_training.drawn_training import with_lora

    torch.manual_seed(0)
    trained, plain = (torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6)) for _ in range(2))
    plain.load_state_dict(trained.state_dict())
    state = with_lora(trained, re.compile("[01]"))
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        for name in state.state_dict()
    }
    with torch.no_grad():
        for parameter in state.state_dict().values():
            parameter.normal_()
    x, lora = torch.randn(3, 6), LoRA(state.state_dict())
    with lora.attached(plain):
        assert torch.allclose(plain(x), trained(x), atol=1e-5)
    state.switch(False)
    assert torch.allclose(plain(x), trained(x), atol=1e-6)


def encoder_lora(encoder):
    name = "vision_model.layers.0.mlp.fc1"
    layer = dict(encoder.named_modules())[name]
    generator = torch.Generator().manual_seed(0)
    return LoRA(
        {
            f"{name}.lora_A.weight": torch.randn(4, layer.in_features, generator=generator),
            f"{name}.lora_B.weight": torch.randn(layer.out_features, 4, generator=generator),
        }
    )


def test_drawn_images_go_through_the_adapter(pipeline, fox, monkeypatch):
    drawn = ImageSegment(fox.pixels, origin="drawn")
    own_features, drawn_features = (i.features for i in pipeline.encode_images(Story.of(fox, drawn)).images)
    assert own_features.encoder_id == drawn_features.encoder_id, "without an adapter all are alike"
    lora = encoder_lora(pipeline.encoder)
    monkeypatch.setattr(pipeline, "drawn_adapter", lora)
    encoded = pipeline.encode_images(Story.of(fox, drawn))
    own, adapted = (image.features for image in encoded.images)
    assert own.visual_tokens.equal(own_features.visual_tokens)
    assert not adapted.visual_tokens.equal(own.visual_tokens)
    assert adapted.encoder_id == features_id(own.encoder_id, "drawn", lora) != own.encoder_id
    assert pipeline.encode_images(encoded).images[1] is encoded.images[1], "its features are kept"
    pixels = torch.rand(1, 3, 128, 128)
    assert encode_image(pipeline.encoder, pixels, "own", lora).visual_tokens.equal(
        encode_image(pipeline.encoder, pixels).visual_tokens
    )


def test_a_story_keeps_where_its_images_come_from(pipeline, fox):
    image = pipeline.generate_image(Story.of("Mia waves."), FAST)
    assert image.origin == "drawn" and fox.origin == "own"
    data = json.loads(json.dumps(Story.of(fox, image).to_json()))
    assert [segment.get("origin") for segment in data["segments"]] == [None, "drawn"]
    assert [each.origin for each in Story.from_json(data).images] == ["own", "drawn"]
    data["segments"][0]["origin"] = "found"
    with pytest.raises(StoryError, match="origin must be 'own' or 'drawn', not 'found'"):
        Story.from_json(data)


def test_models_without_an_adapter_say_so(tmp_path):
    pipeline = MMInterleavedPipeline.load("tiny-random")
    pipeline.adapt_to_drawings(False)
    with pytest.raises(CheckpointError, match="no adapter for drawn images"):
        pipeline.adapt_to_drawings()
    path = tmp_path / "drawn.safetensors"
    save_file(lora_tensors(), path, system_metadata({}, "drawn"))
    assert load_lora(path, "drawn").names == ("0",)
    with pytest.raises(CheckpointError, match="holds 'drawn', not 'contrastive'"):
        load_lora(path, "contrastive")
