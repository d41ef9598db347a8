"""Every recorded tensor of the reference implementation, through the public loader and calls.

Runs on golden/tiny, and on every folder of the same kind named in MMI_GOLDEN (separated by os.pathsep).
"""

import os
from pathlib import Path

import pytest
import torch
from places import TINY
from safetensors.torch import load_file

from comfy_mminterleaved import Drawing, MMInterleaved, Picture, Sampling, Story, Text
from comfy_mminterleaved.generation.image import sites_attached
from comfy_mminterleaved.models.pos_embed import resize_positions
from comfy_mminterleaved.stories.images import preprocess, to_bytes
from comfy_mminterleaved.stories.story import TokenLayout

FOLDERS = [TINY, *map(Path, filter(None, os.environ.get("MMI_GOLDEN", "").split(os.pathsep)))]


class Golden:
    """One folder: the model, the recorded tensors, and its inputs as stories."""

    def __init__(self, folder: Path):
        self.model = MMInterleaved.load(folder, "cpu")
        self.tensors = load_file(folder / "golden.safetensors")
        self.llm = self.model.config.llm
        self.pictures = [Picture(image.float() / 255) for image in self["in.images_u8"]]

    def __getitem__(self, name):
        return self.tensors[name]

    def story(self, ids, pictures) -> Story:
        """Token ids as a story: stretches of text keep their ids, picture slots become the pictures in order."""
        tokens, segments, found = self.llm.tokens, [()], iter(pictures)
        for token in ids.tolist()[1:]:
            if token == tokens.soi:
                segments += [next(found), ()]
            elif token not in (tokens.image, tokens.pad):
                segments[-1] += (token,)
        return Story().add(*(Text("", s) if isinstance(s, tuple) else s for s in segments))

    def rows(self) -> list[Story]:
        counts = self["in.num_image_per_seq"].tolist()
        rows = torch.tensor([0, *counts]).cumsum(0).tolist()
        return [self.story(ids, self.pictures[a:b]) for ids, a, b in zip(self["in.text_ids"], rows, rows[1:])]


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
    found = preprocess(golden["pre.image_u8"].float() / 255, golden["pre.out_u8"].shape[-1])
    assert torch.equal((found * 255).round().byte(), golden["pre.out_u8"])


def test_encoder(golden):
    encoder, pictures = golden.model.encoder, golden["in.images_u8"].float() / 255
    features = encoder(pictures)
    assert_close(features.tokens, golden["vis.vis_embed"])
    for i, level in enumerate(features.maps):
        recorded = golden[f"vis.multiscale.{i}"]
        assert_close(level[: len(recorded)], recorded)
    hidden, _ = encoder.hidden(pictures)
    grid = (golden.model.config.encoder.grid,) * 2
    assert_close(hidden[:, 1:] + resize_positions(encoder.position_map[1:], grid), golden["vis.image_embeds"])


def test_synchronizer(golden):
    mmfs = golden.model.llm.layers[0].synchronizer.mmfs
    counts = sorted({int(name.split(".")[1]) for name in golden.tensors if name.startswith("mmfs_llm.")})
    assert counts
    for count in counts:
        query, value, mask, out = (golden[f"mmfs_llm.{count}.{k}"] for k in ("query", "value", "mask", "out"))
        prepared = mmfs.prepare(value.float(), [(side, side) for side in golden.llm.sync_levels])
        assert_close(mmfs(query, prepared, mask.bool(), torch.full((1, 2), 0.5)), out)


def test_layout_and_visibility(golden):
    for i, story in enumerate(golden.rows()):
        layout = golden.model.layout(story)
        valid = golden["in.attention_mask"][i].bool()
        assert list(layout.ids) == golden["in.text_ids"][i][valid].tolist()
        recorded = golden["mm.cross_attention_mask"][i][valid][:, : len(story.pictures)]
        assert torch.equal(layout.visible(golden.llm).float(), recorded)


def test_llm(golden):
    model, valid = golden.model, golden["in.attention_mask"].bool()
    stories = [model.encode(story) for story in golden.rows()]
    layouts = [model.layout(story) for story in stories]
    tokens = [torch.cat([p.features.tokens for p in story.pictures]) for story in stories]
    for i, (layout, visual) in enumerate(zip(layouts, tokens)):
        embeds = model.llm.embed(torch.tensor([layout.ids]), visual)
        assert_close(embeds[0], golden["mm.embeds"][i][valid[i]])
    model.forget()
    hidden = torch.cat(model._layouts_read(layouts).hidden)  # the batch of two, padded inside
    assert_close(hidden, golden["mm.hidden"][valid])
    assert_close(model.llm.logits(hidden), golden["mm.logits"][valid])


def contexts_of(golden) -> list[torch.Tensor]:
    """For every picture of the rows, the hidden states up to its start-of-image token."""
    model = golden.model
    layouts = [model.layout(model.encode(story)) for story in golden.rows()]
    hidden = model._layouts_read(layouts).hidden
    soi = golden.llm.tokens.soi
    return [h[: at + 1] for layout, h in zip(layouts, hidden) for at, token in enumerate(layout.ids) if token == soi]


def test_decoder_context(golden):
    decoder, contexts = golden.model.decoder, contexts_of(golden)
    features, mask = decoder.context(contexts)
    assert torch.equal(mask.long(), golden["ctx.mask"])
    assert_close(features[mask], golden["ctx.features"][mask])
    assert_close(decoder.condition(contexts), golden["dec.prompt_embeds"])


def test_unet_call(golden):
    model = golden.model
    before = [
        Story(story.segments[:i]) for story in golden.rows() for i, s in enumerate(story) if isinstance(s, Picture)
    ]
    maps, visible = model.looked_at([model.encode(story) for story in before], look_back=1)
    assert torch.equal(visible.long(), golden["ctx.mmfs_mask"])
    prepared = model.decoder.prepare(maps, visible)
    with torch.no_grad(), sites_attached(model.unet, model.decoder, prepared):
        states = golden["dec.prompt_embeds"]
        found = model.unet(golden["dec.latents"], golden["dec.timestep"], encoder_hidden_states=states).sample
    assert_close(found, golden["dec.unet_out"])


@pytest.mark.parametrize(
    "name, sampling",
    [
        ("greedy", Sampling(24, 8, sample=False, repetition_penalty=1.0, only_text=False)),
        ("rep", Sampling(24, 8, sample=False, repetition_penalty=1.3, only_text=False)),
        ("beam", Sampling(20, 6, beams=5, repetition_penalty=1.0, only_text=False)),
    ],
)
def test_writing(golden, name, sampling):
    ids = golden["in.text_ids_txt"][0]
    count = int((ids == golden.llm.tokens.soi).sum())
    written = golden.model.write(golden.story(ids, golden.pictures[:count]), sampling)
    recorded = golden[f"gen.text.{name}"][0].tolist()[1:]
    ends = {golden.llm.tokens.eos, golden.llm.tokens.soi, golden.llm.tokens.pad}
    while recorded and recorded[-1] in ends:  # the stop token, which `tokens` leaves out, and padding
        recorded.pop()
    assert list(written.tokens) == recorded


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_drawing(golden, scheduler):
    recorded = golden[f"gen.image.{scheduler}"].float() / 65535
    segments = golden.rows()[0].segments
    third = [i for i, s in enumerate(segments) if isinstance(s, Picture)][2]
    drawing = Drawing(steps=6, guidance=7.5, scheduler=scheduler, seed=42)
    drawn = golden.model.draw_all([Story(segments[:third])], drawing, count=len(recorded))[0]
    for picture, want in zip(drawn, recorded):
        assert (picture.pixels - want).abs().max() <= 1e-3
    first = [
        torch.randn(want.shape, generator=torch.Generator().manual_seed(42 + i))
        for i, want in enumerate(golden["gen.image_latents_init"])
    ]
    assert_close(torch.stack(first), golden["gen.image_latents_init"])


def test_scores(golden):
    options = [o[m.bool()].tolist() for o, m in zip(golden["in.score_options"], golden["in.score_options_mask"])]
    story = golden.story(golden["in.score_ids"], golden.pictures)
    found = golden.model.score(story, options)
    assert_close(torch.tensor(found), golden["gen.scores"].flatten())


def test_whole_story(golden):
    """Draw, feed the 8-bit picture back, write, draw, write: nothing of it read twice."""
    model, soi, drawn = golden.model, golden.llm.tokens.soi, 0
    ids = golden["story.ids.0"][0]
    last = int((ids == soi).nonzero()[-1])
    story = golden.story(ids[:last], golden.pictures)
    while f"story.image.{drawn}_u8" in golden.tensors:
        picture = model.draw(story, Drawing(steps=4, guidance=7.5, scheduler="ddpm", seed=42))
        recorded = golden[f"story.image.{drawn}_u8"]
        bytes_found = torch.from_numpy(to_bytes(picture.pixels)).permute(2, 0, 1)
        assert (bytes_found.int() - recorded.int()).abs().max() <= 2
        story = story.add(picture)
        sampling = Sampling(10, 4, sample=False, repetition_penalty=1.3, only_text=False)
        written = model.write(story, sampling)
        recorded = [t for t in golden[f"story.text.{drawn}"].tolist() if t not in (soi, golden.llm.tokens.eos)]
        assert list(written.tokens) == recorded
        story = story.add(Text("", written.tokens))
        drawn += 1
        if f"story.ids.{drawn}" in golden.tensors:
            layout = model.layout(story.add(golden.pictures[0]))
            assert list(layout.ids) == golden[f"story.ids.{drawn}"][0].tolist()
    assert drawn == 2


def test_a_layout_that_does_not_hold_its_pictures_is_refused(golden):
    with pytest.raises(ValueError, match="image tokens"):
        TokenLayout.of(golden["in.text_ids"][0].tolist(), [None], golden.llm)
