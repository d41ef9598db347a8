"""The benchmarks run, at toy size: their figures are not looked at here."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch
from places import HERE, TINY

sys.path.insert(0, str(HERE.parent))

from benchmarks import full_size, gather, gpu, models, story, storyboards, token, unet
from benchmarks.timing import interleaved
from comfy_mminterleaved import MMInterleavedPipeline, TextSegment
from comfy_mminterleaved.checkpoints.load import read_config, read_state_dicts
from comfy_mminterleaved.cli import main
from comfy_mminterleaved.config import SpecialTokens
from comfy_mminterleaved.presets import tiny_config


@pytest.fixture
def toy(monkeypatch):
    config = tiny_config()

    def released_13b(layers=None):
        return replace(config, llm=replace(config.llm, num_hidden_layers=layers or 4))

    for module in (models, token, unet, gpu):
        monkeypatch.setattr(module, "released_13b", released_13b)


def test_interleaved_runs_every_case_as_often():
    counts = {"a": 0, "b": 0}
    seconds = interleaved({n: lambda n=n: counts.__setitem__(n, counts[n] + 1) for n in counts}, rounds=3)
    assert counts == {"a": 4, "b": 4} and set(seconds) == {"a", "b"}


def test_token(toy):
    found = token.measure(pictures=(2,), rounds=1, layers=2)
    assert set(found["seconds"]) == {"plain", "2 pictures"} and found["ratios"]["2 pictures"] > 0


def test_storyboards():
    rates = storyboards.measure([], count=2, panels=1, rounds=1, source="tiny-random", ray=False)
    assert set(rates) == {"bare loop", "tell --storyboard", *(f"the same, --batch {n}" for n in (2, 4, 8))}
    assert "| bare loop |" in storyboards.table(rates) and all(rate > 0 for rate in rates.values())


def test_gather(monkeypatch):
    monkeypatch.setattr(gather, "SIZES", ((4, 4), (2, 2), (2, 2), (1, 1)))
    found = gather.measure(1, queries=(2,), pictures=(1,))
    assert set(found["float32, 1 pictures, 2 queries"]) == {"eager", "embedding_bag", "dense"}


def test_the_check_of_the_gpu_finds_what_is_wrong(monkeypatch):
    monkeypatch.setattr(gather, "SIZES", ((4, 4), (2, 2), (2, 2), (1, 1)))
    assert len(gpu.check("cpu", cases=((2, 3),))) == 3
    monkeypatch.setitem(gpu.TOLERANCE, torch.float32, 1e-12)
    with pytest.raises(AssertionError, match="embedding_bag in torch.float32 is off"):
        gpu.check("cpu", cases=((2, 3),))


def test_a_story_is_the_same_with_every_cache_off(tiny_random, monkeypatch):
    """Else the benchmark would compare different work."""
    monkeypatch.setattr(story, "SAMPLING", replace(story.SAMPLING, max_new_tokens=4, min_new_tokens=4))
    monkeypatch.setattr(story, "DRAWING", replace(story.DRAWING, num_inference_steps=2))
    seconds, kept = story.tell(tiny_random, 3)
    assert len(seconds) == 3 and len(kept.images) == 3
    for way in ("kv", "nothing"):
        _, other = story.tell(tiny_random, 3, way)
        assert [s.token_ids for s in kept if isinstance(s, TextSegment)] == [
            s.token_ids for s in other if isinstance(s, TextSegment)
        ]
        for a, b in zip(kept.images, other.images):
            assert torch.allclose(a.pixels, b.pixels, atol=1e-3)
    tiny_random.clear_cache()


def test_a_story_without_the_synchronizer(monkeypatch):
    monkeypatch.setattr(story, "SAMPLING", replace(story.SAMPLING, max_new_tokens=4, min_new_tokens=4))
    monkeypatch.setattr(story, "DRAWING", replace(story.DRAWING, num_inference_steps=2))
    plain = story.without_mmfs(MMInterleavedPipeline.load("tiny-random", "cpu"))
    seconds, _ = story.tell(plain, 3)
    assert len(seconds) == 3


def test_an_llm_by_how_its_weights_are_stored(toy):
    found = token.forms(layers=2, rounds=1, read=8)
    assert set(found) == {"float32", "bfloat16", "fp8", "int8", "q4_0"}
    sizes = [found[name]["bytes"] for name in ("q4_0", "int8", "bfloat16", "float32")]
    assert sizes == sorted(sizes) and found["float32"]["token ratio"] == 1


@pytest.fixture
def small():
    """The recorded reference model's config, with a vocabulary of bytes."""
    config = read_config(TINY)
    return replace(config, llm=replace(config.llm, vocab_size=302, special_tokens=SpecialTokens(1, 2, 299, 300, 301)))


@pytest.mark.parametrize("form", ["fp8", "int8", "q4_0"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_folder_like_the_published_one_tells_a_story(tmp_path, monkeypatch, small, form, dtype):
    """In small shards, as the trainer leaves them; the command line does the rest."""
    monkeypatch.setattr(full_size, "SHARD", 300_000)
    source, target = tmp_path / "published", tmp_path / "model"
    full_size.fake(source, small, full_size.DTYPES[dtype])
    assert len(list(source.glob("*.bin"))) > 5
    assert main(["convert", str(source), str(target), "--quantize", form, "--quiet"]) == 0
    assert main(["info", str(target), "--memory", "2GB"]) == 0
    flags = ["--panels", "1", "--steps", "2", "--max-new-tokens", "4", "--quiet", "--out", str(tmp_path / "out")]
    assert main(["tell", "--model", str(target), "--text", "A fox.", *flags]) == 0
    assert (tmp_path / "out" / "story.html").is_file()


def test_stories_of_converted_models(tmp_path):
    for form in ("fp8", "int8"):
        assert main(["convert", "tiny-random", str(tmp_path / form), "--quantize", form, "--quiet"]) == 0
    found = gpu.stories([tmp_path / "fp8", tmp_path / "int8"], "cpu", num_tokens=6, steps=2)
    assert [figures["form"] for figures in found.values()] == ["fp8", "int8"]
    assert all(figures["tokens a second"] > 0 and figures["plan"] == "resident" for figures in found.values())


def test_a_sparse_folder_takes_no_room_and_is_read(tmp_path, small):
    full_size.fake(tmp_path / "published", small, torch.float16, sparse=True)
    assert read_config(tmp_path / "published") == small
    assert not any(t.any() for t in read_state_dicts(tmp_path / "published")[1]["llm"].values())


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("form", ["fp8", "int8", "q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convert_takes_the_largest_tensor_and_a_gigabyte(tmp_path, form, dtype):
    """At full width, of a model of many gigabytes."""
    config = full_size.config_of(4)
    full_size.fake(tmp_path / "source", config, dtype, sparse=True)
    largest = config.llm.vocab_size * config.llm.hidden_size * dtype.itemsize
    found = full_size.measured(
        "convert", str(tmp_path / "source"), str(tmp_path / "model"), "--quantize", form, "--quiet"
    )
    shutil.rmtree(tmp_path / "model")
    assert found["peak_gb"] * 1e9 < largest + 1e9
