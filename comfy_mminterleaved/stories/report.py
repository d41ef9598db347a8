"""report.html of a storyboard's run: every story with thumbnails, times and failures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from ..files import atomic_write
from .journal import DONE, FAILED, QUEUED, StoryRecord
from .storyboard import StoryPlan

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222;
    background: #fafaf7; }
h1 { font-weight: 600; } a { color: inherit; }
section { background: #fff; border-radius: 8px; padding: .8rem 1rem; margin: 1rem 0; box-shadow: 0 1px 3px #0002; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; } h2 span { font-weight: 400; color: #667; margin-left: .6rem; }
.images { display: flex; flex-wrap: wrap; gap: 6px; } .images img { height: 110px; border-radius: 4px; }
.failed { border-left: 4px solid #c0392b; } .failed p { margin: 0; color: #922; }
@media (prefers-color-scheme: dark) { body { background: #1c1c1e; color: #ddd; } section { background: #2a2a2d; } }
"""


def write_report(folder: Path, plans: Sequence[StoryPlan], records: Mapping[int, StoryRecord]) -> Path:
    """Writes report.html beside the stories' folders; raises OutputError."""
    done = sum(record.status == DONE for record in records.values())
    failed = sum(record.status == FAILED for record in records.values())
    seconds = sum(record.seconds for record in records.values())
    summary = f"{done} of {len(plans)} stories, {failed} failed, {duration(seconds)}"
    sections = []
    for number, plan in enumerate(plans, 1):
        record, name = records.get(number), f"{number:03d}"
        title = html.escape(plan.title or f"Story {number}")
        if record is None:
            sections.append(f"<section><h2>{number}. {title}<span>not begun</span></h2></section>")
            continue
        if record.status == FAILED:
            sections.append(
                f'<section class="failed"><h2>{number}. {title}<span>failed</span></h2>'
                f"<p>{html.escape(record.error)}</p></section>"
            )
            continue
        link = f"{name}/story.html" if (folder / name / "story.html").exists() else f"{name}/"
        states = {DONE: duration(record.seconds), QUEUED: f"at {html.escape(record.server)}"}
        state = states.get(record.status, f"{record.panels} panels so far")
        images = "".join(
            f'<img src="{name}/{html.escape(quote(path.name))}" alt="" loading="lazy">'
            for path in sorted((folder / name).glob("*.*"))
            if path.suffix in (".png", ".jpg", ".webp")
        )
        sections.append(
            f'<section><h2><a href="{link}">{number}. {title}</a><span>{state}</span></h2>'
            f'<div class="images">{images}</div></section>'
        )
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Storyboard</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>Storyboard</h1><p>{summary}</p>\n" + "\n".join(sections) + "</body></html>\n"
    )
    path = folder / "report.html"
    atomic_write(path, page.encode("utf-8"))
    return path


def duration(seconds: float) -> str:
    """Like 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
