"""How early a stream starts: the time to its first segment, against that to its last.

    python benchmarks/streaming.py --model nano --pipeline distilled --json streaming.json

What decoding holds in memory, and what its tiles cost in quality, is in tiling.py.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.streaming import write_stream

PROMPT = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pipeline", default="distilled")
    parser.add_argument("--num-frames", type=int, default=97, help="of the streamed clip")
    parser.add_argument("--skip-stage-2", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {
        "model": options.model,
        "pipeline": options.pipeline,
        "device": str(ModelSet.open(options.model).device),
        **measure_stream(options),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def measure_stream(options: argparse.Namespace) -> dict[str, Any]:
    """A clip streamed to a file, from the request on, after a first one has loaded everything."""
    pipeline = find_pipeline(options.pipeline).from_model(options.model)
    settings = {"num_frames": options.num_frames, "skip_stage_2": options.skip_stage_2}
    pipeline(PROMPT, skip_stage_2=options.skip_stage_2)  # loads and warms everything up
    progress = Progress()
    started = time.monotonic()
    clip = pipeline(PROMPT, progress=progress, **settings)
    denoised_s = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        written = write_stream(clip.stream(), Path(folder) / "clip.mp4", started=started)
    return {
        "num_frames": options.num_frames,
        "before_decoding_s": round(denoised_s, 3),
        "first_segment_s": round(written.first_segment_s, 3),
        "total_s": round(written.total_s, 3),
        "first_segment_share": round(written.first_segment_s / written.total_s, 3),
    }


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
