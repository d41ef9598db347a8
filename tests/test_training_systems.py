"""The stages of what stands beside the story model, and its figures."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("resvg_py")
pytest.importorskip("accelerate")
from safetensors import safe_open

from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.errors import CheckpointError
from comfy_mminterleaved.finetune import story_panels
from comfy_mminterleaved.generation.config import CANDIDATE_STEP, ImageGenerationConfig
from comfy_mminterleaved.generation.dream import in_context_story
from comfy_mminterleaved.generation.embedders import parse_system_metadata
from comfy_mminterleaved.generation.refine import ImageRefiner
from comfy_mminterleaved.models.build import init_modules
from comfy_mminterleaved.models.contrastive import ContrastiveConfig, ContrastiveModel
from comfy_mminterleaved.models.refiner import Refiner, RefinerConfig, enlarge
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story
from starter_training import dream_study, finetuning, renderer, starter_config, world
from starter_training.__main__ import STAGE_DIR, main
from starter_training.classifier import AttributeClassifier
from starter_training.classifier import load as load_classifier
from starter_training.dataset import StoryDataset
from starter_training.prior_training import look_variants
from starter_training.refiner_training import RefinerBatch, RefinerObjective
from starter_training.run_dir import export_systems
from starter_training.stages import run_stage
from starter_training.systems import contrastive as contrastive_figures
from starter_training.systems import drawers, drawn, finetuned, insight, reconstruction, refined
from starter_training.systems import dream as dream_figures
from starter_training.systems import prior as prior_figures
from starter_training.systems import sound as sound_figures
from starter_training.systems import thumbnails as thumbnail_figures
from starter_training.systems import tokens as token_figures
from starter_training.trainer import StageConfig


def test_the_systems_are_trained_exported_and_measured(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert main(["begin", "--out", str(run)]) == 0
    command = ["contrastive", "--out", str(run), "--stories", "3", "--batch", "8", "--steps", "2"]
    assert main([*command, "--minutes", "0"]) == 0
    assert main(command) == 0
    weights = read_tensors(run / "contrastive" / "contrastive.safetensors")
    records = [json.loads(line) for line in (run / "contrastive" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2 and len(list(run.glob("tokens-*.npy"))) == 10
    assert main(["export", "--out", str(run)]) == 0
    pipeline = MMInterleavedPipeline.load(run / "model")
    for name, tensor in pipeline.embedder.model.state_dict().items():
        assert torch.allclose(tensor, weights[name], atol=1e-2), name
    config = ImageGenerationConfig(num_inference_steps=1, best_of=2, guidance_scale=1.0)
    story = Story.of("Mia is a fox in a red coat with a hat. Mia waves by the lake with a kite.")
    single = replace(config, best_of=1)
    candidates = [pipeline.generate_image(story, single.with_seed_offset(n * CANDIDATE_STEP)) for n in range(2)]
    assert (candidates[0].pixels - candidates[1].pixels).abs().max() > 1e-2
    best = pipeline.generate_image(story, config)
    ranked = pipeline.rank_images(story, candidates)
    assert torch.allclose(best.pixels, ranked[0].image.pixels, atol=1e-3)  # a batch differs in last bits
    assert best.seed == ranked[0].index * CANDIDATE_STEP
    assert contrastive_figures.word_masks(pipeline, 20, 1)["prop"]["peak inside, left out"]["cases"] == 1
    figures = contrastive_figures.best_of(pipeline, AttributeClassifier(), 20, 1, tmp_path / "cache", num_candidates=2)
    assert figures["heroes"]["ranked"]["cases"] == 1 and len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert main(["drawn", "--out", str(run), "--stories", "3", "--batch", "4", "--steps", "1"]) == 0
    export_systems(run, run / "model")
    pipeline.adapt_to_drawings()
    assert len(pipeline.drawn_adapter.names) > 20
    assert main(["refine", "--out", str(run), "--stories", "3", "--batch", "2", "--steps", "1"]) == 0
    export_systems(run, run / "model")
    assert next((run / "refine").glob("samples-*.png"))
    refiner = MMInterleavedPipeline.load(run / "model").refiner.model.state_dict()
    for name, tensor in read_tensors(run / "refine" / "refiner.safetensors").items():
        assert torch.allclose(refiner[name], tensor, atol=1e-2), name
    assert main(["prior", "--out", str(run), "--stories", "3", "--batch", "4", "--steps", "1"]) == 0
    export_systems(run, run / "model")
    trained = MMInterleavedPipeline.load(run / "model")
    prior = {f"prior.{name}": tensor for name, tensor in trained.prior.model.state_dict().items()}
    for name, tensor in read_tensors(run / "prior" / "prior.safetensors").items():
        assert name.startswith("conditioner.") or torch.allclose(prior[name], tensor, atol=1e-2), name
    assert trained.prior.model.clip_std.min() > 0
    assert main(["sound", "--out", str(run), "--stories", "3", "--steps", "1"]) == 0
    export_systems(run, run / "model")
    trained = MMInterleavedPipeline.load(run / "model")
    assert len(trained.systems.sounds.phrases) == 40 and trained.generation_config.image.refine is False
    short = ["--out", str(run), "--stories", "3", "--batch", "6", "--steps", "1"]
    with pytest.raises(CheckpointError, match="run its stage 'codes' first"):
        run_stage(StageConfig.read(STAGE_DIR / "tokens.json", steps=1), run, stories=3)
    assert [main([stage, *short]) for stage in ("dream", "codes", "tokens")] == [0, 0, 0]
    export_systems(run, run / "model")
    trained = MMInterleavedPipeline.load(run / "model")
    codebook = read_tensors(run / "codes" / "vqvae.safetensors")["quantize_top.codebook"]
    assert torch.allclose(trained.systems.image_tokenizer.model.quantize_top.codebook, codebook, atol=1e-2)
    assert len(trained.systems.dream.lora.names) == 7 * 6
    monkeypatch.setattr(token_figures, "NUM_CANDIDATES", 2)
    drafted = token_figures.drafts(trained, AttributeClassifier(), 20, 1)
    assert drafted["species"]["any of 2"]["mean"] >= drafted["species"]["best of 2"]["mean"]
    assert token_figures.from_rows(trained, AttributeClassifier(), 20, 1)["sky"]["cases"] == 1
    assert {"one draft of image tokens", "best of 16 drafts"} <= set(drawers.drawers(trained))
    assert main(["thumbnails", *short]) == 0
    generator = run / "thumbnails" / "generator.safetensors"
    small = thumbnail_figures.thumbnails(trained, AttributeClassifier(), 20, 2, generator)
    assert small["place"]["mean"]["cases"] == 2 and small["distance of thumbnails of one text"]["augmented"] > 0
    result = dream_study.study("joint", run, 3, 1, 0, count=1)
    assert 0 <= result["captions"]["mean"] <= 1 and 0 <= result["codes"]["mean"] <= 1
    cache, adapters = tmp_path / "cache", {"none": (None, False), "both": (pipeline.drawn_adapter, True)}
    judge = AttributeClassifier()
    assert set(drawn.wrong_facts(pipeline, judge, 20, 1, cache, adapters)) == set(adapters)
    assert insight.spread(pipeline, judge, 20, 1)["whole"]["cases"] == 1
    assert "image" in insight.sources(pipeline, load_classifier(), 20, 1)
    assert set(reconstruction.descriptions(pipeline, load_classifier(), 20, 1, cache, 2)) >= {"painted", "softened"}
    with pytest.raises(CheckpointError, match="holds 'contrastive', not 'prior'"):
        path = run / "model" / "systems" / "contrastive.safetensors"
        parse_system_metadata(safe_open(path, "pt").metadata(), "prior", path.name)


def test_captions_that_leave_things_out():
    heroes = (world.Hero("fox", "orange", "glasses", "Mia"), world.Hero("bear", "red", "hat", "Otto"))
    scene = world.Scene(heroes, "wave", "lake", "kite", "rain", far=True)
    assert world.partial_caption(scene) == (
        "A fox in an orange coat with glasses and a bear in a red coat with a hat wave far away by the lake with a "
        "kite. It rains."
    )
    assert world.partial_caption(scene, frozenset(world.OMISSIBLE)) == "A fox and a bear wave."
    assert world.partial_caption(scene, frozenset({"colour", "far", "place"})) == (
        "A fox with glasses and a bear with a hat wave with a kite. It rains."
    )
    for panel in world.make_story(3):
        assert world.partial_caption(panel.scene) == world.caption(panel.scene)


def test_look_variants_change_looks_alone():
    scenes = [panel.scene for panel in world.make_story(5)]
    variants = look_variants(scenes)
    assert len(variants) == 3 * len(scenes)
    for k, variant in enumerate(variants):
        scene = scenes[k // 3]
        assert replace(variant, heroes=scene.heroes) == scene
        assert not any(world.is_held_out_appearance(*hero.look) for hero in variant.heroes)
        assert all(a.look != b.look and a.name == b.name for a, b in zip(variant.heroes, scene.heroes))


def test_the_priors_figures(monkeypatch):
    """With the weights that ship: what a held-out image's embedding keeps, what a text tells, one fact moved."""
    monkeypatch.setattr(prior_figures, "NUM_SAMPLES", 4)
    monkeypatch.setattr(prior_figures, "STEPS", 6)
    pipeline, judge = MMInterleavedPipeline.load("starter", "cpu"), load_classifier()
    figures = prior_figures.from_embeddings(pipeline, judge, 10, 6)
    assert figures["place and prop"]["image embedding"]["cases"] == 6
    texts = prior_figures.from_texts(pipeline, judge, 10, 3)
    assert texts["told"]["prior"]["mean"] > 0.5 and texts["untold coats"]["prior"]["cases"] == 2
    moved = prior_figures.differences(pipeline, judge, 10, 4)
    assert set(moved) == {"changed", "kept", *prior_figures.CHANGES}
    assert sound_figures.heard(pipeline, 10, 1)["all"]["mean"] > 0.9
    over = sound_figures.over_images(pipeline, judge, 10, 2)
    assert over["sky as heard"]["sound"]["cases"] == 2 and set(over) == {"sky as heard", "rest kept", "both"}
    assert prior_figures.entropy(["a", "b"]) == pytest.approx(math.log(2))


def test_tasks_in_context_say_what_they_show():
    """Texts are of the world's words, and each scene has what its text and its images say."""
    from starter_training.dream_training import TASKS, edited, is_reserved

    a, b = (world.make_story(seed)[0].scene for seed in (1, 7))
    rng, known = random.Random(0), world.words()
    for make in (*TASKS, lambda rng, a, b: edited(rng, a, "sky"), lambda rng, a, b: edited(rng, a, "place")):
        for _ in range(8):
            task = make(rng, a, b)
            words = re.findall(r"[a-z]+", re.sub(r"\{[AB]\}", "", task.text).lower())
            assert set(words) <= known, task.text
            named = re.findall(r"\{([AB])\}", task.text)
            assert sorted(set(named)) == ["A", "B"][: len(task.images)]
            images = {name: ImageSegment(torch.zeros(3, 8, 8)) for name in named}
            assert len(in_context_story(task.text, images).images) == len(named)
            for fact, phrases in (("place", world.PLACES), ("prop", world.PROPS)):
                said = [key for key, phrase in phrases.items() if phrase in task.text.lower()]
                assert not said or getattr(task.scene, fact) in said, task.text
            renderer.paint(task.scene)
    held_out = world.make_story(3, held_out=True)[0].scene
    assert is_reserved(held_out) and not is_reserved(world.make_story(3, held_out=False)[0].scene)


def test_the_figures_of_dream_queries_and_tokens(monkeypatch):
    """With the weights that ship."""
    monkeypatch.setattr(dream_figures, "STEPS", 6)
    monkeypatch.setattr(drawers, "STEPS", 4)
    pipeline, judge = MMInterleavedPipeline.load("starter", "cpu"), load_classifier()
    figures = dream_figures.in_context(pipeline, judge, 10, 1)
    assert figures["subject: look"]["in context"]["cases"] == 1
    assert set(dream_figures.stories(pipeline, judge, range(10, 11), 1)) == {"heroes", "place", "prop"}
    monkeypatch.setattr(token_figures, "NUM_CANDIDATES", 4)
    assert token_figures.drafts(pipeline, judge, 10, 3)["place and prop"]["any of 4"]["mean"] > 0.5
    kept = token_figures.codes(pipeline, judge, 10, 4)
    assert kept["bytes"] == 400 and kept["place and prop"]["codes"]["mean"] > 0.5
    table = drawers.table(pipeline, judge, 10, 2)
    assert table["painted"]["frechet distance"] == pytest.approx(0, abs=1e-2)
    assert table["painted"]["judge score"] > 1


def test_the_starter_is_fine_tuned_and_measured(tmp_path):
    pytest.importorskip("peft")
    file, run = tmp_path / "tuned.safetensors", tmp_path / "run"
    command = [str(file), "--out", str(run), "--stories", "3", "--used", "2", "--steps", "2", "--batch", "2"]
    assert finetuning.main(command) == 0
    assert len(file.with_suffix(".jsonl").read_text().splitlines()) == 2
    (panel, *_) = story_panels(finetuning.world_stories(StoryDataset(run, 3), 1))
    scene = world.make_story(0, False)[0].scene
    assert world.parse(panel.caption).heroes == tuple(hero.look for hero in scene.heroes)
    assert panel.image.pixels.equal(StoryDataset(run, 3).images([0])[0])
    pipeline, judge, files = (
        MMInterleavedPipeline.load("starter", "cpu"),
        load_classifier(),
        {"none": None, "tuned": file},
    )
    drawn = finetuned.drawings(pipeline, judge, range(20, 21), 1, files)
    assert set(drawn["tuned"]) == {"heroes", "place and prop", "all"} and "against none" in drawn["tuned"]["all"]
    described = finetuned.descriptions(pipeline, judge, 20, 1, tmp_path / "cache", files)
    assert set(described["none"]) >= {"painted", "softened"} and not pipeline._lora_handles
    assert finetuning.main(command) == 2  # the file exists


def test_the_refiners_figures(tmp_path):
    """A model whose refiner is bicubic interpolation is as good as bicubic interpolation, and as sharp."""
    pipeline = MMInterleavedPipeline.load("starter", "cpu")
    vars(pipeline.systems)["refiner"] = ImageRefiner(Refiner(RefinerConfig()).eval())
    figures = refined.pairs(pipeline, 20, 2)
    assert figures["psnr"]["refined"]["mean"] == pytest.approx(figures["psnr"]["bicubic"]["mean"], abs=1e-3)
    assert figures["spectrum"]["refined"]["against bicubic"]["mean"] == pytest.approx(0, abs=1e-3)
    true = refined.large_painting(world.make_story(1, True)[0].scene)
    blurred = enlarge(F.avg_pool2d(true, 2)[None])[0]
    assert refined.psnr(true, true) == pytest.approx(100) and refined.psnr(true, blurred) < 40
    assert refined.spectrum_distance(true, true) == 0 < 0.1 < refined.spectrum_distance(blurred, true)
    sheet = tmp_path / "sheet.png"
    kept = refined.kept_facts(pipeline, load_classifier(), 20, 1, tmp_path / "cache", sheet)
    assert kept["heroes"]["refined"]["cases"] == 1 and kept["seconds"] > 0 and sheet.stat().st_size > 10_000


def test_the_refiners_losses(tmp_path):
    """The refiner learns through the discriminator, which does not learn from the refiner's loss."""
    encoder = init_modules(starter_config.starter_config(), 0)["encoder"]
    objective = RefinerObjective(Refiner(RefinerConfig(8, 2)), ContrastiveModel(ContrastiveConfig()), encoder)
    ids = torch.randint(0, 100, (4, 6))
    batch = RefinerBatch(
        torch.rand(2, 3, 16, 16),
        torch.rand(2, 3, 32, 32),
        torch.rand(2, 3, 128, 128),
        ids,
        torch.ones_like(ids).bool(),
        torch.randn(4, 16, 192),
    )
    losses = objective.train()(batch)
    assert set(losses) == {"loss", "pixels", "squares", "edges", "kept", "words", "adversarial", "discriminator"}
    discriminator, refiner = list(objective.discriminator.parameters()), list(objective.refiner.parameters())

    def moves(loss, parameters):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return any(grad is not None and grad.abs().max() > 0 for grad in grads)

    assert moves(losses["adversarial"], refiner) and not moves(losses["adversarial"], discriminator)
    assert moves(losses["discriminator"], discriminator) and not moves(losses["discriminator"], refiner)
    assert moves(losses["words"], refiner) and moves(losses["kept"], refiner) and moves(losses["pixels"], refiner)
    assert not any(p.requires_grad for module in objective.frozen for p in module.parameters())
