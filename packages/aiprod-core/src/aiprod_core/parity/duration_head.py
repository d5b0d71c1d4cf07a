"""The duration head on both contexts and on each alone, in seconds."""

import torch
from torch import Tensor

from aiprod_core.loader.networks import load_duration_head
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Tensor]:
    head = load_duration_head(case.checkpoint, dtype=torch.float32)
    video, audio = case.input("video"), case.input("audio")
    return {
        "out.both": head(video, audio),
        "out.video": head(video, None),
        "out.audio": head(None, audio),
    }
