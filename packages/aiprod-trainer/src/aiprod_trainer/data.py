"""Precomputed clips: latents and text features, drawn by a function of the random generator."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from aiprod_core.errors import InputError


@dataclass(frozen=True)
class Batch:
    """video (B, C, F, H, W), audio (B, z, T, bins), hidden (B, S, D, L) and its mask (B, S)."""

    video: Tensor
    audio: Tensor
    hidden: Tensor
    mask: Tensor


class LatentDataset:
    """All parts of a folder that `prepare_world` made, memory-mapped.

    `empty_hidden` (tokens, D, L) are the text features of the empty prompt, which stand in for a
    dropped caption. Captions are padded on the right to `max_length` tokens.
    """

    def __init__(self, folder: Path, empty_hidden: Tensor, max_length: int):
        files = sorted(folder.glob("part-*.safetensors"))
        if not files:
            raise InputError(f"{folder}: no part-*.safetensors; make them with prepare_world.")
        self.parts = [load_file(file) for file in files]
        self.empty_hidden, self.max_length = empty_hidden, max_length
        self.offsets = [torch.cumsum(part["lengths"], 0) - part["lengths"] for part in self.parts]
        self.index = [
            (number, clip)
            for number, part in enumerate(self.parts)
            for clip in range(len(part["video"]))
        ]

    def __len__(self) -> int:
        return len(self.index)

    def draw(self, rng: np.random.Generator, count: int, caption_dropout: float) -> Batch:
        """A random batch; each caption is replaced by the empty one with `caption_dropout`."""
        chosen = [self.index[i] for i in rng.integers(0, len(self.index), count)]
        video = torch.stack([self.parts[p]["video"][c] for p, c in chosen]).float()
        audio = torch.stack([self.parts[p]["audio"][c] for p, c in chosen]).float()
        width, layers = self.empty_hidden.shape[1:]
        hidden = torch.zeros(count, self.max_length, width, layers)
        mask = torch.zeros(count, self.max_length, dtype=torch.long)
        for row, (part, clip) in enumerate(chosen):
            tokens = self._caption(rng, part, clip)
            if rng.random() < caption_dropout:
                tokens = self.empty_hidden
            hidden[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return Batch(video, audio, hidden, mask)

    def _caption(self, rng: np.random.Generator, part: int, clip: int) -> Tensor:
        lengths = self.parts[part]["lengths"]
        captions_per_clip = len(lengths) // len(self.parts[part]["video"])
        row = clip * captions_per_clip + int(rng.integers(captions_per_clip))
        start = int(self.offsets[part][row])
        return self.parts[part]["hidden"][start : start + int(lengths[row])].float()
