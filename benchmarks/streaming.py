"""How early a stream starts: the time to its first segment, against that to its last.

    python benchmarks/streaming.py --model nano --json streaming.json

Twice: a long clip in windows, which are made as the stream needs them, and a clip of one window,
which is denoised whole before its first frame. The goal, a share of at most a quarter, is for the
first: the other says what streaming gains where decoding is what takes long. Where the model has no
upsampler, one stage is measured, and the result says so.

What decoding holds in memory, and what its tiles cost in quality, is in tiling.py.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError
from aiprod_pipelines import companions
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.streaming import write_stream

PROMPT = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."
GOAL = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pipeline", default="distilled")
    parser.add_argument("--num-frames", type=int, default=193, help="of the long clip")
    parser.add_argument("--window-frames", type=int, default=25)
    parser.add_argument("--skip-stage-2", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="the median share counts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipeline = find_pipeline(options.pipeline).from_model(options.model)
    settings: dict[str, Any] = {"skip_stage_2": options.skip_stage_2 or not has_upsampler(pipeline)}
    pipeline(PROMPT, num_frames=options.window_frames, **settings)  # loads and warms everything up
    cases: dict[str, dict[str, Any]] = {
        "windows": {"num_frames": options.num_frames, "window_frames": options.window_frames},
        "one window": {"num_frames": options.window_frames},
    }
    result: dict[str, Any] = {
        "model": options.model,
        "pipeline": options.pipeline,
        "stages": 1 if settings["skip_stage_2"] else 2,
        "device": f"{pipeline.models.device}, {platform.machine()}",
    }
    for name, case in cases.items():
        runs = [measure(pipeline, case | settings) for _ in range(options.repeats)]
        runs.sort(key=lambda run: run["first_segment_share"])
        result[name] = case | runs[len(runs) // 2]
    result["reached"] = result["windows"]["first_segment_share"] <= GOAL
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    return 0 if result["reached"] else 1


def has_upsampler(pipeline: Pipeline) -> bool:
    try:
        companions.spatial_upsampler(pipeline.models.checkpoint, None)
        return True
    except InputError:
        return False


def measure(pipeline: Pipeline, settings: dict[str, Any]) -> dict[str, float]:
    """A clip streamed to a file, in seconds from the request on."""
    with tempfile.TemporaryDirectory() as folder:
        written = write_stream(pipeline.stream(PROMPT, **settings), Path(folder) / "clip.mp4")
    return {
        "first_segment_s": round(written.first_segment_s, 3),
        "total_s": round(written.total_s, 3),
        "first_segment_share": round(written.first_segment_s / written.total_s, 3),
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
