"""The report of a prepared folder: one HTML page with counts, what was left out, and every clip."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from aiprod_trainer.dataset.clips import Settings, thumbnail_name
from aiprod_trainer.dataset.journal import write_whole

if TYPE_CHECKING:
    from aiprod_trainer.dataset.prepare import Row

STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; }
th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #8884; border-radius: 6px; overflow: hidden; }
figure img { width: 100%; display: block; background: #0008; }
figcaption { padding: .5rem .75rem; overflow-wrap: anywhere; }
.facts { opacity: .7; font-size: .85em; } .warning { color: #b3540b; font-size: .85em; }
@media (prefers-color-scheme: dark) { .warning { color: #f0a35e; } }
"""


def write_report(folder: Path, rows: Sequence["Row"], settings: Settings, model: str) -> None:
    """Writes report.html, which shows thumbnails/ beside it. The same rows give the same bytes."""
    kept = [row for row in rows if row.state == "kept"]
    skipped = [row for row in rows if row.state == "skipped"]
    doubles = [row for row in rows if row.state == "duplicate"]
    warned = Counter(_kind(text) for row in kept for text in row.record["warnings"])
    counts = [("clips in the table", len(rows)), ("kept", len(kept))]
    counts += [("skipped", len(skipped)), ("duplicates", len(doubles))]
    counts += [(f"kept, but {kind}", number) for kind, number in sorted(warned.items())]
    by_bucket = Counter((row.record["bucket"], row.record["has_audio"]) for row in kept)
    seconds = {bucket: bucket.num_frames / settings.fps for bucket in settings.buckets}
    buckets = [
        (
            str(bucket),
            "with sound" if has_audio else "silent",
            by_bucket[str(bucket), has_audio],
            f"{by_bucket[str(bucket), has_audio] * seconds[bucket]:.1f} s",
        )
        for bucket in settings.buckets
        for has_audio in (True, False)
        if by_bucket[str(bucket), has_audio]
    ]
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{len(kept)} clips prepared</title><style>{STYLE}</style>",
        f"<h1>{len(kept)} clips prepared for {escape(Path(model).name)} "
        f"at {settings.fps:g} frames a second</h1>",
        _table((), counts),
        "<h2>Buckets</h2>",
        _table(("size", "sound", "clips", "of them used"), buckets),
    ]
    if skipped:
        page += ["<h2>Skipped</h2>", _table((), [(r.clip.name, str(r.reason)) for r in skipped])]
    if doubles:
        page += ["<h2>Duplicates</h2>", _table((), [(r.clip.name, str(r.reason)) for r in doubles])]
    page += ['<h2>Clips</h2><div class="clips">', *map(_figure, kept), "</div></html>"]
    write_whole(folder / "report.html", "\n".join(page).encode())


def _figure(row: "Row") -> str:
    record = row.record
    facts = [f"{record['width']}x{record['height']}"] if record["has_video"] else []
    facts += [f"{record['duration_s']:.2f} s", "sound" if record["has_audio"] else "silent"]
    facts += [f"bucket {record['bucket']}", f"part {row.part}"]
    lines = [f"<strong>{escape(row.clip.name)}</strong>", *map(escape, row.clip.captions)]
    lines.append(f'<span class="facts">{escape(", ".join(facts))}</span>')
    lines += [f'<span class="warning">{escape(text)}</span>' for text in record["warnings"]]
    return (
        f'<figure><img loading="lazy" alt="" src="thumbnails/{thumbnail_name(record)}">'
        f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> str:
    lines = ["".join(f"<th>{escape(name)}</th>" for name in header)] if header else []
    lines += ["".join(map(_cell, row)) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(value: str | int) -> str:
    if isinstance(value, int):
        return f'<td class="number">{value}</td>'
    return f"<td>{escape(value)}</td>"


def _kind(warning: str) -> str:
    """A warning without its figures, to count by."""
    words = [word for word in warning.split() if not word[0].isdigit() and word != "times"]
    return " ".join(words).removeprefix("of ")
