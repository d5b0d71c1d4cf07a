"""Precomputed clips: latents and text features, drawn by functions of random generators.

A data set is a folder of parts, read by `LatentDataset` and written by `prepare_world` (the
procedural world) and `aiprod dataset` (footage). A part, in the folder or in one within it, is
`part-00000.safetensors`, ... with

    video                    (K, C, F, H, W)   normalised latents, as the encoder gives them
    audio                    (K, z, T, bins)   the same of the sound; absent: the clips are silent
    reference_latents        (K, C, f, h, w)   what an IC-LoRA is shown beside the clip, and any
                                               other reference_<name>, such as reference_canny
    reference_audio_latents  (K, z, t, bins)
    video_masks              (K, F, H, W)      on the latent grid, 1 = given, 0 = to be generated
    audio_masks              (K, T)
    object_cells             (K, F, H, W)      on the latent grid, 1 where an object is seen
    lengths                  (K x captions,)   int32: tokens of each caption, a clip's one after
                                               another; every clip of a part has as many captions
    hidden                   (tokens, D, L)    the text encoder's hidden states of all captions,
                                               padding removed; or, where these are large,
    video_features           (tokens, Dv)      what `FeatureExtractor` makes of them for each
    audio_features           (tokens, Da)      modality; one alone serves both (2.0)

in float16 or bfloat16, and `part-00000.jsonl` beside it: for each clip a line with the JSON list of
its captions. K is any number. All clips of a part agree in their shapes, in what they have and in
the header's metadata `fps` (frames per second, as text); parts that agree in these form a bucket,
and a batch comes from one bucket. A reference that is smaller or shorter by a whole factor says so
by its shape: h = H / factor, f - 1 = (F - 1) / factor. Sound alone has no `video`.

`empty.safetensors`, where the folder has it, holds the text tensors of the empty caption, which
stands in for a dropped one.

Letters: B batch, K clips, C channels, F latent frames, H W latent height and width, z channels and
T frames of a sound's latent, D width of the text encoder, L its hidden states, S padded tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from aiprod_core.errors import InputError

TEXT = ("hidden", "video_features", "audio_features")


@dataclass(frozen=True)
class Batch:
    """Clips of one bucket, in float32; a modality that the bucket lacks is None.

    text: the tensors of TEXT that the bucket has, (B, S, ...), padded on the right; mask (B, S),
    1 on tokens; extras: references and masks by their names; fps None where the parts do not say.
    """

    video: Tensor | None
    audio: Tensor | None
    text: dict[str, Tensor]
    mask: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    fps: float | None = None

    def __len__(self) -> int:
        return len(self.mask)


@dataclass(frozen=True)
class Bucket:
    """Clips that can be batched: (part, row in it) of each."""

    clips: list[tuple[int, int]]
    fps: float | None
    shapes: dict[str, tuple[int, ...]]  # of one clip's tensors, by name

    @property
    def num_tokens(self) -> int:
        """Of one clip: those of its picture, or of sound alone."""
        return (
            math.prod(self.shapes["video"][1:])
            if "video" in self.shapes
            else self.shapes["audio"][1]
        )


class LatentDataset:
    """All parts of a folder, memory-mapped.

    `max_length` is S. `empty` are the text tensors of the empty caption, (tokens, ...) each; by
    default those of `empty.safetensors`. Raises InputError for a folder without usable parts.
    """

    def __init__(self, folder: Path, max_length: int, empty: dict[str, Tensor] | None = None):
        files = sorted(folder.rglob("part-*.safetensors"))
        if not files:
            raise InputError(
                f"{folder}: no part-*.safetensors; make them with `aiprod dataset process-dataset`."
            )
        self.folder, self.max_length = folder, max_length
        self.parts = [load_file(file) for file in files]
        if empty is None and (folder / "empty.safetensors").is_file():
            empty = load_file(folder / "empty.safetensors")
        self.empty = empty
        self.buckets = self._group(files)
        self.offsets = [torch.cumsum(part["lengths"], 0) - part["lengths"] for part in self.parts]

    def __len__(self) -> int:
        return sum(len(bucket.clips) for bucket in self.buckets)

    @property
    def has_hidden_states(self) -> bool:
        """Whether captions still need the projection that makes features of hidden states."""
        return any("hidden" in part for part in self.parts)

    def draw_bucket(self, rng: np.random.Generator) -> Bucket:
        """A bucket, with a chance proportional to its clips."""
        if len(self.buckets) == 1:
            return self.buckets[0]
        sizes = np.array([len(bucket.clips) for bucket in self.buckets])
        return self.buckets[int(rng.choice(len(sizes), p=sizes / sizes.sum()))]

    def as_many_tokens(self, bucket: Bucket, batch_size: int) -> int:
        """How many clips of `bucket` are as much work as `batch_size` of the smallest bucket."""
        smallest = min(b.num_tokens for b in self.buckets)
        return max(1, batch_size * smallest // bucket.num_tokens)

    def draw(
        self, bucket: Bucket, rngs: Sequence[np.random.Generator], caption_dropout: float
    ) -> Batch:
        """A clip and one of its captions for each generator.

        A caption is replaced by the empty one with the chance `caption_dropout`.
        """
        chosen = [bucket.clips[int(rng.integers(len(bucket.clips)))] for rng in rngs]
        captions = [
            self._caption(part, row, rng, caption_dropout)
            for (part, row), rng in zip(chosen, rngs, strict=True)
        ]
        clips = {
            name: torch.stack([self.parts[part][name][row] for part, row in chosen]).float()
            for name in bucket.shapes
        }
        text, mask = self._pad(captions)
        video, audio = clips.pop("video", None), clips.pop("audio", None)
        return Batch(video, audio, text, mask, clips, bucket.fps)

    def _caption(
        self, part: int, row: int, rng: np.random.Generator, dropout: float
    ) -> dict[str, Tensor]:
        tensors = self.parts[part]
        lengths = tensors["lengths"]
        captions_per_clip = len(lengths) // self._num_clips(part)
        index = row * captions_per_clip + int(rng.integers(captions_per_clip))
        if rng.random() < dropout:
            if self.empty is None:
                raise InputError(
                    f"{self.folder}: captions cannot be dropped, since it has no "
                    "empty.safetensors; make the text features again, or set caption_dropout to 0."
                )
            return self.empty
        start, length = int(self.offsets[part][index]), int(lengths[index])
        return {name: tensors[name][start : start + length] for name in TEXT if name in tensors}

    def _pad(self, captions: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        names = captions[0].keys()
        text = {
            name: torch.zeros(len(captions), self.max_length, *captions[0][name].shape[1:])
            for name in names
            if name in TEXT
        }
        mask = torch.zeros(len(captions), self.max_length, dtype=torch.long)
        for row, caption in enumerate(captions):
            for name, padded in text.items():
                tokens = caption[name][: self.max_length]
                padded[row, : len(tokens)] = tokens
                mask[row, : len(tokens)] = 1
        return text, mask

    def _num_clips(self, part: int) -> int:
        tensors = self.parts[part]
        return len(tensors["video"] if "video" in tensors else tensors["audio"])

    def _group(self, files: list[Path]) -> list[Bucket]:
        buckets: dict[tuple, Bucket] = {}
        for number, (file, tensors) in enumerate(zip(files, self.parts, strict=True)):
            if not tensors.keys() & {"video", "audio"} or not tensors.keys() & set(TEXT):
                raise InputError(
                    f"{file}: needs video or audio, and {' or '.join(TEXT)}; it holds "
                    f"{', '.join(sorted(tensors))}."
                )
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            fps = float(metadata["fps"]) if "fps" in metadata else None
            shapes = {
                name: tuple(tensor.shape[1:])
                for name, tensor in sorted(tensors.items())
                if name not in (*TEXT, "lengths")
            }
            key = (fps, tuple(shapes.items()))
            bucket = buckets.setdefault(key, Bucket([], fps, shapes))
            bucket.clips.extend((number, row) for row in range(self._num_clips(number)))
        return list(buckets.values())
