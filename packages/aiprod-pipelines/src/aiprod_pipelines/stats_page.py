"""The page of `aiprod stats --html`: the timeline of one run, and the trends of many.

One file that fetches nothing. Drawings are SVG; a bar that is pointed at says its figures.
"""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from jinja2 import Environment

from aiprod_pipelines.stats import DETAILS, Run, Span

WIDTH = 1000.0  # of a drawing, in its own units
ROW, GAP = 30.0, 4.0  # a row of the timeline
TREND_HEIGHT, MEMORY_HEIGHT = 190.0, 60.0
SHOWN = 60  # runs in the trends
COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d",
    "#ff9da6", "#8c8c8c",
)  # fmt: skip

TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>AIPROD runs</title>
<style>
 :root { color-scheme: light dark; }
 body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px;
        padding: 0 1rem; }
 h2 { margin: 2.2rem 0 .4rem; font-size: 1.15rem; }
 svg { width: 100%; display: block; overflow: visible; margin: .6rem 0; }
 svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
 svg text.in { fill: #fff; pointer-events: none; }
 svg .grid { stroke: currentColor; opacity: .15; }
 svg .line { fill: none; stroke: currentColor; stroke-width: 1.5; opacity: .7; }
 table { border-collapse: collapse; margin: .8rem 0; width: 100%; }
 td, th { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #8883; }
 td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
 .dim { opacity: .65; } .bad { color: #d1493f; }
 .key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 0; }
 .legend span.name { margin-right: 1.1em; white-space: nowrap; }
 .tiles { display: flex; flex-wrap: wrap; gap: 1.2rem 2.6rem; margin: 1rem 0; }
 .tiles b { display: block; font-size: 1.5rem; font-weight: 600; }
 .scroll { overflow-x: auto; }
</style>
<h1>AIPROD runs</h1>
<div class="tiles">
{% for tile in tiles %}<div><b>{{ tile.value }}</b><span class="dim">{{ tile.name }}</span></div>
{% endfor %}</div>

<h2>Run {{ run.id }}</h2>
<p class="dim">{{ run.about }}</p>
<svg viewBox="0 0 {{ width }} {{ timeline.height }}" role="img"
 aria-label="Timeline of the run's stages">
{% for tick in timeline.ticks %}
 <line class="grid" x1="{{ tick.x }}" x2="{{ tick.x }}" y1="0" y2="{{ timeline.height - 16 }}"/>
 <text x="{{ tick.x + 3 }}" y="{{ timeline.height - 4 }}">{{ tick.text }}</text>
{% endfor %}
{% for bar in timeline.bars %}
 <g><title>{{ bar.title }}</title>
 <rect x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}" rx="2"
  fill="{{ bar.colour }}" fill-opacity="{{ bar.opacity }}"/>
 {% if bar.text %}<text class="in" x="{{ bar.x + 5 }}" y="{{ bar.y + 19 }}">{{ bar.text }}</text>
 {% endif %}</g>
{% endfor %}
</svg>
<table>
<tr><th>stage</th><th class="n">seconds</th><th class="n">share</th><th class="n">held after</th>
<th class="n">energy</th><th>counts</th></tr>
{% for row in run.rows %}
<tr><td><span class="key" style="background:{{ row.colour }}"></span>{{ row.name }}</td>
<td class="n">{{ row.seconds }}</td><td class="n">{{ row.share }}</td>
<td class="n">{{ row.memory }}</td><td class="n">{{ row.energy }}</td><td>{{ row.counts }}</td></tr>
{% endfor %}
</table>

<h2>The last {{ trend.count }} runs</h2>
<p class="legend">{% for name, colour in legend %}<span class="name"><span class="key"
 style="background:{{ colour }}"></span>{{ name }}</span>{% endfor %}</p>
<svg viewBox="0 0 {{ width }} {{ trend.height }}" role="img"
 aria-label="Seconds by stage and peak memory of each run">
{% for tick in trend.ticks %}
 <line class="grid" x1="0" x2="{{ width }}" y1="{{ tick.y }}" y2="{{ tick.y }}"/>
 <text x="0" y="{{ tick.y - 3 }}">{{ tick.text }}</text>
{% endfor %}
{% for bar in trend.bars %}
 <g><title>{{ bar.title }}</title>
 <rect x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}"
  fill="{{ bar.colour }}"/></g>
{% endfor %}
 <polyline class="line" points="{{ trend.memory }}"/>
 <text x="0" y="{{ trend.memory_y }}">peak memory, up to {{ trend.most_memory }}</text>
</svg>
<div class="scroll"><table>
<tr><th>run</th><th>started</th><th>what</th><th>model</th><th>size</th><th class="n">seconds</th>
<th class="n">model calls</th><th class="n">peak</th><th class="n">energy</th><th>ended</th></tr>
{% for row in rows %}
<tr><td>{{ row.id }}</td><td>{{ row.started }}</td><td>{{ row.what }}</td><td>{{ row.model }}</td>
<td>{{ row.size }}</td><td class="n">{{ row.seconds }}</td><td class="n">{{ row.calls }}</td>
<td class="n">{{ row.peak }}</td><td class="n">{{ row.energy }}</td>
<td{% if row.status != "done" %} class="bad"{% endif %}>{{ row.status }}</td></tr>
{% endfor %}
</table></div>
<p class="dim">Bars and rows are wall time. Energy is what the machine's own counters showed
meanwhile, that of other programs included; "-" where there are none to read.</p>
</html>
"""


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str
    text: str = ""
    opacity: float = 1.0


def write_page(path: Path, runs: Sequence[Run], shown: Run) -> None:
    """Writes the page of `shown` and of the last `SHOWN` runs; an older file is replaced."""
    last = list(runs[-SHOWN:])
    names = dict.fromkeys(name for one in [shown, *last] for name in one.stages)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    text = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(TEMPLATE)
        .render(
            width=WIDTH,
            tiles=_tiles(runs),
            run={"id": shown.id, "about": about(shown), "rows": _stage_rows(shown, colours)},
            timeline=_timeline(shown, colours),
            legend=list(colours.items()),
            trend=_trend(last, colours),
            rows=[run_row(one) for one in reversed(last)],
        )
    )
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def run_row(one: Run) -> dict[str, str]:
    """A run's line in a table, as text."""
    facts = one.facts
    size = f"{facts['width']}x{facts['height']}x{facts['num_frames']}" if "width" in facts else "-"
    return {
        "id": one.id[:6],
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.start)),
        "what": " ".join(filter(None, (one.command, str(facts.get("pipeline", ""))))),
        "model": str(facts.get("model", "-")),
        "size": size,
        "seconds": f"{one.seconds:.2f}",
        "calls": str(one.counts.get("model_calls", "-")),
        "peak": _mib(one.peak_mib),
        "energy": _joules(one.energy_j),
        "status": one.status,
    }


def about(one: Run) -> str:
    row = run_row(one)
    parts = [row["what"], row["model"], row["size"], f"began {row['started']}", one.status]
    steps, device = one.facts.get("steps"), one.facts.get("device")
    parts += [f"{steps} steps"] if steps else []
    parts += [f"{device}, {one.facts.get('dtype')}"] if device else []
    parts.append(f"{one.seconds:.2f} s, of which {one.covered_share:.1%} in named stages")
    return "; ".join(parts)


def _tiles(runs: Sequence[Run]) -> list[dict[str, str]]:
    done = [one for one in runs if one.status == "done"]
    counts: dict[str, int] = {}
    for one in runs:
        for name, number in one.counts.items():
            counts[name] = counts.get(name, 0) + number
    asked = counts.get("cache_hits", 0) + counts.get("cache_misses", 0)
    tiles = [("runs", str(len(runs))), ("done", f"{len(done) / len(runs):.0%}")]
    if done:
        tiles.append(("median of those done", f"{median(one.seconds for one in done):.1f} s"))
    tiles.append(("model calls", f"{counts.get('model_calls', 0):,}"))
    if asked:
        tiles.append(("prompts and images known", f"{counts.get('cache_hits', 0) / asked:.0%}"))
    return [{"name": name, "value": value} for name, value in tiles]


def _stage_rows(one: Run, colours: dict[str, str]) -> list[dict[str, str]]:
    """Stages, and below them what was neither, where that is anything."""
    rows = []
    for name, seconds in one.stages.items():
        spans = [part for part in one.spans if part.name == name]
        family = spans + [part for part in one.spans if part.parent in {s.id for s in spans}]
        counts: dict[str, int] = {}
        for part in family:
            for key, number in part.counts.items():
                counts[key] = counts.get(key, 0) + number
        energy = [part.energy_j for part in spans if part.energy_j is not None]
        rows.append(
            {
                "name": name,
                "colour": colours[name],
                "seconds": f"{seconds:.3f}",
                "share": f"{seconds / one.seconds:.1%}" if one.seconds else "-",
                "memory": _mib(spans[-1].memory_mib),
                "energy": _joules(sum(energy) if energy else None),
                "counts": ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items()),
            }
        )
    rest = {"seconds": f"{one.seconds * (1 - one.covered_share):.3f}", "counts": ""}
    rest |= {"share": f"{1 - one.covered_share:.1%}", "memory": "", "energy": ""}
    return [*rows, {"name": "between stages", "colour": "transparent", **rest}]


def _timeline(one: Run, colours: dict[str, str]) -> dict[str, Any]:
    scale = WIDTH / max(one.seconds, 1e-6)
    by_id = {part.id: part for part in one.spans}
    bars, deepest = [], 0
    for number, part in enumerate(one.spans):
        depth, stage = _depth(part, by_id)
        deepest = max(deepest, depth)
        width = max(part.seconds * scale, 0.6)
        text = part.name if width > 7 * len(part.name) + 10 else ""
        opacity = 1.0 if part.name not in DETAILS else (0.55 if number % 2 else 0.75)
        counts = "".join(f", {k.replace('_', ' ')} {v}" for k, v in part.counts.items())
        title = f"{part.name}: {part.seconds:.3f} s from {part.at:.3f} s{counts}"
        title += f", {part.memory_mib:g} MiB held after"
        y = depth * (ROW + GAP)
        colour = colours.get(stage, COLOURS[-1])
        bars.append(Bar(part.at * scale, y, width, ROW, colour, title, text, opacity))
    height = (deepest + 1) * (ROW + GAP) + 20
    step = _round_step(one.seconds / 8)
    ticks = [
        {"x": i * step * scale, "text": f"{i * step:g} s"}
        for i in range(int(one.seconds / step) + 1)
    ]
    return {"height": height, "bars": bars, "ticks": ticks}


def _depth(part: Span, by_id: dict[int, Span]) -> tuple[int, str]:
    """How deep a span lies, and the stage whose colour it has."""
    depth, stage, at = 0, part, part
    while at.parent in by_id:
        if stage.name in DETAILS:
            stage = by_id[at.parent]
        depth, at = depth + 1, by_id[at.parent]
    return depth, stage.name


def _trend(runs: Sequence[Run], colours: dict[str, str]) -> dict[str, Any]:
    most = max((one.seconds for one in runs), default=1.0) or 1.0
    pitch = WIDTH / max(len(runs), 12)
    bars = []
    for number, one in enumerate(runs):
        y = TREND_HEIGHT
        for name, seconds in one.stages.items():
            height = max(seconds, 0.0) / most * (TREND_HEIGHT - 14)
            y -= height
            title = f"{one.id[:6]} {one.command} {one.facts.get('pipeline', '')}: {name} "
            title += f"{seconds:.2f} of {one.seconds:.2f} s, {one.status}"
            bars.append(Bar(number * pitch, y, pitch * 0.8, height, colours[name], title))
    step = _round_step(most / 3)
    ticks = [
        {"y": TREND_HEIGHT - i * step / most * (TREND_HEIGHT - 14), "text": f"{i * step:g} s"}
        for i in range(int(most / step) + 1)
    ]
    known = [(i, one.peak_mib) for i, one in enumerate(runs) if one.peak_mib is not None]
    most_memory = max((peak for _, peak in known), default=1.0) or 1.0
    bottom = TREND_HEIGHT + 30 + MEMORY_HEIGHT
    points = [
        f"{(i + 0.4) * pitch:.1f},{bottom - peak / most_memory * MEMORY_HEIGHT:.1f}"
        for i, peak in known
    ]
    return {
        "count": len(runs),
        "height": bottom + 6,
        "bars": bars,
        "ticks": ticks,
        "memory": " ".join(points),
        "memory_y": TREND_HEIGHT + 22,
        "most_memory": _mib(most_memory),
    }


def _round_step(at_least: float) -> float:
    """The next of 1, 2, 5, 10, ... and their tenths."""
    if at_least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= at_least)


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} MiB"


def _joules(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} J"
