"""The canvas of each clip length, and the tiles of its first doubled round."""

from dataclasses import astuple
from typing import Any

from aiprod_core.components.dfr import canvas_for, temporal_tiles
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Any]:
    layout = {}
    for num_frames, expected in case.params["layout"].items():
        canvas = canvas_for(int(num_frames))
        positions = canvas.doubled().positions
        layout[num_frames] = {
            "canvas": canvas.num_frames,
            "segment": canvas.segment,
            "positions": canvas.positions,
            "tiles": {
                count: [astuple(tile) for tile in temporal_tiles(positions, int(count))]
                for count in expected["tiles"]
            },
        }
    return {"params.layout": layout}
