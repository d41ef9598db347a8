"""Memory that is announced to a host against memory that is used, within 20%, at several widths."""

from dataclasses import replace

import pytest
import torch

from comfy_mminterleaved import ImageSegment, Story
from comfy_mminterleaved.checkpoints.load import read_config
from comfy_mminterleaved.config import skip_channels
from comfy_mminterleaved.generation import memory
from comfy_mminterleaved.generation.config import TextGenerationConfig
from comfy_mminterleaved.generation.peak_memory import PeakMemory
from comfy_mminterleaved.generation.refine import ImageRefiner
from comfy_mminterleaved.generation.text import TextGenerator
from comfy_mminterleaved.models.build import build
from comfy_mminterleaved.models.mmfs import fuse_mmfs
from comfy_mminterleaved.models.quantization import FORMATS, quantized_linears
from comfy_mminterleaved.models.refiner import Refiner, RefinerConfig
from comfy_mminterleaved.models.visual_tokenizer import ImageFeatures
from comfy_mminterleaved.presets import STARTER_DIR, tiny_config


def llm_config(width, layers, heads, intermediate, d_value, levels, mmfs_heads):
    config = tiny_config(64)
    mmfs = replace(config.llm.mmfs, d_model=d_value, d_value=d_value, spatial_shapes=levels, n_heads=mmfs_heads)
    return replace(
        config.llm,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        num_img_token=32,
        max_position_embeddings=2048,
        mmfs=mmfs,
    )


LLMS = {
    "starter": read_config(STARTER_DIR).llm,
    "256": llm_config(256, 12, 4, 688, 128, (16, 8), 4),
    "512": llm_config(512, 8, 8, 1376, 256, (16, 8, 4), 8),
    "1024": llm_config(1024, 4, 8, 2752, 1024, (32, 16, 8), 16),
}
# Channels of the U-Net's levels, blocks in each, side of the latents, width of MMFS.
UNETS = {"starter": None, "128": ([128, 256, 512], 1, 32, 256), "320": ([320, 640, 1280, 1280], 2, 64, 512)}
STORIES = {"text": (0, 600), "an image": (1, 500), "four images": (4, 60), "eight images": (8, 30)}


@pytest.fixture(scope="module", params=LLMS)
def generator(request, tiny_random):
    config = replace(tiny_random.config, llm=LLMS[request.param])
    llm = build(config, ("llm",))["llm"].to_empty(device="cpu")
    for parameter in llm.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return TextGenerator(fuse_mmfs(llm).requires_grad_(False), config, tiny_random.tokenizer)


def story_of(generator, num_images: int, length: int) -> Story:
    c = generator.config.llm
    parts = []
    for _ in range(num_images):
        maps = tuple(torch.randn(c.mmfs.d_value, side, side) for side in (32, 16, 8, 4))
        features = ImageFeatures(torch.randn(c.num_img_token, c.hidden_size), maps, "tests")
        parts += ["x" * length, ImageSegment(torch.rand(3, 16, 16)).with_features(features)]
    return Story.of(*parts) if parts else Story.of("x" * length)


def is_close(announced: int, used: int) -> None:
    assert 0.8 <= announced / used <= 1.2, f"announced {announced / 1e6:.2f} MB, used {used / 1e6:.2f} MB"


@pytest.mark.parametrize("name", STORIES)
def test_prefill(generator, name):
    num_images, length = STORIES[name]
    story = story_of(generator, num_images, length)
    generator.clear_cache()
    with PeakMemory() as measured:
        generator.prefill(story)
    length = max(length, generator.config.llm.num_img_token)
    announced = memory.prefill_bytes(generator.config.llm, len(generator.tokenize(story)), num_images, 4, length)
    is_close(announced, measured.peak)
    held = memory.cache_bytes(generator.config.llm, len(generator.tokenize(story)), num_images, 4)
    assert held == pytest.approx(generator.cache.nbytes, rel=0.01)


@pytest.mark.parametrize("beams, new_tokens", [(5, 24), (64, 12)])
def test_beams(generator, beams, new_tokens):
    story = story_of(generator, 1, 500)
    config = TextGenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, num_beams=beams)
    generator.prefill(story)
    with PeakMemory() as measured:
        generator.generate([story], config)
    c, length = generator.config.llm, len(generator.tokenize(story))
    is_close(memory.continuation_bytes(c, length, new_tokens, beams, 4), measured.peak)


def test_options(generator):
    story, options = story_of(generator, 1, 500), ["y" * 14 for _ in range(40)]
    generator.prefill(story)
    with PeakMemory() as measured:
        generator.score(story, options)
    c, length = generator.config.llm, len(generator.tokenize(story))
    is_close(memory.continuation_bytes(c, length, 16, 16, 4, is_given=True), measured.peak)


ENCODERS = {"starter": None, "64": (64, 8, 16), "256": (256, 16, 64), "384": (384, 8, 64), "1024": (1024, 16, 64)}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoding(name, tiny_random):
    config = read_config(STARTER_DIR)
    if ENCODERS[name] is not None:
        width, grid, stem = ENCODERS[name]
        config, encoder = tiny_random.config, tiny_random.config.encoder
        perceiver = replace(encoder.perceiver, encoder_hidden_size=width)
        encoder = replace(
            encoder, hidden_size=width, image_size=16 * grid, conv_inplane=stem, num_attention_heads=width // 64
        )
        config = replace(config, encoder=replace(encoder, intermediate_size=4 * width, perceiver=perceiver))
    encoder = build(config, ("encoder",))["encoder"].to_empty(device="cpu").requires_grad_(False)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    side = config.encoder.image_size
    with torch.no_grad(), PeakMemory() as measured:
        encoder(torch.rand(1, 3, side, side))
    is_close(memory.encoding_bytes(config.encoder, 4), measured.peak)


@pytest.mark.parametrize("num_images", [1, 3, 6])
@pytest.mark.parametrize("name", UNETS)
def test_sampling_with_context_images(name, num_images, tiny_random):
    config, side = read_config(STARTER_DIR), 16
    if UNETS[name] is not None:
        channels, per_level, side, width = UNETS[name]
        config = tiny_random.config
        mmfs = replace(config.synchronizer.mmfs, d_model=width, d_value=width, n_heads=width // 32, n_points=8)
        config = replace(
            config,
            synchronizer=replace(
                config.synchronizer,
                mmfs=replace(mmfs, spatial_shapes=(64, 32, 16, 8)),
                block_channels=skip_channels(channels, per_level),
                block_base_shapes=_base_shapes(side, len(channels), per_level),
                pos_embed_grid=side,
            ),
        )
    c = config.synchronizer
    synchronizer = build(config, ("synchronizer",))["synchronizer"].to_empty(device="cpu").requires_grad_(False)
    for parameter in synchronizer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    net = fuse_mmfs(synchronizer).mmfs_module
    maps = [torch.randn(1, num_images, c.mmfs.d_value, level, level) for level in c.mmfs.spatial_shapes]
    skips = [torch.randn(2, n, base, base) for n, base in zip(c.block_channels, c.block_base_shapes)]
    with torch.no_grad(), PeakMemory() as measured:
        values = net.project_images(maps, torch.ones(1, num_images, dtype=torch.bool))
        for index, skip in enumerate(skips):
            net.add_residual(index, skip, values)
    is_close(memory.sampling_bytes(c, num_images, 2, (side, side), 4), measured.peak)


def _base_shapes(side: int, levels: int, per_level: int) -> tuple[int, ...]:
    """Sides of the skips in the order they are made, then of the middle block."""
    shapes = [side]
    for level in range(levels):
        shapes += [side >> level] * per_level + ([side >> level + 1] if level < levels - 1 else [])
    return (*shapes, side >> levels - 1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 512, 1024])
def test_dequantizing_a_layer(name, dtype, width):
    config = replace(LLMS["256"], hidden_size=width, intermediate_size=3 * width, quantization=name)
    layer = quantized_linears(name).Linear(width, 3 * width)
    weight, scale = FORMATS[name].quantize(torch.ones(3 * width, width))
    with PeakMemory() as memory_used:
        FORMATS[name].dequantize(weight, scale, dtype)
    assert layer.weight.shape == weight.shape
    is_close(memory.dequantization_bytes(config, dtype.itemsize), memory_used.peak)


@pytest.mark.parametrize("hidden_size", [32, 64, 128])
@pytest.mark.parametrize("size", [(128, 128), (512, 256)])
def test_refining(hidden_size, size):
    config = RefinerConfig(hidden_size)
    refiner = ImageRefiner(Refiner(config).eval().requires_grad_(False))
    image = torch.rand(3, *size)
    with torch.no_grad(), PeakMemory() as measured:
        refiner.refine(image, prompt_embeds=torch.randn(16, config.prompt_dim))
    is_close(memory.refining_bytes(config, *size), measured.peak)
