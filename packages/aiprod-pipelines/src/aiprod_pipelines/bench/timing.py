"""Paired times, the floor under a piece of work, and the rates of the machine.

Two ways to compute the same thing are run in turns, A B A B, so that both meet the same machine;
a ratio is the median over the turns. No time counts before the outputs were found equal.

The floor of a piece of work is the time of its matrix products, attentions and convolutions alone:
they are recorded in one run with their tensors, and replayed one after the other.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], Any]


class UnequalError(Exception):
    """The two sides of a comparison compute different things, so their times mean nothing."""


@dataclass(frozen=True)
class Paired:
    """Seconds of each turn, and how far the outputs were apart."""

    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]
    max_error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over the turns."""
        return statistics.median(
            theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": round(self.ratio, 3),
            "ours_median_s": round(statistics.median(self.ours_s), 5),
            "theirs_median_s": round(statistics.median(self.theirs_s), 5),
            "ours_s": [round(seconds, 5) for seconds in self.ours_s],
            "theirs_s": [round(seconds, 5) for seconds in self.theirs_s],
            "max_error": self.max_error,
            "tolerance": self.tolerance,
        }


def paired(ours: Run, theirs: Run, *, turns: int, tolerance: float, clock: str = "wall") -> Paired:
    """Runs both once for warmth and for their outputs, then in turns.

    Each returns a tensor or a sequence of tensors. `tolerance` is the largest absolute difference
    over the largest absolute value of theirs. Raises UnequalError beyond it.
    """
    error = relative_error(ours(), theirs())
    if not error <= tolerance:
        raise UnequalError(
            f"outputs differ by {error:.2g} of their size, more than {tolerance:.2g}"
        )
    times = [(seconds(ours, clock), seconds(theirs, clock)) for _ in range(turns)]
    mine, others = zip(*times, strict=True)
    return Paired(mine, others, error, tolerance)


def seconds(run: Run, clock: str = "wall") -> float:
    """Of the wall, or of the processor: what a run takes of it while others use it too."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    synchronise()
    start = now()
    run()
    synchronise()
    return now() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative_error(ours: Any, theirs: Any) -> float:
    pairs = list(zip(_tensors(ours), _tensors(theirs), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            raise UnequalError(f"outputs have shapes {list(a.shape)} and {list(b.shape)}")
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def _tensors(value: Any) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for v in value if v is not None]


def peak_memory_mib(run: Run) -> float | None:
    """What a run takes above what was taken before; None where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would hide the peak
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    run()
    return round(_resident("VmHWM") - before, 1)


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


# The floor.

PRODUCTS = {"aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise"}
ATTENTIONS = {
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
CONVOLUTIONS = {
    *(f"aten::conv{n}d" for n in (1, 2, 3)),
    "aten::conv_transpose1d",
    "aten::convolution",
    "aiprod::winograd",
}


class Recorder(TorchDispatchMode):
    """Within it, every product, attention and convolution is kept with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.flops = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.name().split(".")[0]
        if name in PRODUCTS | ATTENTIONS | CONVOLUTIONS:
            self.calls.append((func, args, kwargs))
            first = out[0] if isinstance(out, tuple) else out
            self.flops += _flops(name, args, first)
            tensors = [a for a in (*args, first) if isinstance(a, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out

    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def _flops(name: str, args: tuple[Any, ...], out: Tensor) -> int:
    if name in ATTENTIONS:
        query, key = args[:2]
        return 4 * query.numel() * key.shape[-2]
    if name in CONVOLUTIONS:
        x, weight = [a for a in args if isinstance(a, Tensor) and a.ndim > 1][:2]
        if name == "aiprod::winograd":  # a quarter of a direct convolution's multiplications
            return 2 * out.numel() * weight[0].numel() // 4
        if "transpose" in name:  # every input is spread over the kernel
            return 2 * x.numel() * weight[0].numel()
        return 2 * out.numel() * weight[0].numel()
    left = args[1] if name == "aten::addmm" else args[0]
    return 2 * out.numel() * left.shape[-1]


@dataclass(frozen=True)
class Rates:
    """What this machine reaches, measured now: of a large product, and of copying memory."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, recorder: Recorder) -> float:
        """The least time of the recorded work: whichever of arithmetic and memory takes longer."""
        return max(recorder.flops / self.flops_per_s, recorder.bytes / self.bytes_per_s)


def measure_rates(
    device: torch.device, dtype: torch.dtype, clock: str = "wall", repeats: int = 5
) -> Rates:
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product: Run = lambda: torch.nn.functional.linear(a, b)  # noqa: E731
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        product = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # noqa: E731
    source = torch.empty(64 * 2**20, device=device)  # 256 MiB
    target = torch.empty_like(source)
    with torch.inference_mode():
        product()
        product_s = min(seconds(product, clock) for _ in range(repeats))
        copy_s = min(seconds(lambda: target.copy_(source), clock) for _ in range(repeats))
    return Rates(2 * size**3 / product_s, 2 * 4 * source.numel() / copy_s)
