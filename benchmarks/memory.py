"""What loading and running a large transformer holds in memory, on a checkpoint made for it.

    python benchmarks/memory.py --gigabytes 2 --json memory.json

A random transformer of the wanted size is written once, in bfloat16. Each way of loading it runs in
a fresh process: the peak of resident memory above what was resident before, over the size of the
file, after one call of the model that touches every weight. Block streaming also says how much of
the blocks was in memory at once and what a call costs over one with all weights in memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.convert import Entry, convert, write_safetensors
from aiprod_core.loader.networks import load_transformer
from aiprod_core.loader.offload import stream_from_file
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.types import Modality

WAYS = ("as it is", "fp8", "fp8 file", "int8", "int4", "streamed", "streamed fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=256, help="of the video in the call")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--folder", type=Path, help="for the checkpoint; default: temporary")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_way(options.one, options.folder, options.tokens)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        make_checkpoint(folder, options.gigabytes)
        found = {}
        for way in options.ways:
            command = [sys.executable, __file__, "--one", way, "--folder", str(folder)]
            command += ["--tokens", str(options.tokens)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[way] = json.loads(output.stdout.splitlines()[-1])
            print(way, found[way], file=sys.stderr)
        size = (folder / "large-dev.safetensors").stat().st_size
    result = {"bytes": size, "tokens": options.tokens, "ways": found}
    base = found.get("as it is")
    if base is not None:
        result["peak_over_size"] = round(base["peak_bytes"] / size, 3)
        for figures in found.values():
            figures["peak_over_as_it_is"] = round(figures["peak_bytes"] / base["peak_bytes"], 3)
            figures["call_over_as_it_is"] = round(figures["call_s"] / base["call_s"], 2)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """`large-dev.safetensors` in bf16 and its fp8 variant, written tensor by tensor."""
    config = config_of(24)
    per_block = count(config_of(2)) - count(config_of(1))
    layers = max(9, round((gigabytes * 2**30 / 2 - count(config_of(1))) / per_block) + 1)
    config = config_of(layers)
    with torch.device("meta"):
        network = Transformer(config)
    entries = [
        Entry(key_maps.TRANSFORMER.publish(name), tuple(tensor.shape), torch.bfloat16)
        for name, tensor in network.state_dict().items()
    ]
    generator = torch.Generator().manual_seed(0)

    def tensors(entries: list[Entry]) -> Any:
        for entry in entries:
            scale = entry.shape[-1] ** -0.5
            yield (torch.randn(entry.shape, generator=generator) * scale).bfloat16()

    path = folder / "large-dev.safetensors"
    write_safetensors(path, entries, tensors, {"config": {"transformer": config.to_metadata()}})
    convert(open_checkpoint(path), folder / "large-dev-fp8.safetensors", to_fp8_weights=True)


def config_of(num_layers: int) -> TransformerConfig:
    return TransformerConfig(
        num_attention_heads=12,
        attention_head_dim=64,
        audio_num_attention_heads=12,
        audio_attention_head_dim=32,
        num_layers=num_layers,
        cross_attention_dim=768,
        audio_cross_attention_dim=384,
    )


def count(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def one_way(way: str, folder: Path, tokens: int) -> dict[str, Any]:
    name = "large-dev-fp8" if "fp8 file" in way or way == "streamed fp8" else "large-dev"
    checkpoint = open_checkpoint(folder / f"{name}.safetensors")
    dtype = torch.bfloat16
    load: Callable[[], nn.Module]
    if way.startswith("streamed"):
        load = lambda: load_transformer(checkpoint, dtype=dtype, leaves_blocks=True)  # noqa: E731
    elif way in ("as it is", "fp8 file"):
        load = lambda: load_transformer(checkpoint, dtype=dtype)  # noqa: E731
    else:
        load = lambda: load_transformer(checkpoint, dtype=dtype, quantization=way)  # noqa: E731
    # The libraries' own memory, before the mark is set.
    warm = Transformer(config_of(1)).to(dtype)
    warm(*inputs(warm.config, tokens))
    del warm
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    started = time.monotonic()
    network = load()
    loaded_s = time.monotonic() - started
    stream = stream_from_file(network, checkpoint) if way.startswith("streamed") else None
    given = inputs(network.config, tokens)  # pyright: ignore[reportArgumentType]
    with torch.inference_mode():
        network(*given)
        peak = resident("VmHWM") - before
        started = time.monotonic()
        network(*given)
    figures = {
        "peak_bytes": peak,
        "load_s": round(loaded_s, 2),
        "call_s": round(time.monotonic() - started, 3),
    }
    if stream is not None:
        blocks = sum(
            info.num_bytes
            for key, info in checkpoint.tensors.items()
            if "transformer_blocks" in key
        )
        total = sum(info.num_bytes for info in checkpoint.tensors.values())
        resident_weights = stream.peak_bytes + total - blocks
        figures["resident_share"] = round(resident_weights / total, 3)
        stream.close()
    return figures


def inputs(config: TransformerConfig, tokens: int) -> tuple[Modality, Modality]:
    def one(count: int, axes: int, channels: int, width: int) -> Modality:
        return Modality(
            latent=torch.zeros(1, count, channels, dtype=torch.bfloat16),
            sigma=torch.ones(1),
            timesteps=torch.ones(1, 1, 1),
            positions=torch.zeros(1, axes, count, 2),
            context=torch.zeros(1, 64, width, dtype=torch.bfloat16),
        )

    video = one(tokens, 3, config.in_channels, config.width)
    return video, one(32, 1, config.audio_in_channels, config.audio_width)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


if __name__ == "__main__":
    main()
