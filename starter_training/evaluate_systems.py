"""Evaluates the systems beside the story model, on stories that chose nothing: seeds from 20 on.

    python -m starter_training.evaluate_systems --only retrieval --only best-of

The classifier of the world counts (`classifier.py`); it chooses nothing. Intervals are over stories, not over panels.
Drawings are kept in a folder, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from comfy_mminterleaved.checkpoints.tensors import read_tensors
from comfy_mminterleaved.errors import MMInterleavedError
from comfy_mminterleaved.models.lora import LoRA
from comfy_mminterleaved.pipeline import MMInterleavedPipeline

from .classifier import SHIPPED, load
from .systems import (
    contrastive,
    drawers,
    drawn,
    dream,
    finetuned,
    insight,
    prior,
    reconstruction,
    refined,
    sound,
    thumbnails,
    tokens,
)

FIRST_SEED = 20  # of stories; those before chose weights and settings
PARTS = {
    "retrieval": lambda pipeline, judge, args: contrastive.retrieval(pipeline, args.seed, 3 * args.cases + 100),
    "best-of": lambda pipeline, judge, args: contrastive.best_of(pipeline, judge, args.seed, args.cases, args.cache),
    "pairs": lambda pipeline, judge, args: contrastive.best_of(
        pipeline, judge, args.seed + 1, args.cases * 2 // 3, args.cache, 2
    ),
    "words": lambda pipeline, judge, args: contrastive.word_masks(pipeline, args.seed, args.cases * 2 // 3),
    "drawn": lambda pipeline, judge, args: drawn.wrong_facts(
        pipeline, judge, args.seed, args.cases, args.cache, adapters(pipeline, args)
    ),
    "heroes": lambda pipeline, judge, args: drawn.told_heroes(
        pipeline, judge, range(args.seed, args.seed + 4), args.cases // 6, adapters(pipeline, args)
    ),
    "tuned-descriptions": lambda pipeline, judge, args: finetuned.descriptions(
        pipeline, judge, args.seed, args.cases, args.cache, loras(args)
    ),
    "tuned-drawings": lambda pipeline, judge, args: finetuned.drawings(
        pipeline, judge, range(args.seed, args.seed + 4), args.cases // 6, loras(args)
    ),
    "refined-pairs": lambda pipeline, judge, args: refined.pairs(pipeline, args.seed, args.cases),
    "refined-facts": lambda pipeline, judge, args: refined.kept_facts(
        pipeline, judge, args.seed, args.cases, args.cache, args.sheet
    ),
    "embeddings": lambda pipeline, judge, args: prior.from_embeddings(pipeline, judge, args.seed, args.cases),
    "prior": lambda pipeline, judge, args: prior.from_texts(pipeline, judge, args.seed, args.cases),
    "differences": lambda pipeline, judge, args: prior.differences(pipeline, judge, args.seed, args.cases // 3),
    "heard": lambda pipeline, judge, args: sound.heard(pipeline, args.seed, max(1, args.cases // 25)),
    "sound-over": lambda pipeline, judge, args: sound.over_images(pipeline, judge, args.seed, args.cases // 3),
    "dream": lambda pipeline, judge, args: dream.stories(
        pipeline, judge, range(args.seed, args.seed + 4), args.cases // 6
    ),
    "in-context": lambda pipeline, judge, args: dream.in_context(pipeline, judge, args.seed, args.cases * 2 // 3),
    "codes": lambda pipeline, judge, args: tokens.codes(pipeline, judge, args.seed, args.cases),
    "draft-settings": lambda pipeline, judge, args: tokens.settings(pipeline, judge, args.seed, args.cases),
    "drafts": lambda pipeline, judge, args: tokens.drafts(pipeline, judge, args.seed, args.cases * 2 // 3),
    "rows": lambda pipeline, judge, args: tokens.from_rows(pipeline, judge, args.seed, args.cases // 3),
    "thumbnails": lambda pipeline, judge, args: thumbnails.thumbnails(
        pipeline, judge, args.seed, args.cases * 2 // 3, args.thumbnails
    ),
    "drawers": lambda pipeline, judge, args: drawers.table(pipeline, judge, args.seed, args.cases * 2 // 3),
    "sources": lambda pipeline, judge, args: insight.sources(pipeline, judge, args.seed, args.cases // 3),
    "robustness": lambda pipeline, judge, args: insight.robustness(pipeline, judge, args.seed, args.cases // 5),
    "bias": lambda pipeline, judge, args: insight.name_bias(pipeline, judge, args.seed, max(1, args.cases // 50)),
    "spread": lambda pipeline, judge, args: insight.spread(pipeline, judge, args.seed, args.cases // 5),
    "descriptions": lambda pipeline, judge, args: reconstruction.descriptions(
        pipeline, judge, args.seed, args.cases, args.cache
    ),
}


def adapters(pipeline: MMInterleavedPipeline, args) -> dict:
    """Adapters for drawn images by name, and whether each is on for all images."""
    pipeline.adapt_to_drawings()
    made = {"none": (None, False), "adapter": (pipeline.drawn_adapter, False)}
    pipeline.adapt_to_drawings(False)
    if args.both is not None:
        made["one encoder tuned on both"] = LoRA(read_tensors(args.both)), True
    return made


def loras(args) -> dict[str, Path | None]:
    """LoRA files of fine-tuning by name, the model itself first."""
    return {"none": None, **{path.stem: path for path in args.lora}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.evaluate_systems", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter", help="a checkpoint folder (default: the starter)")
    parser.add_argument("--only", choices=PARTS, action="append", help="(default: all)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--cases", type=int, default=300, help="panels; the parts take their shares (default: 300)")
    parser.add_argument("--cache", type=Path, default=Path("runs/systems"), help="folder of the drawings that are kept")
    parser.add_argument(
        "--both", type=Path, metavar="FILE", help="the LoRA of the stage drawn-both, to compare the adapter with"
    )
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="a LoRA of `finetuning` for the parts tuned-...; may be repeated",
    )
    parser.add_argument(
        "--thumbnails", type=Path, metavar="FILE", help="the generator of the stage thumbnails, for the part thumbnails"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="a PNG of fifty refined panels, to look at")
    args = parser.parse_args(argv)
    try:
        pipeline, judge = MMInterleavedPipeline.load(args.model), load(SHIPPED)
        result: dict = {"model": args.model, "seed": args.seed}
        left_out = {"tuned-descriptions", "tuned-drawings"} if not args.lora else set()
        left_out |= {"draft-settings"}  # which chooses, on other seeds
        left_out |= {"thumbnails"} if args.thumbnails is None else set()
        for name in args.only or (part for part in PARTS if part not in left_out):
            result[name] = PARTS[name](pipeline, judge, args)
            sys.stderr.write(f"{name}: {json.dumps(result[name])}\n")
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
