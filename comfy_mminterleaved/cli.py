"""The command line: mminterleaved tell | write | draw | ask | caption | convert | info."""

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
    from .generation.config import ImageGenerationConfig, TextGenerationConfig
    from .stories.story import Story

# Flag (argparse's name) -> field of TextGenerationConfig, of ImageGenerationConfig.
TEXT_FLAGS = {
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "num_beams": "num_beams",
}
IMAGE_FLAGS = {
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "scheduler": "scheduler",
    "size": "size",
    "context_images": "num_context_images",
    "mmfs_scale": "mmfs_scale",
    "mmfs_start": "mmfs_start",
    "mmfs_end": "mmfs_end",
}
DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_OUT = "out/story"
DEFAULT_DENOISE = 0.6  # of an initial image: its layout stays, its content can change


class _Segment(argparse.Action):
    """Collects --text and --image in the order given."""

    def __call__(self, parser, namespace, value, option=None):
        namespace.opening = [*(namespace.opening or []), (self.dest, value)]


def _add(group, flag: str, old: str, **options) -> None:
    """Adds a flag that also has an old spelling, which --help does not show."""
    dest = flag[2:].replace("-", "_")
    group.add_argument(flag, dest=dest, **options)
    group.add_argument(old, dest=dest, **{**options, "help": argparse.SUPPRESS})


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(prog="mminterleaved", description="Stories of interleaved text and images.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str):
        p = commands.add_parser(name, help=summary, description=summary)
        p.set_defaults(run=globals()[f"_{name}"])
        p.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        return p

    def model_options(p):
        p.add_argument(
            "--model",
            help="a checkpoint folder; starter: the small model that ships (the default); tiny-random: random weights",
        )
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
        p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on CPU, float16 on CUDA)")
        p.add_argument("--compile", action="store_true", help="torch.compile: slow to start, for many images")
        p.add_argument("--quiet", action="store_true", help="no progress bars")

    def story_options(p, grows=True):
        p.add_argument("--text", action=_Segment, help="text of the story; may be repeated, in order with --image")
        _add(p, "--image", "--picture", action=_Segment, metavar="FILE", help="an image of the story; may be repeated")
        p.add_argument("--story", metavar="FOLDER", help="a story to continue: its folder, or its story.json")
        if grows:
            p.add_argument(
                "--drop-oldest-panels", action="store_true", help="drop the oldest panels if the story is too long"
            )
        p.add_argument("--seed", type=int, help="seed of text and images (default: the story's, else 0)")
        p.set_defaults(opening=None)

    def text_options(p, default="the model's own"):
        group = p.add_argument_group("text generation", f"Defaults: those of --story, else {default}.")
        group.add_argument("--max-new-tokens", type=int)
        group.add_argument("--min-new-tokens", type=int)
        group.add_argument("--greedy", action="store_true", help="no sampling: always the likeliest token")
        group.add_argument("--temperature", type=float)
        group.add_argument("--top-k", type=int, help="0 for all")
        group.add_argument("--top-p", type=float)
        group.add_argument("--repetition-penalty", type=float)
        _add(group, "--num-beams", "--beams", type=int)

    def image_options(p):
        group = p.add_argument_group("image generation", "Defaults: those of --story, else the model's own.")
        group.add_argument("--steps", type=int)
        _add(group, "--guidance-scale", "--guidance", type=float)
        group.add_argument("--scheduler", help="ddpm, ddim, dpm++, euler, unipc, or a class of diffusers")
        group.add_argument("--size", metavar="WxH", help="in px")
        _add(group, "--context-images", "--look-back", type=int, help="how many earlier images the U-Net attends to")
        _add(
            group,
            "--mmfs-scale",
            "--strength",
            type=float,
            help="scale of MMFS in the U-Net; 0 turns it off",
        )
        _add(group, "--mmfs-start", "--start", type=float, help="when MMFS starts, as a fraction of the steps")
        _add(group, "--mmfs-end", "--end", type=float, help="when MMFS ends, as a fraction of the steps")

    p = command("tell", "Tells an illustrated story: a folder with story.html, story.json and the images.")
    story_options(p)
    p.add_argument("--storyboard", metavar="FILE", help="a file of stories to tell; each gets a folder of its own")
    p.add_argument("--panels", type=int, help="how many panels to add (default: 3)")
    image_first = {"dest": "image_first", "action": argparse.BooleanOptionalAction}
    p.add_argument(
        "--image-first", **image_first, help="each panel's image before its text (default: as the story or the model)"
    )
    p.add_argument("--picture-first", **{**image_first, "help": argparse.SUPPRESS})
    p.add_argument(
        "--introduce",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add a sentence that says who is in an opening image, if the model's stories have one",
    )
    p.add_argument("--title")
    p.add_argument(
        "--out",
        help="the folder to write; if it holds another story, a free name beside it (default: that of --story, else "
        f"{DEFAULT_OUT})",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the story in --out")
    text_options(p), image_options(p), model_options(p)

    p = command("write", "Continues a story with text.")
    story_options(p), text_options(p), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many texts")

    p = command("draw", "Draws the next image of a story.")
    story_options(p), image_options(p), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many images; the k-th has seed + k")
    _add(p, "--init-image", "--begin", metavar="FILE", help="an image to start from")
    p.add_argument(
        "--denoise", type=float, help=f"how much of --init-image changes, up to 1 (default: {DEFAULT_DENOISE})"
    )
    p.add_argument("--out", default="out/image.png", help="the PNG to write (default: %(default)s)")

    p = command("ask", "Answers a question about the images of a story.")
    p.add_argument("question")
    story_options(p, grows=False)
    text_options(p, "the likeliest words, 30 at most"), model_options(p)
    p.add_argument("--option", action="append", help="rank given answers instead of writing one; may be repeated")

    p = command("caption", "Describes an image.")
    story_options(p, grows=False)
    text_options(p, "five beams, 30 tokens at most"), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many captions")

    p = command("convert", "Converts a checkpoint between the reference's layout and this project's.")
    p.add_argument("source", help="a checkpoint folder, starter or tiny-random")
    p.add_argument("target", help="a new folder")
    p.add_argument("--to", choices=("native", "reference", "own"), default="native", metavar="{native,reference}")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as they are)")

    p = command("info", "Shows what a checkpoint contains.")
    p.add_argument("source", help="a checkpoint folder, starter or tiny-random")
    return parser


# ---- from arguments to values ----


def _dtype(name: str | None):
    import torch

    return getattr(torch, name) if name else None


@dataclasses.dataclass
class _Opening:
    """The story that a command works on, and its settings: flags first, then the story's own, then the model's."""

    story: Story
    title: str
    model: str
    seed: int
    text_config: TextGenerationConfig
    image_config: ImageGenerationConfig


def _opening(args, text_config: TextGenerationConfig | None = None, required: bool = True) -> _Opening:
    """Everything that can be known before the model is loaded; raises for whatever does not fit.

    Args:
        text_config: The command's own settings, instead of the story's and the model's.
    """
    from .checkpoints.load import model_folder
    from .errors import StoryError
    from .generation.config import GenerationConfig, image_settings, read_generation_config, text_settings
    from .stories.page import load_book
    from .stories.story import ImageSegment, Story

    book = load_book(args.story) if args.story else None
    story, settings = (book.story, book.settings) if book else (Story(), {})
    for kind, value in args.opening or []:
        story = story.add(ImageSegment.of(value) if kind == "image" else value.strip())
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

    def saved(names: tuple[str, ...], read) -> dict:
        return read(next((settings[name] for name in names if name in settings), {}))

    if text_config is None:
        text_config = _replaced(generation.text, saved(("text_generation", "sampling"), text_settings))
    image_config = _replaced(generation.image, saved(("image_generation", "drawing"), image_settings))
    text_config = _replaced(text_config, {**_flags(args, TEXT_FLAGS), "seed": seed})
    if getattr(args, "greedy", False):
        text_config = _replaced(text_config, {"do_sample": False})
    flags = _flags(args, IMAGE_FLAGS)
    if flags.get("size"):
        width, cross, height = args.size.lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and len(args.size) < 20):
            raise SettingError(f"--size must be like 512x512, not {args.size!r:.60}.")
        flags["size"] = int(width), int(height)
    flags["denoise"] = _denoise(args)
    image_config = _replaced(image_config, {**flags, "seed": seed})
    return _Opening(story, book.title if book else "", model, seed, text_config, image_config)


def _flags(args, fields: dict[str, str]) -> dict:
    return {field: getattr(args, flag) for flag, field in fields.items() if getattr(args, flag, None) is not None}


def _replaced(settings, values: dict):
    """Settings with other values; raises SettingError also for values of a wrong type, as a file can have them."""
    try:
        return dataclasses.replace(settings, **values)
    except TypeError as error:
        raise SettingError(f"A setting has a value of a wrong type: {error}.") from None


def _denoise(args) -> float:
    denoise = getattr(args, "denoise", None)
    if denoise is None:
        return DEFAULT_DENOISE if getattr(args, "init_image", None) else 1.0
    if not args.init_image:
        raise SettingError(f"--denoise {denoise:g} requires --init-image.")
    return denoise


def _pipeline(args, opening: _Opening, *stories):
    """The model, with a note if these stories hold words, or the settings a size, that it was not trained on."""
    from .pipeline import MMInterleavedPipeline

    if opening.model in ("tiny-random", "untrained"):
        _print_status(f"Note: the model '{opening.model}' has random weights; its texts and images mean nothing.")
    pipeline = MMInterleavedPipeline.load(opening.model, args.device, _dtype(args.dtype), args.compile)
    _warn_unknown_words(pipeline, stories)
    size, trained = opening.image_config.size, pipeline.config.synchronizer.image_size
    if size is not None and size != (trained, trained) and pipeline.known_words is not None:
        _print_status(
            f"Note: this model was trained at {trained} x {trained} px; at other sizes it tends to repeat objects."
        )
    return pipeline


def _warn_unknown_words(pipeline, stories) -> None:
    words = list(dict.fromkeys(word for story in stories for word in pipeline.find_unknown_words(story)))
    if words:
        _print_status(
            f"Note: this model does not know the words {', '.join(words)}; it may continue with different words."
        )


# ---- output ----


def _print_status(line: str) -> None:
    sys.stderr.write(line + "\n")


def _emit(args, data: dict, text: str) -> int:
    sys.stdout.write((json.dumps(data) if args.json else text) + "\n")
    return 0


class _ProgressBars:
    """Progress on standard error: one bar for the current step, with the text so far behind it."""

    def __init__(self, quiet: bool):
        from tqdm import tqdm

        self.make = lambda total, label: tqdm(total=total, desc=label, leave=False, disable=quiet or None, unit="")
        self.bar, self.label = None, ""

    def _update(self, label: str, done: int, total: int):
        if self.bar is None or self.label != label or done <= self.bar.n:
            self.close()
            self.bar, self.label = self.make(total, label), label
        self.bar.update(done - self.bar.n)

    def on_step(self, done: int, total: int, _preview) -> None:
        self._update("drawing", done, total)

    def on_token(self, limit: int):
        def on_token(text: str) -> None:
            count = 1 if self.bar is None or self.label != "writing" else self.bar.n + 1
            self._update("writing", min(count, limit), limit)
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
    from .stories.storyboard import MAX_PANELS, StoryPlan, load_storyboard

    if args.panels is not None and not 1 <= args.panels <= MAX_PANELS:
        raise SettingError(f"--panels must be at least 1 and at most {MAX_PANELS}, not {args.panels}.")
    if args.storyboard:
        if args.opening or args.story:
            raise SettingError("--storyboard has its own openings; omit --text, --image and --story.")
        if args.title or args.panels or args.image_first is not None:
            raise SettingError(
                "A storyboard's stories have their own title, panels and image_first; omit --title, --panels and "
                "--image-first."
            )
        plans = load_storyboard(args.storyboard)
    opening = _opening(args, required=not args.storyboard)
    if not args.storyboard:
        title = opening.title if args.title is None else args.title
        plans = [StoryPlan(opening.story, args.panels or 3, title)]
    source = _folder_of(args.story) if args.story else None
    out = Path(args.out) if args.out else source or Path(DEFAULT_OUT)
    in_place = source is not None and has_book(out) and out.samefile(source)
    note = ""
    if has_book(out) and not (args.overwrite or in_place):
        out, occupied = free_name(out), out
        note = f"Note: {occupied} holds a story; writing to {out}. Use --overwrite to replace it."

    stories = []
    with output_folder(out):
        pipeline, bars = _pipeline(args, opening, *(plan.opening for plan in plans)), _ProgressBars(args.quiet)
        if note:
            _print_status(note)
        jobs = []
        for plan in plans:  # everything is checked before anything is drawn
            story = plan.opening
            if plan.steps is None:
                story = story.arrange(pipeline.text.resolve_image_first(story, args.image_first))
            configs = [c.with_seed_offset(plan.seed) for c in (opening.text_config, opening.image_config)]
            pipeline.validate_plan(story, plan.steps_after(story), *configs, args.drop_oldest_panels)
            jobs.append((plan, story, *configs))
        for number, (plan, story, text_config, image_config) in enumerate(jobs, 1):
            settings = {
                "model": opening.model,
                "seed": text_config.seed,
                "text_generation": to_file(text_config),
                "image_generation": to_file(image_config),
            }
            with contextlib.closing(bars), output_folder(out / f"{number:03d}" if args.storyboard else out) as folder:

                def save(story, folder=folder, plan=plan, settings=settings):
                    save_story(folder, story, plan.title, settings)

                if args.introduce and not args.story and plan.steps is None:
                    story = pipeline.introduce(story)
                    if len(story) > len(plan.opening):
                        _print_status(f"Note: the opening image is introduced as: {story.text.splitlines()[0]}")
                        save(story)
                pipeline.run_plan(
                    story,
                    plan.steps_after(story),
                    text_config,
                    image_config,
                    on_token=bars.on_token(text_config.max_new_tokens),
                    on_step=bars.on_step,
                    on_segment=save,
                    drop_oldest=args.drop_oldest_panels,
                )
            segments = json.loads((folder / "story.json").read_text(encoding="utf-8"))["segments"]
            stories.append({"folder": str(folder), "page": str(folder / "story.html"), "segments": segments})
    text = "\n".join(f"Open {story['page']}" for story in stories)
    return _emit(args, {"stories": stories}, text)


def _folder_of(story: str) -> Path:
    path = Path(story)
    return path if path.is_dir() else path.parent


def _write(args) -> int:
    opening = _opening(args)
    pipeline, bars = _pipeline(args, opening, opening.story), _ProgressBars(args.quiet)
    on_token = bars.on_token(opening.text_config.max_new_tokens)
    with contextlib.closing(bars):
        (texts,) = pipeline.generate_texts(
            [opening.story], opening.text_config, args.count, lambda _, text: on_token(text), args.drop_oldest_panels
        )
    records = [{"text": t.text, "finish_reason": t.finish_reason} for t in texts]
    return _emit(args, {"texts": records}, "\n".join(t.text for t in texts))


def _draw(args) -> int:
    from .files import atomic_write, output_folder
    from .stories.images import encode_png
    from .stories.story import ImageSegment

    opening, out = _opening(args), Path(args.out)
    if out.suffix.lower() != ".png":
        raise OutputError(f"--out must be a .png file, not {args.out!r}.")
    init_images = [ImageSegment.of(args.init_image)] if args.init_image else None
    with output_folder(out.parent):
        pipeline, bars = _pipeline(args, opening, opening.story), _ProgressBars(args.quiet)
        with contextlib.closing(bars):
            (images,) = pipeline.generate_images(
                [opening.story], opening.image_config, args.count, init_images, bars.on_step, args.drop_oldest_panels
            )
        names = [out if len(images) == 1 else out.with_stem(f"{out.stem}-{i}") for i in range(1, len(images) + 1)]
        for name, image in zip(names, images):
            atomic_write(name, encode_png(image.pixels))
    return _emit(args, {"images": [str(name) for name in names]}, "\n".join(map(str, names)))


def _ask(args) -> int:
    from .generation.text import ANSWER_CONFIG

    opening = _opening(args, ANSWER_CONFIG)
    if not args.question.strip():
        raise SettingError("The question must not be empty.")
    pipeline = _pipeline(args, opening)
    if args.option:
        ranked = pipeline.rank(opening.story, args.option, args.question)
        records = [dataclasses.asdict(option) for option in ranked]
        return _emit(args, {"ranking": records}, "\n".join(f"{o.log_prob:9.3f}  {o.text}" for o in ranked))
    answer = pipeline.answer(opening.story, args.question, opening.text_config)
    return _emit(args, {"answer": answer.text, "finish_reason": answer.finish_reason}, answer.text)


def _caption(args) -> int:
    from .generation.text import CAPTION_CONFIG

    opening = _opening(args, CAPTION_CONFIG)
    captions = _pipeline(args, opening).caption(opening.story, opening.text_config, args.count)
    records = [{"text": c.text, "finish_reason": c.finish_reason, "score": c.score} for c in captions]
    return _emit(args, {"captions": records}, "\n".join(c.text for c in captions))


def _convert(args) -> int:
    from .checkpoints.load import read
    from .checkpoints.native import save
    from .checkpoints.reference import save_reference

    saved = read(args.source)
    write = save_reference if args.to == "reference" else save
    write(args.target, saved.config, saved.blocks, saved.tokenizer, _dtype(args.dtype), saved.generation, saved.words)
    return _emit(args, {"folder": args.target}, f"Written: {args.target}")


def _info(args) -> int:
    from .checkpoints.load import read

    saved = read(args.source)
    config, tokenizer = saved.config, saved.tokenizer
    counts = {name: sum(t.numel() for t in tensors.values()) for name, tensors in saved.blocks.items()}
    data = {
        "layout": saved.layout,
        "parameters": counts,
        "tokenizer": tokenizer is not None,
        "image_size": config.synchronizer.image_size,
        "max_position_embeddings": config.llm.max_position_embeddings,
        "num_img_token": config.llm.num_img_token,
        "generation_config": saved.generation.to_dict(),
        "config": config.to_dict(),
    }
    lines = [f"{name:13}{count / 1e6:12,.2f} million parameters" for name, count in counts.items()]
    lines += [
        f"{'layout':13}{saved.layout:>12}",
        f"{'tokenizer':13}{'yes' if tokenizer else 'none':>12}",
        f"{'image':13}{config.synchronizer.image_size:>12} px",
        f"{'context':13}{config.llm.max_position_embeddings:>12} tokens, {config.llm.num_img_token + 1} per image",
    ]
    return _emit(args, data, "\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for what the user can fix, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not hold every character of a story
            stream.reconfigure(errors="replace")
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except MMInterleavedError as error:
        _print_status(f"Error: {error}")
        return 2
    except KeyboardInterrupt:
        _print_status("Stopped; what was finished is kept.")
        return 130
