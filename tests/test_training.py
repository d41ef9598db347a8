import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py")
pytest.importorskip("accelerate")
from safetensors.torch import save_file

from comfy_mminterleaved.checkpoints.load import read_state_dicts
from comfy_mminterleaved.checkpoints.native import save
from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.config import BLOCKS
from comfy_mminterleaved.errors import CheckpointError, SettingError
from comfy_mminterleaved.generation.latents import encode_latents
from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.models.build import init_modules
from comfy_mminterleaved.presets import STARTER_DIR, tiny_config
from comfy_mminterleaved.tokenizer import Tokenizer, byte_level
from starter_training import starter_config, trainer, world
from starter_training.__main__ import STAGE_DIR, main
from starter_training.augmentation import augment, reconstruct_some
from starter_training.batches import StoryBatch, StoryBatches, TextBatch
from starter_training.dataset import StoryDataset, error_weights
from starter_training.muon import Muon, is_matrix, orthogonalized
from starter_training.pretraining import OracleMMFS, UNetObjective, VAEDecoderObjective, VAEObjective, diffusion_loss
from starter_training.run_dir import STAGES, begin, export, latest_slim_vae, load_run
from starter_training.story_training import MMFS_TARGET_SCALE, MMFSObjective, StoryObjective, previous_images
from starter_training.targets import (
    APPEARANCE_HEADS,
    ATTRIBUTES,
    COAT_HEADS,
    IGNORE_INDEX,
    NUM_CLASSES,
    ConditioningTargets,
    MMFSTargets,
)
from starter_training.trainer import StageConfig, train


@pytest.fixture(scope="module")
def config():
    return replace(tiny_config(), llm=replace(tiny_config().llm, max_position_embeddings=4096))


@pytest.fixture(scope="module")
def tokenizer(config):
    return Tokenizer(byte_level(260), config.llm.special_tokens, 260)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return StoryDataset(tmp_path_factory.mktemp("book"), 12)


@pytest.fixture
def batches(book, config, tokenizer):
    return StoryBatches(book, config, tokenizer, images_per_batch=8)


def batch_that(batches, draws):
    return next(b for b in map(batches.build, range(100)) if b.has_image_loss == draws)


def to_draw(batch):
    """Latents and where the heroes stand, by chance."""
    return torch.randn(*batch.image_indices.shape, 4, 16, 16), torch.rand(*batch.image_indices.shape, 1, 16, 16).round()


def test_a_book_is_painted_once_and_holds_its_stories(book, tmp_path):
    assert len(book) == sum(map(len, book.stories))
    first = book.images([0, len(book) - 1])
    assert first.shape == (2, 3, 128, 128) and not torch.equal(*first)
    again = StoryDataset(tmp_path, 12)
    assert (again.pixels == book.pixels).all()
    stamp = next(tmp_path.glob("*.npy")).stat().st_mtime_ns
    StoryDataset(tmp_path, 12)
    assert next(tmp_path.glob("*.npy")).stat().st_mtime_ns == stamp


def test_a_book_may_begin_at_any_seed(book, tmp_path):
    later = StoryDataset(tmp_path, 3, first_seed=9)
    assert later.stories == book.stories[9:] and np.array_equal(later.pixels, book.pixels[book.offsets[9] :])
    assert StoryDataset(tmp_path, 3).name != later.name


def test_batches_are_the_same_for_the_same_seed(batches):
    a, b, c = batches.build(3), batches.build(3), batches.build(4)
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.images, b.images)
    assert a.input_ids.shape != c.input_ids.shape or not torch.equal(a.input_ids, c.input_ids)


def test_targets_are_the_next_tokens_but_never_a_picture_slot(batches, config):
    t = config.llm.special_tokens
    for seed in range(20):
        batch = batches.build(seed)
        learned = batch.targets != IGNORE_INDEX
        assert (batch.targets[:, :-1] == batch.input_ids[:, 1:])[learned[:, :-1]].all()
        assert not torch.isin(batch.targets, torch.tensor([t.image, t.pad, t.bos])).any()
        assert (batch.targets == t.eos).sum(1).eq(1).all()
        assert (batch.input_ids.gather(1, batch.soi_positions) == t.soi).all()
        for ids, visible, starts in zip(batch.input_ids, batch.image_mask, batch.soi_positions):
            for picture, start in enumerate(starts.tolist()):
                assert not visible[: start + 1, picture].any()
                assert visible[start + 1 : (ids != t.pad).nonzero().max(), picture].all()
    single = batch_that(batches, draws=False)
    first = [int((row != IGNORE_INDEX).nonzero()[0]) for row in single.targets]
    assert min(first) > config.llm.num_img_token + 5  # the prompt is given, the answer is learned


def test_a_drawing_is_told_what_the_text_says_and_what_sites_cannot_find(book, batches):
    kinds = set()
    for seed in range(30):
        batch = batches.build(seed)
        assert (batch.image_labels == batch.inferable_labels)[batch.inferable_labels != IGNORE_INDEX].all() and (
            batch.image_labels >= 0
        ).all()
        text_first = batch.has_image_loss and bool(batch.soi_positions[0, 0] > 2)
        for labels, rows in zip(batch.inferable_labels, batch.image_indices):
            first = book.panel(int(rows[0]))
            introduced, two = text_first and bool(world.parse(first.text).heroes), len(first.scene.heroes) > 1
            known = labels != IGNORE_INDEX
            for k in range(len(ATTRIBUTES)):
                if k not in APPEARANCE_HEADS:
                    assert known[:, k].all() if text_first else not known[:, k].any()
                    continue
                assert bool(known[0, k]) == introduced  # before there is a picture
                later = batch.has_image_loss and (introduced or (text_first if two else k not in COAT_HEADS))
                assert known[1:, k].all() if later else not known[1:, k].any()
            kinds.add((text_first, introduced, two))
    assert kinds >= {(True, True, False), (True, False, False), (True, False, True)}


def test_some_pictures_are_read_with_other_heroes(book, batches, config, tokenizer):
    """Never the first, and only what is read: what is to be drawn and told stays the story's."""
    slipping = StoryBatches(book, config, tokenizer, images_per_batch=8, corrupt_history=True)
    changed = total = 0
    for seed in range(30):
        true, batch = batches.build(seed), slipping.build(seed)
        assert torch.equal(batch.inferable_labels, true.inferable_labels) and torch.equal(
            batch.image_labels, true.image_labels
        )
        other = (batch.images != true.images).flatten(2).any(-1)
        assert not other[:, 0].any() and (batch.has_image_loss or not other.any())
        if batch.has_image_loss:
            changed, total = changed + int(other[:, 1:].sum()), total + other[:, 1:].numel()
    assert 0.1 < changed / total < 0.4


def test_whom_a_text_names(book, config, tokenizer):
    batches = StoryBatches(book, config, tokenizer, images_per_batch=8, with_coref=True, two_character_prob=0.6)
    kinds = {type(batches.build(seed)) for seed in range(20)}
    assert kinds == {StoryBatch, TextBatch}
    stories = [
        batch for batch in map(batches.build, range(40)) if isinstance(batch, StoryBatch) and batch.has_image_loss
    ]
    asked = set()
    for batch in stories:
        for row, meant in zip(batch.image_indices, batch.referents):
            cast, text_first = book.panel(int(row[0])).scene.heroes, bool(batch.soi_positions[0, 0] > 2)
            for number, whom in zip(row.tolist(), meant.tolist()):
                known = text_first and len(cast) > 1
                who = {0: cast, 1: cast[:1], 2: cast[1:], IGNORE_INDEX: None}[whom]
                assert who == (book.panel(number).scene.heroes if known else None)
                asked.add(whom)
    assert asked == {IGNORE_INDEX, 0, 1, 2}


def test_texts_and_drills_say_whom_every_word_is_about(book, config, tokenizer):
    batches, soi = StoryBatches(book, config, tokenizer, images_per_batch=8), config.llm.special_tokens.soi
    texts = batches.texts(0, 6)
    assert texts.input_ids.shape == texts.referents.shape and config.llm.special_tokens.image not in texts.input_ids
    for ids, meant in zip(texts.input_ids.tolist(), texts.referents.tolist()):
        ends = [i + 1 for i, id in enumerate(ids) if id == soi]
        cast = world.parse(tokenizer.decode(ids[1 : ends[0]])).names
        for start, end in zip([0, *ends], ends):
            names = world.parse(tokenizer.decode(ids[max(start, 1) : end])).names
            assert set(meant[start:end]) == {[cast, cast[:1], cast[1:]].index(names)}
        assert set(meant[ends[-1] :]) <= {IGNORE_INDEX}
    drills = batches.coref_drills(0, 6)
    for ids, meant in zip(drills.input_ids.tolist(), drills.referents.tolist()):
        (start,) = [i for i, id in enumerate(ids) if id == soi]
        first, second = [name for name in tokenizer.decode(ids[:start]).split() if name in world.NAMES]
        assert set(meant[:start]) == {IGNORE_INDEX} and meant[start] == 0 and {1, 2} <= set(meant[start + 1 :])
        for name, whom in ((first, 2), (second, 1)):
            assert name not in tokenizer.decode([id for id, of in zip(ids, meant) if of == whom])


def test_names_are_learned_from_drills(config, tokenizer, book):
    torch.manual_seed(0)
    blocks = init_modules(config)
    blocks["encoder"].requires_grad_(False)
    learner = StoryObjective(blocks, config.scheduler, with_image_loss=False)
    drills = StoryBatches(book, config, tokenizer, images_per_batch=8).coref_drills(0, 4)
    named = {name: p for name, p in learner.named_parameters() if name.startswith(("llm", "coref_probe"))}
    optimizer = Muon(named, 3e-3, 0.0)
    before = learner(drills)["text_coref"].item()
    for _ in range(40):
        optimizer.zero_grad()
        learner(drills)["loss"].backward()
        optimizer.step()
    assert learner(drills)["text_coref"].item() < 0.5 * before


def test_drawings_look_at_pictures_before_them_only():
    # Maps that say which story and picture they are of.
    numbered = (torch.arange(3).view(3, 1) * 10 + torch.arange(5)).view(3, 5, 1, 1, 1).float()
    depths = set()
    for _ in range(50):
        (maps,), mask = previous_images([numbered], num_context_images=3, random_length=True)
        depths.add(mask.shape[1])
        for drawing, (context, exists) in enumerate(zip(maps.flatten(1).tolist(), mask)):
            story, picture = drawing % 3, drawing // 3
            before = [story * 10 + p for p in range(max(0, picture - mask.shape[1]), picture)]
            assert [int(p) for p, image in zip(context, exists) if image] == before
    assert depths == {1, 2, 3} and previous_images([numbered], num_context_images=3)[1].shape[1] == 3


def test_each_drawing_has_its_own_visibility(tiny_random, pictures):
    """R drawings of a row at once, each looking at other pictures, are those drawings one by one."""
    from comfy_mminterleaved import Story

    story = tiny_random.encode_images(Story.of(*pictures[:3]))
    maps, _ = tiny_random.image.context_feature_maps([story], 3)
    visible = torch.tensor([[[True, False, False]], [[True, True, False]], [[False, True, True]]])
    x = torch.randn(3, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    together = tiny_random.synchronizer.mmfs_module.add_residual(
        0, x, tiny_random.synchronizer.mmfs_module.project_images(maps, visible)
    )
    for i in range(3):
        alone = tiny_random.synchronizer.mmfs_module.add_residual(
            0, x[i : i + 1], tiny_random.synchronizer.mmfs_module.project_images(maps, visible[i])
        )
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)


def test_losses_reach_every_trained_parameter(batches, config):
    blocks = init_modules(config)
    for name, parameter in [pair for block in blocks.values() for pair in block.named_parameters()]:
        zero_at_first = ("gate", "gamma", "conv.weight", "offsets.weight", "weights.weight")  # nothing would pass
        if name.endswith(zero_at_first):
            torch.nn.init.normal_(parameter, std=0.1)
    learner = StoryObjective(blocks, config.scheduler).train()
    batch = batch_that(batches, draws=True)
    torch.manual_seed(0)
    losses = learner(batch, *to_draw(batch))
    guides = losses["token_attr"] + losses["pooled_map_attr"] + losses["text_attr"] + losses["cond_attr"]
    whole = losses["text"] + 10 * losses["image"] + 0.2 * guides + losses["cond_mse"] + losses["mmfs_mse"]
    assert losses["loss"].item() == pytest.approx(whole.item(), rel=1e-5)
    losses["loss"].backward()
    fixed = ("pos_embed", "class_embedding")
    without = [
        f"{block}.{name}"
        for block in ("encoder", "llm", "synchronizer", "unet")
        for name, p in blocks[block].named_parameters()
        if (p.grad is None or not p.grad.abs().sum() > 0) and not name.endswith(fixed)
    ]
    # The sinks' own logits are overwritten by a constant, as in the reference; keys' biases shift all logits alike.
    without = [name for name in without if not name.endswith(("k_proj.bias", "key.bias", "k_norm.bias"))]
    assert not without


def test_what_stands_still_is_not_guided(batches, config):
    blocks = init_modules(config)
    for name in ("encoder", "llm"):
        blocks[name].requires_grad_(False)
    learner = StoryObjective(blocks, config.scheduler).train()
    batch = batch_that(batches, draws=True)
    losses = learner(batch, *to_draw(batch))
    assert set(losses) == {"loss", "cond_attr", "cond_mse", "image", "mmfs_mse"}
    losses["loss"].backward()
    reached = {name for name, p in learner.named_parameters() if p.grad is not None}
    assert reached and all(name.startswith(("synchronizer.", "unet.")) for name in reached)


def test_only_what_is_to_be_drawn_is_kept_where_only_drawing_is_learned(book, config, tokenizer):
    stories = StoryBatches(book, config, tokenizer, images_per_batch=8, image_loss_only=True)
    for seed in range(20):
        batch = stories.build(seed)
        told = [k for k in range(len(ATTRIBUTES)) if k not in APPEARANCE_HEADS]
        assert (
            batch.has_image_loss
            and (batch.soi_positions[:, 0] > 2).all()
            and (batch.inferable_labels[..., told] != IGNORE_INDEX).all()
        )


def test_a_vaes_decoder_learns_what_the_encoder_sees(config):
    torch.manual_seed(0)
    blocks = init_modules(config)
    blocks["encoder"].requires_grad_(False)
    learner = VAEDecoderObjective(blocks["vae"], blocks["encoder"])
    side = config.encoder.image_size
    pictures = torch.rand(4, 3, 4, 4).repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)
    latents = encode_latents(blocks["vae"], pictures).detach()
    before = learner.eval()(latents, pictures)["perceptual"].item()
    optimizer = Muon(dict(blocks["vae"].decoder.named_parameters()), 3e-3, 0.0)
    for _ in range(60):
        optimizer.zero_grad()
        learner.train()(latents, pictures)["loss"].backward()
        optimizer.step()
    assert all(p.grad is None for p in blocks["encoder"].parameters())
    assert learner.eval()(latents, pictures)["perceptual"].item() < 0.8 * before


def test_what_is_decoded_badly_is_met_more_often(config, book):
    """A VAE that gets all right but one prop."""
    scenes = [page.scene for story in book.stories for page in story]
    bad = scenes[0].prop

    class NearlyRight(torch.nn.Linear):
        config = type("Config", (), {"scaling_factor": 1.0})
        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, rows):
            row = int(rows)
            error = 0.5 if scenes[row].prop == bad else 0.05
            return type("Decoded", (), {"sample": (book.images([row]) * 2 - 1) * (1 - error)})

    sums = error_weights(NearlyRight(1, 1), book, np.arange(len(book)).reshape(-1, 1, 1, 1), count=len(book))
    weights = [b - a for a, b in zip([0.0, *sums], sums)]
    alone = {scene.prop: weight / len(scene.heroes) for scene, weight in zip(scenes, weights)}
    assert weights == pytest.approx([alone[scene.prop] * len(scene.heroes) for scene in scenes])
    assert all(alone[bad] > 4 * weight for prop, weight in alone.items() if prop != bad)


def test_some_pictures_are_read_as_they_would_be_drawn(config):
    vae = init_modules(config)["vae"]
    pictures, latents = torch.rand(40, 3, 64, 64), torch.randn(40, 4, 8, 8)
    torch.manual_seed(0)
    drawn = reconstruct_some(vae, pictures, latents)
    same = (drawn == pictures).flatten(1).all(1)
    assert drawn.shape == pictures.shape and 5 < same.sum() < 35 and drawn.min() >= 0 and drawn.max() <= 1


def test_the_encoder_meets_pictures_that_are_not_quite_as_painted(book):
    pictures = book.images(range(40))
    augmented = augment(pictures, random.Random(0))
    assert torch.equal(augmented, augment(pictures, random.Random(0)))
    assert augmented.shape == pictures.shape and augmented.min() >= 0 and augmented.max() <= 1
    assert (augmented != pictures).flatten(1).any(1).sum() >= 39
    middle = pictures[..., 8:-8, 8:-8]
    for whole, picture in zip(augmented, middle):  # moved back, it is the same but for tint and softness
        places = whole.unfold(1, 112, 1).unfold(2, 112, 1)[:, 4:13, 4:13]
        assert (places - picture[:, None, None]).abs().mean((0, 3, 4)).min() < 0.07


def test_codes_say_their_labels_and_what_is_not_known():
    codes = ConditioningTargets(16, 24)
    labels = torch.tensor([[0] * len(ATTRIBUTES), [1] * (len(ATTRIBUTES) - 1) + [IGNORE_INDEX]])
    states = codes(labels)
    assert states.shape == (2, 16, 24) and torch.equal(states, ConditioningTargets(16, 24)(labels))
    assert torch.allclose(states.mean(-1), torch.zeros(2, 16), atol=1e-5)
    assert torch.equal(states[0, len(ATTRIBUTES) :], states[1, len(ATTRIBUTES) :])
    error, read = codes.losses(states, labels)
    assert error == 0 and read < codes.losses(states.flip(0), labels)[1]


def test_site_codes_are_sums_of_what_is_known():
    codes = MMFSTargets([24, 400])
    labels = torch.ones(4, len(ATTRIBUTES), dtype=torch.long)
    labels[1, APPEARANCE_HEADS[0]] = IGNORE_INDEX
    labels[2, APPEARANCE_HEADS] = IGNORE_INDEX
    labels[3, [k for k in range(len(ATTRIBUTES)) if k not in APPEARANCE_HEADS]] = 0  # of what sites do not find
    small, wide = codes(labels)
    assert small.shape == (4, 24) and wide.shape == (4, 400) and wide[0].std() == pytest.approx(2, abs=0.3)
    assert not wide[2].any() and torch.equal(wide[3], wide[0])
    assert torch.allclose(wide[0] - wide[1], codes.tables[1][0][1], atol=1e-5)
    assert torch.equal(MMFSTargets([24, 400])(labels)[1], wide)


def test_what_sites_add_for_coats_has_a_basis():
    codes, labels = MMFSTargets([64, 400]), torch.ones(2, len(ATTRIBUTES), dtype=torch.long)
    labels[0, [k for k in APPEARANCE_HEADS if k not in COAT_HEADS]] = IGNORE_INDEX
    for said, basis in zip(codes(labels), codes.coat_bases()):
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
        kept = (said @ basis).pow(2).sum(-1) / said.pow(2).sum(-1)
        assert kept[0] == pytest.approx(1, abs=1e-4) and kept[1] < 0.8  # coats alone, and all of the look


def test_where_the_heroes_stand(book):
    from starter_training import renderer

    rows = range(0, len(book), 5)
    found = book.foreground_mask(rows, 16)
    assert found.shape == (len(rows), 1, 16, 16) and 0.1 < found.clamp(max=1).mean() < 0.5
    for grid, row in zip(found[:, 0], rows):
        scene = book.panel(row).scene
        bare = renderer.paint(replace(scene, heroes=(), seed=scene.seed)) if len(scene.heroes) == 1 else None
        if bare is None:  # without heroes the prop of two would stand elsewhere
            continue
        hero = (bare != book.pixels[row]).any(-1).reshape(16, 8, 16, 8).mean((1, 3))
        assert hero[grid.numpy() > 0].sum() > 0.85 * hero.sum()  # but for the z of sleepers, and notes


def test_small_heroes_weigh_more(book):
    from starter_training import renderer

    rows, weights, areas = range(len(book)), [], []
    for row, grid in zip(rows, book.foreground_mask(rows, 128)[:, 0]):
        scene = book.panel(row).scene
        left, top, right, bottom = renderer.bounding_boxes(scene)[1]
        if len(scene.heroes) == 1 and left >= 0 and right <= 128 and top >= 0:
            y, x = round(bottom) - 5, round((left + right) / 2)  # at the feet, where no prop stands
            weights.append(float(grid[y, x]))
            areas.append((right - left) * (bottom - top))
    assert min(areas) < 3400 / 1.3 and max(areas) > 3400
    for weight, area in zip(weights, areas):
        assert weight == pytest.approx(min(max(3400 / area, 1), 3), rel=0.02)


def test_hard_pictures_are_met_more_often(book):
    rows = book.weighted_indices(20000, random.Random(0))
    assert rows == book.weighted_indices(20000, random.Random(0)) == sorted(rows)
    scenes = [book.panel(row).scene for row in range(len(book))]

    def met(hard) -> float:
        return sum(hard(scenes[row]) for row in rows) / sum(map(hard, scenes))

    easy = met(lambda s: s.action != "sleep" and not s.far and len(s.heroes) == 1)
    assert met(lambda s: s.action == "sleep" and not s.far and len(s.heroes) == 1) == pytest.approx(2 * easy, rel=0.25)
    assert met(lambda s: s.action != "sleep" and s.far and len(s.heroes) == 1) == pytest.approx(2 * easy, rel=0.25)
    assert met(lambda s: s.action != "sleep" and s.far and len(s.heroes) == 2) == pytest.approx(4 * easy, rel=0.25)


def test_what_matters_weighs_more_where_its_place_is_known():
    class Nothing(torch.nn.Module):
        def forward(self, x, times, **_):
            return type("Found", (), {"sample": torch.zeros_like(x)})

    noise = make_scheduler("ddpm", tiny_config().scheduler)
    latents, emphasis = torch.zeros(400, 1, 2, 2), torch.tensor([[1.0, 0], [0, 0]]).expand(400, 1, 2, 2)
    states, negative = torch.zeros(400, 1, 8), torch.zeros(1, 1, 8)

    def error(**options):
        torch.manual_seed(0)
        return diffusion_loss(Nothing(), noise, negative, states, latents, True, **options).item()

    plain, weighed = error(), error(foreground_mask=emphasis)
    assert plain == pytest.approx(1, abs=0.1) and weighed == pytest.approx(plain, abs=0.1) and weighed != plain
    assert error(foreground_mask=torch.zeros_like(emphasis)) == pytest.approx(plain, rel=1e-5)


def test_sites_learn_to_find_how_heroes_look(batches, config):
    """Maps that say it plainly: what is left to learn is to look."""
    torch.manual_seed(0)
    blocks = init_modules(config)
    for block in blocks.values():
        block.requires_grad_(False)
    sites = {n: p for n, p in blocks["synchronizer"].named_parameters() if "mmfs_module" in n and "pos_embed" not in n}
    for parameter in sites.values():
        parameter.requires_grad_(True)
    learner = MMFSObjective(blocks, config.scheduler).eval()
    batch = batch_that(batches, draws=True)

    class Says(torch.nn.Module):
        def forward(self, pictures):
            shown = torch.cat(
                [
                    torch.nn.functional.one_hot(batch.image_labels.flatten(0, 1)[:, k], NUM_CLASSES[k])
                    for k in APPEARANCE_HEADS
                ],
                1,
            ).float()
            width = config.synchronizer.mmfs.d_value
            values = torch.nn.functional.pad(shown, (0, max(0, width - shown.shape[1])))[:, :width, None, None]
            return type(
                "Found",
                (),
                {"feature_maps": [values.expand(-1, -1, s, s) for s in config.synchronizer.mmfs.spatial_shapes]},
            )

    learner.encoder = Says()
    optimizer = Muon(sites, 0.02, 0.0)
    before = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = learner(batch, to_draw(batch)[0])["loss"]
        before = before or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * before
    learner.eval()
    firm = learner.rescale_to_targets([(batch, to_draw(batch)[0])])
    assert all(0.95 < factor / MMFS_TARGET_SCALE < 2 for factor in firm)  # what is found is at most what is wanted
    assert learner.rescale_to_targets([(batch, to_draw(batch)[0])]) == pytest.approx([1.0] * len(firm), abs=0.05)
    back = learner.rescale_to_targets([(batch, to_draw(batch)[0])], 1.0)
    assert back == pytest.approx([1 / MMFS_TARGET_SCALE] * len(firm), rel=0.05)
    assert all(p.grad is None for n, p in blocks["synchronizer"].named_parameters() if n not in sites)


def test_a_unet_learns_to_draw_what_codes_say(config):
    torch.manual_seed(0)
    blocks = init_modules(config)
    velocity = {**config.scheduler, "prediction_type": "v_prediction"}
    learner = UNetObjective(blocks["unet"], blocks["synchronizer"], velocity)
    optimizer = Muon(dict(blocks["unet"].named_parameters()), 3e-3, 0.0)
    labels = torch.zeros(16, len(ATTRIBUTES), dtype=torch.long)
    labels[8:, 1] = 1
    latents = torch.where(torch.arange(16).view(-1, 1, 1, 1) < 8, 1.0, -1.0).expand(16, 4, 4, 4)

    @torch.no_grad()
    def error(labels) -> float:
        """Of what is drawn in one step from noise alone."""
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        found = learner.eval().unet(noise, 999, encoder_hidden_states=learner.cond_targets(labels)).sample
        return (found + latents).square().mean().item()

    # It learns which half is which between steps 60 and 130, sooner or later as the processor rounds; then it is sure.
    for _ in range(200):
        optimizer.zero_grad()
        learner.train()(latents, labels)["loss"].backward()
        optimizer.step()
    assert error(labels) < 0.5 * error(labels.flip(0))  # 0.03 to 0.07 with several seeds


def test_a_unet_is_told_of_looks_by_its_sites(config):
    blocks = init_modules(config)
    learner = UNetObjective(blocks["unet"], blocks["synchronizer"], config.scheduler).eval()
    labels, latents = torch.zeros(2, len(ATTRIBUTES), dtype=torch.long), torch.randn(2, 4, 8, 8)
    sites = OracleMMFS(config.synchronizer.block_channels)
    x = torch.randn(2, config.synchronizer.block_channels[0], 4, 4)
    assert torch.allclose(
        sites.add_residual(0, x, sites.residuals(labels)) - x, sites.targets(labels)[0][:, :, None, None]
    )
    losses = learner(latents, labels)
    assert set(losses) == {"loss", "cond_only", "mmfs_only"} and losses["cond_only"] != losses["mmfs_only"]


def test_sites_err_where_the_states_know_better(config):
    torch.manual_seed(0)
    blocks = init_modules(config)
    learner = UNetObjective(blocks["unet"], blocks["synchronizer"], config.scheduler)
    labels = torch.arange(400)[:, None].repeat(1, len(ATTRIBUTES))
    alone = torch.arange(400)[:, None] < 200
    wrong = learner.corrupt_labels(labels, alone) != labels
    assert not wrong[:200, COAT_HEADS].any()
    for part in (wrong[200:, COAT_HEADS], wrong[:, [k for k in range(len(ATTRIBUTES)) if k not in COAT_HEADS]]):
        assert part.float().mean() == pytest.approx(learner.MMFS_LABEL_NOISE, abs=0.05)


def test_muon_takes_orthogonal_steps_of_matrices_and_adams_of_the_rest():
    torch.manual_seed(0)
    for width in (64, 160):  # the wide one by its Gram matrix's polynomials
        gradient = torch.randn(32, width) @ torch.diag(torch.logspace(0, -1.5, width))
        found = orthogonalized(gradient)
        assert torch.linalg.svdvals(found).min() > 0.3 and torch.linalg.svdvals(found).max() < 1.3
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        core = left.T @ found @ right.T  # the same singular vectors
        assert torch.allclose(core, core.diag().diag(), atol=1e-3)
        assert torch.allclose(orthogonalized(gradient.T), found.T, atol=1e-5)
    named = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.randn_like(p)
    Muon(named, 0.1, 0.0).step()
    moved = {name: (p.detach() - before[name]) / -0.1 for name, p in named.items()}
    assert [name for name, p in named.items() if is_matrix(name, p)] == ["linear", "conv"]
    for name in ("linear", "conv"):
        assert moved[name].pow(2).mean().sqrt() == pytest.approx(0.2, abs=0.05)
    for name in ("table.embedding", "bias", "depthwise"):
        assert torch.allclose(moved[name], named[name].grad.sign(), atol=1e-3)


SHAPES = {
    "linear": (32, 64),
    "conv": (32, 16, 3, 3),
    "table.embedding": (40, 32),
    "bias": (32,),
    "depthwise": (32, 1, 3, 3),
}


def test_most_quarters_are_about_heroes(book):
    rows = [0, 1, 2, 3] * 20
    random_crops = book.random_crops(rows, random.Random(0))
    assert random_crops.shape == (80, 3, 64, 64)
    assert torch.equal(random_crops, book.random_crops(rows, random.Random(0)))
    every = book.images([0])[0].unfold(1, 64, 1).unfold(2, 64, 1)  # (3, 65, 65, 64, 64)
    some = every[..., ::9, ::9]
    emphasis, about = book.foreground_mask([0], 128)[0, 0], []
    for quarter in random_crops[::4]:
        away = (some - quarter[:, None, None, ::9, ::9]).abs().amax(dim=(0, 3, 4))
        y, x = divmod(int(away.argmin()), 65)
        assert torch.equal(every[:, y, x], quarter)
        about.append(float(emphasis[y : y + 64, x : x + 64].mean()))
    assert sum(about) / len(about) > 1.3 * float(emphasis.mean())


TWO_PROCESSES = """
import os
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from starter_training import trainer
from starter_training.trainer import StageConfig, train

class Learner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.even = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, seed):
        return {"loss": (self.odd if seed % 2 else self.even)(torch.ones(1, 4)).square().mean()}

torch.manual_seed(0)
learner = Learner()
folder, minutes = Path(sys.argv[1]), float(sys.argv[2]) or None
if minutes and os.environ["RANK"] == "1":
    trainer.time = SimpleNamespace(monotonic=lambda: 0.0)  # a clock that stands still: it is never late by itself
stage = StageConfig("toy", (), (), 10**6 if minutes else 6, 1, 1e-2, warmup=1)
done = train(stage, learner, {"odd": learner.odd}, folder, lambda seed: (seed // 2,), [(0,)], minutes=minutes)
assert done == (minutes is None)
"""


@pytest.mark.parametrize("minutes", [0, 0.02])
def test_two_processes_learn_together_though_a_batch_leaves_parameters_out(tmp_path, minutes):
    script = tmp_path / "learn.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    root = Path(trainer.__file__).parents[1]
    where = {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    ran = subprocess.run(
        [*command, str(tmp_path / "toy"), str(minutes)],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (tmp_path / "toy" / "odd.safetensors").exists()


def tiny_stage(**changes):
    settings = {"name": "vae", "blocks": ("vae",), "needs": (), "steps": 6, "batch": 2, "learning_rate": 1e-3}
    return StageConfig(**{**settings, "warmup": 2, "log_every": 2, "validate_every": 3, "save_every": 3, **changes})


def run_vae(folder, book, config, stage, minutes=None):
    blocks = init_modules(config, seed=1)
    learner = VAEObjective(blocks["vae"])
    small_pictures = book.images(range(8))[:, :, ::4, ::4]
    done = train(
        stage,
        learner,
        {"vae": blocks["vae"]},
        folder,
        lambda seed: (small_pictures[[seed % 8]],),
        [(small_pictures[:2],)],
        minutes=minutes,
    )
    return done, blocks["vae"].state_dict()


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path, book, config):
    done, whole = run_vae(tmp_path / "whole", book, config, tiny_stage())
    assert done
    stopped, _ = run_vae(tmp_path / "parts", book, config, tiny_stage(), minutes=0)
    assert not stopped
    for _ in range(5):
        stopped, parts = run_vae(tmp_path / "parts", book, config, tiny_stage(), minutes=0)
    assert stopped and all(torch.equal(whole[k], parts[k]) for k in whole)
    records = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 6 and (tmp_path / "parts" / "curves.png").stat().st_size > 5000
    assert not list(tmp_path.rglob("*.part"))


def test_older_state_files_have_other_names():
    names = trainer._current_names({"decoder.conv.weight": 0, "maps.0.weight": 1, "vae.decoder.bias": 2, "odd": 3})
    assert list(names) == ["synchronizer.conv.weight", "map_probes.0.weight", "vae.decoder.bias", "odd"]


def test_training_lowers_the_loss(tmp_path, book, config):
    run_vae(tmp_path, book, config, tiny_stage(steps=60, log_every=10, validate_every=60))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "validation" not in r]
    assert losses[-1] < 0.8 * losses[0]


def test_stage_files_are_complete():
    for name in STAGES:
        stage = StageConfig.read(STAGE_DIR / f"{name}.json", steps=7)
        assert stage.name == name and stage.steps == 7 and stage.batch > 0
    with pytest.raises(SettingError, match="unknown settings: colour"):
        StageConfig.read(STAGE_DIR / "vae.json", colour=1)


def test_a_stage_without_what_it_needs(tmp_path):
    with pytest.raises(CheckpointError, match="has no trained encoder yet"):
        load_run(tmp_path, ("encoder",))


def test_a_run_goes_on_from_a_checkpoint(tmp_path, capsys):
    begin(tmp_path / "run", STARTER_DIR)
    config, blocks = load_run(tmp_path / "run", BLOCKS)
    known, shipped = read_state_dicts(STARTER_DIR)
    assert config == known
    for name, tensors in shipped.items():
        found = blocks[name].state_dict()
        assert all(torch.equal(found[key], tensor.float()) for key, tensor in tensors.items())
    thin, pictures = latest_slim_vae(tmp_path / "run", config), torch.rand(1, 3, 32, 32)
    assert torch.allclose(encode_latents(thin, pictures), encode_latents(blocks["vae"], pictures), atol=1e-5)
    export(tmp_path / "run")
    exported = read_state_dicts(tmp_path / "run" / "model")[1]
    for name, tensors in shipped.items():
        assert all(torch.equal(exported[name][key], tensor) for key, tensor in tensors.items())
    assert main(["begin", "--out", str(tmp_path / "run")]) == 2
    assert "already holds a run; choose another with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["begin", "--first", "3"], ["look", "--model", "starter"], ["sheet", "--steps", "9"]]
)
def test_options_of_no_use_are_named(tmp_path, capsys, command):
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert f"{command[1]} does not apply to {command[0]!r}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_from_anothers_vae(tmp_path, config, tokenizer):
    tensors = {name: block.state_dict() for name, block in init_modules(config).items()}
    save(tmp_path / "model", config, tensors, tokenizer)
    with pytest.raises(CheckpointError, match="was not made by this training"):
        begin(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("last", ["language", "look", "joint"])
def test_a_block_is_as_the_last_stage_left_it_whichever_that_was(tmp_path, last):
    begin(tmp_path / "run", STARTER_DIR)
    was = read_state_dicts(STARTER_DIR)[1]["synchronizer"]
    for age, stage in enumerate(sorted(("language", "look", "joint"), key=lambda stage: stage != last)):
        path = tmp_path / "run" / stage / "synchronizer.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({key: tensor.float() + (stage == last) for key, tensor in was.items()}, path)
        os.utime(path, (2e9 - age, 2e9 - age))
    found = load_run(tmp_path / "run")[1]["synchronizer"].state_dict()
    assert all(torch.equal(found[key], tensor.float() + 1) for key, tensor in was.items())


def test_a_run_begins_with_the_mean_of_checkpoints(tmp_path, capsys):
    begin(tmp_path / "one", STARTER_DIR)
    path = tmp_path / "one" / "language" / "llm.safetensors"
    save_file({key: tensor + 1 for key, tensor in read_tensors(path).items()}, path)
    export(tmp_path / "one")
    command = ["begin", "--model", "starter", "--model", str(tmp_path / "one" / "model")]
    assert main([*command, "--out", str(tmp_path / "mean")]) == 0
    found = {name: block.state_dict() for name, block in load_run(tmp_path / "mean", BLOCKS)[1].items()}
    for name, tensors in read_state_dicts(STARTER_DIR)[1].items():
        for key, tensor in tensors.items():
            assert torch.allclose(found[name][key], tensor.float() + 0.5 * (name == "llm"), atol=2e-3)


def test_there_is_no_mean_of_checkpoints_that_do_not_fit(tmp_path, capsys, config, tokenizer):
    save(
        tmp_path / "tiny", config, {name: block.state_dict() for name, block in init_modules(config).items()}, tokenizer
    )
    command = ["begin", "--model", "starter", "--model", str(tmp_path / "tiny"), "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "has another config; only equal configs can be averaged" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_starters_size_and_words():
    from comfy_mminterleaved.models.build import build

    values = sum(p.numel() for block in build(starter_config.starter_config()).values() for p in block.parameters())
    assert values * 2 <= 40e6  # in float16
    tokenizer = starter_config.make_tokenizer(300)
    assert tokenizer.tokenizer.get_vocab_size() <= starter_config.TEXT_VOCAB_SIZE
    for text in ("Mia runs on the beach with a kite. It is night.", "Zoë <s> 猫 xylophone"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("Mia runs on the beach with a kite.")) <= 11


def test_questions_are_answered_by_the_scene():
    rng = random.Random(0)
    for _ in range(100):
        scene = world.make_scene(rng, world.make_cast(rng, rng.randint(1, 2), False))
        asked = dict(world.questions(scene))
        assert asked["Where is it?"].rstrip(".").lower() == world.PLACES[scene.place]
        assert all(hero.species in asked["Who is it?"] for hero in scene.heroes)
