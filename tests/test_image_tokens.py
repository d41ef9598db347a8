"""Images as codes (VQ-VAE-2), and drafts of a story's next image (DALL-E)."""

import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from comfy_mminterleaved.errors import CheckpointError, SettingError, StoryError
from comfy_mminterleaved.generation.embedders import system_metadata
from comfy_mminterleaved.generation.image_tokens import (
    ImageTokenizer,
    TokenSampler,
    _sample,
    check_tokens,
    load_image_tokenizer,
    load_token_sampler,
    rows_of,
)
from comfy_mminterleaved.models.token_decoder import (
    CELL_CODES,
    TokenDecoder,
    TokenDecoderConfig,
    from_cells,
    to_cells,
)
from comfy_mminterleaved.models.vqvae import VQVAE, ImageCodes, VQVAEConfig
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story

CLOSE = {"atol": 1e-4, "rtol": 1e-3}
CONFIG = VQVAEConfig(4, 0.5, 8, 1, 32, 4)
SIDE = 3


def random_codec(seed: int = 0, config: VQVAEConfig = CONFIG) -> VQVAE:
    torch.manual_seed(seed)
    return VQVAE(config).eval().requires_grad_(False)


def random_decoder(pipeline, seed: int = 0) -> TokenDecoder:
    torch.manual_seed(seed)
    perceiver = pipeline.config.synchronizer.perceiver
    c = TokenDecoderConfig(perceiver.num_queries, perceiver.hidden_size, 32, SIDE, 2, 2, 16, 2.0)
    model = TokenDecoder(c, pipeline.config.llm).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("gate"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def decoder(tiny_random):
    return random_decoder(tiny_random)


@pytest.fixture
def sampler(decoder):
    return TokenSampler(decoder)


@pytest.fixture
def prompt_embeds(tiny_random):
    """Of a story, from the Perceiver."""
    return tiny_random.prompt_embeds([Story.of("Mia waves.")])


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


def test_no_code_sees_what_comes_after_it(decoder, prompt_embeds):
    """Of each code, the logits change with those before it, and only with those."""
    cells = torch.randint(32, (1, SIDE * SIDE, CELL_CODES), generator=torch.Generator().manual_seed(0))
    prompt = decoder.embed_prompt(prompt_embeds)
    plain = decoder(cells, prompt)
    for cell, place in ((0, 0), (2, 0), (2, 3), (7, 4)):
        changed = cells.clone()
        changed[0, cell, place] = (changed[0, cell, place] + 1) % 32
        is_other = (decoder(changed, prompt) - plain).abs().amax(-1)[0] > 1e-6
        expected = torch.zeros_like(is_other)
        expected[cell, place + 1 :] = True
        expected[cell + 1 :] = True
        assert is_other.equal(expected), (cell, place)
    assert (decoder(cells, decoder.embed_prompt(prompt_embeds + 1)) - plain).abs().max() > 1e-3
    dropped = decoder.embed_prompt(prompt_embeds, torch.tensor([True]))
    assert dropped.equal(decoder.no_prompt) and (decoder(cells, dropped) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("given", [0, 4])
def test_cell_by_cell_is_as_at_once(tiny_random, sampler, prompt_embeds, given, scale, monkeypatch):
    """What is sampled from are the logits of the whole image, behind the prompt and in view of the story's images."""
    from comfy_mminterleaved.generation import image_tokens

    seen = []
    monkeypatch.setattr(image_tokens, "_sample", lambda logits, *_: seen.append(logits) or logits.argmax(-1))
    model, story = sampler.model, tiny_random.encode_images(Story.of("Mia waves.", image(1), "Mia sits.", image(2)))
    first = torch.randint(32, (given, CELL_CODES), generator=torch.Generator().manual_seed(0))
    cells = to_cells(sampler.sample(prompt_embeds, story, 2, 0, 1.0, guidance_scale=scale, given=first))
    assert cells[0].equal(cells[1]) and cells[0, :given].equal(first)
    image_values, image_mask = sampler._images(story)
    expected = model(cells[:1], model.embed_prompt(prompt_embeds), image_values, image_mask)
    without = model(cells[:1], model.no_prompt, None, None)
    guided = without + scale * (expected - without)
    parts = torch.stack(seen, 1).unflatten(1, (-1, CELL_CODES))
    assert torch.allclose(parts[:1], guided[:, given:], **CLOSE)
    for other in (Story(), tiny_random.encode_images(Story.of("Mia waves.", image(1), "Mia sits.", image(3)))):
        assert (
            model(cells[:1], model.embed_prompt(prompt_embeds), *sampler._images(other)) - expected
        ).abs().max() > 1e-5


def test_a_long_storys_newest_images_are_attended_to(tiny_random, sampler):
    limit = tiny_random.config.llm.mmfs.max_num_image_per_seq - 1
    images = [each for i in range(limit + 2) for each in ("Mia.", image(i))]
    story = tiny_random.encode_images(Story.of(*images))
    values, mask = sampler._images(story)
    assert mask.shape == (1, limit) and values.num_images == limit
    last, _ = sampler._images(Story.of(*story.images[-1:]))
    assert torch.allclose(values.layers[0].value[:, -1], last.layers[0].value[:, 0], **CLOSE)


def test_drafts_depend_on_prompt_and_seed_alone(decoder, sampler, prompt_embeds):
    decoder.double()  # in float32 a batch may differ in last bits
    three = sampler.sample(prompt_embeds, count=3, seed=4)
    assert three.top.shape == (3, SIDE, SIDE) and three.bottom.shape == (3, 2 * SIDE, 2 * SIDE)
    for seed, draft in zip((4, 5, 6), to_cells(three)):
        assert to_cells(sampler.sample(prompt_embeds, seed=seed))[0].equal(draft)
    assert not to_cells(three)[0].equal(to_cells(three)[1])
    assert not to_cells(sampler.sample(prompt_embeds + 1, seed=4))[0].equal(to_cells(three)[0])
    steps = []
    sampler.sample(prompt_embeds, on_step=lambda step, total: steps.append((step, total)))
    assert steps == [(i, 9) for i in range(1, 10)]


def test_given_cells_stay(sampler, prompt_embeds):
    given = torch.randint(32, (4, CELL_CODES))
    drafts = to_cells(sampler.sample(prompt_embeds, count=2, given=given))
    assert all(cells[:4].equal(given) for cells in drafts) and not drafts[0, 4:].equal(drafts[1, 4:])


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"count": 0}, "number of drafts must be at least 1, not 0"),
        ({"temperature": 0.0}, "temperature must be over 0, not 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"guidance_scale": 0.5}, "at least 1, not 0.5"),
        ({"guidance_scale": math.inf}, "at least 1, not inf"),
        ({"given": torch.zeros(9, CELL_CODES, dtype=torch.long)}, "leave at least one"),
        ({"given": torch.full((3, CELL_CODES), 32)}, "codes up to 32, but drafts have 32"),
        ({"given": torch.zeros(3, 2, dtype=torch.long)}, re.escape("the shape (3, 2)")),
    ],
)
def test_settings_out_of_range(sampler, prompt_embeds, options, sentence):
    with pytest.raises(SettingError, match=sentence):
        sampler.sample(prompt_embeds, **options)


def test_images_of_another_encoder(tiny_random, decoder, prompt_embeds):
    story = tiny_random.encode_images(Story.of("Mia.", image(1)))
    own = TokenSampler(decoder, story.images[0].features.encoder_id)
    own.sample(prompt_embeds, story)
    with pytest.raises(StoryError, match="not encoded"):
        own.sample(prompt_embeds, Story.of(image(1)))
    with pytest.raises(StoryError, match="features of another encoder"):
        TokenSampler(decoder, "0123").sample(prompt_embeds, story)
    features = story.images[0].features
    fewer = replace(story.images[0], features=replace(features, feature_maps=features.feature_maps[:1]))
    with pytest.raises(StoryError, match="features of another encoder"):
        own.sample(prompt_embeds, Story.of(fewer))


def test_a_prompt_of_another_model(sampler, prompt_embeds):
    for wrong in (prompt_embeds[:, :1], prompt_embeds[..., :3], prompt_embeds.repeat(2, 1, 1)):
        with pytest.raises(SettingError, match=re.escape(f"has the shape {tuple(wrong.shape)}")):
            sampler.sample(wrong)


def test_sampling_is_among_the_likeliest_by_their_probabilities():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(20_000, -1)
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    for top_k in (0, 1, 2, 9):
        expected = logits[0].clone()
        expected[logits[0].argsort(descending=True)[top_k or 4 :]] = -torch.inf
        shares = _sample(logits, top_k, noise).bincount(minlength=4) / len(logits)
        assert torch.allclose(shares, expected.softmax(-1), atol=0.02), top_k


# ---- a model's files ----


def test_what_is_written_is_read(tiny_random, decoder, prompt_embeds, tmp_path):
    codec = random_codec()
    save_file(codec.state_dict(), tmp_path / "codes.safetensors", system_metadata(CONFIG.to_dict(), "codes"))
    metadata = system_metadata(decoder.config.to_dict(), "tokens")
    save_file(decoder.state_dict(), tmp_path / "tokens.safetensors", metadata)
    tokenizer = load_image_tokenizer(tmp_path / "codes.safetensors")
    assert tokenizer.encode(latents(0)).bottom.equal(ImageTokenizer(codec).encode(latents(0)).bottom)
    sampler = load_token_sampler(tmp_path / "tokens.safetensors", tiny_random.config)
    cells = torch.randint(32, (1, SIDE * SIDE, CELL_CODES))
    images = sampler._images(tiny_random.encode_images(Story.of(image(1), image(2))))  # fused, the other is not
    own = TokenSampler(decoder)._images(tiny_random.encode_images(Story.of(image(1), image(2))))
    read = sampler.model(cells, sampler.model.embed_prompt(prompt_embeds), *images)
    assert torch.allclose(read, decoder(cells, decoder.embed_prompt(prompt_embeds), *own), atol=1e-3)
    half = load_token_sampler(tmp_path / "tokens.safetensors", tiny_random.config, dtype=torch.bfloat16)
    assert to_cells(half.sample(prompt_embeds, count=2)).shape == (2, SIDE * SIDE, CELL_CODES)
    check_tokens(tokenizer.model, sampler.model, "it")
    with pytest.raises(CheckpointError, match="32 codes, but the image tokens have 16"):
        check_tokens(random_codec(config=VQVAEConfig(4, 1.0, 8, 1, 16, 4)), sampler.model, "It")
    with pytest.raises(CheckpointError, match="holds 'tokens', not 'codes'"):
        load_image_tokenizer(tmp_path / "tokens.safetensors")
    tensors = decoder.state_dict()
    del tensors["start"]
    save_file(tensors, tmp_path / "tokens.safetensors", metadata)
    with pytest.raises(CheckpointError, match="missing: start"):
        load_token_sampler(tmp_path / "tokens.safetensors", tiny_random.config)
    bad = system_metadata({**decoder.config.to_dict(), "grid_size": -1}, "tokens")
    save_file(decoder.state_dict(), tmp_path / "tokens.safetensors", bad)
    with pytest.raises(CheckpointError):
        load_token_sampler(tmp_path / "tokens.safetensors", tiny_random.config)


def test_a_pipeline_drafts(tiny_random, monkeypatch):
    """Drafts are images that the VAE decodes; without text to rank by they stay in the order of their seeds."""
    side = tiny_random.config.unet["sample_size"] // 2
    channels = tiny_random.vae.config.latent_channels
    codec = random_codec(config=VQVAEConfig(channels, 0.5, 8, 1, 32, 4))
    torch.manual_seed(0)
    perceiver = tiny_random.config.synchronizer.perceiver
    c = TokenDecoderConfig(perceiver.num_queries, perceiver.hidden_size, 32, side, 1, 1, 16, 1.0)
    decoder = TokenDecoder(c, tiny_random.config.llm).eval()
    with pytest.raises(CheckpointError, match="so it cannot draft"):
        tiny_random.draft_images(Story.of("Mia."))
    with pytest.raises(CheckpointError, match="no image tokens"):
        tiny_random.image_codes(image(1))
    monkeypatch.setitem(tiny_random.systems.__dict__, "image_tokenizer", ImageTokenizer(codec))
    monkeypatch.setitem(tiny_random.systems.__dict__, "token_sampler", TokenSampler(decoder))
    drafts = tiny_random.draft_images(Story(), 2, seed=7)
    assert [draft.seed for draft in drafts] == [7, 8] and {draft.origin for draft in drafts} == {"drawn"}
    codes = tiny_random.image_codes(drafts[0])
    assert codes.top.shape == (1, side, side) and tiny_random.decode_codes(codes).shape[1:] == drafts[0].pixels.shape
    (begun,) = tiny_random.draft_images(Story(), 1, seed=7, given=rows_of(codes, 1))
    assert begun.pixels.shape == drafts[0].pixels.shape
    for options, sentence in (({"count": 0}, "not 0"), ({"conditioner": "clip"}, "must be perceiver or dream")):
        with pytest.raises(SettingError, match=sentence):
            tiny_random.draft_images(Story.of("Mia."), **options)
    tiny_random.clear_cache()


def test_drafts_of_the_storys_heroes_come_first(tiny_random, monkeypatch):
    """Where heroes are described the LLM's word counts most, then the text; else the text and likeness to images."""

    class Colours:
        truncates_end = True

        def text_embeds(self, texts):
            return torch.tensor([[0.0, 1.0, 0.0]] * len(texts))  # all texts are green

        def image_embeds(self, images):
            return torch.stack([each.pixels.mean((1, 2)) for each in images])

    def colour(red: float, green: float, blue: float) -> ImageSegment:
        return ImageSegment(torch.tensor([red, green, blue]).float()[:, None, None].expand(3, 16, 16))

    drafts = [colour(1, 0.1, 0.1), colour(0.1, 1, 0.1), colour(0.1, 0.1, 1), colour(0.5, 1, 0.5)]
    monkeypatch.setattr(MMInterleavedPipeline, "embedder", Colours())
    captions = []

    def caption_scores(images, text, batch_size):
        captions.append(text)
        return [-9.0, -9.0, -0.1, -0.2]

    monkeypatch.setattr(tiny_random.text, "caption_scores", caption_scores)

    def order(*parts) -> list[int]:
        return [each.index for each in tiny_random.rank_drafts(Story.of(*parts), drafts)]

    assert order("Mia is a bear. Mia waves.") == [3, 2, 1, 0] and captions == ["A bear"]
    assert order("Mia waves.")[0] == 1 and len(captions) == 1
    assert order("Mia waves.", colour(0, 0, 1), "Mia runs.")[0] == 2 and len(captions) == 1
    tiny_random.clear_cache()
