"""Blocks that take turns on a card: the CPU is the card, and every copy to it counts."""

from dataclasses import replace

import pytest
import torch

from comfy_mminterleaved import ImageGenerationConfig, MMInterleavedPipeline, Story, TextGenerationConfig
from comfy_mminterleaved.checkpoints import native
from comfy_mminterleaved.checkpoints.load import read
from comfy_mminterleaved.checkpoints.quantize import quantized_config
from comfy_mminterleaved.checkpoints.reference import from_reference
from comfy_mminterleaved.cli import main
from comfy_mminterleaved.errors import SettingError
from comfy_mminterleaved.generation.peak_memory import PeakMemory
from comfy_mminterleaved.generation.placement import RESERVED, Placement, make_plan, parse_bytes
from comfy_mminterleaved.presets import tiny_config

# Of the released model: GiB of a card, form, and what the plan must be.
CARDS = [(24, "fp8", "resident"), (16, "fp8", "swapped"), (12, "q4_0", "swapped"), (8, "q4_0", "streamed")]


@pytest.mark.parametrize("gib, form, mode", CARDS)
def test_the_full_size_model_on_the_cards_that_artists_have(gib, form, mode):
    plan = make_plan(quantized_config(from_reference({}), form), gib * 2**30)
    assert plan.mode == mode and plan.peak <= plan.room


def test_a_card_that_is_too_small_is_told_what_would_do():
    config = quantized_config(from_reference({}), "q4_0")
    with pytest.raises(SettingError) as error:
        make_plan(config, 4 * 2**30)
    needed = str(error.value).split("needs ")[1].split(";")[0]
    assert "4.0 GiB of memory are too little" in str(error.value)
    assert make_plan(config, parse_bytes(needed) + 10**8)


@pytest.mark.parametrize(
    "text, size", [("12GB", 12 * 2**30), ("7.5 GiB", 7.5 * 2**30), ("800M", 800 * 2**20), ("12", 12)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "a lot", "-3GB", "12 GBs"])
def test_no_sizes(text):
    with pytest.raises(SettingError, match="must be like 12GB"):
        parse_bytes(text)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder of a model whose LLM is the largest block by far, as at full size."""
    config = tiny_config()
    llm = replace(config.llm, num_hidden_layers=24, intermediate_size=2048, max_position_embeddings=1024)
    from comfy_mminterleaved.loading import tiny_random_blocks
    from comfy_mminterleaved.models.build import init_modules

    config = replace(config, llm=llm)
    blocks = {name: module.state_dict() for name, module in init_modules(config).items()}
    folder = tmp_path_factory.mktemp("wide") / "model"
    native.save(folder, config, blocks, tiny_random_blocks()[2])
    return folder


STORY = Story.of("Once there was a bear", torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3)), "who")
TEXT = TextGenerationConfig(max_new_tokens=12, min_new_tokens=12, seed=1)
IMAGE = ImageGenerationConfig(num_inference_steps=2, seed=1, scheduler="ddim")


def told(pipeline):
    story = pipeline.generate_story(STORY, 2, text_config=TEXT, image_config=IMAGE)
    return story.text, torch.stack([image.pixels for image in story.images[1:]])


def placed(folder, capacity: int, **plan) -> MMInterleavedPipeline:
    pipeline = MMInterleavedPipeline.load(folder, "cpu")
    found = make_plan(pipeline.config, capacity, torch.float32, num_tokens=256, num_images=4, **plan)
    modules = {name: getattr(pipeline, name) for name in ("encoder", "llm", "synchronizer", "unet", "vae")}
    pipeline.placement = Placement(found, modules, torch.device("cpu"))
    return pipeline


@pytest.fixture(scope="module")
def expected(wide):
    return told(MMInterleavedPipeline.load(wide, "cpu"))


def capacity_for(folder, mode: str) -> int:
    """The smallest card, in steps of a tenth of the LLM, whose plan is of a mode; the largest for streaming."""
    config = MMInterleavedPipeline.load(folder, "cpu").config
    everything = make_plan(config, 10**12, torch.float32, num_tokens=256, num_images=4)
    step = everything.weights["llm"] // 10
    capacity = RESERVED + everything.peak
    while True:
        plan = make_plan(config, capacity, torch.float32, num_tokens=256, num_images=4)
        if plan.mode == mode:
            return capacity
        capacity -= step


@pytest.mark.parametrize("mode", ["resident", "swapped", "streamed"])
def test_the_same_story_within_the_plan(wide, expected, mode):
    """The peak of everything that is copied to the card or made on it, beyond the plan by at most a tenth."""
    pipeline = placed(wide, capacity_for(wide, mode))
    plan = pipeline.placement.plan
    assert plan.mode == mode
    with PeakMemory() as memory:
        text, images = told(pipeline)
    assert text == expected[0]
    torch.testing.assert_close(images, expected[1], atol=1e-3, rtol=0)  # kernels depend on how weights are aligned
    assert memory.peak <= 1.1 * plan.peak
    assert memory.peak >= 0.5 * plan.peak, "a plan that asks for twice the memory plans nothing"


def test_less_memory_takes_less(wide):
    peaks = {}
    for mode in ("resident", "swapped", "streamed"):
        pipeline = placed(wide, capacity_for(wide, mode))
        with PeakMemory() as memory:
            told(pipeline)
        peaks[mode] = memory.peak
    assert peaks["streamed"] < peaks["swapped"] < peaks["resident"]


def test_a_cache_in_eight_bits_tells_a_story(wide):
    pipeline = MMInterleavedPipeline.load(wide, "cpu", cache_dtype=torch.float8_e4m3fn)
    text, images = told(pipeline)
    assert len(text) > 20 and len(images) == 2
    cache = pipeline.text.cache.kv_cache
    assert cache.keys[0].dtype == cache.values[0].dtype == torch.float8_e4m3fn
    beams = pipeline.generate_texts([STORY], TextGenerationConfig(max_new_tokens=6, num_beams=3, do_sample=False), 2)
    assert len(beams[0]) == 2
    ranked = pipeline.rank(STORY, ["a bear", "a fox"], "Who is it?")
    assert len(ranked) == 2


def test_a_cache_in_eight_bits_is_near(wide):
    story = Story.of("Once there was a bear who lived near the sea.")
    states = [
        MMInterleavedPipeline.load(wide, "cpu", cache_dtype=dtype).context_features([story])[0]
        for dtype in (None, torch.float8_e4m3fn)
    ]
    assert 0 < (states[0] - states[1]).norm() / states[0].norm() < 0.1


def test_the_starter_is_read_as_before():
    assert read("starter").config.llm.quantization is None
    assert MMInterleavedPipeline.load("starter", "cpu").placement is None


def test_a_model_that_takes_turns_is_not_compiled(wide):
    resident = make_plan(MMInterleavedPipeline.load(wide, "cpu").config, 10**12, torch.float32)
    with pytest.raises(SettingError, match="omit --compile"):
        MMInterleavedPipeline.load(wide, "cpu", memory=RESERVED + resident.peak - 10**6, compile=True)


@pytest.mark.parametrize("form", ["fp8", "int8", "q4_0"])
def test_a_quantized_model_is_loaded_by_a_plan(wide, tmp_path, form):
    """In parts, with the CPU as the card: the same story as when all stays."""
    saved = read(wide)
    native.save(tmp_path / "model", saved.config, saved.blocks, saved.tokenizer, quantization=form)
    plain = MMInterleavedPipeline.load(tmp_path / "model", "cpu", torch.float32)
    size = (64, 64)
    most = make_plan(plain.config, 10**12, torch.float32, size)
    memory = RESERVED + max(most.needed("text") - most.weights["llm"] // 3, most.needed("draw"))
    pipeline = MMInterleavedPipeline.load(tmp_path / "model", "cpu", torch.float32, memory=memory, image_size=size)
    assert pipeline.placement.plan.mode == "streamed"
    texts = [p.generate_text(STORY, TEXT).text for p in (plain, pipeline)]
    images = [p.generate_image(STORY, replace(IMAGE, size=size)).pixels for p in (plain, pipeline)]
    assert texts[0] == texts[1]
    torch.testing.assert_close(*images, atol=1e-3, rtol=0)


def test_a_copy_that_fails_leaves_nothing_on_the_card(wide, monkeypatch):
    from comfy_mminterleaved.generation import placement

    pipeline = placed(wide, capacity_for(wide, "swapped"))
    copies, copy = 0, placement._copy_to

    def fail(host, device):
        nonlocal copies
        copies += 1
        if copies == 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy(host, device)

    hosts = {tensor.data_ptr() for tensor in pipeline.unet.parameters()}
    monkeypatch.setattr(placement, "_copy_to", fail)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.generate_image(STORY, IMAGE)
    monkeypatch.setattr(placement, "_copy_to", copy)
    pipeline.placement.place("text")
    assert {tensor.data_ptr() for tensor in pipeline.unet.parameters()} == hosts
    assert len(told(pipeline)[1]) == 2


def test_the_command_line_has_no_card_to_share_on_a_cpu(capsys):
    assert main(["write", "--text", "x", "--memory", "8GB", "--device", "cpu"]) == 2
    assert "--memory is of a card, but the model runs on the CPU" in capsys.readouterr().err
