"""Runs golden cases through the public loader and modules: `python -m aiprod_core.parity DIR`.

Prints a line a case and exits 0 only if every case passes; a case that cannot run has failed.
"""

import argparse
import importlib
import json
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.parity.case import Case

COMPONENTS = (
    "audio_vae",
    "conditioning",
    "connectors",
    "dfr",
    "diffusion_steps",
    "duration_head",
    "e2e",
    "guiders",
    "lora",
    "noisers",
    "patchifiers",
    "quantization",
    "schedulers",
    "tiling",
    "transformer",
    "upsampler",
    "video_vae",
    "vocoder",
)


@dataclass(frozen=True)
class Result:
    """How one case went. Errors are the largest over the case's outputs."""

    component: str
    case: str
    passed: bool
    max_abs: float
    max_rel: float
    atol: float
    rtol: float
    reason: str = ""

    def line(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return (
            f"{self.component:16} {self.case:36} abs {self.max_abs:9.2e}  rel {self.max_rel:9.2e}  "
            f"tol {self.atol:.0e}/{self.rtol:.0e}  {verdict}  {self.reason}".rstrip()
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aiprod_core.parity", description=__doc__)
    parser.add_argument("directory", type=Path, help="a folder laid out as the golden set")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--only", default="", help="run cases whose 'component/case' contains this")
    parser.add_argument(
        "--trace", action="store_true", help="print the trace of cases that cannot run"
    )
    arguments = parser.parse_args(argv)
    folders = sorted(path.parent for path in arguments.directory.rglob("case.json"))
    if not folders:
        print(f"{arguments.directory}: no case.json below this folder", file=sys.stderr)
        return 2
    results = []
    for folder in folders:
        if arguments.only in str(folder.relative_to(arguments.directory)):
            results.append(run_case(folder, trace=arguments.trace))
            print(results[-1].line(), flush=True)
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 1 if failed or not results else 0


@torch.no_grad()
def run_case(folder: Path, *, trace: bool = False) -> Result:
    """Runs and compares one case. Never raises: what cannot run is a failed result."""
    try:
        case = Case.read(folder)
    except Exception as error:
        return Result("?", folder.name, False, 0, 0, 0, 0, f"unreadable case.json: {error}")
    tolerance = case.description.get("tolerance") or {"atol": 0.0, "rtol": 0.0}

    def failure(reason: str) -> Result:
        return Result(case.component, case.name, False, 0, 0, *tolerance.values(), reason)

    if case.component not in COMPONENTS:
        return failure(f'no such component "{case.component}"')
    try:
        module = importlib.import_module(f"aiprod_core.parity.{case.component}")
        got = module.run(case)
        return compare(case, got)
    except Exception as error:  # the process boundary: a broken case must not hide the others
        if trace:
            traceback.print_exc()
        return failure(f"{type(error).__name__}: {error}")


def compare(case: Case, got: dict[str, Any]) -> Result:
    """`|got - want| <= atol + rtol |want|` for every output, equality for tables."""
    problems: list[str] = []
    max_abs = max_rel = 0.0
    wanted = {k: v for k, v in case.tensors.items() if k.startswith("out.") and k != "out.dummy"}
    if not wanted and not any(key.startswith("params.") for key in got):
        problems.append("the case has nothing that was checked")
    for key, want in wanted.items():
        if key not in got:
            problems.append(f"{key} was not computed")
        elif tuple(got[key].shape) != tuple(want.shape):
            problems.append(f"{key} is {list(got[key].shape)}, expected {list(want.shape)}")
        else:
            error, relative, is_close = _difference(got[key], want, *case.tolerance(key))
            max_abs, max_rel = max(max_abs, error), max(max_rel, relative)
            if not is_close:
                problems.append(f"{key} differs by {error:.2e}")
    for key, table in got.items():
        if key.startswith("params.") and _plain(table) != case.params[key[len("params.") :]]:
            problems.append(f"table {key} differs")
    for key, value in got.items():
        if key.startswith("mid.") and key in case.tensors and problems:
            want = case.tensors[key]
            if value.shape != want.shape or not _difference(value, want, *case.tolerance(key))[2]:
                problems.append(f"(already off at {key})")
    atol, rtol = case.description["tolerance"]["atol"], case.description["tolerance"]["rtol"]
    reason = "; ".join(problems)
    return Result(case.component, case.name, not problems, max_abs, max_rel, atol, rtol, reason)


def _difference(got: Tensor, want: Tensor, atol: float, rtol: float) -> tuple[float, float, bool]:
    if want.numel() == 0:
        return 0.0, 0.0, True
    got, want = got.detach().double(), want.double()
    error = (got - want).abs()
    is_close = bool((error <= atol + rtol * want.abs()).all())  # NaN compares false
    scale = max(float(want.abs().max()), 1e-12)
    return float(error.max()), float(error.max()) / scale, is_close


def _plain(table: Any) -> Any:
    """Tuples and integer keys as JSON has them."""
    return json.loads(json.dumps(table))


if __name__ == "__main__":
    sys.exit(main())
