"""Images as codes (VQ-VAE-2), and drafts of a story's next image as its next tokens (DALL-E)."""

import math

import pytest
import torch
from safetensors.torch import save_file

from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryTooLongError
from comfy_mminterleaved.generation.dream import DreamConditioner
from comfy_mminterleaved.generation.embedders import system_metadata
from comfy_mminterleaved.generation.image_tokens import (
    ImageTokenizer,
    TokenSampler,
    check_tokens,
    load_image_tokenizer,
    load_token_sampler,
    rows_of,
)
from comfy_mminterleaved.models.dream import DreamConfig, DreamQueries
from comfy_mminterleaved.models.llama_mmfs import KVCache
from comfy_mminterleaved.models.token_decoder import (
    CELL_CODES,
    TokenDecoder,
    TokenDecoderConfig,
    from_cells,
    to_cells,
)
from comfy_mminterleaved.models.vqvae import VQVAE, ImageCodes, VQVAEConfig
from comfy_mminterleaved.stories.story import ImageSegment, Story

CLOSE = {"atol": 1e-4, "rtol": 1e-3}
CONFIG = VQVAEConfig(4, 0.5, 8, 1, 32, 4)
SIDE = 3


def random_codec(seed: int = 0, config: VQVAEConfig = CONFIG) -> VQVAE:
    torch.manual_seed(seed)
    return VQVAE(config).eval().requires_grad_(False)


def random_decoder(pipeline, seed: int = 0) -> TokenDecoder:
    torch.manual_seed(seed)
    model = TokenDecoder(TokenDecoderConfig(32, SIDE, 2, 16, 2.0), pipeline.config.llm).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("gate"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def decoder(tiny_random):
    return random_decoder(tiny_random)


@pytest.fixture
def dream(tiny_random):
    """Queries that the LLM reads before the image."""
    torch.manual_seed(0)
    c = tiny_random.config
    model = DreamQueries(DreamConfig(3, c.llm.hidden_size, c.synchronizer.perceiver.hidden_size)).eval()
    torch.nn.init.normal_(model.dream_queries, std=1.0)
    return DreamConditioner(model)


@pytest.fixture
def sampler(decoder, dream):
    return TokenSampler(decoder, dream)


def image(seed: int) -> ImageSegment:
    return ImageSegment(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)))


def latents(seed: int, count: int = 2, sides=(6, 10)) -> torch.Tensor:
    return torch.randn(count, 4, *sides, generator=torch.Generator().manual_seed(seed))


# ---- codes ----


def test_codes_of_images_of_any_shape():
    tokenizer = ImageTokenizer(random_codec())
    x = latents(0)
    codes = tokenizer.encode(x)
    assert codes.top.shape == (2, 3, 5) and codes.bottom.shape == (2, 6, 10)
    assert tokenizer.decode(codes).shape == x.shape
    alone = tokenizer.encode(x[1:])
    assert alone.top.equal(codes.top[1:]) and alone.bottom.equal(codes.bottom[1:])
    assert tokenizer.num_bytes(codes) == math.ceil((15 + 60) * 5 / 8)


def test_the_nearest_entry_is_taken():
    quantizer = random_codec().quantize_top
    x = torch.randn(2, 4, 3, 3)
    distances = (x.movedim(1, -1)[..., None, :] - quantizer.codebook).square().sum(-1)
    assert quantizer(x).equal(distances.argmin(-1))
    assert quantizer(quantizer.embed(torch.arange(32).view(1, 4, 8))).equal(torch.arange(32).view(1, 4, 8))


def test_the_bottom_level_knows_the_top_one():
    """Section 3.1: bottom codes say what top ones have not, so that they depend on them, and both are decoded."""
    model = random_codec()
    codes = model.encode(latents(0))
    other = ImageCodes((codes.top + 1) % 32, codes.bottom)
    assert (model.decode(codes) - model.decode(other)).abs().max() > 1e-3
    features, top = model.encode_top(latents(0))
    first, second = (
        model.encode_bottom(features, model.upsample_top(model.quantize_top.embed(each.top))) for each in (codes, other)
    )
    assert (first - second).abs().max() > 1e-3


def test_latents_are_scaled_as_the_codes_were_trained():
    tokenizer, x = ImageTokenizer(random_codec()), latents(0)
    assert tokenizer.encode(x).top.equal(tokenizer.model.encode(x * 0.5).top)
    codes = tokenizer.encode(x)
    assert torch.allclose(tokenizer.decode(codes), tokenizer.model.decode(codes) / 0.5)


@pytest.mark.parametrize(
    "x, sentence",
    [
        (torch.zeros(1, 3, 4, 4), "4 channels"),
        (torch.zeros(4, 4, 4), "4 channels"),
        (torch.zeros(1, 4, 5, 4), "4 x 5"),
        (torch.full((1, 4, 4, 4), torch.nan), "not numbers"),
    ],
)
def test_latents_that_have_no_codes(x, sentence):
    with pytest.raises(SettingError, match=sentence):
        ImageTokenizer(random_codec()).encode(x)


def test_cells_are_places():
    codes = ImageCodes(torch.arange(9).view(1, 3, 3), torch.arange(36).view(1, 6, 6))
    cells = to_cells(codes)
    assert cells.shape == (1, 9, CELL_CODES)
    assert cells[0, 0].tolist() == [0, 0, 1, 6, 7] and cells[0, 4].tolist() == [4, 14, 15, 20, 21]
    back = from_cells(cells)
    assert back.top.equal(codes.top) and back.bottom.equal(codes.bottom)
    assert rows_of(codes, 1).equal(cells[0, :3])
    for rows in (0, 3):
        with pytest.raises(SettingError, match=f"not {rows}"):
            rows_of(codes, rows)


# ---- the decoder ----


def test_no_code_sees_what_comes_after_it(decoder):
    """Of each code, the logits change with those before it, and only with those."""
    cells = torch.randint(32, (1, SIDE * SIDE, CELL_CODES), generator=torch.Generator().manual_seed(0))
    plain = decoder(cells, KVCache(1))
    for cell, place in ((0, 0), (2, 0), (2, 3), (7, 4)):
        changed = cells.clone()
        changed[0, cell, place] = (changed[0, cell, place] + 1) % 32
        is_other = (decoder(changed, KVCache(1)) - plain).abs().amax(-1)[0] > 1e-6
        expected = torch.zeros_like(is_other)
        expected[cell, place + 1 :] = True
        expected[cell + 1 :] = True
        assert is_other.equal(expected), (cell, place)


def test_cell_by_cell_is_as_at_once(tiny_random, decoder, sampler):
    """Behind a story, of which the LLM's keys and values are read, and whose image is attended to."""
    told = tiny_random.encode_images(Story.of("Mia waves.", image(1), "Mia sits."))
    cells = torch.randint(32, (2, SIDE * SIDE, CELL_CODES), generator=torch.Generator().manual_seed(0))
    (context,) = sampler._contexts(tiny_random.text, told, 2, 1.0)
    whole = decoder(cells, *context)
    context = sampler._contexts(tiny_random.text, told, 2, 1.0)[0]
    parts = []
    for number in range(SIDE * SIDE):
        hidden = decoder.hidden_states(decoder.inputs(cells[:, max(number - 1, 0) : number], number), *context)
        parts.append(decoder.code_logits(hidden, cells[:, number : number + 1, :-1]))
    assert torch.allclose(torch.cat(parts, dim=1), whole, **CLOSE)
    other = tiny_random.encode_images(Story.of("Mia waves.", ImageSegment(torch.zeros(3, 16, 16)), "Mia sits."))
    (context,) = sampler._contexts(tiny_random.text, other, 2, 1.0)
    assert (decoder(cells, *context) - whole).abs().max() > 1e-5
    (context,) = sampler._contexts(tiny_random.text, Story.of("Otto."), 2, 1.0)
    assert (decoder(cells, *context) - whole).abs().max() > 1e-3


def test_drafts_depend_on_story_and_seed_alone(tiny_random, sampler):
    told = Story.of("Mia waves.")
    three = sampler.sample(tiny_random.text, told, 3, seed=4)
    assert three.top.shape == (3, SIDE, SIDE) and three.bottom.shape == (3, 2 * SIDE, 2 * SIDE)
    again = sampler.sample(tiny_random.text, told, 1, seed=6)
    assert to_cells(again)[0, 0].equal(to_cells(three)[2, 0])  # of later ones, a batch may differ in last bits
    assert not to_cells(three)[0].equal(to_cells(three)[1])
    steps = []
    sampler.sample(tiny_random.text, told, 1, on_step=lambda step, total: steps.append((step, total)))
    assert steps == [(i, 9) for i in range(1, 10)]


def test_the_story_is_read_once(tiny_random, sampler):
    told = tiny_random.encode_images(Story.of("Mia waves.", image(1), "Mia sits."))
    tiny_random.clear_cache()
    before = tiny_random.context_features([told])[0]
    sampler.sample(tiny_random.text, told, 2)
    assert tiny_random.text.cache.num_cached_tokens >= len(before) - 1
    assert torch.allclose(tiny_random.context_features([told])[0], before, **CLOSE)


def test_given_cells_stay(tiny_random, sampler):
    given = torch.randint(32, (4, CELL_CODES))
    drafts = to_cells(sampler.sample(tiny_random.text, Story.of("Mia."), 2, given=given))
    assert all(cells[:4].equal(given) for cells in drafts) and not drafts[0, 4:].equal(drafts[1, 4:])


def test_guidance_moves_logits_away_from_those_of_nothing(tiny_random, sampler, monkeypatch):
    """At scale 1 they are the story's, above it further from those of nothing at all; the likeliest is taken here."""
    from comfy_mminterleaved.generation import image_tokens

    seen = []
    monkeypatch.setattr(image_tokens, "_sample", lambda logits, *_: seen.append(logits) or logits.argmax(-1))
    told = Story.of("Mia waves.")
    sampler.sample(tiny_random.text, told, guidance_scale=1.0, temperature=2.0)
    plain = seen[0] * 2
    seen.clear()
    sampler.sample(tiny_random.text, told, guidance_scale=3.0)
    guided = seen[0]
    seen.clear()
    _, (nothing, *_) = sampler._contexts(tiny_random.text, told, 1, 2.0)
    hidden = sampler.model.hidden_states(sampler.model.inputs(torch.zeros(1, 0, CELL_CODES, dtype=torch.long)), nothing)
    without = sampler.model.code_logits(hidden[:, -1], torch.zeros(1, 0, dtype=torch.long))[:, -1]
    assert torch.allclose(guided, without + 3 * (plain - without), **CLOSE)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"count": 0}, "number of drafts must be at least 1, not 0"),
        ({"temperature": 0.0}, "temperature must be over 0, not 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"guidance_scale": 0.5}, "at least 1, not 0.5"),
        ({"given": torch.zeros(9, CELL_CODES, dtype=torch.long)}, "leave at least one"),
    ],
)
def test_settings_out_of_range(tiny_random, sampler, options, sentence):
    with pytest.raises(SettingError, match=sentence):
        sampler.sample(tiny_random.text, Story.of("Mia."), **options)


def test_a_story_without_room(tiny_random, sampler):
    limit = tiny_random.config.llm.max_position_embeddings
    with pytest.raises(StoryTooLongError, match="context"):
        sampler.sample(tiny_random.text, Story.of("a" * limit))


# ---- a model's files ----


def test_what_is_written_is_read(tiny_random, decoder, dream, tmp_path):
    codec = random_codec()
    save_file(codec.state_dict(), tmp_path / "codes.safetensors", system_metadata(CONFIG.to_dict(), "codes"))
    metadata = system_metadata(decoder.config.to_dict(), "tokens")
    save_file(decoder.state_dict(), tmp_path / "tokens.safetensors", metadata)
    tokenizer = load_image_tokenizer(tmp_path / "codes.safetensors")
    assert tokenizer.encode(latents(0)).bottom.equal(ImageTokenizer(codec).encode(latents(0)).bottom)
    sampler = load_token_sampler(tmp_path / "tokens.safetensors", tiny_random.config, dream)
    cells = torch.randint(32, (1, SIDE * SIDE, CELL_CODES))
    assert torch.allclose(sampler.model(cells, KVCache(1)), decoder(cells, KVCache(1)), atol=1e-3)
    check_tokens(tokenizer.model, sampler.model, "it")
    with pytest.raises(CheckpointError, match="32 codes, but the image tokens have 16"):
        check_tokens(random_codec(config=VQVAEConfig(4, 1.0, 8, 1, 16, 4)), sampler.model, "It")
    with pytest.raises(CheckpointError, match="holds 'tokens', not 'codes'"):
        load_image_tokenizer(tmp_path / "tokens.safetensors")
    tensors = decoder.state_dict()
    del tensors["start"]
    save_file(tensors, tmp_path / "tokens.safetensors", metadata)
    with pytest.raises(CheckpointError, match="missing: start"):
        load_token_sampler(tmp_path / "tokens.safetensors", tiny_random.config, dream)
    bad = system_metadata({**decoder.config.to_dict(), "grid_size": -1}, "tokens")
    save_file(decoder.state_dict(), tmp_path / "tokens.safetensors", bad)
    with pytest.raises(CheckpointError):
        load_token_sampler(tmp_path / "tokens.safetensors", tiny_random.config, dream)


def test_a_pipeline_drafts(tiny_random, dream, monkeypatch):
    """Drafts are images of the VAE's; without a contrastive model's text they stay in the order of their seeds."""
    side = tiny_random.config.unet["sample_size"] // 2
    channels = tiny_random.vae.config.latent_channels
    codec = random_codec(config=VQVAEConfig(channels, 0.5, 8, 1, 32, 4))
    torch.manual_seed(0)
    decoder = TokenDecoder(TokenDecoderConfig(32, side, 1, 16, 1.0), tiny_random.config.llm).eval()
    with pytest.raises(CheckpointError, match="so it cannot draft"):
        tiny_random.draft_images(Story.of("Mia."))
    with pytest.raises(CheckpointError, match="no image tokens"):
        tiny_random.image_codes(image(1))
    monkeypatch.setitem(tiny_random.systems.__dict__, "image_tokenizer", ImageTokenizer(codec))
    monkeypatch.setitem(tiny_random.systems.__dict__, "token_sampler", TokenSampler(decoder, dream))
    drafts = tiny_random.draft_images(Story(), 2, seed=7)
    assert [draft.seed for draft in drafts] == [7, 8] and {draft.origin for draft in drafts} == {"drawn"}
    codes = tiny_random.image_codes(drafts[0])
    assert codes.top.shape == (1, side, side) and tiny_random.decode_codes(codes).shape[1:] == drafts[0].pixels.shape
    (begun,) = tiny_random.draft_images(Story(), 1, seed=7, given=rows_of(codes, 1))
    assert begun.pixels.shape == drafts[0].pixels.shape
    tiny_random.clear_cache()
