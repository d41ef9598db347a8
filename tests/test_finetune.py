"""Fine-tuning by LoRA: losses, reconstruction, the loop that can be stopped, and the file that it writes."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_mminterleaved.cli import main
from comfy_mminterleaved.errors import CheckpointError, OutputError, SettingError, StoryError, StoryTooLongError
from comfy_mminterleaved.files import write_json
from comfy_mminterleaved.finetune import FinetuneConfig, finetune, load_stories, story_panels
from comfy_mminterleaved.finetune.dataset import IGNORE_INDEX, collate
from comfy_mminterleaved.finetune.objective import (
    FinetuneObjective,
    diffusion_target,
    matching_tokens,
    predicted_latents,
)
from comfy_mminterleaved.finetune.train import _Run
from comfy_mminterleaved.generation.config import ImageGenerationConfig, Introduction
from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.models.lora import read_kohya
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.page import save_story
from comfy_mminterleaved.stories.story import ImageSegment, Story

peft = pytest.importorskip("peft")

CONFIG = FinetuneConfig(steps=4, batch_size=2, learning_rate=0.01)
QUICK = ImageGenerationConfig(num_inference_steps=2)


@pytest.fixture(scope="module")
def pipeline(tiny_random):
    return tiny_random


@pytest.fixture
def stories(pictures):
    described = dataclasses.replace(pictures[1], alt="a bear on a hill")
    return [
        Story.of("Mia waves.", pictures[0], "She runs to a hill.", described),
        Story.of("Otto sits in the snow.", pictures[2]),
    ]


def test_panels_are_images_with_what_comes_before_them(stories, pictures):
    first, second, third = story_panels(stories)
    assert [len(first.story), len(second.story), len(third.story)] == [1, 3, 1]
    assert [each.caption for each in (first, second, third)] == [
        "Mia waves.",
        "a bear on a hill",
        "Otto sits in the snow.",
    ]
    assert second.story.images == (pictures[0],)
    # Image first: the text after an image describes it, and what has nothing before it cannot be learned.
    (only,) = story_panels([Story.of(pictures[0], "Mia waves.", pictures[1], "Mia runs.")])
    assert only.caption == "Mia runs." and len(only.story) == 2
    with pytest.raises(StoryError, match="nothing to learn"):
        story_panels([Story.of(pictures[0]), Story.of("Mia waves.")])


def test_stories_from_files(tmp_path, stories):
    (tmp_path / ".002.unfinished").mkdir()
    save_story(tmp_path / ".002.unfinished", stories[0], "", {})
    for number, story in enumerate(stories):
        (tmp_path / f"{number:03d}").mkdir()
        save_story(tmp_path / f"{number:03d}", story, "", {})
    assert len(load_stories(tmp_path)) == 2
    for path in (tmp_path / "000", tmp_path / "000" / "story.json"):
        assert load_stories(path)[0].text == stories[0].text
    board = tmp_path / "000" / "board.json"
    segments = json.loads((tmp_path / "000" / "story.json").read_text(encoding="utf-8"))["segments"]
    opening = [{key: each[key] for key in ("text", "image") if key in each} for each in segments]
    write_json(board, {"format": "mm-interleaved-storyboard", "stories": [{"opening": opening, "panels": 1}]})
    assert len(story_panels(load_stories(board))) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoryError, match="holds no stories"):
        load_stories(tmp_path / "empty")
    with pytest.raises(StoryError, match="cannot be read"):
        load_stories(tmp_path / "none.json")


# ---- losses ----


def test_stories_are_read_as_in_inference(pipeline, stories):
    """Padded rows have the hidden states that drawing is conditioned on."""
    objective = FinetuneObjective(pipeline)
    panels = story_panels(stories)
    batch = objective.story_batch(objective.encoded([panel.story for panel in panels]))
    with torch.no_grad():
        hidden = objective.hidden_states(batch)
    expected = pipeline.context_features([panel.story for panel in panels])
    for i, (length, context) in enumerate(zip(batch.lengths, expected)):
        assert torch.allclose(hidden[i, :length], context, atol=1e-4)
    pipeline.clear_cache()


def test_only_text_has_a_loss(pipeline, stories):
    objective, special = FinetuneObjective(pipeline), pipeline.config.llm.special_tokens
    batch = objective.story_batch(objective.encoded([panel.story for panel in story_panels(stories)]))
    for ids, targets, length in zip(batch.input_ids, batch.targets, batch.lengths):
        assert (targets[length - 1 :] == IGNORE_INDEX).all()
        for position in range(length - 1):
            following = int(ids[position + 1])
            assert int(targets[position]) == (IGNORE_INDEX if following == special.image else following)
    tokens = pipeline.text.tokenize(Story.of("Mia waves."))
    assert (collate([tokens], [None], [[]], pipeline.llm).targets == IGNORE_INDEX).all()


def test_the_loss_of_captions_is_their_score(pipeline, pictures):
    objective, captions = FinetuneObjective(pipeline), ["a bear", "a red hat on a fox"]
    features = objective.features(pictures[:2])
    with torch.no_grad():
        loss, probs = objective.caption_loss(captions, features)
    total, eos = 0.0, pipeline.config.llm.special_tokens.eos
    for image, caption, prob in zip(pictures, captions, probs):
        ids = pipeline.tokenizer.encode(caption, after_text=True)
        log_prob = float(prob.gather(1, torch.tensor(ids)[:, None]).log().sum())
        story = pipeline.text.caption_story(Story.of(image))
        assert log_prob == pytest.approx(pipeline.score(story, [caption])[0], rel=1e-3)
        total += pipeline.score(story, [[*ids, eos]])[0]
    count = sum(len(prob) + 1 for prob in probs)
    assert float(loss) == pytest.approx(-total / count, rel=1e-3)


@pytest.mark.parametrize("is_introduced", [False, True])
def test_soft_captions_that_are_certain_are_hard_ones(pipeline, monkeypatch, is_introduced):
    if is_introduced:
        introduction = Introduction(prompt="{name} is", scene_prompts=(), names=("Mia",), subject=r"\bA \w+ in red")
        monkeypatch.setattr(
            pipeline.text,
            "generation_config",
            dataclasses.replace(pipeline.generation_config, introduction=introduction),
        )
    objective, captions = FinetuneObjective(pipeline), ["A bear in red waves.", "snow"]
    ids = [pipeline.tokenizer.encode(caption, after_text=True) for caption in captions]
    probs = [torch.nn.functional.one_hot(torch.tensor(each), pipeline.config.llm.vocab_size).float() for each in ids]
    with torch.no_grad():
        contexts = objective.soft_contexts(captions, probs)
    told = ["Mia is a bear in red. Mia waves." if is_introduced else captions[0], captions[1]]
    for context, expected in zip(contexts, pipeline.context_features([Story.of(text) for text in told])):
        assert torch.allclose(context, expected, atol=1e-4)
    pipeline.clear_cache()


def test_tokens_are_matched_in_order():
    assert matching_tokens([1, 2, 3, 4], [9, 2, 3, 8, 4, 7]) == [None, 1, 2, None, 3, None]
    assert matching_tokens([], [5]) == [None]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_the_image_back(prediction):
    scheduler = make_scheduler("ddpm", {"num_train_timesteps": 100, "prediction_type": prediction})
    torch.manual_seed(0)
    latents, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([5, 40, 80])
    noisy = scheduler.add_noise(latents, noise, t)
    pred = diffusion_target(scheduler, latents, noise, t)
    assert torch.allclose(predicted_latents(scheduler, noisy, pred, t), latents, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("direction", ["from_texts", "from_images"])
def test_reconstruction_ties_reading_and_drawing(pipeline, stories, tmp_path, weight, direction):
    """With it, captions teach the U-Net and drawings teach the captioner."""
    run = _Run(
        pipeline, story_panels(stories), tmp_path / "x.safetensors", FinetuneConfig(reconstruction_weight=weight)
    )
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in run.parameters.items():
                if ".lora_B" in name:
                    p.normal_(std=0.02)
        losses = getattr(run.objective, direction)(run.panels)
        names = {"from_texts": ["text", "image"], "from_images": ["caption"]}[direction]
        extra = {"from_texts": "caption_of_predicted", "from_images": "image_of_caption"}[direction]
        assert list(losses) == ["loss", *names, *([extra] if weight else [])]
        if direction == "from_texts" and not weight:
            return
        key = extra if weight else "caption"
        grads = torch.autograd.grad(losses[key], run.parameters.values(), allow_unused=True)
        moved = {
            block
            for (name, _), grad in zip(run.parameters.items(), grads)
            if grad is not None and grad.abs().max() > 0
            for block in [name.split(".")[0]]
        }
        assert moved == ({"llm", "unet"} if weight else {"llm"})
    finally:
        run.close()


# ---- training ----


def state_of(pipeline):
    return {name: t.clone() for block in (pipeline.llm, pipeline.unet) for name, t in block.state_dict().items()}


def test_training_writes_a_file_and_leaves_the_model(pipeline, stories, tmp_path):
    story = Story.of("Mia waves.")
    before, drawn = state_of(pipeline), pipeline.generate_image(story, QUICK).pixels
    out, seen = tmp_path / "new" / "mia.safetensors", []
    assert finetune(pipeline, stories, out, CONFIG, lambda *args: seen.append(args))
    assert [(done, total) for done, total, _ in seen] == [(n, 4) for n in range(1, 5)]
    assert [sorted(losses) for *_, losses in seen[:2]] == [
        ["caption_of_predicted", "image", "loss", "text"],
        ["caption", "image_of_caption", "loss"],
    ]
    after = state_of(pipeline)
    assert list(after) == list(before) and all(after[name].equal(before[name]) for name in before)
    assert [path.name for path in out.parent.iterdir()] == ["mia.safetensors"]
    assert pipeline.generate_image(story, QUICK).pixels.equal(drawn)
    try:
        pipeline.load_lora(out)
        assert not pipeline.generate_image(story, QUICK).pixels.equal(drawn)
        pipeline.load_lora(out, scale=0.0)
        assert torch.allclose(pipeline.generate_image(story, QUICK).pixels, drawn, atol=1e-5)
    finally:
        pipeline.unload_lora()
    assert pipeline.generate_image(story, QUICK).pixels.equal(drawn)


def test_what_is_loaded_is_what_was_trained(pipeline, stories, tmp_path):
    run = _Run(pipeline, story_panels(stories), tmp_path / "x.safetensors", CONFIG)
    panels = run.panels
    try:
        with torch.no_grad():
            for p in run.parameters.values():
                p.copy_(p.half().float().normal_(std=0.05).half())
        torch.manual_seed(1)
        trained = float(run.objective.from_images(panels)["loss"].detach())
        run._save()
    finally:
        run.close()
    objective = FinetuneObjective(pipeline)
    torch.manual_seed(1)
    plain = float(objective.from_images(panels)["loss"])
    try:
        pipeline.load_lora(tmp_path / "x.safetensors")
        torch.manual_seed(1)
        loaded = float(objective.from_images(panels)["loss"])
    finally:
        pipeline.unload_lora()
    assert loaded == pytest.approx(trained, rel=1e-4) and abs(plain - trained) > 1e-3


def test_a_new_caption_is_learned(tmp_path):
    """The starter, of an image that is nothing of its world."""
    pipeline, losses = MMInterleavedPipeline.load("starter", "cpu"), []
    grey = ImageSegment(torch.full((3, 128, 128), 0.5), alt="A fox in a green coat with a hat sits in the snow.")
    config = FinetuneConfig(steps=50, batch_size=1, learning_rate=0.02, reconstruction_weight=0.0)
    out = tmp_path / "x.safetensors"
    finetune(pipeline, [Story.of("Mia sits.", grey)], out, config, lambda *args: losses.append(args[2]))
    captions = [each["caption"] for each in losses if "caption" in each]
    assert captions[-1] < captions[0] / 4


def test_a_stopped_run_goes_on(pipeline, stories, tmp_path):
    straight, halves = tmp_path / "straight.safetensors", tmp_path / "halves.safetensors"
    assert finetune(pipeline, stories, straight, CONFIG)
    steps = []
    assert not finetune(pipeline, stories, halves, CONFIG, lambda n, *_: steps.append(n), lambda: len(steps) == 3)
    assert halves.with_suffix(".state").exists() and not halves.exists()
    with pytest.raises(SettingError, match="other stories, settings or weights"):
        finetune(pipeline, stories[:1], halves, CONFIG)
    with pytest.raises(SettingError, match="other stories, settings or weights"):
        finetune(pipeline, stories, halves, dataclasses.replace(CONFIG, rank=2))
    assert finetune(pipeline, stories, halves, CONFIG, lambda n, *_: steps.append(n))
    assert steps == [1, 2, 3, 4] and straight.read_bytes() == halves.read_bytes()
    bad = tmp_path / "bad.safetensors"
    bad.with_suffix(".state").write_bytes(b"no state")
    with pytest.raises(SettingError, match="not a checkpoint of a fine-tuning run"):
        finetune(pipeline, stories, bad, CONFIG)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("block", ["llm", "unet"])
def test_one_block_alone(pipeline, stories, tmp_path, block, weight):
    out = tmp_path / "x.safetensors"
    config = dataclasses.replace(CONFIG, steps=2, blocks=(block,), reconstruction_weight=weight, seed=2**62)
    finetune(pipeline, stories, out, config)
    assert {key.split("_")[1] for key in load_file(out)} == {block}
    assert all(t.isfinite().all() for t in load_file(out).values())


# ---- bad input ----


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000000, not 0"),
        ({"rank": 1.5}, "rank must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"learning_rate": 0}, "learning_rate must be a number from 0 to 1, not 0"),
        ({"learning_rate": float("nan")}, "not nan"),
        ({"reconstruction_weight": -1}, "reconstruction_weight must be a number from 0 to 100, not -1"),
        ({"blocks": ("vae",)}, "blocks must be of llm, unet"),
    ],
)
def test_settings_out_of_range(changes, sentence):
    with pytest.raises(SettingError, match=sentence):
        FinetuneConfig(**changes)


def test_outputs_that_cannot_be_written(pipeline, stories, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="already exists"):
        finetune(pipeline, stories, tmp_path / "there.safetensors", CONFIG)
    with pytest.raises(OutputError, match="must be written to a .safetensors file"):
        finetune(pipeline, stories, tmp_path / "x.pt", CONFIG)
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_stories_that_are_too_long(pipeline, pictures, tmp_path):
    with pytest.raises(StoryTooLongError):
        finetune(pipeline, [Story.of("word " * 5000, pictures[0])], tmp_path / "x.safetensors", CONFIG)


def test_a_loss_that_is_not_a_number(pipeline, stories, tmp_path, monkeypatch):
    broken = ImageSegment(torch.full((3, 128, 128), 0.5))
    monkeypatch.setattr(
        FinetuneObjective, "latents", lambda self, images: torch.full((len(images), 4, 16, 16), float("nan"))
    )
    with pytest.raises(SettingError, match="not a number at step 1"):
        finetune(pipeline, [Story.of("Mia.", broken)], tmp_path / "x.safetensors", CONFIG)
    assert not any(".lora_" in name for name, _ in pipeline.llm.named_parameters())


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_quantized_layers_are_refused(stories, tmp_path, quantization):
    from comfy_mminterleaved.checkpoints.load import read
    from comfy_mminterleaved.checkpoints.native import save

    saved = read("tiny-random")
    folder = tmp_path / "small"
    save(folder, saved.config, saved.blocks, saved.tokenizer, quantization=quantization)
    pipeline = MMInterleavedPipeline.load(folder, "cpu")
    with pytest.raises(SettingError, match="The llm has quantized layers"):
        finetune(pipeline, stories, tmp_path / "x.safetensors", CONFIG)
    assert finetune(pipeline, stories, tmp_path / "y.safetensors", dataclasses.replace(CONFIG, blocks=("unet",)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_trained_in_32_bits(stories, tmp_path, dtype):
    pipeline = MMInterleavedPipeline.load("tiny-random", "cpu", dtype)
    run = _Run(pipeline, story_panels(stories), tmp_path / "x.safetensors", CONFIG)
    assert {p.dtype for p in run.parameters.values()} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(list(run._step().values()))).all() for _ in range(2))
    run.close()


def test_another_models_token_ids_are_not_trained(pipeline, pictures):
    text = dataclasses.replace(Story.of("Mia waves.").segments[0], token_ids=(5, 6, 10**6))
    objective = FinetuneObjective(pipeline)
    batch = objective.story_batch([Story.of(text)])
    expected = pipeline.text.tokenize(Story.of("Mia waves.")).input_ids
    assert batch.input_ids[0, : len(expected)].tolist() == list(expected)


def test_a_model_with_a_lora_is_not_trained(pipeline, stories, tmp_path):
    out = tmp_path / "x.safetensors"
    finetune(pipeline, stories, out, dataclasses.replace(CONFIG, steps=1))
    try:
        with pytest.raises(SettingError, match="has a LoRA already"):
            finetune(pipeline.load_lora(out), stories, tmp_path / "y.safetensors", CONFIG)
    finally:
        pipeline.unload_lora()


def test_layers_that_cannot_be_trained(pipeline, stories, tmp_path, monkeypatch):
    from comfy_mminterleaved.finetune import train

    monkeypatch.setitem(train.LAYERS, "llm", train.LAYERS["unet"])  # as if its linear layers were others
    with pytest.raises(SettingError, match="no layer that LoRA can train"):
        finetune(pipeline, stories, tmp_path / "x.safetensors", CONFIG)
    assert not any(".lora_" in name for name, _ in pipeline.unet.named_parameters())


def test_files_of_other_models(pipeline, tmp_path):
    path, modules = tmp_path / "x.safetensors", {"llm": pipeline.llm, "unet": pipeline.unet}
    name = "lora_llm_layers_0_self_attn_v_proj"
    down, up = torch.randn(2, pipeline.config.llm.hidden_size), torch.randn(pipeline.config.llm.hidden_size, 2)
    good = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    (lora,) = read_kohya(good, modules, "it").values()
    assert torch.allclose(lora.up[0], up / 2), "alpha / rank is the scale"
    for tensors, sentence in [
        ({}, "holds no LoRA"),
        ({"lora_te_text_model_x.lora_down.weight": down}, "for another model"),
        ({f"{name}.lora_mid.weight": down}, "no LoRA of a linear layer"),
        ({f"{name}.lora_down.weight": down}, "no matching pair"),
        ({f"{name}.lora_down.weight": down[:, 1:], f"{name}.lora_up.weight": up}, "does not fit this model"),
    ]:
        save_file({key: t.contiguous() for key, t in tensors.items()}, path)
        with pytest.raises(CheckpointError, match=sentence):
            pipeline.load_lora(path)
    path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError):
        pipeline.load_lora(path)


def test_without_peft_there_is_a_sentence(pipeline, stories, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingError, match="pip install peft"):
        finetune(pipeline, stories, tmp_path / "x.safetensors", CONFIG)


# ---- command line ----


def test_the_command_line(tmp_path, stories, capsys):
    def command(*args):
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    (tmp_path / "mia").mkdir()
    save_story(tmp_path / "mia", stories[0], "", {})
    out = tmp_path / "mia.safetensors"
    train = ("finetune", tmp_path / "mia", "--out", out, "--model", "tiny-random", "--steps", 2, "--batch", 2)
    code, stdout, stderr = command(*train, "--json")
    assert code == 0 and json.loads(stdout) == {"file": str(out), "panels": 2}, stderr
    code, _, stderr = command(*train)
    assert code == 2 and "already exists" in stderr
    code, _, stderr = command("finetune", tmp_path / "none", "--out", tmp_path / "y.safetensors")
    assert code == 2 and "cannot be read" in stderr
    code, _, stderr = command("finetune", tmp_path / "mia", "--out", tmp_path / "y.safetensors", "--rank", 0)
    assert code == 2 and "rank must be" in stderr
    draw = ("draw", "--model", "tiny-random", "--text", "Mia waves.", "--steps", 2, "--quiet")
    assert command(*draw, "--out", tmp_path / "a.png")[0] == 0
    tensors = load_file(out)  # of two steps: too small to be seen in 8 bits
    strong = {key: t * 50 if key.endswith("lora_up.weight") else t for key, t in tensors.items()}
    save_file(strong, out)
    code, _, stderr = command(*draw, "--out", tmp_path / "b.png", "--lora", out)
    assert code == 0 and (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes(), stderr
    tell = ("tell", "--model", "tiny-random", "--steps", 1, "--quiet", "--panels", 1, "--max-new-tokens", 8)
    code, _, stderr = command(*tell, "--text", "Mia waves.", "--out", tmp_path / "told", "--lora", out)
    assert code == 0, stderr
    settings = json.loads((tmp_path / "told" / "story.json").read_text(encoding="utf-8"))["settings"]
    assert settings["lora"] == str(out)
    assert command(*tell, "--story", tmp_path / "told")[0] == 0
    out.rename(tmp_path / "other.safetensors")
    code, _, stderr = command(*tell, "--story", tmp_path / "told")
    assert code == 2 and "does not exist" in stderr  # not silently without it
    assert command(*tell, "--story", tmp_path / "told", "--lora", "")[0] == 0
    code, _, stderr = command(*draw, "--out", tmp_path / "c.png", "--lora", tmp_path / "none.safetensors")
    assert code == 2 and "does not exist" in stderr and not (tmp_path / "c.png").exists()


def test_a_lora_makes_another_run_of_a_storyboard(tmp_path):
    from comfy_mminterleaved.checkpoints.load import fingerprint

    file = tmp_path / "x.safetensors"
    file.write_bytes(b"1")
    prints = [fingerprint("starter"), fingerprint("starter", file)]
    file.write_bytes(b"12")
    assert len({*prints, fingerprint("starter", file)}) == 3


def test_the_starter_learns_with_reconstruction(tmp_path):
    """The model that ships, with introductions: a step each way, and what it writes can be loaded."""
    pipeline = MMInterleavedPipeline.load("starter", "cpu")
    image = pipeline.generate_image(Story.of("Mia is a bear in a red coat with a hat. Mia waves in the snow."), QUICK)
    image = dataclasses.replace(image, alt="A bear in a red coat with a hat waves in the snow.")
    story = Story.of("Mia is a bear in a red coat with a hat. Mia waves in the snow.", image)
    losses = []
    out = tmp_path / "mia.safetensors"
    assert finetune(pipeline, [story], out, FinetuneConfig(steps=2), lambda *args: losses.append(args[2]))
    assert {"caption_of_predicted", "image_of_caption"} <= set(losses[0]) | set(losses[1])
    assert MMInterleavedPipeline.load("starter", "cpu", lora=out)._lora_handles
