"""How early a stream starts, what decoding holds in memory, and what tiles cost in quality.

    python benchmarks/streaming.py --model nano --pipeline distilled --json streaming.json

Memory is measured in fresh processes, one a length: the peak of resident memory while a clip is
decoded to frames, above what was resident before (model, libraries and latents). The clips are
random latents at the model's own size; their content does not matter for memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.tiling import decode_chunks, time_spans
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.stages import decode_video
from aiprod_pipelines.streaming import write_stream
from aiprod_pipelines.tiles import choose_tiling, free_memory

PROMPT = "A red rubber ball bounces up and down in a grey room, with a dull thud at each impact."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pipeline", default="distilled")
    parser.add_argument("--num-frames", type=int, default=97, help="of the streamed clip")
    parser.add_argument("--base-frames", type=int, default=97, help="the shorter of two lengths")
    parser.add_argument("--skip-stage-2", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--decode-only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode_only is not None:
        print(peak_of_decoding(options.model, options.decode_only))
        return
    result = {
        "model": options.model,
        "pipeline": options.pipeline,
        "device": str(ModelSet.open(options.model).device),
        **measure_stream(options),
        **measure_memory(options),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def measure_stream(options: argparse.Namespace) -> dict[str, Any]:
    """A clip streamed to a file, its own time to the first segment, and its tiles' quality."""
    pipeline = find_pipeline(options.pipeline).from_model(options.model)
    settings = {"num_frames": options.num_frames, "skip_stage_2": options.skip_stage_2}
    pipeline(PROMPT, skip_stage_2=options.skip_stage_2)  # loads and warms everything up
    progress = Progress()
    started = time.monotonic()
    clip = pipeline(PROMPT, progress=progress, **settings)
    denoised_s = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        written = write_stream(clip.stream(), Path(folder) / "clip.mp4", started=started)
    assert clip.latents.video is not None
    return {
        "num_frames": options.num_frames,
        "before_decoding_s": round(denoised_s, 3),
        "first_segment_s": round(written.first_segment_s, 3),
        "total_s": round(written.total_s, 3),
        "first_segment_share": round(written.first_segment_s / written.total_s, 3),
        **measure_tiles(clip.models, clip.latents.video),
    }


@torch.inference_mode()
def measure_tiles(models: ModelSet, latent: Tensor) -> dict[str, float]:
    """The streamed tiling against whole decoding: PSNR, and how much rougher time is at seams.

    The seam score is the mean change from frame to frame where tiles meet, over the same of the
    whole decoding: 1 means that no seam can be seen.
    """
    scale = models.profile.scale
    size = (
        (latent.shape[2] - 1) * scale.time + 1,
        latent.shape[3] * scale.height,
        latent.shape[4] * scale.width,
    )
    with models.video_decoder() as decoder:
        tiling = choose_tiling(
            "auto",
            decoder.config,
            scale,
            size,
            element_bytes=models.dtype.itemsize,
            free_bytes=free_memory(models.device),
            is_streamed=True,
        )
        latent = latent.to(models.device, models.dtype)
        draw = torch.Generator(models.device)
        whole = decoder(latent, generator=draw.manual_seed(0)).float().clamp(-1, 1)
        parts = list(decode_chunks(decoder, latent, tiling, generator=draw.manual_seed(0)))
        tiled = torch.cat(parts, dim=2).float().clamp(-1, 1)
        spans = time_spans(tiling.frames, latent.shape[2], scale.time)
    overlaps = [slice(b.pixels.start, a.pixels.stop) for a, b in pairwise(spans)]
    error = (tiled - whole).square().mean().clamp_min(1e-12)
    changes = [0.0, 0.0]
    for index, pixels in enumerate((tiled, whole)):
        steps = pixels.diff(dim=2).abs()
        changes[index] = sum(float(steps[:, :, overlap].mean()) for overlap in overlaps)
    return {
        "num_tiles": len(spans),
        "tiled_psnr_db": round(float(10 * torch.log10(4 / error)), 2),
        "seam_score": round(changes[0] / changes[1], 4) if overlaps else 1.0,
    }


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of decoding two lengths, one ten times the other, each in its own process."""
    peaks = {}
    for times in (1, 10):
        frames = times * (options.base_frames - 1) + 1
        command = [sys.executable, __file__, "--model", options.model, "--decode-only", str(frames)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[frames] = float(output.split()[-1])
    short, long = peaks.values()
    return {
        "decode_peak_mib": {str(frames): round(peak, 1) for frames, peak in peaks.items()},
        "decode_peak_ratio": round(long / short, 3),
    }


def peak_of_decoding(model: str, num_frames: int) -> float:
    """MiB above the resident memory before decoding, by the kernel's high-water mark on Linux, or
    by PyTorch's on a GPU."""
    models = ModelSet.open(model)
    shape = (
        (num_frames - 1) // models.profile.scale.time + 1,
        models.profile.height // models.profile.scale.height,
        models.profile.width // models.profile.scale.width,
    )
    latent = torch.randn(1, models.transformer_config.in_channels, *shape)
    for _ in decode_video(models, latent[:, :, :2], Progress()):
        pass  # loads the decoder and its libraries
    if models.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark
        before = resident("VmRSS")
    for _ in decode_video(models, latent, Progress(), is_streamed=True):
        pass
    if models.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20 - before
    return resident("VmHWM") - before


def resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


if __name__ == "__main__":
    main()
