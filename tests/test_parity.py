"""Every recorded tensor of the reference implementation, through the public loader and calls.

Runs on golden/tiny, and on every folder of the same kind named in MMI_GOLDEN (separated by os.pathsep).
"""

import os
from pathlib import Path

import pytest
import torch
from places import TINY
from safetensors.torch import load_file

from comfy_mminterleaved import (
    ImageGenerationConfig,
    ImageSegment,
    MMInterleavedPipeline,
    Story,
    TextGenerationConfig,
    TextSegment,
)
from comfy_mminterleaved.generation.tokens import StoryTokens
from comfy_mminterleaved.generation.unet_hooks import attach_mmfs
from comfy_mminterleaved.models.image_processor import preprocess_image
from comfy_mminterleaved.models.pos_embed import interpolate_pos_embed
from comfy_mminterleaved.stories.images import to_bytes

FOLDERS = [TINY, *map(Path, filter(None, os.environ.get("MMI_GOLDEN", "").split(os.pathsep)))]


class Golden:
    """One folder: the model, the recorded tensors, and its inputs as stories."""

    def __init__(self, folder: Path):
        self.model = MMInterleavedPipeline.load(folder, "cpu")
        self.tensors = load_file(folder / "golden.safetensors")
        self.llm = self.model.config.llm
        self.images = [ImageSegment(image.float() / 255) for image in self["in.images_u8"]]

    def __getitem__(self, name):
        return self.tensors[name]

    def story(self, ids, pictures) -> Story:
        """Token ids as a story: stretches of text keep their ids, picture slots become the pictures in order."""
        tokens, segments, found = self.llm.special_tokens, [()], iter(pictures)
        for token in ids.tolist()[1:]:
            if token == tokens.soi:
                segments += [next(found), ()]
            elif token not in (tokens.image, tokens.pad):
                segments[-1] += (token,)
        return Story().add(*(TextSegment("", s) if isinstance(s, tuple) else s for s in segments))

    def rows(self) -> list[Story]:
        counts = self["in.num_image_per_seq"].tolist()
        rows = torch.tensor([0, *counts]).cumsum(0).tolist()
        return [self.story(ids, self.images[a:b]) for ids, a, b in zip(self["in.text_ids"], rows, rows[1:])]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda p: p.name)
def golden(request):
    return Golden(request.param)


def assert_close(found, recorded, tolerance=2e-5):
    """At most `tolerance` of the largest recorded value; a tensor stored in float16 may be off by its rounding too."""
    assert found.shape == recorded.shape
    rounding = recorded.float().abs() * 2**-11 if recorded.dtype == torch.float16 else 0
    recorded = recorded.float()
    over = ((found.float() - recorded).abs() - rounding).max() / recorded.abs().max()
    assert over <= tolerance, f"off by {over:.2e} of the largest value"


def test_preprocessing(golden):
    found = preprocess_image(golden["pre.image_u8"].float() / 255, golden["pre.out_u8"].shape[-1])
    assert torch.equal((found * 255).round().byte(), golden["pre.out_u8"])


def test_encoder(golden):
    encoder, pictures = golden.model.encoder, golden["in.images_u8"].float() / 255
    features = encoder(pictures)
    assert_close(features.visual_tokens, golden["vis.vis_embed"])
    for i, level in enumerate(features.feature_maps):
        recorded = golden[f"vis.multiscale.{i}"]
        assert_close(level[: len(recorded)], recorded)
    hidden, _ = encoder.forward_features(pictures)
    grid = (golden.model.config.encoder.grid_size,) * 2
    assert_close(hidden[:, 1:] + interpolate_pos_embed(encoder.pos_embed[1:], grid), golden["vis.image_embeds"])


def test_synchronizer(golden):
    mmfs = golden.model.llm.layers[0].llama_cross_attn.attn
    counts = sorted({int(name.split(".")[1]) for name in golden.tensors if name.startswith("mmfs_llm.")})
    assert counts
    for count in counts:
        query, value, mask, out = (golden[f"mmfs_llm.{count}.{k}"] for k in ("query", "value", "mask", "out"))
        prepared = mmfs.project_images(value.float(), [(side, side) for side in golden.llm.mmfs.spatial_shapes])
        assert_close(mmfs(query, prepared, mask.bool(), torch.full((1, 2), 0.5)), out)


def test_layout_and_visibility(golden):
    for i, story in enumerate(golden.rows()):
        layout = golden.model.text.tokenize(story)
        valid = golden["in.attention_mask"][i].bool()
        assert list(layout.input_ids) == golden["in.text_ids"][i][valid].tolist()
        recorded = golden["mm.cross_attention_mask"][i][valid][:, : len(story.images)]
        assert torch.equal(layout.image_mask(golden.llm).float(), recorded)


def test_llm(golden):
    model, valid = golden.model, golden["in.attention_mask"].bool()
    stories = [model.encode_images(story) for story in golden.rows()]
    layouts = [model.text.tokenize(story) for story in stories]
    tokens = [torch.cat([p.features.visual_tokens for p in story.images]) for story in stories]
    for i, (layout, visual) in enumerate(zip(layouts, tokens)):
        embeds = model.llm.embed_inputs(torch.tensor([layout.input_ids]), visual)
        assert_close(embeds[0], golden["mm.embeds"][i][valid[i]])
    model.clear_cache()
    hidden = torch.cat(model.text._prefill(layouts).hidden_states)  # the batch of two, padded inside
    assert_close(hidden, golden["mm.hidden"][valid])
    assert_close(model.llm.logits(hidden), golden["mm.logits"][valid])


def contexts_of(golden) -> list[torch.Tensor]:
    """For every picture of the rows, the hidden states up to its start-of-image token."""
    model = golden.model
    layouts = [model.text.tokenize(model.encode_images(story)) for story in golden.rows()]
    hidden = model.text._prefill(layouts).hidden_states
    soi = golden.llm.special_tokens.soi
    return [
        h[: at + 1] for layout, h in zip(layouts, hidden) for at, token in enumerate(layout.input_ids) if token == soi
    ]


def test_decoder_context(golden):
    decoder, contexts = golden.model.synchronizer, contexts_of(golden)
    features, mask = decoder.conditioner.pack_context(contexts)
    assert torch.equal(mask.long(), golden["ctx.mask"])
    assert_close(features[mask], golden["ctx.features"][mask])
    assert_close(decoder.conditioner.prompt_embeds(contexts), golden["dec.prompt_embeds"])


def test_unet_call(golden):
    model = golden.model
    before = [
        Story(story.segments[:i]) for story in golden.rows() for i, s in enumerate(story) if isinstance(s, ImageSegment)
    ]
    maps, visible = model.image.context_feature_maps([model.encode_images(story) for story in before], 1)
    assert torch.equal(visible.long(), golden["ctx.mmfs_mask"])
    prepared = model.synchronizer.mmfs_module.project_images(maps, visible)
    with torch.no_grad(), attach_mmfs(model.unet, model.synchronizer.mmfs_module, prepared):
        states = golden["dec.prompt_embeds"]
        found = model.unet(golden["dec.latents"], golden["dec.timestep"], encoder_hidden_states=states).sample
    assert_close(found, golden["dec.unet_out"])


@pytest.mark.parametrize(
    "name, sampling",
    [
        ("greedy", TextGenerationConfig(24, 8, do_sample=False, repetition_penalty=1.0, suppress_special_tokens=False)),
        ("rep", TextGenerationConfig(24, 8, do_sample=False, repetition_penalty=1.3, suppress_special_tokens=False)),
        ("beam", TextGenerationConfig(20, 6, num_beams=5, repetition_penalty=1.0, suppress_special_tokens=False)),
    ],
)
def test_writing(golden, name, sampling):
    ids = golden["in.text_ids_txt"][0]
    count = int((ids == golden.llm.special_tokens.soi).sum())
    written = golden.model.generate_text(golden.story(ids, golden.images[:count]), sampling)
    recorded = golden[f"gen.text.{name}"][0].tolist()[1:]
    ends = {golden.llm.special_tokens.eos, golden.llm.special_tokens.soi, golden.llm.special_tokens.pad}
    while recorded and recorded[-1] in ends:  # the stop token, which `tokens` leaves out, and padding
        recorded.pop()
    assert list(written.tokens) == recorded


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_drawing(golden, scheduler):
    recorded = golden[f"gen.image.{scheduler}"].float() / 65535
    segments = golden.rows()[0].segments
    third = [i for i, s in enumerate(segments) if isinstance(s, ImageSegment)][2]
    drawing = ImageGenerationConfig(num_inference_steps=6, guidance_scale=7.5, scheduler=scheduler, seed=42)
    drawn = golden.model.generate_images([Story(segments[:third])], drawing, num_outputs=len(recorded))[0]
    for picture, want in zip(drawn, recorded):
        assert (picture.pixels - want).abs().max() <= 1e-3
    first = [
        torch.randn(want.shape, generator=torch.Generator().manual_seed(42 + i))
        for i, want in enumerate(golden["gen.image_latents_init"])
    ]
    assert_close(torch.stack(first), golden["gen.image_latents_init"])


def test_scores(golden):
    options = [o[m.bool()].tolist() for o, m in zip(golden["in.score_options"], golden["in.score_options_mask"])]
    story = golden.story(golden["in.score_ids"], golden.images)
    found = golden.model.score(story, options)
    assert_close(torch.tensor(found), golden["gen.scores"].flatten())


def test_whole_story(golden):
    """Draw, feed the 8-bit picture back, write, draw, write: nothing of it read twice."""
    model, soi, drawn = golden.model, golden.llm.special_tokens.soi, 0
    ids = golden["story.ids.0"][0]
    last = int((ids == soi).nonzero()[-1])
    story = golden.story(ids[:last], golden.images)
    while f"story.image.{drawn}_u8" in golden.tensors:
        picture = model.generate_image(
            story, ImageGenerationConfig(num_inference_steps=4, guidance_scale=7.5, scheduler="ddpm", seed=42)
        )
        recorded = golden[f"story.image.{drawn}_u8"]
        bytes_found = torch.from_numpy(to_bytes(picture.pixels)).permute(2, 0, 1)
        assert (bytes_found.int() - recorded.int()).abs().max() <= 2
        story = story.add(picture)
        sampling = TextGenerationConfig(10, 4, do_sample=False, repetition_penalty=1.3, suppress_special_tokens=False)
        written = model.generate_text(story, sampling)
        recorded = [t for t in golden[f"story.text.{drawn}"].tolist() if t not in (soi, golden.llm.special_tokens.eos)]
        assert list(written.tokens) == recorded
        story = story.add(TextSegment("", written.tokens))
        drawn += 1
        if f"story.ids.{drawn}" in golden.tensors:
            layout = model.text.tokenize(story.add(golden.images[0]))
            assert list(layout.input_ids) == golden[f"story.ids.{drawn}"][0].tolist()
    assert drawn == 2


def test_a_layout_that_does_not_hold_its_pictures_is_refused(golden):
    with pytest.raises(ValueError, match="image tokens"):
        StoryTokens.of(golden["in.text_ids"][0].tolist(), [None], golden.llm)
