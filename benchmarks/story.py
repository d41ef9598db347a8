"""Whole stories of a small model with random weights: what panel 8 costs, what the caches save, what memory it takes.

A story is told in three ways. "kept": as the library does. "kv": it starts over at every panel, and projects every
picture anew at every token, step and site, as the reference does; only while a text is written its keys and values are
kept. "nothing": they are not kept either, every cache is off.

python -m benchmarks.story peak with|without prints the peak memory of an eight-panel story in MB.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from dataclasses import replace

import torch

from comfy_mminterleaved import Drawing, MMInterleaved, Picture, Sampling, Story, Text
from comfy_mminterleaved.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    LLMConfig,
    ResamplerConfig,
    SpecialTokens,
    sites_of,
)
from comfy_mminterleaved.generation.prefix_cache import Reading
from comfy_mminterleaved.generation.prefix_cache import read as read_story
from comfy_mminterleaved.models.mmfs import PreparedPictures
from comfy_mminterleaved.models.unet_synchronizer import PreparedSites

from .models import random_blocks
from .timing import in_a_process, peak_memory_mb

WORDS = tuple(range(10, 40))  # the text of every panel: 30 tokens
SAMPLING = Sampling(max_new_tokens=40, min_new_tokens=40, sample=False)
DRAWING = Drawing(steps=8, guidance=4.0, scheduler="ddim")


def config() -> Config:
    """Much smaller than the released model, and its LLM smaller still: what is saved there counts for less here."""
    width, feature, context = 512, 256, 384
    blocks, layers, grids = [64, 128, 256], 1, [32, 16, 8]
    widths, sides = sites_of(blocks, layers, grids)
    tokens = SpecialTokens(bos=1, eos=2, pad=0, soi=4000, image=4001)
    return Config(
        encoder=EncoderConfig(
            ResamplerConfig(32, feature, feature, 4, 4, 2 * feature, 2, qk_norm=True),
            out_width=width,
            image_size=224,
            patch_size=14,
            width=feature,
            layers=8,
            heads=4,
            ffn_width=4 * feature,
            position_grid=16,
            stem_width=64,
        ),
        llm=LLMConfig(
            slots=32,
            vocab_size=4002,
            width=width,
            layers=8,
            heads=8,
            kv_heads=8,
            ffn_width=1024,
            context_length=2048,
            tokens=tokens,
            sync_every=4,
            sync_levels=(32, 16, 8),
            sync_base=16,
            sync_heads=8,
            sync_points=8,
            sync_width=feature,
            feature_width=feature,
            max_pictures=50,
        ),
        decoder=DecoderConfig(
            width,
            ResamplerConfig(77, context, width, 1, 6, 4 * context),
            widths,
            sides,
            picture_size=256,
            position_grid=32,
            feature_width=feature,
            levels=(64, 32, 16, 8),
            sync_heads=8,
            sync_points=8,
            sync_width=feature,
            max_pictures=10,
            look_back=1,
        ),
        unet={
            "_class_name": "UNet2DConditionModel",
            "sample_size": 32,
            "block_out_channels": blocks,
            "layers_per_block": layers,
            "cross_attention_dim": context,
            "attention_head_dim": [2, 4, 8],
            "use_linear_projection": True,
            "norm_num_groups": 32,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        vae={"_class_name": "AutoencoderTiny", "scaling_factor": 1.0},
        scheduler={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    )


def model() -> MMInterleaved:
    made = config()
    names = ("encoder", "llm", "synchronizer", "unet", "vae")
    return MMInterleaved(made, random_blocks(made, names), None)


def tell(model: MMInterleaved, panels: int, way: str = "kept") -> tuple[list[float], Story]:
    """Seconds of each panel (30 tokens read, 40 written, a picture drawn in 8 steps and encoded), and the story."""
    story, seconds = Story(), []
    model.forget()
    for number in range(panels):
        began = time.perf_counter()
        with contextlib.nullcontext() if way == "kept" else _nothing_kept(model, way == "kv"):
            story = story.add(Text("", WORDS))
            for step in ("write", "draw", "encode"):
                if way != "kept":
                    model.forget()
                    story = Story(tuple(Picture(s.pixels) if isinstance(s, Picture) else s for s in story))
                if step == "write":
                    story = story.add(Text("", model.write(story, SAMPLING).tokens))
                elif step == "draw":
                    story = story.add(model.draw(story, replace(DRAWING, seed=number)))
                else:
                    story = model.encode(story)
        seconds.append(time.perf_counter() - began)
    return seconds, story


@contextlib.contextmanager
def _nothing_kept(model: MMInterleaved, kv: bool):
    """Pictures are projected anew at every token and every step and site; without `kv` each token reads the story."""
    decoder, llm = model.decoder, model.llm
    prepare, site, layers = decoder.prepare, decoder.site, llm.layers
    given = {}

    def keep_maps(maps, visible):
        given["maps"] = maps
        return PreparedSites(prepare(maps, visible).sites, visible)

    def site_anew(index, x, prepared, strength=1.0):
        maps = [m for m in given["maps"] if m.shape[-1] in decoder.config.levels]
        features = torch.cat([m.flatten(3).transpose(2, 3) for m in maps], dim=2)
        part = decoder.sites[index]
        anew = part.mmfs.prepare(part.feature_norm(features), [tuple(m.shape[-2:]) for m in maps])
        sites = tuple(anew if i == index else p for i, p in enumerate(prepared.sites))
        return site(index, x, PreparedSites(sites, prepared.visible), strength)

    hooks, read = [], {}
    prepare_llm = llm.prepare

    def keep_llm_maps(maps):
        read["maps"] = maps
        return prepare_llm(maps)

    def layer_anew(module, args):
        x, pictures, visible = args
        if pictures.count and read["maps"][0].shape[1] == pictures.count:
            chosen = llm.select_maps(read["maps"])
            features = torch.cat([m.flatten(3).transpose(2, 3) for m in chosen], dim=2)
            pictures = module.prepare(features.to(x.dtype), [tuple(m.shape[-2:]) for m in chosen])
        return x, pictures, visible

    feed, layouts = Reading.feed, []
    read_layouts = model._layouts_read

    def keep_layouts(found):
        layouts[:] = found
        return read_layouts(found)

    def read_all(self, llm, tokens):
        longer = replace(layouts[0], ids=(*self.ids[0], *tokens[0]))
        model.forget()
        again = read_story(llm, [longer])
        self.ids, self.hidden = again.ids, again.hidden
        return [again.hidden[0][-len(tokens[0]) :]]

    if not kv:
        Reading.feed, model._layouts_read = read_all, keep_layouts
    decoder.prepare, decoder.site, llm.prepare = keep_maps, site_anew, keep_llm_maps
    for layer in layers:
        if layer.synchronizer is not None:
            hooks.append(layer.synchronizer.register_forward_pre_hook(layer_anew))
    try:
        yield
    finally:
        for name in ("prepare", "site"):
            delattr(decoder, name)
        del llm.prepare
        if not kv:
            Reading.feed = feed
            del model._layouts_read
        for hook in hooks:
            hook.remove()


class Nothing(torch.nn.Module):
    """In a synchronizer's place: finds nothing, at no cost."""

    def prepare(self, features, sizes):
        return PreparedPictures(features.new_zeros(*features.shape[:2], 1, 1, 1), ())

    def forward(self, x, pictures, visible):
        return 0


def without_synchronizer(made: MMInterleaved) -> MMInterleaved:
    """The same model as a plain Llama and a plain U-Net."""
    for layer in made.llm.layers:
        if layer.synchronizer is not None:
            layer.synchronizer = Nothing()
    made.decoder.prepare = lambda maps, visible: PreparedSites((), visible)
    made.decoder.site = lambda index, x, prepared, strength=1.0: x
    return made


@torch.no_grad()
def measure(panels: int = 8, rounds: int = 2) -> dict:
    made, late, early = model(), [], []
    whole: dict[str, list[float]] = {"kept": [], "kv": [], "nothing": []}
    tell(made, 1)
    for _ in range(rounds):
        for way in whole:
            seconds, _ = tell(made, panels, way)
            whole[way].append(sum(seconds))
            if way == "kept":
                early.append(seconds[1])
                late.append(seconds[-1])
                panel_seconds = seconds
    median = statistics.median
    return {
        "panel 2 (s)": median(early),
        f"panel {panels} (s)": median(late),
        "late over early": median(b / a for a, b in zip(early, late)),
        "story (s)": median(whole["kept"]),
        "story, started over (s)": median(whole["kv"]),
        "story, every cache off (s)": median(whole["nothing"]),
        "kept over started over": median(a / b for a, b in zip(whole["kept"], whole["kv"])),
        "kept over nothing kept": median(a / b for a, b in zip(whole["kept"], whole["nothing"])),
        "panel seconds": panel_seconds,
        "rounds": rounds,
    }


def peaks(rounds: int = 3) -> dict:
    """The peak memory of processes that tell eight panels, with and without the synchronizer, in turn."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(rounds):
        for way, megabytes in found.items():
            megabytes.append(float(in_a_process("benchmarks.story", "peak", way)))
    middle = {way: statistics.median(megabytes) for way, megabytes in found.items()}
    return {"MB": middle, "ratio": middle["with"] / middle["without"], "rounds": rounds}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    ours = model()
    tell(ours if sys.argv[2] == "with" else without_synchronizer(ours), 8)
    sys.stdout.write(f"{peak_memory_mb()}\n")
