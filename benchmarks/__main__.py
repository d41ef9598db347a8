"""python -m benchmarks: what the synchronizer and the caches cost and save on this machine.

Ratios of medians of interleaved runs, as a table, JSON and plots in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path

import torch

from . import book, gather, story, token, unet

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "unet": unet.measure,
    "sizes": unet.sizes,
    "token": token.measure,
    "story": story.measure,
    "memory": story.peaks,
    "gather": gather.measure,
    "book": book.measure,
}


def rows(found: dict) -> list[tuple[str, str, str, str]]:
    """(figure, reference, bar, measured) of what was measured."""
    made = []
    if "unet" in found:
        ratios = found["unet"]["ratios"]
        made += [
            ("guided U-Net step with / without, one picture", "2.5x", "<= 1.10x", f"{ratios['1 pictures']:.2f}x"),
            ("the same with three earlier pictures", "-", "<= 1.15x", f"{ratios['3 pictures']:.2f}x"),
        ]
    if "token" in found:
        ratio = found["token"]["ratios"]["8 pictures"]
        made.append(("decoded token, four 13B-wide layers, 8 pictures", "1.40x", "<= 1.03x", f"{ratio:.3f}x"))
    if "story" in found:
        s = found["story"]
        made += [
            ("panel 8 of a story against panel 2", "grows", "<= 1.25x", f"{s['late over early']:.2f}x"),
            ("8-panel story / every cache off", "-", "<= 0.4x", f"{s['kept over nothing kept']:.2f}x"),
            ("the same / started over at every panel", "-", "-", f"{s['kept over started over']:.2f}x"),
        ]
    if "memory" in found:
        ratio = found["memory"]["ratio"]
        made.append(("peak memory of that story with / without", "-", "<= 1.15x", f"{ratio:.2f}x"))
    if "book" in found:
        made.append(("starter model: a 5-panel book end to end", "-", "< 30 s", f"{found['book']['whole']:.1f} s"))
    return made


def table(found: dict) -> str:
    lines = ["| figure | reference | bar | measured |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows(found))])


def plots(found: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4))
    axes = axes.flatten()
    if "unet" in found:
        cases = {"0": 1.0, **{name.split()[0]: ratio for name, ratio in found["unet"]["ratios"].items()}}
        axes[0].plot([int(n) for n in cases], list(cases.values()), marker="o")
        axes[0].set(title="U-Net step, SD 2.1 size", xlabel="pictures looked at", ylabel="times the plain step")
        axes[0].set_ylim(0, 1.5)
    if "story" in found:
        seconds = found["story"]["panel seconds"]
        axes[1].bar(range(1, len(seconds) + 1), seconds)
        axes[1].set(title="panels of one story", xlabel="panel", ylabel="seconds")
    if "book" in found:
        parts = {k: v for k, v in found["book"].items() if isinstance(v, float) and k != "whole"}
        axes[2].barh(list(parts), list(parts.values()))
        axes[2].set(title="a five-panel book of the starter model", xlabel="seconds")
    if "unet" in found and "sizes" in found:
        by_size = {k: v for k, v in found["sizes"].items() if k.endswith(" px")}
        by_size["512 px"] = found["unet"]["ratios"]["1 pictures"]
        axes[3].bar(list(by_size), list(by_size.values()))
        axes[3].set(title="U-Net step by picture size, one picture", ylabel="times the plain step", ylim=(0, 1.5))
    figure.tight_layout()
    figure.savefig(folder / "cpu.png", dpi=110)
    plt.close(figure)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given several times")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cpu.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only or PARTS:
        found[name] = PARTS[name]()
        found[name]["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        found[name]["date"] = date.today().isoformat()
        path.write_text(json.dumps(found, indent=1) + "\n")
    plots(found, args.out)
    sys.stdout.write(table(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
