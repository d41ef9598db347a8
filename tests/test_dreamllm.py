"""DreamLLM's own layout at toy width, through `convert`: what it computes is what transformers and diffusers do."""

import json

import pytest
import torch
from tiny_dreamllm import IDS, NUM_QUERIES, make_dreamllm

from comfy_mminterleaved.cli import main
from comfy_mminterleaved.errors import CheckpointError
from comfy_mminterleaved.generation.config import ImageGenerationConfig
from comfy_mminterleaved.models.visual_tokenizer import CLIP_MEAN, CLIP_STD
from comfy_mminterleaved.pipeline import MMInterleavedPipeline
from comfy_mminterleaved.stories.story import ImageSegment, Story, TextSegment

CLOSE = {"atol": 2e-4, "rtol": 1e-3}


@pytest.fixture(scope="module", params=[True, False], ids=["three bins", "one file"])
def made(request, tmp_path_factory, tiny_random):
    """The official folder, what is in it, and the pipeline of what `convert` makes of it."""
    folder, target = tmp_path_factory.mktemp("dreamllm") / "official", tmp_path_factory.mktemp("converted") / "model"
    c = tiny_random.config
    parts = make_dreamllm(folder, {**c.unet}, {**c.vae}, {**c.scheduler}, request.param)
    assert main(["convert", str(folder), str(target)]) == 0
    return folder, parts, target, MMInterleavedPipeline.load(target, "cpu")


def text(*ids: int) -> TextSegment:
    return TextSegment("", tuple(ids))


def image() -> ImageSegment:
    return ImageSegment(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def official_embeds(parts, before: list[int], picture: ImageSegment | None, after: list[int]) -> torch.Tensor:
    """As the official `get_prompt_embeds` does, with transformers' Llama and CLIP."""
    llama, clip = parts["llama"], parts["clip"]
    embed = llama.get_input_embeddings()
    rows = [embed(torch.tensor(before))]
    if picture is not None:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        hidden = clip((picture.pixels[None] - mean) / std, output_hidden_states=True).hidden_states[-2][:, 1:]
        projector = parts["clip_vision_embedding"]
        patches = hidden @ projector["projector.projector.weight"].T + projector["projector.projector.bias"]
        rows += [embed(torch.tensor([IDS["<im_start>"]])), patches[0], embed(torch.tensor([IDS["<im_end>"]]))]
    rows += [embed(torch.tensor(after, dtype=torch.long)), embed(torch.tensor([IDS["<dream_start>"]]))]
    rows.append(parts["dream_embedding"]["dream_queries"][0])
    states = llama.model(inputs_embeds=torch.cat(rows)[None]).last_hidden_state[:, -NUM_QUERIES:]
    return states @ parts["stable_diffusion_head"]["projector.projector.weight"].T


def test_prompt_embeds_are_the_official_ones(made):
    _, parts, _, pipeline = made
    picture = image()
    story = Story.of(text(5, 9, 12), picture, text(7, 7))
    embeds = pipeline.prompt_embeds([story], "dream")
    assert torch.allclose(embeds, official_embeds(parts, [1, 5, 9, 12], picture, [7, 7]), **CLOSE)
    told = Story.of(text(5, 9, 12))
    assert torch.allclose(
        pipeline.prompt_embeds([told], "dream"), official_embeds(parts, [1, 5, 9, 12], None, []), **CLOSE
    )
    negative = pipeline.systems.dream.negative_prompt_embeds(pipeline.text)
    assert torch.allclose(negative, official_embeds(parts, [1], None, []), **CLOSE)


def test_images_are_drawn_from_them_alone(made):
    """By dream queries and without the synchronizer, unless one says otherwise; guided away from those of nothing."""
    _, parts, _, pipeline = made
    defaults = pipeline.generation_config.image
    assert (defaults.conditioner, defaults.mmfs_scale) == ("dream", 0.0)
    config = ImageGenerationConfig(2, 3.0, "ddim", conditioner="dream", mmfs_scale=0.0)
    story = Story.of(text(5, 9), image())
    drawn = pipeline.generate_image(story, config)
    embeds = official_embeds(parts, [1, 5, 9], image(), [])
    (expected,) = pipeline.image.generate(
        [pipeline.encode_images(story)],
        None,
        config,
        prompt_embeds=embeds,
        negative_prompt_embeds=official_embeds(parts, [1], None, []),
    )[0]
    assert torch.allclose(drawn.pixels, expected.pixels, atol=1e-3)
    (other,) = pipeline.image.generate([Story()], None, config, prompt_embeds=embeds)[0]
    assert (other.pixels - drawn.pixels).abs().max() > 1e-6


@torch.no_grad()
def test_the_llm_writes_as_llama_does(made):
    _, parts, _, pipeline = made
    llama, ids = parts["llama"], [1, 5, 9, 12, 20, 31]
    hidden = pipeline.llm(pipeline.llm.embed_inputs(torch.tensor([ids])))
    assert torch.allclose(pipeline.llm.logits(hidden), llama(torch.tensor([ids])).logits, **CLOSE)
    stops = {IDS["<im_start>"]: "image", IDS["<dream_start>"]: "image", 2: "eos"}
    from comfy_mminterleaved.generation.decoding import _stop_tokens

    assert _stop_tokens(pipeline.llm) == stops


def test_an_end_of_image_token(made):
    _, _, _, pipeline = made
    c = pipeline.config.llm
    tokens = pipeline.text.tokenize(Story.of(text(5), image(), text(6)))
    start, patch, end = (IDS[name] for name in ("<im_start>", "<im_patch>", "<im_end>"))
    assert list(tokens.input_ids) == [1, 5, start, *[patch] * 16, end, 6]
    assert tokens.image_ends == (19,) and tokens.segment_ends == (2, 20, 21)
    assert tokens.image_mask(c)[:, 0].tolist() == [False] * 3 + [True] * 18
    assert c.special_tokens.all() == {
        1,
        2,
        60,
        *(IDS[n] for n in ("<im_patch>", "<im_start>", "<im_end>", "<dream_start>")),
    }
    first = pipeline.prompt_embeds([Story.of(text(5), image())], "dream")
    longer = Story.of(text(5), image(), text(6))
    pipeline.prefill(longer)
    assert pipeline.text.cache.num_cached_tokens >= 18
    assert torch.allclose(pipeline.prompt_embeds([Story.of(text(5), image())], "dream"), first, **CLOSE)


def test_after_an_image_a_text_begins_without_a_space(made):
    from comfy_mminterleaved.generation.tokens import tokenize_story

    class Spaced:
        def encode(self, text, after_text=False):
            return [40 if after_text else 41]

    ids = tokenize_story(Story.of("a", image(), "b"), Spaced(), made[3].config.llm).input_ids
    assert ids[1] == 41 and ids[-1] == 41


def test_it_must_be_converted_first(made):
    folder = made[0]
    with pytest.raises(CheckpointError, match="is a DreamLLM; convert it first"):
        MMInterleavedPipeline.load(folder, "cpu")
    assert main(["convert", str(folder), str(folder.parent / "reference"), "--to", "reference"]) == 2


def test_info_and_quantized(made, tmp_path, capsys):
    folder = made[0]
    assert main(["info", str(folder), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["layout"] == "dreamllm" and about["num_img_token"] == 16
    assert about["config"]["encoder"]["projector"] == "linear"


@pytest.mark.parametrize(
    "missing, sentence",
    [
        ("dream_embedding", "lacks 'dream_queries'"),
        ("clip_vision_embedding", "lacks"),
        ("stable_diffusion_head", "lacks 'projector.projector.weight'"),
    ],
)
def test_parts_that_are_missing(tiny_random, tmp_path, missing, sentence, capsys):
    c = tiny_random.config
    folder = tmp_path / "official"
    make_dreamllm(folder, {**c.unet}, {**c.vae}, {**c.scheduler})
    (folder / f"{missing}.bin").unlink()
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_tensors_that_do_not_fit(tiny_random, tmp_path, capsys):
    c = tiny_random.config
    folder = tmp_path / "official"
    make_dreamllm(folder, {**c.unet}, {**c.vae}, {**c.scheduler})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}), encoding="utf-8")
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 2
    assert "layers.0.mlp.gate_proj.weight is (48, 32), must be (40, 32)" in capsys.readouterr().err
    del config["special_tokens2ids_dict"]["additional_special_tokens"]["<im_end>"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 2
    assert "'<im_end>'" in capsys.readouterr().err


def test_tokenizer_limit(made):
    """Text never encodes to what was added to the vocabulary."""
    c = made[3].config.llm
    assert c.vocab_size - c.num_added_tokens == 61
