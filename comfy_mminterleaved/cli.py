"""The command line: python -m comfy_mminterleaved tell | write | draw | ask | caption | convert | info."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MMInterleavedError, OutputError, SettingError

if TYPE_CHECKING:
    from .generation.image import Drawing
    from .generation.text import Sampling
    from .stories.story import Story

TEXT_FLAGS = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "beams")
IMAGE_FLAGS = ("steps", "guidance", "scheduler", "size", "look_back", "strength", "start", "end")
DTYPES = ("float32", "float16", "bfloat16")
DENOISE = 0.6  # of a picture to start from: its layout stays, what it shows can change


class _Segment(argparse.Action):
    """Collects --text and --image in the order given."""

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
        p.add_argument(
            "--model",
            help="a checkpoint folder; starter: the small model that ships (the default); untrained: random weights",
        )
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
        p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on CPU, float16 on CUDA)")
        p.add_argument("--compile", action="store_true", help="torch.compile: slow to begin, for many pictures")
        p.add_argument("--quiet", action="store_true", help="no progress bars")

    def story_options(p, grows=True):
        p.add_argument("--text", action=_Segment, help="text of the story; may be repeated, in order with --image")
        p.add_argument(
            "--image",
            "--picture",
            dest="picture",
            action=_Segment,
            metavar="FILE",
            help="a picture of the story; may be repeated",
        )
        p.add_argument("--story", metavar="FILE", help="a story to go on with: its story.json, or the folder of it")
        if grows:
            said = "let a story that is too long lose its oldest panels"
            p.add_argument("--drop-oldest-panels", action="store_true", help=said)
        p.add_argument("--seed", type=int, help="of text and pictures (default: that of --story, else 0)")
        p.set_defaults(opening=None)

    def sampling_options(p, default="the model's own"):
        group = p.add_argument_group("writing", f"What is left out is that of --story, else {default}.")
        group.add_argument("--max-new-tokens", type=int)
        group.add_argument("--min-new-tokens", type=int)
        group.add_argument("--greedy", action="store_true", help="no chance: always the likeliest token")
        group.add_argument("--temperature", type=float)
        group.add_argument("--top-k", type=int, help="0 for all")
        group.add_argument("--top-p", type=float)
        group.add_argument("--repetition-penalty", type=float)
        group.add_argument("--beams", type=int)

    def drawing_options(p):
        group = p.add_argument_group("drawing", "What is left out is that of --story, else the model's own.")
        group.add_argument("--steps", type=int)
        group.add_argument("--guidance", type=float)
        group.add_argument("--scheduler", help="ddpm, ddim, dpm++, euler, unipc, or a class of diffusers")
        group.add_argument("--size", metavar="WxH", help="in px")
        group.add_argument("--look-back", type=int, help="how many pictures before are looked at")
        group.add_argument("--strength", type=float, help="of the synchronizer")
        group.add_argument("--start", type=float, help="of the synchronizer, as a fraction of the steps")
        group.add_argument("--end", type=float)

    p = command("tell", "Tells an illustrated story: a folder with story.html, story.json and the pictures.")
    story_options(p)
    p.add_argument("--storyboard", metavar="FILE", help="a file of stories to make; each gets a folder of its own")
    p.add_argument("--panels", type=int, default=3, help="how many panels to add (default: %(default)s)")
    p.add_argument(
        "--image-first",
        "--picture-first",
        dest="image_first",
        action=argparse.BooleanOptionalAction,
        help="each panel's picture before its text (default: as the story or the model has it)",
    )
    p.add_argument(
        "--introduce",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="say in the text who is in an opening picture, where the model's stories do so",
    )
    p.add_argument("--title")
    p.add_argument(
        "--out",
        default="out/story",
        help="the folder to write; a free name beside it if it holds a story (default: %(default)s)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the story in --out")
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
    sampling_options(p, "the likeliest words, 30 at most"), model_options(p)
    p.add_argument("--option", action="append", help="rank given answers instead of writing one; may be repeated")

    p = command("caption", "Describes a picture.")
    story_options(p, grows=False)
    sampling_options(p, "five beams, 30 tokens at most"), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many captions")

    p = command("convert", "Converts a checkpoint between the reference's layout and this project's.")
    p.add_argument("source", help="a checkpoint folder, starter or untrained")
    p.add_argument("target", help="a folder that is not there yet")
    p.add_argument("--to", choices=("own", "reference"), default="own")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as they are)")

    p = command("info", "Says what a checkpoint holds.")
    p.add_argument("source", help="a checkpoint folder, starter or untrained")
    return parser


# ---- from arguments to values ----


def _dtype(name: str | None):
    import torch

    return getattr(torch, name) if name else None


@dataclasses.dataclass
class _Opening:
    """The story that a command works on, and what was said beside it: flags first, then the story's own settings, then
    the model's."""

    story: Story
    title: str
    model: str
    seed: int
    sampling: Sampling
    drawing: Drawing


def _opening(args, sampling: Sampling | None = None, required: bool = True) -> _Opening:
    """Everything that can be known before the model is loaded; raises for whatever does not fit.

    Args:
        sampling: the command's own settings of writing, instead of the story's and the model's.
    """
    from .checkpoints.load import model_folder
    from .errors import StoryError
    from .generation.config import GenerationConfig, image_settings, read_generation_config, text_settings
    from .stories.page import load_book
    from .stories.story import Picture, Story

    book = load_book(args.story) if args.story else None
    story, settings = (book.story, book.settings) if book else (Story(), {})
    for kind, value in args.opening or []:
        story = story.add(Picture.of(value) if kind == "picture" else value.strip())
    if required and not len(story):
        raise StoryError("The story is empty; give --text, --image or --story.")
    model = args.model or settings.get("model", "starter")
    if not isinstance(model, str):
        raise SettingError(f"The story's model must be a name, not {model!r:.60}; give one with --model.")
    folder = model_folder(model)
    generation = read_generation_config(folder) if folder is not None else GenerationConfig()
    seed = settings.get("seed", 0) if args.seed is None else args.seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SettingError(f"The story's seed must be a whole number, not {seed!r:.60}; give one with --seed.")

    def kept(names: tuple[str, ...], read) -> dict:
        return read(next((settings[name] for name in names if name in settings), {}))

    if sampling is None:
        sampling = _replaced(generation.text, kept(("text_generation", "sampling"), text_settings))
    drawing = _replaced(generation.image, kept(("image_generation", "drawing"), image_settings))
    sampling = _replaced(sampling, {**_flags(args, TEXT_FLAGS), "seed": seed})
    if getattr(args, "greedy", False):
        sampling = _replaced(sampling, {"sample": False})
    flags = _flags(args, IMAGE_FLAGS)
    if flags.get("size"):
        width, cross, height = args.size.lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and len(args.size) < 20):
            raise SettingError(f"--size must be like 512x512, not {args.size!r:.60}.")
        flags["size"] = int(width), int(height)
    flags["denoise"] = _denoise(args)
    drawing = _replaced(drawing, {**flags, "seed": seed})
    return _Opening(story, book.title if book else "", model, seed, sampling, drawing)


def _flags(args, names: tuple[str, ...]) -> dict:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _replaced(settings, values: dict):
    """Settings with other values; raises SettingError also for values of a wrong type, as a file can have them."""
    try:
        return dataclasses.replace(settings, **values)
    except TypeError as error:
        raise SettingError(f"A setting has a value of a wrong type: {error}.") from None


def _denoise(args) -> float:
    denoise = getattr(args, "denoise", None)
    if denoise is None:
        return DENOISE if getattr(args, "begin", None) else 1.0
    if not args.begin:
        raise SettingError(f"--denoise {denoise:g} needs a picture to start from: give one with --begin.")
    return denoise


def _model(args, name: str, *stories):
    """The model, and a line that names the words of these stories which it was not taught."""
    from .pipeline import MMInterleaved

    if name == "untrained":
        _say("Note: the model 'untrained' has random weights; its texts and pictures mean nothing.")
    model = MMInterleaved.load(name, args.device, _dtype(args.dtype), args.compile)
    words = list(dict.fromkeys(word for story in stories for word in model.unknown_words(story)))
    if words:
        _say(f"Note: this model does not know the words {', '.join(words)}; it does its best.")
    return model


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
    from .files import free_name, output_folder
    from .generation.config import to_file
    from .stories.page import has_book, save_story
    from .stories.storyboard import MAX_PANELS, Plan, load_storyboard

    if not 1 <= args.panels <= MAX_PANELS:
        raise SettingError(f"--panels must be at least 1 and at most {MAX_PANELS}, not {args.panels}.")
    if args.storyboard:
        if args.opening or args.story:
            raise SettingError("--storyboard has its own openings; leave --text, --image and --story away.")
        if args.title or args.image_first is not None:
            raise SettingError(
                "A storyboard's stories have their own title and image_first; leave --title and --image-first away."
            )
        plans = load_storyboard(args.storyboard)
    opening = _opening(args, required=not args.storyboard)
    out = Path(args.out)
    if not args.storyboard:
        title = opening.title if args.title is None else args.title
        plans = [Plan(opening.story, args.panels, title)]
    in_place = bool(args.story) and has_book(out) and out.samefile(_folder_of(args.story))
    if has_book(out) and not (args.overwrite or in_place):
        out = free_name(out)
        _say(f"Note: {args.out} holds a story; writing to {out}. Use --overwrite to replace it.")

    stories = []
    with output_folder(out):
        model, bars = _model(args, opening.model, *(plan.opening for plan in plans)), _Bars(args.quiet)
        openings = []
        for plan in plans:  # everything is checked before anything is drawn
            arranged = plan.opening
            if plan.steps is None:
                arranged = arranged.arrange(model.order(arranged, args.image_first))
            sampling, drawing = opening.sampling.plus(plan.seed), opening.drawing.plus(plan.seed)
            model.check_plan(arranged, plan.steps_after(arranged), sampling, drawing, args.drop_oldest_panels)
            openings.append(arranged)
        for number, (plan, story) in enumerate(zip(plans, openings), 1):
            sampling, drawing = opening.sampling.plus(plan.seed), opening.drawing.plus(plan.seed)
            settings = {
                "model": opening.model,
                "seed": sampling.seed,
                "text_generation": to_file(sampling),
                "image_generation": to_file(drawing),
            }
            with contextlib.closing(bars), output_folder(out / f"{number:03d}" if args.storyboard else out) as folder:

                def save(story, folder=folder, plan=plan, settings=settings):
                    save_story(folder, story, plan.title, settings)

                if args.introduce and not args.story and plan.steps is None:
                    story = model.introduce(story)
                    if len(story) > len(plan.opening):
                        _say(f"Note: the opening picture is introduced as: {story.text.splitlines()[0]}")
                        save(story)
                story = model.follow(
                    story,
                    plan.steps_after(story),
                    sampling,
                    drawing,
                    None,
                    bars.tokens(sampling.max_new_tokens),
                    bars.step,
                    save,
                    args.drop_oldest_panels,
                )
            segments = json.loads((folder / "story.json").read_text(encoding="utf-8"))["segments"]
            stories.append({"folder": str(folder), "page": str(folder / "story.html"), "segments": segments})
    text = "\n".join(f"Open {story['page']}" for story in stories)
    return _result(args, {"stories": stories}, text)


def _folder_of(story: str) -> Path:
    path = Path(story)
    return path if path.is_dir() else path.parent


def _write(args) -> int:
    opening = _opening(args)
    model, bars = _model(args, opening.model, opening.story), _Bars(args.quiet)
    on_token = bars.tokens(opening.sampling.max_new_tokens)
    with contextlib.closing(bars):
        texts = model.write_all(
            [opening.story], opening.sampling, args.count, lambda i, text: on_token(text), args.drop_oldest_panels
        )[0]
    found = [{"text": t.text, "stopped_by": t.stopped_by} for t in texts]
    return _result(args, {"texts": found}, "\n".join(t.text for t in texts))


def _draw(args) -> int:
    from .files import output_folder, write_bytes
    from .stories.images import encode_png
    from .stories.story import Picture

    opening, out = _opening(args), Path(args.out)
    if out.suffix.lower() != ".png":
        raise OutputError(f"--out must be a .png file, not {args.out!r}.")
    begin = [Picture.of(args.begin)] if args.begin else None
    with output_folder(out.parent):
        model, bars = _model(args, opening.model, opening.story), _Bars(args.quiet)
        with contextlib.closing(bars):
            pictures = model.draw_all(
                [opening.story], opening.drawing, args.count, begin, bars.step, args.drop_oldest_panels
            )[0]
        names = [out if len(pictures) == 1 else out.with_stem(f"{out.stem}-{i}") for i in range(1, len(pictures) + 1)]
        for name, picture in zip(names, pictures):
            write_bytes(name, encode_png(picture.pixels))
    return _result(args, {"pictures": [str(name) for name in names]}, "\n".join(map(str, names)))


def _ask(args) -> int:
    from .generation.text import Sampling

    default = Sampling(max_new_tokens=30, min_new_tokens=1, sample=False, repetition_penalty=1.0)
    opening = _opening(args, default)
    if not args.question.strip():
        raise SettingError("The question must not be empty.")
    model = _model(args, opening.model)
    if args.option:
        ranked = model.choose(opening.story, args.option, args.question)
        found = [dataclasses.asdict(choice) for choice in ranked]
        return _result(args, {"choices": found}, "\n".join(f"{c.log_probability:9.3f}  {c.option}" for c in ranked))
    answer = model.ask(opening.story, args.question, opening.sampling)
    return _result(args, {"answer": answer.text, "stopped_by": answer.stopped_by}, answer.text)


def _caption(args) -> int:
    from .generation.text import Sampling

    default = Sampling(max_new_tokens=30, min_new_tokens=8, repetition_penalty=1.0, beams=5)
    opening = _opening(args, default)
    captions = _model(args, opening.model).caption(opening.story, opening.sampling, args.count)
    found = [{"text": c.text, "stopped_by": c.stopped_by, "score": c.score} for c in captions]
    return _result(args, {"captions": found}, "\n".join(c.text for c in captions))


def _convert(args) -> int:
    from .checkpoints import load as checkpoint

    saved = checkpoint.read(args.source)
    save = checkpoint.save if args.to == "own" else checkpoint.save_reference
    save(args.target, saved.config, saved.blocks, saved.tokenizer, _dtype(args.dtype), saved.generation, saved.words)
    return _result(args, {"folder": args.target}, f"Written: {args.target}")


def _info(args) -> int:
    from .checkpoints import load as checkpoint

    saved = checkpoint.read(args.source)
    config, tokenizer = saved.config, saved.tokenizer
    counts = {name: sum(t.numel() for t in tensors.values()) for name, tensors in saved.blocks.items()}
    data = {
        "layout": saved.layout,
        "parameters": counts,
        "tokenizer": tokenizer is not None,
        "picture_size": config.decoder.picture_size,
        "context_length": config.llm.context_length,
        "visual_tokens": config.llm.slots,
        "generation_config": saved.generation.to_dict(),
        "config": config.to_dict(),
    }
    lines = [f"{name:13}{count / 1e6:12,.2f} million values" for name, count in counts.items()]
    lines += [
        f"{'layout':13}{saved.layout:>12}",
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
