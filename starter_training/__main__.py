"""Trains the starter model, stage by stage: python -m starter_training STAGE.

A stage can be stopped at any time and resumes from its last checkpoint. Everything is in one run folder: the images, a
folder per stage with its log, curves, samples and weights, and config.json. `export` writes the checkpoint, `sheet`
draws held-out stories with it, and `begin` makes a run folder from a checkpoint to continue its training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from comfy_mminterleaved.errors import MMInterleavedError, SettingError
from comfy_mminterleaved.files import ensure_writable_dir
from comfy_mminterleaved.presets import STARTER_DIR

from .run_dir import STAGES, begin, export
from .samples import story_contact_sheet
from .stages import run_stage
from .trainer import StageConfig

STAGE_DIR = Path(__file__).parent / "stages"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="starter_training", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=(*STAGES, "begin", "export", "sheet"))
    parser.add_argument("--out", default="runs/starter", help="the run folder (default: %(default)s)")
    begins = parser.add_argument_group("begin")
    begins.add_argument(
        "--model",
        action="append",
        help="a checkpoint of a run's `export`; the mean of their weights if repeated (default: the starter)",
    )
    stages = parser.add_argument_group("stages")
    stages.add_argument("--stories", type=int, help="number of stories, rendered once and kept (default: 12000)")
    stages.add_argument("--first", type=int, help="the seed of the first story (default: 0)")
    stages.add_argument("--minutes", type=float, help="stop after this time, at a checkpoint")
    stages.add_argument("--precision", choices=("no", "bf16", "fp16"), help="(default: no)")
    stages.add_argument("--steps", type=int)
    stages.add_argument("--batch", type=int, help="images per step")
    stages.add_argument("--learning-rate", type=float, dest="learning_rate")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    options, out = {k: v for k, v in vars(args).items() if k not in ("stage", "out") and v is not None}, Path(args.out)
    try:
        stage_options = set(vars(args)) - {"model"}
        accepted = {"begin": {"model"}, "export": set(), "sheet": set()}.get(args.stage, stage_options)
        for name in sorted(options.keys() - accepted):
            raise SettingError(f"--{name.replace('_', '-')} does not apply to {args.stage!r}; omit it.")
        if args.stage == "begin":
            begin(out, *(STARTER_DIR if m == "starter" else Path(m) for m in options.get("model", ["starter"])))
        elif args.stage == "export":
            export(out)
        elif args.stage == "sheet":
            story_contact_sheet(out)
        else:
            changes = {name: options.pop(name, None) for name in ("steps", "batch", "learning_rate")}
            stage = StageConfig.read(STAGE_DIR / f"{args.stage}.json", **changes)
            run_stage(stage, ensure_writable_dir(out), **options)
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
