"""The commands: what each does with its arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import OutputError, SettingError
from .parser import DEFAULT_DENOISE, DEFAULT_OUT

if TYPE_CHECKING:
    from ..generation.config import ImageGenerationConfig, TextGenerationConfig
    from ..stories.story import Story

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
    """Story and settings of a command, checked before the model is loaded; raises MMInterleavedError.

    Args:
        text_config: The command's own settings, instead of the story's and the model's.
    """
    from ..checkpoints.load import model_folder
    from ..errors import StoryError
    from ..generation.config import GenerationConfig, image_settings, read_generation_config, text_settings
    from ..stories.page import load_book
    from ..stories.story import ImageSegment, Story

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
    """Loads the model; prints a note if stories have words, or settings a size, that it was not trained on."""
    from ..pipeline import MMInterleavedPipeline, resolve_device

    if args.memory and resolve_device(args.device).type == "cpu":
        raise SettingError("--memory is of a card, but the model runs on the CPU; omit it.")
    if opening.model in ("tiny-random", "untrained"):
        print_status(f"Note: the model '{opening.model}' has random weights; its texts and images mean nothing.")
    pipeline = MMInterleavedPipeline.load(
        opening.model,
        args.device,
        _dtype(args.dtype),
        args.compile,
        args.memory,
        _cache_dtype(args),
        args.quantize,
        opening.image_config.size,
    )
    _note_large(pipeline)
    _warn_unknown_words(pipeline, stories)
    size, trained = opening.image_config.size, pipeline.config.synchronizer.image_size
    if size is not None and size != (trained, trained) and pipeline.known_words is not None:
        print_status(
            f"Note: this model was trained at {trained} x {trained} px; at other sizes it tends to repeat objects."
        )
    return pipeline


def _cache_dtype(args):
    import torch

    return torch.float8_e4m3fn if args.kv_cache == "fp8" else None


def _note_large(pipeline) -> None:
    """One line on how a large model is computed."""
    from ..checkpoints.load import is_large
    from ..files import format_memory

    if not is_large(pipeline.config):
        return
    plan = pipeline.placement.plan if pipeline.placement is not None else None
    where = f"on {pipeline.device}, in {str(pipeline.llm.soi_token.dtype)[6:]}"
    stored = pipeline.config.llm.quantization
    stored = f", from {stored} weights" if stored else ""
    if plan is None:
        print_status(f"Note: the model is computed {where}{stored}.")
    else:
        print_status(f"Note: the model is computed {where}{stored}; {plan.mode}, at most {format_memory(plan.peak)}.")


def _warn_unknown_words(pipeline, stories) -> None:
    words = list(dict.fromkeys(word for story in stories for word in pipeline.find_unknown_words(story)))
    if words:
        print_status(
            f"Note: this model does not know the words {', '.join(words)}; it may continue with different words."
        )


# ---- output ----


def print_status(line: str) -> None:
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

    def update(self, label: str, done: int, total: int):
        if self.bar is None or self.label != label or done < self.bar.n:
            self.close()
            self.bar, self.label = self.make(total, label), label
        self.bar.update(done - self.bar.n)

    def on_step(self, done: int, total: int, _preview) -> None:
        self.update("drawing", done, total)

    def on_token(self, limit: int):
        def on_token(text: str) -> None:
            count = 1 if self.bar is None or self.label != "writing" else self.bar.n + 1
            self.update("writing", min(count, limit), limit)
            self.bar.set_postfix_str(text[-60:].replace("\n", " "))

        return on_token

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


# ---- commands ----


def tell(args) -> int:
    from ..files import free_name, output_folder
    from ..generation.config import to_file
    from ..stories.page import has_book, save_story
    from ..stories.storyboard import MAX_PANELS, plan_panels

    if args.storyboard:
        return _tell_storyboard(args)
    if args.restart or args.retry_failed:
        raise SettingError("--restart and --retry-failed are for a storyboard; give one with --storyboard.")
    if args.panels is not None and not 1 <= args.panels <= MAX_PANELS:
        raise SettingError(f"--panels must be at least 1 and at most {MAX_PANELS}, not {args.panels}.")
    opening = _opening(args)
    title, panels = opening.title if args.title is None else args.title, args.panels or 3
    source = _folder_of(args.story) if args.story else None
    out = Path(args.out) if args.out else source or Path(DEFAULT_OUT)
    in_place = source is not None and has_book(out) and out.samefile(source)
    note = ""
    if has_book(out) and not (args.overwrite or in_place):
        out, occupied = free_name(out), out
        note = f"Note: {occupied} holds a story; writing to {out}. Use --overwrite to replace it."

    text_config, image_config = opening.text_config, opening.image_config
    with output_folder(out) as folder:
        pipeline, bars = _pipeline(args, opening, opening.story), _ProgressBars(args.quiet)
        if note:
            print_status(note)
        story = opening.story.arrange(pipeline.text.resolve_image_first(opening.story, args.image_first))
        configs = text_config, image_config
        pipeline.validate_plan(story, plan_panels(story, panels), *configs, args.drop_oldest_panels)
        settings = {
            "model": opening.model,
            "seed": text_config.seed,
            "text_generation": to_file(text_config),
            "image_generation": to_file(image_config),
        }

        def save(story):
            save_story(folder, story, title, settings)

        with contextlib.closing(bars):
            if args.introduce and not args.story:
                introduced = pipeline.introduce(story)
                if len(introduced) > len(story):
                    print_status(f"Note: the opening image is introduced as: {introduced.text.splitlines()[0]}")
                    save(introduced)
                story = introduced
            pipeline.run_plan(
                story,
                plan_panels(story, panels),
                *configs,
                on_token=bars.on_token(text_config.max_new_tokens),
                on_step=bars.on_step,
                on_segment=save,
                drop_oldest=args.drop_oldest_panels,
            )
        record = _told(folder)
    return _emit(args, {"stories": [record]}, f"Open {record['page']}")


def _told(folder: Path) -> dict:
    """What `--json` says of a story."""
    segments = json.loads((folder / "story.json").read_text(encoding="utf-8"))["segments"]
    return {"folder": str(folder), "page": str(folder / "story.html"), "segments": segments}


def _tell_storyboard(args) -> int:
    from ..batch import BatchSettings, Stopped, StoryboardRun, stop_after_step
    from ..checkpoints.load import fingerprint
    from ..files import free_name, locked, output_folder
    from ..stories.journal import DONE, FAILED, JOURNAL_FILE
    from ..stories.page import has_book
    from ..stories.report import duration
    from ..stories.storyboard import load_storyboard

    if args.opening or args.story:
        raise SettingError("--storyboard has its own openings; omit --text, --image and --story.")
    if args.title or args.panels or args.image_first is not None:
        raise SettingError(
            "A storyboard's stories have their own title, panels and image_first; omit --title, --panels and "
            "--image-first."
        )
    plans = load_storyboard(args.storyboard)
    opening = _opening(args, required=False)
    out, note = Path(args.out or DEFAULT_OUT), ""
    if has_book(out) and not (out / JOURNAL_FILE).exists() and not (args.overwrite or args.restart):
        out, occupied = free_name(out), out
        note = f"Note: {occupied} holds a story; writing to {out}. Use --overwrite to replace it."
    settings = BatchSettings(
        opening.model,
        fingerprint(opening.model),
        opening.text_config,
        opening.image_config,
        args.drop_oldest_panels,
        args.introduce,
    )
    busy = f"Another run is writing into {str(out)!r}; wait for it, or give another --out."
    with output_folder(out), locked(out / ".lock", busy):
        restart = args.restart or args.overwrite
        run = StoryboardRun(out, plans, settings, restart, args.retry_failed)
        pending = run.pending()
        if note:
            print_status(note)
        records = [run.record(number) for number in range(1, len(plans) + 1) if number not in pending]
        failed = sum(record.status == FAILED for record in records)
        if records:
            print_status(f"{len(records) - failed} of {len(plans)} stories are there already.")
        if failed:
            print_status(f"{failed} failed before; --retry-failed tries again.")
        bars, panels_left, seconds, num_panels = (
            _ProgressBars(args.quiet),
            sum(plans[n - 1].panels for n in pending),
            0.0,
            0,
        )

        def on_story(number: int, record) -> None:
            nonlocal panels_left, seconds, num_panels
            bars.close()
            panels_left -= plans[number - 1].panels
            seconds, num_panels = seconds + record.seconds, num_panels + record.panels
            title = plans[number - 1].title or f"story {number}"
            if record.status == FAILED:
                print_status(f"[{number}/{len(plans)}] {title} failed: {record.error}")
                return
            left = f"; about {duration(seconds / num_panels * panels_left)} left" if num_panels and panels_left else ""
            print_status(f"[{number}/{len(plans)}] {title}: {record.panels} panels, {duration(record.seconds)}{left}")

        stopped = False
        if pending:
            pipeline = _pipeline(args, opening, *(plans[n - 1].opening for n in pending))
            try:
                with contextlib.closing(bars), stop_after_step() as should_stop:
                    run.run(
                        pipeline,
                        should_stop,
                        on_story,
                        on_token=bars.on_token(opening.text_config.max_new_tokens),
                        on_step=bars.on_step,
                    )
            except Stopped:
                stopped = True
    records = run.journal.records
    stories, lines = [], []
    for number, plan in enumerate(plans, 1):
        record = records.get(number)
        status = record.status if record else "not begun"
        about = _told(run.story_folder(number)) if status == DONE else {"folder": str(run.story_folder(number))}
        if status == DONE:
            lines.append(f"Open {about['page']}")
        elif status == FAILED:
            about["error"] = record.error
            lines.append(f"Failed: {about['folder']}: {record.error}")
        stories.append({"title": plan.title, "status": status, **about})
    lines.append(f"All of them: {out / 'report.html'}")
    _emit(args, {"stories": stories, "report": str(out / "report.html")}, "\n".join(lines))
    if stopped:
        print_status("Stopped after the step at hand; the same command goes on.")
        return 130
    return 1 if any(story["status"] == FAILED for story in stories) else 0


def _folder_of(story: str) -> Path:
    path = Path(story)
    return path if path.is_dir() else path.parent


def write(args) -> int:
    opening = _opening(args)
    pipeline, bars = _pipeline(args, opening, opening.story), _ProgressBars(args.quiet)
    on_token = bars.on_token(opening.text_config.max_new_tokens)
    with contextlib.closing(bars):
        (texts,) = pipeline.generate_texts(
            [opening.story], opening.text_config, args.count, lambda _, text: on_token(text), args.drop_oldest_panels
        )
    records = [{"text": t.text, "finish_reason": t.finish_reason} for t in texts]
    return _emit(args, {"texts": records}, "\n".join(t.text for t in texts))


def draw(args) -> int:
    from ..files import atomic_write, output_folder
    from ..stories.images import encode_png
    from ..stories.story import ImageSegment

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


def ask(args) -> int:
    from ..generation.text import ANSWER_CONFIG

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


def caption(args) -> int:
    from ..generation.text import CAPTION_CONFIG

    opening = _opening(args, CAPTION_CONFIG)
    captions = _pipeline(args, opening).caption(opening.story, opening.text_config, args.count)
    records = [{"text": c.text, "finish_reason": c.finish_reason, "score": c.score} for c in captions]
    return _emit(args, {"captions": records}, "\n".join(c.text for c in captions))


def convert(args) -> int:
    from ..checkpoints.load import fingerprint, is_large, read
    from ..checkpoints.native import save
    from ..checkpoints.reference import save_reference

    if args.quantize and args.to == "reference":
        raise SettingError("--quantize writes this project's layout; omit --to reference.")
    saved = read(args.source)
    if saved.tokenizer is None and is_large(saved.config):
        print_status(
            "Note: the checkpoint has no tokenizer, so the model will read and write no text; put tokenizer.model of "
            f"lmsys/vicuna-13b-v1.3 into {Path(args.source) / 'llm'} and convert again."
        )
    source = fingerprint(args.source)
    options = {
        "fingerprint": source and f"{__version__} {source} {args.to} {args.dtype} {args.quantize}",
        **({} if args.to == "reference" else {"quantization": args.quantize}),
    }
    bars = _ProgressBars(args.quiet)
    save_as = save_reference if args.to == "reference" else save
    with contextlib.closing(bars):
        save_as(
            args.target,
            saved.config,
            saved.blocks,
            saved.tokenizer,
            _dtype(args.dtype),
            saved.generation,
            saved.words,
            on_progress=lambda done, total: bars.update("writing MB", done // 10**6, total // 10**6),
            **options,
        )
    return _emit(args, {"folder": args.target}, f"Written: {args.target}")


def info(args) -> int:
    from ..checkpoints.load import read
    from ..files import format_bytes
    from ..models.build import num_parameters

    saved = read(args.source)
    config, tokenizer = saved.config, saved.tokenizer
    plan = None
    if args.memory:
        from ..generation.placement import make_plan, parse_bytes

        plan = make_plan(config, parse_bytes(args.memory), cache_dtype=_cache_dtype(args))
    counts = num_parameters(config)
    sizes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in saved.blocks.items()}
    data = {
        "layout": saved.layout,
        "parameters": counts,
        "bytes": sizes,
        "quantization": config.llm.quantization,
        "tokenizer": tokenizer is not None,
        "image_size": config.synchronizer.image_size,
        "max_position_embeddings": config.llm.max_position_embeddings,
        "num_img_token": config.llm.num_img_token,
        "generation_config": saved.generation.to_dict(),
        "config": config.to_dict(),
        **({"plan": {**dataclasses.asdict(plan), "mode": plan.mode, "peak": plan.peak}} if plan else {}),
    }
    lines = [
        f"{n:13}{count / 1e6:12,.2f} million parameters{format_bytes(sizes[n]):>12}" for n, count in counts.items()
    ]
    lines += [
        f"{'layout':13}{saved.layout:>12}",
        f"{'LLM stored as':13}{config.llm.quantization or _dtype_name(saved.blocks['llm']):>12}",
        f"{'tokenizer':13}{'yes' if tokenizer else 'none':>12}",
        f"{'image':13}{config.synchronizer.image_size:>12} px",
        f"{'context':13}{config.llm.max_position_embeddings:>12} tokens, {config.llm.num_img_token + 1} per image",
    ]
    if plan:
        lines += ["", f"On a card of {args.memory}, with a full context, in float16:", plan.table()]
    return _emit(args, data, "\n".join(lines))


def _dtype_name(tensors) -> str:
    """The dtype of most of a block's bytes."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[str(tensor.dtype)[6:]] = sizes.get(str(tensor.dtype)[6:], 0) + tensor.nbytes
    return max(sizes, key=sizes.get)


COMMANDS = {command.__name__: command for command in (tell, write, draw, ask, caption, convert, info)}
