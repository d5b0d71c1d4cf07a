"""What a run saves when the weights with adapters in them are remembered, and what keeping costs.

    python benchmarks/merged_adapters.py --json merged.json

Nano with its distilled LoRA, and a random transformer in bfloat16 with a LoRA on every linear of
its blocks. Each way runs in fresh processes, of which the median counts: without a cache, with an
empty one (adds up, and writes), and with what that has left. Time counts from the headers to
weights that were all read. Nano is below what is remembered by default, but not here.
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
from pathlib import Path
from typing import Any

import torch
from memory import make_checkpoint
from safetensors.torch import save_file

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.lora import open_lora
from aiprod_core.types import ScaleFactors
from aiprod_pipelines import components, recipe
from aiprod_pipelines.cache import Cache
from aiprod_pipelines.components import DTYPE_NAMES, ModelSet
from aiprod_pipelines.model_files import resolve_model
from aiprod_pipelines.request import ModelProfile

WAYS = ("no cache", "cold", "warm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.6, help="of the random transformer")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of the files; default: temporary")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_way(*options.one)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        large, large_lora = make_large(options.folder or Path(temporary), options)
        (nano,) = resolve_model("nano")
        nano_lora = nano.with_name("nano-distilled-lora-64.safetensors")
        cases = [
            ("nano", nano, nano_lora, "float32", ""),
            ("large", large, large_lora, "bfloat16", ""),
            ("large", large, large_lora, "float32", ""),
            ("large", large, large_lora, "float32", "int8"),
        ]
        found = []
        for name, model, lora, dtype, quantization in cases:
            seconds = {way: [] for way in WAYS}
            digests = set()
            for _ in range(options.repeats):
                with tempfile.TemporaryDirectory() as cache:
                    for way in WAYS:
                        run = in_a_process(cache, [way, str(model), str(lora), dtype, quantization])
                        seconds[way].append(run["seconds"])
                        digests.add(run["weights"])
                    kept_bytes = Cache(Path(cache)).info()["bytes"]
            case = {
                "model": name,
                "dtype": dtype,
                "quantization": quantization or None,
                "kept_bytes": kept_bytes,
                "bit_identical": len(digests) == 1,
                "seconds": {way: statistics.median(times) for way, times in seconds.items()},
                "all_seconds": seconds,
            }
            print(case, file=sys.stderr)
            found.append(case)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def in_a_process(cache: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", *arguments]
    environment = {**os.environ, "AIPROD_CACHE_DIR": cache}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def make_large(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    model, path = folder / "large-dev.safetensors", folder / "large-lora.safetensors"
    if path.exists():
        return model, path
    make_checkpoint(folder, options.gigabytes)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for key, info in open_checkpoint(model).tensors.items():
        if "transformer_blocks" not in key or not key.endswith(".weight") or len(info.shape) != 2:
            continue
        layer, (rows, columns) = key.removeprefix("model.").removesuffix(".weight"), info.shape
        down = torch.randn(options.rank, columns, generator=generator) * columns**-0.5
        up = torch.randn(rows, options.rank, generator=generator) * 0.01
        tensors[f"{layer}.lora_A.weight"] = down.bfloat16()
        tensors[f"{layer}.lora_B.weight"] = up.bfloat16()
    save_file(tensors, path)
    return model, path


def one_way(way: str, model: str, lora: str, dtype: str, quantization: str) -> dict[str, Any]:
    components.MIN_MERGED_WEIGHTS = 0
    checkpoint, adapter = open_checkpoint(model), open_lora(lora)
    models = ModelSet(
        name=model,
        checkpoint=checkpoint,
        profile=ModelProfile(ScaleFactors(8, 32, 32)),
        device=torch.device("cpu"),
        dtype=DTYPE_NAMES[dtype],
        keeps_loaded=False,  # a run of a model that is freed after its stage
        cache=None if way == "no cache" else Cache(Path(os.environ["AIPROD_CACHE_DIR"]), 4 * 2**30),
        quantization=quantization or None,
    )
    for path in (*checkpoint.paths, *adapter.checkpoint.paths):
        recipe.file_identity(path)  # once a process, for the clip's recipe in any case
    started = time.monotonic()
    with models.transformer([(adapter, 0.8)]) as network:
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.reshape(-1).view(torch.uint8)[::997].numpy().tobytes())
    return {"seconds": round(time.monotonic() - started, 2), "weights": digest.hexdigest()}


if __name__ == "__main__":
    main()
