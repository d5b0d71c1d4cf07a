"""Golden tables of tile intervals, blend masks and default tile sizes."""

import re
from typing import Any

from aiprod_core import tiling
from aiprod_core.parity.case import Case
from aiprod_core.types import ScaleFactors

RELEASED = ScaleFactors(8, 32, 32)


def run(case: Case) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if "intervals" in case.params:
        out["params.intervals"] = {key: split(key) for key in case.params["intervals"]}
    if "auto_conv_tiling" in case.params:
        table = case.params["auto_conv_tiling"]
        rows = {size: default_row(size, table["columns"]) for size in table["table"]}
        out["params.auto_conv_tiling"] = {**table, "table": rows}
    for key in case.tensors:
        if match := re.fullmatch(r"out\.trapezoid_(\d+)_(\d+)_(\d+)_(True|False)", key):
            length, left, right = map(int, match.groups()[:3])
            from_zero = match[4] == "True"
            out[key] = tiling.trapezoid(length, left, right, from_zero=from_zero)
    return out


def split(call: str) -> list[tiling.Interval]:
    """The row that a text such as "temporal_causal(size=4,overlap=2)(11)" asks for."""
    match = re.fullmatch(r"(\w+)\((.*)\)\((\d+)\)", call)
    assert match is not None, call
    name, length = match[1], int(match[3])
    given = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match[2])}
    if "n" in given:
        tiles = tiling.split_by_count(length, given["n"], given["overlap"])
    else:
        smallest = given.get("min", 1)
        tiles = tiling.split_by_size(length, given["size"], given["overlap"], smallest)
    return tiling.start_earlier(tiles) if name.endswith("temporal_causal") else tiles


def default_row(size: str, columns: list[str]) -> list[int]:
    height, width = map(int, size.split("x"))
    chosen = tiling.default_tiling(height, width, RELEASED)
    axes = {"h": chosen.height, "w": chosen.width, "f": chosen.frames}
    row = []
    for column in columns:
        kind, axis = column.split("_")
        tiles = axes[axis]
        assert isinstance(tiles, tiling.BySize)
        row.append(tiles.size if kind == "tile" else tiles.overlap)
    return row
