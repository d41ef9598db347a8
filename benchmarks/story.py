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

from comfy_mminterleaved import (
    ImageGenerationConfig,
    ImageSegment,
    MMInterleavedPipeline,
    Story,
    TextGenerationConfig,
    TextSegment,
)
from comfy_mminterleaved.config import (
    Config,
    LlamaMMFSConfig,
    MMFSConfig,
    PerceiverConfig,
    SpecialTokens,
    SynchronizerConfig,
    VisualTokenizerConfig,
    skip_channels,
)
from comfy_mminterleaved.generation.prefix_cache import PrefixCache, prefill
from comfy_mminterleaved.models.mmfs import MMFSValues
from comfy_mminterleaved.models.unet_synchronizer import UNetImageValues

from .models import random_blocks
from .timing import in_a_process, peak_memory_mb

WORDS = tuple(range(10, 40))  # the text of every panel: 30 tokens
SAMPLING = TextGenerationConfig(max_new_tokens=40, min_new_tokens=40, do_sample=False)
DRAWING = ImageGenerationConfig(num_inference_steps=8, guidance_scale=4.0, scheduler="ddim")


def config() -> Config:
    """Much smaller than the released model, and its LLM smaller still: what is saved there counts for less here."""
    hidden_size, d_value, context = 512, 256, 384
    channels, layers = [64, 128, 256], 1
    mmfs = {"n_heads": 8, "n_points": 8, "d_model": d_value, "d_value": d_value}
    return Config(
        encoder=VisualTokenizerConfig(
            PerceiverConfig(32, d_value, d_value, 4, 4, 2 * d_value, 2, qk_normalization=True),
            llm_hidden_size=hidden_size,
            hidden_size=d_value,
            num_hidden_layers=8,
            num_attention_heads=4,
            intermediate_size=4 * d_value,
        ),
        llm=LlamaMMFSConfig(
            num_img_token=32,
            mmfs=MMFSConfig((32, 16, 8), 16, **mmfs, cross_attention_frequency=4),
            vocab_size=4002,
            hidden_size=hidden_size,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            intermediate_size=1024,
            special_tokens=SpecialTokens(bos=1, eos=2, pad=0, soi=4000, image=4001),
        ),
        synchronizer=SynchronizerConfig(
            hidden_size,
            PerceiverConfig(77, context, hidden_size, 1, 6, 4 * context),
            MMFSConfig((64, 32, 16, 8), **mmfs, max_num_image_per_seq=10),
            block_channels=skip_channels(channels, layers),
            block_base_shapes=(32, 32, 16, 16, 8, 8, 8),
            image_size=256,
            pos_embed_grid=32,
        ),
        unet={
            "_class_name": "UNet2DConditionModel",
            "sample_size": 32,
            "block_out_channels": channels,
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


def model() -> MMInterleavedPipeline:
    made = config()
    names = ("encoder", "llm", "synchronizer", "unet", "vae")
    return MMInterleavedPipeline(made, random_blocks(made, names), None)


def tell(model: MMInterleavedPipeline, panels: int, way: str = "kept") -> tuple[list[float], Story]:
    """Seconds of each panel (30 tokens read, 40 written, a picture drawn in 8 steps and encoded), and the story."""
    story, seconds = Story(), []
    model.clear_cache()
    for number in range(panels):
        began = time.perf_counter()
        with contextlib.nullcontext() if way == "kept" else _nothing_kept(model, way == "kv"):
            story = story.add(TextSegment("", WORDS))
            for step in ("write", "draw", "encode"):
                if way != "kept":
                    model.clear_cache()
                    story = Story(tuple(ImageSegment(s.pixels) if isinstance(s, ImageSegment) else s for s in story))
                if step == "write":
                    story = story.add(TextSegment("", model.generate_text(story, SAMPLING).tokens))
                elif step == "draw":
                    story = story.add(model.generate_image(story, replace(DRAWING, seed=number)))
                else:
                    story = model.encode_images(story)
        seconds.append(time.perf_counter() - began)
    return seconds, story


@contextlib.contextmanager
def _nothing_kept(model: MMInterleavedPipeline, kv: bool):
    """Pictures are projected anew at every token and every step and site; without `kv` each token reads the story."""
    mmfs, llm, text = model.synchronizer.mmfs_module, model.llm, model.text
    project_images, add_residual, layers = mmfs.project_images, mmfs.add_residual, llm.layers
    given: dict = {}

    def keep_maps(maps, image_mask, dtype=None):
        given["unet"] = maps
        return UNetImageValues(project_images(maps, image_mask, dtype).blocks, image_mask)

    def block_anew(index, x, values, scale=1.0):
        maps = [m for m in given["unet"] if m.shape[-1] in mmfs.spatial_shapes]
        features = torch.cat([m.flatten(3).transpose(2, 3) for m in maps], dim=2)
        block = mmfs.blocks[index]
        anew = block.mmfs.project_images(block.feat_norm(features), [tuple(m.shape[-2:]) for m in maps])
        blocks = tuple(anew if i == index else p for i, p in enumerate(values.blocks))
        return add_residual(index, x, UNetImageValues(blocks, values.image_mask), scale)

    project_for_llm = llm.project_images

    def keep_llm_maps(maps):
        given["llm"] = maps
        return project_for_llm(maps)

    def layer_anew(module, args):
        x, values, image_mask = args
        if values.num_images and given["llm"][0].shape[1] == values.num_images:
            chosen = llm.select_levels(given["llm"])
            features = torch.cat([m.flatten(3).transpose(2, 3) for m in chosen], dim=2)
            values = module.project_images(features.to(x.dtype), [tuple(m.shape[-2:]) for m in chosen])
        return x, values, image_mask

    extend, prefill_batch = PrefixCache.extend, text._prefill
    batch: list = []

    def keep_batch(tokens):
        batch[:] = tokens
        return prefill_batch(tokens)

    def prefill_again(self, llm, new_ids):
        longer = replace(batch[0], input_ids=(*self.input_ids[0], *new_ids[0]))
        model.clear_cache()
        again = prefill(llm, [longer])
        self.input_ids, self.hidden_states = again.input_ids, again.hidden_states
        return [again.hidden_states[0][-len(new_ids[0]) :]]

    if not kv:
        PrefixCache.extend, text._prefill = prefill_again, keep_batch
    mmfs.project_images, mmfs.add_residual, llm.project_images = keep_maps, block_anew, keep_llm_maps
    attentions = [layer.llama_cross_attn for layer in layers if layer.llama_cross_attn is not None]
    hooks = [attention.register_forward_pre_hook(layer_anew) for attention in attentions]
    try:
        yield
    finally:
        del mmfs.project_images, mmfs.add_residual, llm.project_images
        if not kv:
            PrefixCache.extend = extend
            del text._prefill
        for hook in hooks:
            hook.remove()


class NoMMFS(torch.nn.Module):
    """In the place of an MMFS layer of the LLM: adds nothing, at no cost."""

    def project_images(self, features, spatial_shapes):
        return MMFSValues(features.new_zeros(*features.shape[:2], 1, 1, 1), ())

    def forward(self, x, values, image_mask):
        return 0


def without_mmfs(made: MMInterleavedPipeline) -> MMInterleavedPipeline:
    """The same model as a plain Llama and a plain U-Net."""
    for layer in made.llm.layers:
        if layer.llama_cross_attn is not None:
            layer.llama_cross_attn = NoMMFS()
    mmfs = made.synchronizer.mmfs_module
    mmfs.project_images = lambda maps, image_mask, dtype=None: UNetImageValues((), image_mask)
    mmfs.add_residual = lambda index, x, values, scale=1.0: x
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
    tell(ours if sys.argv[2] == "with" else without_mmfs(ours), 8)
    sys.stdout.write(f"{peak_memory_mb()}\n")
