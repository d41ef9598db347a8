"""The command line: python -m comfy_mminterleaved tell | write | draw | ask | caption | convert | info."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from .errors import MMInterleavedError, OutputError, SettingError

DTYPES = ("float32", "float16", "bfloat16")
DENOISE = 0.6  # of a picture to start from: its layout stays, what it shows can change


class _Segment(argparse.Action):
    """Collects --text and --picture in the order given."""

    def __call__(self, parser, namespace, value, option=None):
        namespace.opening = [*(namespace.opening or []), (self.dest, value)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comfy_mminterleaved", description="Interleaved text and pictures.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str):
        p = commands.add_parser(name, help=summary, description=summary)
        p.set_defaults(run=globals()[f"_{name}"])
        p.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        return p

    def model_options(p):
        p.add_argument("--model", default="starter", help="a checkpoint folder; starter: the small model that ships; "
                       "untrained: random weights")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
        p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on CPU, float16 on CUDA)")
        p.add_argument("--compile", action="store_true", help="torch.compile: slow to begin, for many pictures")
        p.add_argument("--quiet", action="store_true", help="no progress bars")

    def story_options(p, grows=True):
        p.add_argument("--text", action=_Segment, help="text of the story; may be repeated, in order with --picture")
        p.add_argument("--picture", action=_Segment, metavar="FILE", help="a picture of the story; may be repeated")
        p.add_argument("--story", metavar="FILE", help="a story.json to go on from")
        if grows:
            said = "let a story that is too long lose its oldest panels"
            p.add_argument("--drop-oldest-panels", action="store_true", help=said)
        p.add_argument("--seed", type=int, default=0, help="of text and pictures (default: %(default)s)")
        p.set_defaults(opening=None)

    def sampling_options(p, **defaults):
        group = p.add_argument_group("writing")
        group.add_argument("--max-new-tokens", type=int, default=defaults.get("max_new_tokens", 90))
        group.add_argument("--min-new-tokens", type=int, default=defaults.get("min_new_tokens", 8))
        group.add_argument(
            "--greedy",
            action="store_true",
            default=defaults.get("greedy", False),
            help="no chance: always the likeliest token",
        )
        group.add_argument("--temperature", type=float, default=1.0)
        group.add_argument("--top-k", type=int, default=50, help="0 for all")
        group.add_argument("--top-p", type=float, default=0.9)
        group.add_argument("--repetition-penalty", type=float, default=defaults.get("repetition_penalty", 1.3))
        group.add_argument("--beams", type=int, default=defaults.get("beams", 1))

    def drawing_options(p):
        group = p.add_argument_group("drawing")
        group.add_argument("--steps", type=int, default=30)
        group.add_argument("--guidance", type=float, default=7.5)
        group.add_argument(
            "--scheduler", default="ddpm", help="ddpm, ddim, dpm++, euler, unipc, or a class of diffusers"
        )
        group.add_argument("--size", metavar="WxH", help="in px (default: the model's own)")
        group.add_argument("--look-back", type=int, help="how many pictures before are looked at")
        group.add_argument("--strength", type=float, default=1.0, help="of the synchronizer")
        group.add_argument("--start", type=float, default=0.0, help="of the synchronizer, as a fraction of the steps")
        group.add_argument("--end", type=float, default=1.0)

    p = command("tell", "Tells an illustrated story: a folder with story.html, story.json and the pictures.")
    story_options(p)
    p.add_argument("--storyboard", metavar="FILE", help="a file of stories to make; each gets a folder of its own")
    p.add_argument("--panels", type=int, default=3, help="how many panels to add (default: %(default)s)")
    p.add_argument(
        "--picture-first", action=argparse.BooleanOptionalAction,
        help="each panel's picture before its text (default: if the story opens with a picture and ends with text)",
    )  # fmt: skip
    p.add_argument("--title", default="")
    p.add_argument("--out", default="out/story", help="the folder to write (default: %(default)s)")
    sampling_options(p), drawing_options(p), model_options(p)

    p = command("write", "Continues a story with text.")
    story_options(p), sampling_options(p), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many texts")

    p = command("draw", "Draws the next picture of a story.")
    story_options(p), drawing_options(p), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many pictures; the k-th has seed + k")
    p.add_argument("--begin", metavar="FILE", help="a picture to start from")
    p.add_argument("--denoise", type=float, help=f"how much of --begin is drawn over, up to 1 (default: {DENOISE})")
    p.add_argument("--out", default="out/picture.png", help="the PNG to write (default: %(default)s)")

    p = command("ask", "Answers a question about the pictures of a story.")
    p.add_argument("question")
    story_options(p, grows=False)
    sampling_options(p, max_new_tokens=30, min_new_tokens=1, greedy=True, repetition_penalty=1.0), model_options(p)
    p.add_argument("--option", action="append", help="rank given answers instead of writing one; may be repeated")

    p = command("caption", "Describes a picture.")
    story_options(p, grows=False)
    sampling_options(p, max_new_tokens=30, repetition_penalty=1.0, beams=5), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many captions")

    p = command("convert", "Converts a checkpoint between the reference's layout and this project's.")
    p.add_argument("source")
    p.add_argument("target", help="a folder that is not there yet")
    p.add_argument("--to", choices=("own", "reference"), default="own")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as they are)")

    p = command("info", "Says what a checkpoint holds.")
    p.add_argument("source")
    return parser


# ---- from arguments to values ----


def _dtype(name: str | None):
    import torch

    return getattr(torch, name) if name else None


def _model(args):
    from .model import MMInterleaved

    if args.model == "untrained":
        _say("Note: the model 'untrained' has random weights; its texts and pictures mean nothing.")
    return MMInterleaved.load(args.model, args.device, _dtype(args.dtype), args.compile)


def _notice(model, *stories) -> None:
    """One line that names the words which the model was not taught."""
    words = list(dict.fromkeys(word for story in stories for word in model.unknown_words(story)))
    if words:
        _say(f"Note: this model does not know the words {', '.join(words)}; it does its best.")


def _story(args):
    from .book import load_story
    from .errors import StoryError
    from .story import Picture, Story

    story = load_story(args.story) if args.story else Story()
    for kind, value in args.opening or []:
        story = story.add(Picture.of(value) if kind == "picture" else value.strip())
    if not len(story):
        raise StoryError("The story is empty; give --text, --picture or --story.")
    return story


def _sampling(args):
    from .writing import Sampling

    names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "beams", "seed")
    values = {name: getattr(args, name) for name in names}
    return Sampling(sample=not args.greedy, **values)


def _drawing(args):
    from .drawing import Drawing

    size = None
    if args.size:
        width, cross, height = args.size.lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()):
            raise SettingError(f"--size must be like 512x512, not {args.size!r}.")
        size = int(width), int(height)
    names = ("steps", "guidance", "scheduler", "seed", "look_back", "strength", "start", "end")
    denoise = getattr(args, "denoise", None)
    if denoise is None:
        denoise = DENOISE if getattr(args, "begin", None) else 1.0
    elif not args.begin:
        raise SettingError(f"--denoise {denoise:g} needs a picture to start from: give one with --begin.")
    return Drawing(size=size, denoise=denoise, **{name: getattr(args, name) for name in names})


# ---- what is shown ----


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _result(args, data: dict, text: str) -> int:
    sys.stdout.write((json.dumps(data) if args.json else text) + "\n")
    return 0


class _Bars:
    """Progress on standard error: one bar for what goes on now, with the text so far behind it."""

    def __init__(self, quiet: bool):
        from tqdm import tqdm

        self.make = lambda total, what: tqdm(total=total, desc=what, leave=False, disable=quiet or None, unit="")
        self.bar, self.what = None, ""

    def _at(self, what: str, done: int, total: int):
        if self.bar is None or self.what != what or done <= self.bar.n:
            self.close()
            self.bar, self.what = self.make(total, what), what
        self.bar.update(done - self.bar.n)

    def step(self, done: int, total: int, _preview) -> None:
        self._at("drawing", done, total)

    def tokens(self, most: int):
        def on_token(text: str) -> None:
            count = 1 if self.bar is None or self.what != "writing" else self.bar.n + 1
            self._at("writing", min(count, most), most)
            self.bar.set_postfix_str(text[-60:].replace("\n", " "))

        return on_token

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


# ---- commands ----


def _tell(args) -> int:
    from .book import save_story
    from .files import make_folder
    from .storyboard import Plan, load_storyboard, plan_panels

    sampling, drawing = _sampling(args), _drawing(args)
    if args.panels < 1:
        raise SettingError(f"--panels must be at least 1, not {args.panels}.")
    if args.storyboard:
        if args.opening or args.story:
            raise SettingError("--storyboard has its own openings; leave --text, --picture and --story away.")
        if args.title or args.picture_first is not None:
            raise SettingError("A storyboard's stories have their own title and picture_first; leave --title and "
                               "--picture-first away.")  # fmt: skip
        plans = load_storyboard(args.storyboard)
        folders = [make_folder(Path(args.out) / f"{i:03d}") for i in range(1, len(plans) + 1)]
    else:
        opening = _story(args)
        plans = [Plan(opening, plan_panels(opening, args.panels, args.picture_first), args.title)]
        folders = [make_folder(args.out)]
    model = _model(args)
    for plan in plans:
        model.check_plan(plan.opening, plan.panels, sampling, drawing, args.drop_oldest_panels)
    _notice(model, *(plan.opening for plan in plans))

    bars, stories = _Bars(args.quiet), []
    for plan, folder in zip(plans, folders):
        settings = {
            "model": args.model, "seed": args.seed + plan.seed, "sampling": dataclasses.asdict(sampling),
            "drawing": dataclasses.asdict(drawing),
        }  # fmt: skip
        with contextlib.closing(bars):
            story = model.follow(
                plan.opening, plan.panels, sampling.plus(plan.seed), drawing.plus(plan.seed), None,
                bars.tokens(sampling.max_new_tokens), bars.step,
                lambda done: save_story(folder, done, plan.title, settings),  # noqa: B023, called within the turn
                args.drop_oldest_panels,
            )  # fmt: skip
        written = story.to_json([f"{i:02d}.png" for i in range(1, len(story.pictures) + 1)])
        stories.append({"folder": str(folder), "page": str(folder / "story.html"), "segments": written["segments"]})
    text = "\n".join(f"Open {story['page']}" for story in stories)
    return _result(args, {"stories": stories}, text)


def _write(args) -> int:
    sampling, story = _sampling(args), _story(args)
    model, bars = _model(args), _Bars(args.quiet)
    on_token = bars.tokens(sampling.max_new_tokens)
    with contextlib.closing(bars):
        texts = model.write_all([story], sampling, args.count, lambda i, text: on_token(text), args.drop_oldest_panels)[
            0
        ]
    found = [{"text": t.text, "stopped_by": t.stopped_by} for t in texts]
    return _result(args, {"texts": found}, "\n".join(t.text for t in texts))


def _draw(args) -> int:
    from .files import make_folder, write_bytes
    from .pictures import encode_png
    from .story import Picture

    drawing, story, out = _drawing(args), _story(args), Path(args.out)
    if out.suffix.lower() != ".png":
        raise OutputError(f"--out must be a .png file, not {args.out!r}.")
    make_folder(out.parent)
    begin = [Picture.of(args.begin)] if args.begin else None
    model, bars = _model(args), _Bars(args.quiet)
    with contextlib.closing(bars):
        pictures = model.draw_all([story], drawing, args.count, begin, bars.step, args.drop_oldest_panels)[0]
    names = [out if len(pictures) == 1 else out.with_stem(f"{out.stem}-{i}") for i in range(1, len(pictures) + 1)]
    for name, picture in zip(names, pictures):
        write_bytes(name, encode_png(picture.pixels))
    return _result(args, {"pictures": [str(name) for name in names]}, "\n".join(map(str, names)))


def _ask(args) -> int:
    sampling, story = _sampling(args), _story(args)
    model = _model(args)
    if args.option:
        ranked = model.choose(story, args.option, args.question)
        found = [dataclasses.asdict(choice) for choice in ranked]
        return _result(args, {"choices": found}, "\n".join(f"{c.log_probability:9.3f}  {c.option}" for c in ranked))
    answer = model.ask(story, args.question, sampling)
    return _result(args, {"answer": answer.text, "stopped_by": answer.stopped_by}, answer.text)


def _caption(args) -> int:
    sampling, story = _sampling(args), _story(args)
    captions = _model(args).caption(story, sampling, args.count)
    found = [{"text": c.text, "stopped_by": c.stopped_by, "score": c.score} for c in captions]
    return _result(args, {"captions": found}, "\n".join(c.text for c in captions))


def _convert(args) -> int:
    from . import checkpoint

    target = Path(args.target)
    config, blocks = checkpoint.read_blocks(args.source)
    save = checkpoint.save if args.to == "own" else checkpoint.save_reference
    save(target, config, blocks, checkpoint.read_tokenizer(args.source, config), _dtype(args.dtype))
    return _result(args, {"folder": str(target)}, f"Written: {target}")


def _info(args) -> int:
    from . import checkpoint

    config, blocks = checkpoint.read_blocks(args.source)
    counts = {name: sum(t.numel() for t in tensors.values()) for name, tensors in blocks.items()}
    tokenizer = checkpoint.read_tokenizer(args.source, config)
    layout = "reference" if checkpoint.is_reference(Path(args.source)) else "own"
    data = {
        "layout": layout, "parameters": counts, "tokenizer": tokenizer is not None,
        "picture_size": config.decoder.picture_size, "context_length": config.llm.context_length,
        "visual_tokens": config.llm.slots, "config": config.to_dict(),
    }  # fmt: skip
    lines = [f"{name:13}{count / 1e6:12,.2f} million values" for name, count in counts.items()]
    lines += [
        f"{'layout':13}{layout:>12}",
        f"{'tokenizer':13}{'yes' if tokenizer else 'none':>12}",
        f"{'picture':13}{config.decoder.picture_size:>12} px",
        f"{'context':13}{config.llm.context_length:>12} tokens, {config.llm.slots + 1} a picture",
    ]
    return _result(args, data, "\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not hold every character of a story
            stream.reconfigure(errors="replace")
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except MMInterleavedError as error:
        _say(f"Error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("Stopped; what was finished is kept.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
