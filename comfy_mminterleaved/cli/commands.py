"""The commands: what each does with its arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path

from .. import __version__
from ..errors import OutputError, SettingError
from .common import (
    ProgressBars,
    cache_dtype,
    emit,
    load_pipeline,
    parse_dtype,
    print_status,
    read_opening,
    story_record,
)
from .parser import DEFAULT_OUT
from .storyboard import queue, tell_storyboard

# ---- commands ----


def tell(args) -> int:
    from ..files import free_name, output_folder
    from ..generation.config import to_file
    from ..stories.page import has_book, save_story
    from ..stories.storyboard import MAX_PANELS, plan_panels

    if args.storyboard:
        return tell_storyboard(args)
    if args.restart or args.retry_failed or args.batch != "1" or args.ray is not None or args.workers is not None:
        raise SettingError(
            "--restart, --retry-failed, --batch, --ray and --workers are for a storyboard; give one with --storyboard."
        )
    if args.redraw is not None:
        return redraw(args)
    if args.panels is not None and not 1 <= args.panels <= MAX_PANELS:
        raise SettingError(f"--panels must be at least 1 and at most {MAX_PANELS}, not {args.panels}.")
    opening = read_opening(args)
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
        pipeline, bars = load_pipeline(args, opening, opening.story), ProgressBars(args.quiet)
        if note:
            print_status(note)
        story = opening.story.arrange(pipeline.text.resolve_image_first(opening.story, args.image_first))
        configs = text_config, image_config
        pipeline.validate_plan(story, plan_panels(story, panels), *configs, args.drop_oldest_panels)
        settings = {
            "model": opening.model,
            **({"lora": opening.lora} if opening.lora else {}),
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
        record = story_record(folder)
    return emit(args, {"stories": [record]}, f"Open {record['page']}")


def redraw(args) -> int:
    """One panel's image anew, from the panels before it and its own text."""
    from ..errors import StoryError
    from ..files import output_folder
    from ..stories.edit import panel_of, set_panel
    from ..stories.page import load_book, save_story

    if not args.story or args.opening or args.panels or args.title is not None or args.image_first is not None:
        raise SettingError(
            "--redraw draws one panel of a saved story: give that with --story, and omit --text, --image, --panels, "
            "--title and --image-first."
        )
    book = load_book(args.story)
    _, old, before = panel_of(book.story, args.redraw)
    if old is None:
        raise StoryError(f"Panel {args.redraw} of the story has no image to draw anew.")
    if args.seed is None:
        args.seed = ((old.seed or 0) + 1) % 2**63
    opening, out = read_opening(args), Path(args.out) if args.out else _folder_of(args.story)
    texts, _ = book.story.panel_segments()[args.redraw - 1]
    prefix = before if book.story.is_image_first else before.add(*texts)
    with output_folder(out) as folder:
        pipeline, bars = load_pipeline(args, opening, book.story), ProgressBars(args.quiet)
        with contextlib.closing(bars):
            image = pipeline.generate_image(
                prefix, opening.image_config, on_step=bars.on_step, drop_oldest=args.drop_oldest_panels
            )
        story = set_panel(book.story, args.redraw, image=dataclasses.replace(image, seed=args.seed))
        save_story(folder, story, book.title, book.settings)
        record = story_record(folder)
    return emit(args, {"stories": [record]}, f"Open {record['page']}")


def _folder_of(story: str) -> Path:
    path = Path(story)
    return path if path.is_dir() else path.parent


def write(args) -> int:
    opening = read_opening(args)
    pipeline, bars = load_pipeline(args, opening, opening.story), ProgressBars(args.quiet)
    on_token = bars.on_token(opening.text_config.max_new_tokens)
    with contextlib.closing(bars):
        (texts,) = pipeline.generate_texts(
            [opening.story], opening.text_config, args.count, lambda _, text: on_token(text), args.drop_oldest_panels
        )
    records = [{"text": t.text, "finish_reason": t.finish_reason} for t in texts]
    return emit(args, {"texts": records}, "\n".join(t.text for t in texts))


def draw(args) -> int:
    from ..files import atomic_write, output_folder
    from ..stories.images import encode_png
    from ..stories.story import ImageSegment

    opening, out = read_opening(args), Path(args.out)
    if out.suffix.lower() != ".png":
        raise OutputError(f"--out must be a .png file, not {args.out!r}.")
    init_images = [ImageSegment.of(args.init_image)] if args.init_image else None
    if args.refine is None:  # the model's default is for pages; here --size says how large the file is
        opening.image_config = dataclasses.replace(opening.image_config, refine=False)
    with output_folder(out.parent):
        pipeline, bars = load_pipeline(args, opening, opening.story), ProgressBars(args.quiet)
        with contextlib.closing(bars):
            (images,) = pipeline.generate_images(
                [opening.story], opening.image_config, args.count, init_images, bars.on_step, args.drop_oldest_panels
            )
        names = [out if len(images) == 1 else out.with_stem(f"{out.stem}-{i}") for i in range(1, len(images) + 1)]
        for name, image in zip(names, images):
            atomic_write(name, encode_png(image.display_pixels))
    return emit(args, {"images": [str(name) for name in names]}, "\n".join(map(str, names)))


def ask(args) -> int:
    from ..generation.text import ANSWER_CONFIG

    opening = read_opening(args, ANSWER_CONFIG)
    if not args.question.strip():
        raise SettingError("The question must not be empty.")
    pipeline = load_pipeline(args, opening)
    if args.option:
        ranked = pipeline.rank(opening.story, args.option, args.question)
        records = [dataclasses.asdict(option) for option in ranked]
        return emit(args, {"ranking": records}, "\n".join(f"{o.log_prob:9.3f}  {o.text}" for o in ranked))
    answer = pipeline.answer(opening.story, args.question, opening.text_config)
    return emit(args, {"answer": answer.text, "finish_reason": answer.finish_reason}, answer.text)


def caption(args) -> int:
    from ..generation.text import CAPTION_CONFIG

    opening = read_opening(args, CAPTION_CONFIG)
    captions = load_pipeline(args, opening).caption(opening.story, opening.text_config, args.count)
    records = [{"text": c.text, "finish_reason": c.finish_reason, "score": c.score} for c in captions]
    return emit(args, {"captions": records}, "\n".join(c.text for c in captions))


def export(args) -> int:
    from ..books.export import FORMATS, render_book
    from ..books.layout import PageConfig
    from ..files import atomic_write, output_folder
    from ..stories.page import load_book, save_story
    from ..stories.story import TextSegment

    names = [field.name for field in dataclasses.fields(PageConfig)]
    config = PageConfig(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    book, targets = load_book(args.book), [Path(name) for name in args.out]
    for path in targets:
        if path.suffix and path.suffix.lower() not in FORMATS:
            raise OutputError(f"A book can be written as {', '.join(FORMATS)} or a folder, not as {path.name!r:.80}.")
        is_taken = any(path.iterdir()) if path.is_dir() else path.exists()
        if is_taken and not args.overwrite:
            raise OutputError(f"{str(path)!r} already exists; choose another name, or give --overwrite.")
    title = book.title if args.title is None else args.title
    TextSegment(title)  # a title that is no text is said to be none
    logging.basicConfig(format="Note: %(message)s")  # captions that are cut, signs that are left out
    # All are made before any is written.
    books = {path: render_book(book.story, path.suffix.lower(), title, config) for path in targets if path.suffix}
    for path in targets:
        with output_folder(path.parent if path.suffix else path) as folder:
            if path.suffix:
                atomic_write(path, books[path])
            else:
                save_story(folder, book.story, title, book.settings, has_metadata=not args.no_metadata)
    return emit(args, {"files": [str(path) for path in targets]}, "\n".join(map(str, targets)))


def finetune(args) -> int:
    """Stories and settings are checked before the model is loaded."""
    import torch

    from ..finetune import FinetuneConfig, load_stories, story_panels
    from ..finetune import finetune as train
    from ..finetune.train import check_output
    from ..jobs.run_folder import stop_after_step
    from ..loading import resolve_device
    from ..pipeline import MMInterleavedPipeline

    flags = {
        "steps": args.steps,
        "batch_size": args.batch,
        "learning_rate": args.learning_rate,
        "rank": args.rank,
        "reconstruction_weight": args.reconstruction,
        "blocks": args.only and (args.only,),
        "seed": args.seed,
    }
    config = FinetuneConfig(**{name: value for name, value in flags.items() if value is not None})
    out = check_output(args.out)
    stories = [story for path in args.stories for story in load_stories(path)]
    count = len(story_panels(stories))
    dtype = parse_dtype(args.dtype)
    if dtype is None and resolve_device(args.device).type == "cuda":
        dtype = torch.bfloat16  # float16 has too small a range for gradients
    pipeline = MMInterleavedPipeline.load(args.model, args.device, dtype)
    print_status(f"Note: {count} panel{'s' * (count > 1)} to learn; {config.steps} steps of {config.batch_size}.")
    bars = ProgressBars(args.quiet)

    def on_step(done: int, total: int, losses: dict[str, float]) -> None:
        bars.update("training", done, total)

    with contextlib.closing(bars), stop_after_step() as should_stop:
        finished = train(pipeline, stories, out, config, on_step, should_stop)
    if not finished:
        print_status(f"Stopped; the same command goes on from {out.with_suffix('.state')}.")
        return 130
    return emit(args, {"file": str(out), "panels": count}, f"Written: {out}")


def convert(args) -> int:
    from ..checkpoints.load import fingerprint, is_large, read
    from ..checkpoints.native import save
    from ..checkpoints.reference import save_reference

    if args.quantize and args.to == "reference":
        raise SettingError("--quantize writes this project's layout; omit --to reference.")
    saved = read(args.source)
    if saved.layout == "dreamllm" and args.to == "reference":
        raise SettingError("A DreamLLM is converted to this project's layout; omit --to reference.")
    if saved.tokenizer is None and is_large(saved.config):
        print_status(
            "Note: the checkpoint has no tokenizer, so the model will read and write no text; put tokenizer.model of "
            f"lmsys/vicuna-13b-v1.3 into {Path(args.source) / 'llm'} and convert again."
        )
    source = fingerprint(args.source)
    options = {
        "fingerprint": source and f"{__version__} {source} {args.to} {args.dtype} {args.quantize}",
        **({} if args.to == "reference" else {"quantization": args.quantize, "systems": saved.systems}),
    }
    bars = ProgressBars(args.quiet)
    save_as = save_reference if args.to == "reference" else save
    with contextlib.closing(bars):
        save_as(
            args.target,
            saved.config,
            saved.blocks,
            saved.tokenizer,
            parse_dtype(args.dtype),
            saved.generation,
            saved.words,
            on_progress=lambda done, total: bars.update("writing MB", done // 10**6, total // 10**6),
            **options,
        )
    return emit(args, {"folder": args.target}, f"Written: {args.target}")


def info(args) -> int:
    from ..checkpoints.load import read
    from ..files import format_bytes
    from ..models.build import num_parameters

    saved = read(args.source)
    config, tokenizer = saved.config, saved.tokenizer
    plan = None
    if args.memory:
        from ..generation.placement import make_plan, parse_bytes

        plan = make_plan(config, parse_bytes(args.memory), cache_dtype=cache_dtype(args))
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
    return emit(args, data, "\n".join(lines))


def _dtype_name(tensors) -> str:
    """The dtype of most of a block's bytes."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[str(tensor.dtype)[6:]] = sizes.get(str(tensor.dtype)[6:], 0) + tensor.nbytes
    return max(sizes, key=sizes.get)


COMMANDS = {
    command.__name__: command for command in (tell, queue, write, draw, ask, caption, export, finetune, convert, info)
}
