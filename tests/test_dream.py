"""Dream queries: conditioning from the LLM itself, and texts with images in them (DreamLLM)."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryTooLongError
from comfy_mminterleaved.generation.config import ImageGenerationConfig, to_file
from comfy_mminterleaved.generation.dream import DreamConditioner, in_context_story, load_dream
from comfy_mminterleaved.generation.embedders import system_metadata
from comfy_mminterleaved.models.dream import DreamConfig, DreamQueries, continue_rows
from comfy_mminterleaved.models.llama_mmfs import KVCache
from comfy_mminterleaved.models.lora import LoRA
from comfy_mminterleaved.stories.story import ImageSegment, Story

CLOSE = {"atol": 1e-3, "rtol": 1e-3}
QUICK = ImageGenerationConfig(num_inference_steps=1, guidance_scale=1.0)


def image(seed: int, side: int = 16) -> ImageSegment:
    return ImageSegment(torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)))


def random_lora(pipeline, seed: int = 0, std: float = 0.2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in pipeline.llm.named_modules():
        if name.endswith(("self_attn.q_proj", "mlp.up_proj")):
            out, width = layer.weight.shape
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, width, generator=generator) * std
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * std
    return tensors


def random_dream(pipeline, seed: int = 0) -> tuple[DreamQueries, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    c = pipeline.config.synchronizer.perceiver
    model = DreamQueries(DreamConfig(3, pipeline.config.llm.hidden_size, c.hidden_size, 2)).eval()
    torch.nn.init.normal_(model.dream_queries, std=1.0)
    torch.nn.init.normal_(model.projector.weight, std=2.0)
    return model, random_lora(pipeline)


@pytest.fixture
def dream(tiny_random):
    model, lora = random_dream(tiny_random)
    tiny_random.clear_cache()
    return DreamConditioner(model, LoRA(lora))


def story(pipeline, *parts) -> Story:
    return pipeline.encode_images(Story.of(*parts))


# ---- what the LLM reads ----


@pytest.mark.parametrize("has_lora", [True, False])
def test_queries_are_read_behind_the_story_as_one_sequence_is(tiny_random, dream, has_lora):
    """What comes before is as without the LoRA; the queries are as in a pass of the whole sequence with it."""
    dream.lora = dream.lora if has_lora else None
    told = story(tiny_random, "Mia waves.", image(1), "Mia sits.")
    found = dream.prompt_embeds(tiny_random.text, [told])
    llm, tokens = tiny_random.llm, tiny_random.text.tokenize(told)
    features = told.images[0].features
    x = llm.embed_inputs(torch.tensor([tokens.input_ids]), features.visual_tokens)
    image_values = llm.project_images([level[None, None] for level in features.feature_maps])
    cache = KVCache(1)
    llm(x, image_values, tokens.image_mask(tiny_random.config.llm)[None], cache)
    start = llm.embed_inputs(torch.tensor([[tiny_random.config.llm.special_tokens.soi]]))
    queries = torch.cat([start, dream.model.dream_queries], dim=1)
    handles = dream.lora.attach(llm) if has_lora else []
    states = llm(queries, image_values, torch.ones(1, queries.shape[1], 1, dtype=torch.bool), cache)
    for handle in handles:
        handle.remove()
    assert torch.allclose(found, dream.model.projector(states[:, 1:]), **CLOSE)
    assert found.shape == (1, 3, tiny_random.config.synchronizer.perceiver.hidden_size)


def test_normalized_embeds(tiny_random, dream):
    told = story(tiny_random, "Mia waves.")
    plain = dream.prompt_embeds(tiny_random.text, [told])
    dream.model.config = replace(dream.model.config, is_normalized=True)
    embeds = dream.prompt_embeds(tiny_random.text, [told])
    assert torch.allclose(embeds, torch.nn.functional.layer_norm(plain, plain.shape[-1:]), **CLOSE)


def test_a_batch_is_as_each_story_alone(tiny_random, dream):
    stories = [story(tiny_random, "Mia waves.", image(1), "Mia sits."), story(tiny_random, "Otto."), story(tiny_random)]
    alone = torch.cat([dream.prompt_embeds(tiny_random.text, [each]) for each in stories])
    assert torch.allclose(dream.prompt_embeds(tiny_random.text, stories), alone, **CLOSE)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_texts_and_caches_stay_as_they_are(tiny_random, dream):
    told = story(tiny_random, "Mia waves.", image(1), "Mia sits.")
    tiny_random.clear_cache()
    before = tiny_random.context_features([told])[0]
    tokens = len(tiny_random.text.cache.input_ids[0])
    first = dream.prompt_embeds(tiny_random.text, [told])
    assert tiny_random.text.cache.num_cached_tokens >= tokens - 1  # the story was read once
    assert dream.prompt_embeds(tiny_random.text, [told]).equal(first)
    assert torch.allclose(tiny_random.context_features([told])[0], before, **CLOSE)
    assert not any(module._forward_hooks for module in tiny_random.llm.modules())


def test_continued_rows(tiny_random):
    """Rows of a cache that go on from the middle of a story: as from that much of the story alone."""
    llm = tiny_random.llm
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = KVCache(2)
    llm(llm.embed_inputs(ids), cache=cache)
    rest = llm.embed_inputs(ids[:, :4])
    rows, lengths = [1, 0, 1], [9, 3, 5]
    continued, values = continue_rows(cache, None, rows, lengths)
    found = llm(rest[rows], cache=continued)
    for out, row, length in zip(found, rows, lengths):
        alone = KVCache(1)
        llm(llm.embed_inputs(ids[row : row + 1, :length]), cache=alone)
        assert torch.allclose(out, llm(rest[row : row + 1], cache=alone)[0], **CLOSE)
    assert values is None and cache.lengths == [9, 9]


# ---- texts with images in them ----


def test_images_stand_where_the_text_says():
    a, b = image(1), image(2)
    told = in_context_story(" In {B}, {A} waves. ", {"A": a, "B": b})
    assert [s if isinstance(s, ImageSegment) else s.text for s in told.segments] == ["In", b, ",", a, "waves."]
    twice = in_context_story("{A} and {A}.", {"A": a})
    assert twice.images == (a, a)


@pytest.mark.parametrize(
    "text, names, sentence",
    [
        ("A fox waves.", "A", "names no image"),
        ("", "A", "names no image"),
        ("{A} in {B}.", "A", "no image B"),
        ("{A} waves.", "AB", "does not name image B"),
        ("{a} waves.", "A", "no image a"),
        ("{E} waves.", "A", "no image E"),
    ],
)
def test_a_text_that_does_not_fit_its_images(text, names, sentence):
    with pytest.raises(SettingError, match=re.escape(sentence)):
        in_context_story(text, {name: image(1) for name in names})


# ---- a model's file ----


def write_dream(folder, model: DreamQueries, lora, config: DreamConfig | None = None):
    path = folder / "dream.safetensors"
    tensors = {**model.state_dict(), **{f"lora.{name}": t for name, t in lora.items()}}
    save_file(tensors, path, system_metadata((config or model.config).to_dict(), "dream"))
    return path


def test_what_is_written_is_read(tiny_random, tmp_path, dream):
    model, lora = random_dream(tiny_random)
    path = write_dream(tmp_path, model, lora)
    loaded = load_dream(path, tiny_random.llm, tiny_random.config)
    told = story(tiny_random, "Mia waves.")
    expected = dream.prompt_embeds(tiny_random.text, [told])
    assert torch.allclose(loaded.prompt_embeds(tiny_random.text, [told]), expected, **CLOSE)
    plain = load_dream(write_dream(tmp_path, model, {}), tiny_random.llm, tiny_random.config)
    assert plain.lora is None and (plain.prompt_embeds(tiny_random.text, [told]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"llm_hidden_size": 24}, "an LLM of width 24"),
        ({"cross_attention_dim": 20}, "conditioning of width 20"),
    ],
)
def test_files_of_other_models(tiny_random, tmp_path, change, sentence):
    model, _ = random_dream(tiny_random)
    config = replace(model.config, **change)
    other = DreamQueries(config)
    path = write_dream(tmp_path, other, {})
    with pytest.raises(CheckpointError, match=sentence):
        load_dream(path, tiny_random.llm, tiny_random.config)


def test_broken_files(tiny_random, tmp_path):
    model, lora = random_dream(tiny_random)
    path = write_dream(tmp_path, model, lora)
    tensors = load_file(path)
    del tensors["dream_queries"]
    save_file(tensors, path, system_metadata(model.config.to_dict(), "dream"))
    with pytest.raises(CheckpointError, match="missing: dream_queries"):
        load_dream(path, tiny_random.llm, tiny_random.config)
    lora["layers.9.self_attn.q_proj.lora_A.weight"] = lora["layers.0.self_attn.q_proj.lora_A.weight"].clone()
    lora["layers.9.self_attn.q_proj.lora_B.weight"] = lora["layers.0.self_attn.q_proj.lora_B.weight"].clone()
    with pytest.raises(CheckpointError, match="layers.9"):
        load_dream(write_dream(tmp_path, model, lora), tiny_random.llm, tiny_random.config)
    save_file(dict(model.state_dict()), path, system_metadata({"breadth": 3}, "dream"))
    with pytest.raises(CheckpointError, match="breadth"):
        load_dream(path, tiny_random.llm, tiny_random.config)


def test_a_pipeline_draws_by_its_queries(tiny_random, dream, monkeypatch):
    told = story(tiny_random, "Mia waves.", image(1), "Mia sits.")
    with pytest.raises(CheckpointError, match="no dream queries"):
        tiny_random.generate_image(told, replace(QUICK, conditioner="dream"))
    with pytest.raises(SettingError, match="conditioner must be"):
        replace(QUICK, conditioner="pereiver")
    monkeypatch.setitem(tiny_random.systems.__dict__, "dream", dream)
    drawn = tiny_random.generate_image(told, replace(QUICK, conditioner="dream"))
    plain = tiny_random.generate_image(told, QUICK)
    assert (drawn.pixels - plain.pixels).abs().max() > 1e-3
    assert tiny_random.generate_image(told, replace(QUICK, conditioner="dream")).pixels.equal(drawn.pixels)
    embeds = tiny_random.prompt_embeds([told], "dream")
    (image_,) = tiny_random.image.generate([told], None, QUICK, prompt_embeds=embeds)[0]
    assert image_.pixels.equal(drawn.pixels)


def test_drawing_in_context_looks_at_no_image(tiny_random, dream, monkeypatch):
    """The U-Net attends to none, so that heroes of several images are not mixed: what is drawn is what is told."""
    monkeypatch.setitem(tiny_random.systems.__dict__, "dream", dream)
    images = {"A": image(1), "B": ImageSegment(torch.zeros(3, 16, 16))}
    drawn = tiny_random.draw_in_context("{A} in {B}.", images, QUICK)
    told = tiny_random.encode_images(in_context_story("{A} in {B}.", images))
    config = replace(QUICK, num_context_images=0)
    embeds = tiny_random.prompt_embeds([told], "dream")
    (expected,) = tiny_random.image.generate([told], None, config, prompt_embeds=embeds)[0]
    assert drawn.pixels.equal(expected.pixels)
    swapped = tiny_random.encode_images(in_context_story("{B} in {A}.", images))
    assert (tiny_random.prompt_embeds([swapped], "dream") - embeds).abs().max() > 1e-2


def test_a_story_without_room_for_the_queries(tiny_random, dream):
    limit = tiny_random.config.llm.max_position_embeddings
    with pytest.raises(StoryTooLongError, match="context"):
        dream.prompt_embeds(tiny_random.text, [story(tiny_random, "a" * limit)])


def test_settings_in_files():
    assert "conditioner" not in to_file(QUICK)
    assert to_file(replace(QUICK, conditioner="dream"))["conditioner"] == "dream"
