"""Every pipeline on one model: model calls, seconds, peak memory, and when first frames are out.

    python benchmarks/pipelines.py --model nano --json pipelines.json --docs docs/pipelines.md

Each pipeline makes one clip with its own defaults in a fresh process, streamed to a file: `seconds`
are from the request to the last byte, weights read on the way, and `first` to the first segment,
which holds the first frames. Peak memory is the process's, or PyTorch's on a GPU. A pipeline whose
companions are not beside the model is reported as what it needs, and makes the exit code 1. With
--docs the table replaces the one between the file's marks.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from aiprod_core.errors import InputError
from aiprod_core.model.transformer import Transformer
from aiprod_pipelines import media
from aiprod_pipelines.catalog import PIPELINES, find_pipeline
from aiprod_pipelines.clip import peak_memory_mib
from aiprod_pipelines.streaming import write_stream

PROMPT = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."
MARKS = ("<!-- benchmarks/pipelines.py -->\n", "<!-- end -->\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES), choices=PIPELINES)
    parser.add_argument("--steps", type=int, help="where a pipeline leaves them open")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="a Markdown file with the marks")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # pipeline, folder of inputs
    options = parser.parse_args()
    if options.one is not None:
        name, folder = options.one
        print(json.dumps(measure(name, options.model, Path(folder), options.steps)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(options.model, Path(folder), options.steps)
        rows = [run(name, options, folder) for name in options.pipelines]
    result = {
        "model": options.model,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "pipelines": rows,
    }
    table = markdown(rows)
    print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.docs is not None:
        before, rest = options.docs.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        note = f"\n{options.model} on {result['machine']}:\n\n"
        options.docs.write_text(f"{before}{MARKS[0]}{note}{table}\n{MARKS[1]}{after}")
    return 0 if all("needs" not in row for row in rows) else 1


def make_inputs(model: str, folder: Path, steps: int | None) -> None:
    """A clip of the model's own, and its first and last frame: what the others start from."""
    pipeline = find_pipeline("one-stage").from_model(model)
    clip = pipeline(PROMPT, seed=1, num_inference_steps=steps, crf=10)
    frames = list(media.read_frames(clip.save(folder / "source.mp4")))
    for name, frame in (("first", frames[0]), ("last", frames[-1])):
        Image.fromarray(frame).save(folder / f"{name}.png")


def run(name: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", options.model, "--one", name, folder]
    command += ["--steps", str(options.steps)] if options.steps else []
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode == 0:
        return {"pipeline": name, **json.loads(finished.stdout.splitlines()[-1])}
    reason = finished.stderr.strip().splitlines()[-1]
    if not reason.startswith("error: "):
        raise RuntimeError(f"{name}: {finished.stderr}")
    return {"pipeline": name, "needs": reason.removeprefix("error: ")}


def measure(name: str, model: str, folder: Path, steps: int | None) -> dict[str, Any]:
    calls, original = [0], Transformer.forward

    def forward(self: Transformer, *args: Any, **arguments: Any) -> Any:
        calls[0] += 1
        return original(self, *args, **arguments)

    Transformer.forward = forward
    pipeline = find_pipeline(name).from_model(model)
    source = folder / "source.mp4"
    duration_s = media.probe(source).duration_s
    settings: dict[str, Any] = {
        "keyframes": {
            "keyframes": [
                (folder / "first.png", 0),
                (folder / "last.png", pipeline.models.profile.num_frames - 1),
            ]
        },
        "ic-lora": {"controls": [("canny", source)]},
        "audio-to-video": {"audio": source},
        "retake": {"source": source, "start_time": duration_s / 3, "end_time": duration_s / 1.5},
        "extend": {"source": source},
    }.get(name, {})
    if steps is not None and not pipeline.is_distilled:
        settings["num_inference_steps"] = steps
    started = time.monotonic()
    clip = pipeline(PROMPT, seed=1, **settings)
    if clip.latents.video is None:
        clip.save(folder / f"{name}.wav")
        first_s = total_s = time.monotonic() - started
    else:
        written = write_stream(clip.stream(), folder / f"{name}.mp4", started=started)
        first_s, total_s = written.first_segment_s, written.total_s
    shape = clip.request.shape
    picture = f"{shape.width}x{shape.height}, " if clip.latents.video is not None else ""
    return {
        "clip": f"{picture}{shape.num_frames} frames at {shape.fps:g}",
        "model_calls": calls[0],
        "seconds": round(total_s, 2),
        "first_seconds": round(first_s, 2),
        "peak_memory_mib": round(peak_memory_mib(pipeline.models.device)),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| pipeline | clip | model calls | seconds | first frames after | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "needs" in row:
            lines.append(f"| {row['pipeline']} | needs: {row['needs']} | | | | |")
            continue
        lines.append(
            f"| {row['pipeline']} | {row['clip']} | {row['model_calls']} | {row['seconds']} s | "
            f"{row['first_seconds']} s | {row['peak_memory_mib']} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
