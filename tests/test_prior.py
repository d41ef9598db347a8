"""DALL-E 2's prior: image embeddings from texts, embeddings that are moved, and images drawn from them."""

import gc
import json
import math
import weakref

import pytest
import torch
from safetensors.torch import save_file
from tiny_prior import make_prior

from comfy_mminterleaved.errors import CheckpointError, SettingError
from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.generation.embedders import FeatureEmbedder, system_metadata
from comfy_mminterleaved.generation.prior import (
    ImagePrior,
    blend,
    is_prior_folder,
    load_prior,
    load_prior_folder,
    make_prior_scheduler,
    move,
    of_embedder,
    turn,
)
from comfy_mminterleaved.models.contrastive import ContrastiveConfig, ContrastiveModel
from comfy_mminterleaved.models.prior import DiffusionPrior, PriorConfig
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import Story

WIDTH = 32
QUICK = ImageGenerationConfig(num_inference_steps=1, guidance_scale=1.0)


def make_config(queries: int = 4, channels: int = 12) -> PriorConfig:
    return PriorConfig(WIDTH, 10, 2, 8, 1, queries, channels, 16, 2.0)


def random_prior(config=None, seed=0) -> DiffusionPrior:
    torch.manual_seed(seed)
    model = DiffusionPrior(config or make_config()).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.prior.clip_std.fill_(1.0)
    return model


@pytest.fixture
def embedder(tiny_random):
    torch.manual_seed(0)
    config = ContrastiveConfig(WIDTH, hidden_size=16, num_hidden_layers=1, vocab_size=tiny_random.config.llm.vocab_size)
    return FeatureEmbedder(ContrastiveModel(config).eval(), tiny_random.tokenizer, lambda images: images)


@pytest.fixture
def prior(embedder):
    return ImagePrior(
        random_prior().prior, make_prior_scheduler(), of_embedder(embedder, 10), is_unit=True, guidance_scale=2.0
    )


# ---- sampling ----


def test_samples_depend_on_text_and_seed_alone(prior):
    first = prior.sample("a fox waves", 3, num_inference_steps=4, seed=5)
    assert first.shape == (3, WIDTH) and torch.allclose(first.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert prior.sample("a fox waves", 3, num_inference_steps=4, seed=5).equal(first)
    second = prior.sample("a fox waves", 1, num_inference_steps=4, seed=6)
    assert torch.allclose(second[0], first[1], atol=1e-4)
    for other in (prior.sample("a cow", 1, num_inference_steps=4, seed=5), second):
        assert (other[0] - first[0]).abs().max() > 1e-3


def test_the_better_of_two_is_kept(prior, monkeypatch):
    """Of two samples, the one nearer to the text (section 2.2): never a worse one than the first alone."""
    from comfy_mminterleaved.generation import prior as module

    text = prior.text_embeds(["a fox waves"])[0]
    both = prior.sample("a fox waves", 8, num_inference_steps=3)
    monkeypatch.setattr(module, "NUM_CANDIDATES", 1)
    alone = prior.sample("a fox waves", 8, num_inference_steps=3)
    fits = [torch.cosine_similarity(each, text[None]) for each in (both, alone)]
    assert (fits[0] >= fits[1] - 1e-4).all() and (fits[0] > fits[1] + 1e-4).any()


def test_guidance_of_one_is_none(prior):
    calls = []
    prior.model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    prior.sample("a fox", num_inference_steps=2, guidance_scale=1.0)
    prior.sample("a fox", num_inference_steps=2)
    assert calls == [2, 2, 4, 4]


def test_progress(prior):
    steps = []
    prior.sample("a fox", num_inference_steps=3, on_step=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"text": " "}, "empty"),
        ({"count": 0}, "at least 1, not 0"),
        ({"num_inference_steps": 1}, "at least 2 steps, not 1"),
        ({"guidance_scale": -1.0}, "at least 0, not -1"),
        ({"guidance_scale": math.nan}, "at least 0, not nan"),
    ],
)
def test_bad_settings(prior, options, sentence):
    with pytest.raises(SettingError, match=sentence):
        prior.sample(**{"text": "a fox", **options})


# ---- moving ----


def test_blends_go_along_the_arc():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    half = math.sqrt(0.5)
    for amount, expected in ((0, [1, 0]), (1, [0, 3]), (0.5, [2 * half, 2 * half])):
        assert torch.allclose(blend(a, b, amount)[0], torch.tensor(expected).float(), atol=1e-4)
    assert torch.allclose(blend(a, a, 0.5), a, atol=1e-4)


def test_text_differences_turn_towards_what_is_new():
    image, text, neutral = torch.eye(3)
    moved = move(2 * image, text, neutral, 0.35)
    assert moved.norm().item() == pytest.approx(2, abs=1e-4)
    assert moved @ text > 0.1 and moved @ neutral < -0.1 and moved @ image > 1
    assert torch.allclose(move(image, text, neutral, 0), image, atol=1e-4)
    with pytest.raises(SettingError, match="no difference"):
        turn(image, torch.zeros(3), 0.5)
    with pytest.raises(SettingError, match="no difference"):
        move(image, text, 5 * text)


def test_embeddings_of_other_models_and_nan():
    with pytest.raises(SettingError, match="widths 3 and 4"):
        blend(torch.ones(3), torch.ones(4), 0.5)
    with pytest.raises(SettingError, match="not a number"):
        blend(torch.ones(3), torch.full((3,), math.nan), 0.5)


# ---- drawing ----


@pytest.fixture
def pipeline(tiny_random, embedder, monkeypatch):
    """The tiny model with a prior of its widths."""
    perceiver = tiny_random.config.synchronizer.perceiver
    model = random_prior(make_config(perceiver.num_queries, perceiver.hidden_size))
    encode = of_embedder(embedder, 10)
    prior = ImagePrior(model.prior, make_prior_scheduler(), encode, is_unit=True), model.conditioner
    monkeypatch.setitem(vars(tiny_random.systems), "_prior", prior)
    return tiny_random


def test_embeddings_are_drawn(pipeline, pictures):
    embeds = torch.nn.functional.normalize(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    images = pipeline.generate_from_embeds(embeds, QUICK, seeds=[4, 4, 4])
    assert [image.seed for image in images] == [4, 4, 4] and images[0].origin == "drawn"
    (alone,) = pipeline.generate_from_embeds(embeds[1:2], QUICK, seeds=[4])
    assert torch.allclose(alone.pixels, images[1].pixels, atol=1e-3)
    assert (images[0].pixels - images[1].pixels).abs().max() > 1e-3
    (beside,) = pipeline.generate_from_embeds(embeds[1:2], QUICK, Story.of(pictures[0]), seeds=[4])
    assert (beside.pixels - alone.pixels).abs().max() > 1e-3
    consecutive = pipeline.generate_from_embeds(embeds, QUICK.with_seed_offset(7))
    assert [image.seed for image in consecutive] == [7, 8, 9]


def test_bad_embeddings_are_refused_before_drawing(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.image, "generate", lambda *_, **__: pytest.fail("drawn"))
    embeds = torch.ones(2, WIDTH)
    for arguments, sentence in (
        ((torch.ones(1, 5), QUICK), "widths 5 and 32"),
        ((embeds * math.nan, QUICK), "not a number"),
        ((embeds, ImageGenerationConfig(best_of=2)), "best_of"),
        ((embeds, QUICK, Story(), None, None, 8, [1]), "2 embeddings"),
        ((embeds[0], QUICK), r"one a row, \(N, D\), not of the shape \(32,\)"),
        ((embeds[:0], QUICK), r"shape \(0, 32\)"),
    ):
        with pytest.raises(SettingError, match=sentence):
            pipeline.generate_from_embeds(*arguments)


def test_a_pipeline_that_is_dropped_is_freed():
    gc.collect()
    gc.disable()
    try:
        pipeline = MMInterleavedPipeline.load("tiny-random", "cpu")
        unet = weakref.ref(pipeline.unet)
        del pipeline
        assert unet() is None
    finally:
        gc.enable()


def test_a_model_without_a_prior(tiny_random):
    with pytest.raises(CheckpointError, match="no prior"):
        _ = tiny_random.prior


# ---- files ----


def test_files(tmp_path, embedder):
    model, path = random_prior(), tmp_path / "prior.safetensors"
    metadata = system_metadata(model.config.to_dict(), "prior")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata)
    prior, conditioner = load_prior(path, embedder)
    expected = ImagePrior(model.prior, make_prior_scheduler(), of_embedder(embedder, 10), True, 2.0)
    options = {"num_inference_steps": 3, "seed": 2}
    assert torch.allclose(prior.sample("a fox", **options), expected.sample("a fox", **options), atol=1e-4)
    assert torch.allclose(conditioner(torch.ones(1, WIDTH)), model.conditioner(torch.ones(1, WIDTH)), atol=1e-5)

    save_file({k: v for k, v in tensors.items() if k != "conditioner.fc1.bias"}, path, metadata)
    with pytest.raises(CheckpointError, match="conditioner.fc1.bias"):
        load_prior(path, embedder)
    save_file(tensors, path, system_metadata({**model.config.to_dict(), "num_layers": "two"}, "prior"))
    with pytest.raises(CheckpointError, match="prior.safetensors"):
        load_prior(path, embedder)
    save_file(tensors, path, system_metadata(model.config.to_dict(), "refiner"))
    with pytest.raises(CheckpointError, match="'refiner', not 'prior'"):
        load_prior(path, embedder)
    other = random_prior(PriorConfig(16, 10, 2, 8, 1, 4, 12, 16))
    save_file(other.state_dict(), path, system_metadata(other.config.to_dict(), "prior"))
    with pytest.raises(CheckpointError, match="width 16, but the contrastive model gives 32"):
        load_prior(path, embedder)


@pytest.mark.parametrize("scheduler", ["prior_scheduler", "scheduler"])
def test_folders_of_diffusers(tmp_path, scheduler, monkeypatch):
    """Karlo's layout and Kandinsky 2.2's, tiny: samples are those of diffusers' own pipeline, one candidate each."""
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from comfy_mminterleaved.generation import prior as module

    folder = make_prior(tmp_path / "prior of somebody", scheduler)
    assert is_prior_folder(folder) and not is_prior_folder(tmp_path)
    prior = load_prior_folder(folder)
    states = prior.encode_texts(["a fox.", ""])
    assert states.attention_mask.sum(1).tolist() == [7, 2]  # letters, and what begins and ends a text
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    pipe = KandinskyV22PriorPipeline(
        PriorTransformer.from_pretrained(folder / "prior"),
        CLIPVisionModelWithProjection(vision),
        prior.encode_texts.tower,
        prior.encode_texts.tokenizer,
        prior.scheduler,
        None,
    )
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(module, "NUM_CANDIDATES", 1)
    for guidance in (1.0, 3.0):
        embeds = prior.sample("a fox.", 2, guidance, 3, seed=1)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        expected = pipe("a fox.", None, 2, 3, generators, guidance_scale=guidance, output_type="pt").image_embeds
        assert torch.allclose(embeds, expected, atol=1e-4)


def test_folders_that_are_no_priors(tmp_path):
    folder = make_prior(tmp_path / "karlo")
    (folder / "text_encoder" / "config.json").rename(folder / "text_encoder" / "other.json")
    with pytest.raises(CheckpointError, match="cannot be read as a prior"):
        load_prior_folder(folder)
    for name in ("tokenizer", "prior_scheduler"):
        (folder / name).rename(folder / f"no {name}")
    with pytest.raises(CheckpointError, match="lacks tokenizer, prior_scheduler"):
        load_prior_folder(folder)
    (folder / "prior" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError):
        load_prior_folder(folder)


def test_another_text_encoder_is_refused(tmp_path):
    folder, other = make_prior(tmp_path / "one"), make_prior(tmp_path / "other", width=8)
    config = json.loads((other / "text_encoder" / "config.json").read_text())
    assert config["projection_dim"] == 8
    for file in (folder / "text_encoder").iterdir():
        file.write_bytes((other / "text_encoder" / file.name).read_bytes())
    with pytest.raises(CheckpointError, match="width 8, but its prior takes 16"):
        load_prior_folder(folder)
