from dataclasses import replace

import pytest
import torch

from comfy_mminterleaved import ImageGenerationConfig, ImageSegment, Story
from comfy_mminterleaved.errors import SettingError
from comfy_mminterleaved.generation.latents import decode_latents, encode_latents, latents_to_rgb
from comfy_mminterleaved.generation.schedulers import SCHEDULERS
from comfy_mminterleaved.generation.unet_hooks import attach_mmfs

FAST = ImageGenerationConfig(num_inference_steps=2, scheduler="ddim", seed=1)


@pytest.fixture
def story(pictures):
    return Story.of("Otto met a bear.", pictures[0], "It was", pictures[1], "Then")


def off(a, b):
    return (a.pixels - b.pixels).abs().max().item()


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "HeunDiscreteScheduler"])
def test_every_scheduler_and_the_same_alone_in_a_batch_and_again(tiny_random, pictures, story, scheduler):
    drawing = ImageGenerationConfig(num_inference_steps=3, scheduler=scheduler, seed=4)
    alone = tiny_random.generate_image(story, drawing)
    assert alone.pixels.shape == (3, 128, 128) and 0 <= alone.pixels.min() < alone.pixels.max() <= 1
    others = [Story.of("nothing to look at"), Story.of(pictures[5])]
    together = tiny_random.generate_images([others[0], story, others[1]], drawing, num_outputs=2)
    assert off(together[1][0], alone) < 1e-3
    by_twos = tiny_random.generate_images([others[0], story, others[1]], drawing, num_outputs=2, batch_size=2)
    assert max(off(a, b) for x, y in zip(together, by_twos) for a, b in zip(x, y)) < 1e-3
    own = tiny_random.generate_images([others[0], story], replace(drawing, seed=9), seeds=[7, 4])
    assert off(own[1][0], alone) < 1e-3 < off(own[0][0], together[0][0])
    assert off(tiny_random.generate_image(story, drawing), alone) < 1e-5
    assert off(tiny_random.generate_image(story, replace(drawing, seed=5)), together[1][1]) < 1e-3 < off(*together[1])


def test_each_story_needs_a_seed(tiny_random, story):
    with pytest.raises(SettingError, match="Each of 1 stories needs a seed; there are 2 seeds."):
        tiny_random.generate_images([story], FAST, seeds=[1, 2])


def test_what_is_looked_at(tiny_random, pictures, story):
    """Pictures out of sight change nothing at the sites; those in sight do."""
    encoded = tiny_random.encode_images(story)
    contexts = tiny_random.context_features([encoded])

    def drawn(num_context_images, segments):
        maps, visible = tiny_random.image.context_feature_maps(
            [tiny_random.encode_images(Story(segments))], num_context_images
        )
        prepared = tiny_random.synchronizer.mmfs_module.project_images(maps, visible)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), attach_mmfs(tiny_random.unet, tiny_random.synchronizer.mmfs_module, prepared):
            return tiny_random.unet(x, 500, tiny_random.synchronizer.conditioner.prompt_embeds(contexts)).sample

    other = (encoded.segments[0], pictures[7], *encoded.segments[2:])
    assert torch.allclose(drawn(1, encoded.segments), drawn(1, other), atol=1e-5)
    assert (drawn(2, encoded.segments) - drawn(2, other)).abs().max() > 1e-4
    assert (drawn(1, encoded.segments) - drawn(2, encoded.segments)).abs().max() > 1e-4
    assert (drawn(0, encoded.segments) - drawn(1, encoded.segments)).abs().max() > 1e-4


def test_strength_and_span_of_the_synchronizer(tiny_random, story):
    full, none = (
        tiny_random.generate_image(story, FAST),
        tiny_random.generate_image(story, replace(FAST, mmfs_scale=0.0)),
    )
    assert off(full, none) > 1e-3
    assert off(none, tiny_random.generate_image(story, replace(FAST, mmfs_start=1.0))) < 1e-6
    assert off(none, tiny_random.generate_image(story, replace(FAST, mmfs_end=0.0))) < 1e-6
    half = tiny_random.generate_image(story, replace(FAST, mmfs_end=0.5))
    assert off(half, none) > 1e-4 < off(half, full)


def test_the_unet_is_left_as_it_was(tiny_random, story):
    before = [len(block._forward_pre_hooks) for block in tiny_random.unet.up_blocks]

    def stop(step, steps, latents_to_rgb):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_random.generate_image(story, FAST, on_step=stop)
    assert [len(block._forward_pre_hooks) for block in tiny_random.unet.up_blocks] == before == [0] * len(before)


def test_all_sites_are_used(tiny_random, story):
    used = []
    handles = [
        site.register_forward_hook(lambda *_, i=i: used.append(i))
        for i, site in enumerate(tiny_random.synchronizer.mmfs_module.blocks)
    ]
    tiny_random.generate_image(story, replace(FAST, num_inference_steps=1))
    for handle in handles:
        handle.remove()
    assert sorted(used) == list(range(len(tiny_random.synchronizer.mmfs_module.blocks)))
    assert used[0] == len(tiny_random.synchronizer.mmfs_module.blocks) - 1  # the mid output comes first


def test_guidance_off_takes_the_positive_half_alone(tiny_random, story):
    rows = []
    handle = tiny_random.unet.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True
    )
    tiny_random.generate_image(story, replace(FAST, guidance_scale=1.0))
    tiny_random.generate_image(story, FAST)
    handle.remove()
    assert rows == [1, 1, 2, 2]


@pytest.mark.parametrize("size", [(128, 128), (160, 96), (64, 64)])
def test_sizes(tiny_random, story, size):
    assert tiny_random.generate_image(story, replace(FAST, size=size)).size == size


@pytest.mark.parametrize("size", [(100, 128), (0, 128), (16, 16)])
def test_a_size_that_does_not_divide_is_refused(tiny_random, story, size):
    with pytest.raises(SettingError, match=f"{size[0]} x {size[1]} must be in multiples of 32 px"):
        tiny_random.generate_image(story, replace(FAST, size=size))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_from_a_picture(tiny_random, story, pictures, scheduler):
    """The less is done over, the nearer the result stays to what the VAE makes of the picture."""
    begin = pictures[2]
    kept = ImageSegment(decode_latents(tiny_random.vae, encode_latents(tiny_random.vae, begin.pixels[None]))[0])
    settings = ImageGenerationConfig(num_inference_steps=10, scheduler=scheduler, mmfs_scale=0, guidance_scale=1)
    little, much = (tiny_random.generate_image(story, replace(settings, denoise=d), begin) for d in (0.1, 1.0))
    assert (little.pixels - kept.pixels).pow(2).mean() < (much.pixels - kept.pixels).pow(2).mean()


def test_callback_has_previews(tiny_random, story):
    seen = []
    tiny_random.generate_image(
        story,
        replace(FAST, num_inference_steps=3),
        on_step=lambda i, n, latents_to_rgb: seen.append((i, n, latents_to_rgb())),
    )
    assert [(i, n) for i, n, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(p.shape == (1, 3, 16, 16) and 0 <= p.min() <= p.max() <= 1 for *_, p in seen)


def test_a_preview_shows_the_colours_of_the_picture():
    """On a VAE that keeps colours linearly (a fixed 8 x 8 mean), the fitted map gives them back."""
    from types import SimpleNamespace

    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q

    class Vae:
        config = SimpleNamespace(scaling_factor=0.5, block_out_channels=[1, 1, 1, 1])
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, pictures):
            small = torch.nn.functional.avg_pool2d(pictures, 8)
            small = torch.cat([small, small.mean(1, keepdim=True) ** 2], 1)
            return SimpleNamespace(latents=torch.einsum("ij,njhw->nihw", mix, small))

    vae, picture = Vae(), torch.rand(1, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents = vae.encode(picture * 2 - 1).latents * 0.5
    assert torch.allclose(latents_to_rgb(vae, latents), picture[:, :, ::8, ::8], atol=1e-4)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_inference_steps", 0),
        ("guidance_scale", 0.5),
        ("seed", -1),
        ("num_context_images", -1),
        ("mmfs_start", -0.1),
        ("mmfs_end", 1.1),
        ("denoise", 0.0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"{name} must be .*, not {value}"):
        ImageGenerationConfig(**{name: value})


def test_unknown_scheduler_and_too_much_to_look_at(tiny_random, story):
    for name in ("nonsense", "UNet2DConditionModel"):
        with pytest.raises(SettingError, match=f"scheduler '{name}' is not known; use ddpm, ddim"):
            tiny_random.generate_image(story, replace(FAST, scheduler=name))
    with pytest.raises(SettingError, match="num_context_images must be at most 9 for this model, not 10"):
        tiny_random.generate_image(story, replace(FAST, num_context_images=10))


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "KarrasVeScheduler",
        "RePaintScheduler",
        "DDPMWuerstchenScheduler",
        "UnCLIPScheduler",
        "VQDiffusionScheduler",
    ],
)
def test_a_scheduler_that_does_not_fit_is_found_before_anything_is_drawn(tiny_random, story, name):
    drawn = []
    with pytest.raises(SettingError, match=f"scheduler '{name}' does not fit this model's noise in 2 steps; use ddpm"):
        tiny_random.generate_images([story], replace(FAST, scheduler=name), on_step=lambda *step: drawn.append(step))
    assert not drawn


def test_a_scheduler_that_needs_more_steps_is_found_too(tiny_random, story):
    with pytest.raises(SettingError, match="'PNDMScheduler' does not fit .* in 1 step; .*, or another number of steps"):
        tiny_random.generate_image(story, replace(FAST, scheduler="PNDMScheduler", num_inference_steps=1))
    tiny_random.generate_image(story, replace(FAST, scheduler="PNDMScheduler", num_inference_steps=4))


def test_drawing_leaves_the_random_numbers_of_others_alone(tiny_random, story):
    before = torch.get_rng_state()
    tiny_random.generate_image(story, replace(FAST, scheduler="ddpm"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_unet_of_another_shape_is_refused(tiny_random):
    import diffusers

    other = diffusers.UNet2DConditionModel.from_config({**tiny_random.config.unet, "layers_per_block": 2})
    prepared = tiny_random.synchronizer.mmfs_module.project_images(
        *tiny_random.image.context_feature_maps([Story()], 1)
    )
    with pytest.raises(SettingError, match="The U-Net has 9 skips, but the synchronizer has MMFS blocks for 6"):
        attach_mmfs(other, tiny_random.synchronizer.mmfs_module, prepared).__enter__()
