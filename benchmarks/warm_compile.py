"""What a second process waits for a compiled transformer, when the first has left its code.

    python benchmarks/warm_compile.py --json warm_compile.json

Each run is a fresh process with a cache folder of its own: cold with an empty one, warm with what
the cold run has left. Time counts from the loaded network to the end of its first call, in which
its blocks are compiled; the eager call's result is what theirs must be close to.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.kernels.apply import compile_blocks
from aiprod_core.types import Modality
from aiprod_pipelines.cache import Cache, keep_compiled_code
from aiprod_pipelines.components import ModelSet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=96, help="of the video in the call")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_run(options.model, options.tokens)))
        return
    pairs = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append([in_a_process(options, folder), in_a_process(options, folder)])
            kept_bytes = Cache(Path(folder)).info()["bytes"]
    ratios = [cold["first_call_s"] / warm["first_call_s"] for cold, warm in pairs]
    result = {
        "model": options.model,
        "tokens": options.tokens,
        "first_call_ratio": round(statistics.median(ratios), 2),
        "bit_identical": all(cold["result"] == warm["result"] for cold, warm in pairs),
        "kept_bytes": kept_bytes,
        "runs": pairs,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def in_a_process(options: argparse.Namespace, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", "--model", options.model]
    command += ["--tokens", str(options.tokens)]
    environment = {**os.environ, "AIPROD_CACHE_DIR": cache}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(output.stdout.splitlines()[-1])
    print(found, file=sys.stderr)
    return found


@torch.inference_mode()
def one_run(model: str, tokens: int) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    models = replace(ModelSet.open(model), cache=None)
    with models.transformer() as network:
        config = network.config
        video = random_modality(tokens, 3, config.in_channels, config.width, models)
        audio = random_modality(32, 1, config.audio_in_channels, config.audio_width, models)
        eager = network(video, audio)
        started = time.monotonic()
        keep_compiled_code(config)
        compile_blocks(network)
        compiled = network(video, audio)
        first_call_s = time.monotonic() - started
    digest = hashlib.sha256()
    for tensor in compiled:
        digest.update(tensor.float().cpu().numpy().tobytes())
    return {
        "first_call_s": round(first_call_s, 2),
        "graphs_found": counters["inductor"]["fxgraph_cache_hit"],
        "graphs_compiled": counters["inductor"]["fxgraph_cache_miss"],
        "largest_difference_to_eager": max(map(largest_difference, compiled, eager)),
        "result": digest.hexdigest(),
    }


def random_modality(count: int, axes: int, channels: int, width: int, models: ModelSet) -> Modality:
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(models.device, models.dtype)

    return Modality(
        latent=normal(1, count, channels),
        sigma=torch.ones(1, device=models.device),
        timesteps=torch.ones(1, 1, 1, device=models.device),
        positions=torch.rand(1, axes, count, 2, generator=generator).to(models.device),
        context=normal(1, 64, width),
    )


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


if __name__ == "__main__":
    main()
