"""The page of an evaluation: figures against their goals, then clips with their contact sheets.

A folder with `index.html` and PNG files; nothing is fetched from elsewhere, and clips are linked
where they lie.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from aiprod_pipelines.media import Audio, resample
from aiprod_pipelines.metrics.report import read_clip
from aiprod_trainer.evaluation.scores import GOALS, Row, is_reached
from aiprod_trainer.world.contact_sheet import contact_sheet, write_png
from aiprod_trainer.world.sound import SAMPLE_RATE

SHOWN = 24  # of the worst and of the best

TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
 :root { color-scheme: light dark; }
 body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1640px;
        padding: 0 1rem; }
 table { border-collapse: collapse; margin: 1rem 0; }
 td, th { padding: .15rem .9rem .15rem 0; text-align: left; }
 td.n { text-align: right; font-variant-numeric: tabular-nums; }
 .yes { color: #2a9d4a; } .no { color: #d1493f; } .dim { opacity: .65; }
 article { margin: 0 0 1.6rem; } article p { margin: .2rem 0; }
 img { width: 100%; display: block; border-radius: 4px; }
</style>
<h1>{{ title }}</h1>
<p class="dim">{{ subtitle }}</p>
{% if scores %}
<table>
<tr><th>figure</th><th>value</th><th>goal</th><th></th></tr>
{% for line in scores %}
<tr><td>{{ line.name }}</td><td class="n">{{ line.value }}</td><td class="n">{{ line.goal }}</td>
<td class="{{ line.mark }}">{{ {"yes": "reached", "no": "missed"}.get(line.mark, "") }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for clip in section.clips %}
<article>
 <p><b>{{ clip.prompt }}</b></p>
 <p>{% for word, is_right in clip.right %}
  <span class="{{ "yes" if is_right else "no" }}">{{ word }}</span>{% endfor %}
  <span class="dim">{{ clip.facts }}</span>
  <a href="{{ clip.link }}">{{ clip.name }}</a></p>
 <img loading="lazy" src="{{ clip.sheet }}"
  alt="Frames in a row, spectrogram and waveform below them.">
</article>
{% endfor %}
{% endfor %}
<p class="dim">Sheets: frames in order of time, spectrogram (60 Hz upwards, 60 dB), waveform (left
above, right below). White ticks: heard events; yellow: seen ones.</p>
</html>
"""


def write_page(
    folder: Path, rows: Sequence[Row], *, title: str, subtitle: str, scores: dict[str, Any]
) -> Path:
    """Writes `index.html` and its sheets and returns its path.

    Judged clips are shown best and worst by what they got right, others worst fault first.
    """
    worst_first = sorted(rows, key=_badness, reverse=True)
    is_judged = any(row.score is not None for row in rows)
    if is_judged and len(rows) > SHOWN:
        count = min(SHOWN, len(rows) // 2)
        parts = {
            f"The {count} worst": worst_first[:count],
            f"The {count} best": worst_first[-count:][::-1],
        }
    else:
        parts = {"Worst first": worst_first[: 2 * SHOWN]}
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    sections = [
        {"title": name, "clips": [_entry(row, rows.index(row), folder) for row in chosen]}
        for name, chosen in parts.items()
    ]
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    text = template.render(title=title, subtitle=subtitle, sections=sections, scores=_lines(scores))
    page = folder / "index.html"
    temporary = page.with_name("index.html.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, page)
    return page


def _badness(row: Row) -> tuple[float, float, float]:
    """What is wrong first, then the sync error, then the faults of picture and sound."""
    wrong = 0.0 if row.score is None else 1 - row.score
    return wrong, row.sync_ms or 0.0, sum(row.report.faults.values())


def _entry(row: Row, number: int, folder: Path) -> dict[str, Any]:
    name = f"{number:04}.png"
    write_png(folder / "sheets" / name, _sheet(row))
    facts = []
    if row.sync_ms is not None:
        facts.append(f"sync {row.sync_ms:.0f} ms")
    facts += [f"{fault} {severity:.2f}" for fault, severity in row.report.faults.items()]
    loudness = row.report.figures.get("loudness_lufs")
    if loudness is not None:
        facts.append(f"{loudness:.1f} LUFS")
    return {
        "prompt": row.prompt or row.file.name,
        "right": sorted(row.right.items(), key=lambda item: item[1]),
        "facts": " | ".join(facts),
        "link": os.path.relpath(row.file, folder),
        "name": row.file.name,
        "sheet": f"sheets/{name}",
    }


def _sheet(row: Row) -> np.ndarray:
    frames, fps, audio = read_clip(row.file)
    if frames is None:  # a sound alone: a dark strip keeps the time axis
        assert audio is not None
        fps = 12.0
        frames = np.full((max(round(audio.duration_s * fps), 1), 16, 128, 3), 18, np.uint8)
    if audio is None:
        audio = Audio(
            np.zeros((2, round(len(frames) / fps * SAMPLE_RATE)), np.float32), SAMPLE_RATE
        )
    audio = resample(audio, SAMPLE_RATE, channels=2)
    seen, heard = (row.verdict.seen_s, row.verdict.heard_s) if row.verdict else ((), ())
    return contact_sheet(frames, audio.samples, fps=fps, seen_s=seen, heard_s=heard)


def _lines(scores: dict[str, Any]) -> list[dict[str, str]]:
    lines = []
    for name, value in scores.items():
        if not isinstance(value, int | float) or name.endswith(("_n", "_due")):
            continue
        reached = is_reached(name, value)
        low, high = GOALS.get(name, (None, None))
        goal = f"at least {low:g}" if low is not None else f"at most {high:g}" if high else ""
        count = scores.get(f"{name}_n")
        lines.append(
            {
                "name": name,
                "value": f"{value:g}" + (f" of {count}" if count is not None else ""),
                "goal": goal,
                "mark": {True: "yes", False: "no"}.get(reached, "") if reached is not None else "",
            }
        )
    return lines
