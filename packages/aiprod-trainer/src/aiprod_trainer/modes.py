"""What is generated, what is given and what is left out in training: the modes as a table.

A mode says of each stream whether it is generated and under which conditions; each condition is an
edit of the stream's LatentState, the same that the pipelines make (`components.conditioning`), with
the clip's own latents as what is given. Every condition has a probability. One coin is tossed for a
whole step: where all tokens of a batch share a noise level, the modulation is computed once a clip
and not once a token, and every process of a parallel run does the same work.

Letters: B batch, C channels, F latent frames, H W latent height and width, z channels and T frames
of a sound's latent, N tokens.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aiprod_core.components import conditioning
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.errors import InputError
from aiprod_core.types import AudioLatentShape, LatentState, ScaleFactors, VideoLatentShape
from aiprod_trainer.config import Section
from aiprod_trainer.data import Batch, Bucket

Kind = Literal["first_frame", "prefix", "suffix", "spatial_crop", "mask", "reference"]


class Condition(Section):
    """One condition of a stream.

    temporal_boundary: seconds given before it (prefix) or after it (suffix); None draws it anew at
    every step. spatial_region: left, top, right and bottom of what is given, as fractions of the
    picture; None draws it. latents_dir and mask_dir name a tensor of the data set's parts; their
    defaults are `reference_latents`, `reference_audio_latents`, `video_masks` and `audio_masks`.
    """

    type: Kind
    probability: float = 1.0
    temporal_boundary: float | None = None
    spatial_region: tuple[float, float, float, float] | None = None
    latents_dir: str | None = None
    mask_dir: str | None = None


class Stream(Section):
    """A stream that is generated under conditions, or shown clean to the other one.

    latents_dir names its tensor in the data set's parts, by default `video` or `audio`.
    """

    is_generated: bool = True
    latents_dir: str | None = None
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Mode:
    """A stream that is None takes no part."""

    video: Stream | None
    audio: Stream | None


def _on(*kinds: Kind) -> Stream:
    return Stream(conditions=tuple(Condition(type=kind) for kind in kinds))


FREE, GIVEN = Stream(), Stream(is_generated=False)

# A name in `training_strategy.name`, then what happens to the picture and to the sound.
MODES: dict[str, Mode] = {
    "text-to-video": Mode(FREE, FREE),
    "image-to-video": Mode(_on("first_frame"), FREE),
    "video-extend": Mode(_on("prefix"), _on("prefix")),
    "video-suffix": Mode(_on("suffix"), _on("suffix")),
    "video-to-video": Mode(_on("reference"), None),
    "audio-to-video": Mode(FREE, GIVEN),
    "video-to-audio": Mode(GIVEN, FREE),
    "video-inpainting": Mode(_on("mask"), GIVEN),
    "video-outpainting": Mode(_on("spatial_crop"), GIVEN),
    "text-to-audio": Mode(None, FREE),
    "audio-extend": Mode(None, _on("prefix")),
    "audio-suffix": Mode(None, _on("suffix")),
    "audio-inpainting": Mode(None, _on("mask")),
    "audio-to-audio": Mode(None, _on("reference")),
    "audio-video-to-audio-video": Mode(_on("reference"), _on("reference")),
    "preference": Mode(FREE, FREE),  # Flow-DPO: each clip beside one that is worse
}

OF_VIDEO_ALONE = ("first_frame", "spatial_crop")
DEFAULT_TENSORS = {
    ("video", "reference"): "reference_latents",
    ("audio", "reference"): "reference_audio_latents",
    ("video", "mask"): "video_masks",
    ("audio", "mask"): "audio_masks",
}
# LTX-2's names of the folders that hold the streams' own latents.
FOLDERS = {"latents": "video", "audio_latents": "audio"}


@dataclass(frozen=True)
class Conditioned:
    """A stream's clean tokens and conditions, before noise.

    `state.latent` (B, N, C) is clean. is_given: no token is generated. is_uniform: all are, so that
    one noise level describes a sample.
    """

    state: LatentState
    grid: VideoGrid | AudioGrid
    is_given: bool
    is_uniform: bool


def tensor_name(stream: str, setting: str | None, kind: str | None = None) -> str:
    """The tensor of a data set that a stream, or a condition of `kind`, reads."""
    if setting is not None:
        return FOLDERS.get(setting, setting)
    return stream if kind is None else DEFAULT_TENSORS[stream, kind]


def check_mode(mode: Mode) -> None:
    """Raises InputError for a mode in which nothing is generated or a condition makes no sense."""
    streams = {"video": mode.video, "audio": mode.audio}
    if not any(stream is not None and stream.is_generated for stream in streams.values()):
        raise InputError("training_strategy: nothing is generated; set is_generated for a stream.")
    for name, stream in streams.items():
        for condition in () if stream is None else stream.conditions:
            if name == "audio" and condition.type in OF_VIDEO_ALONE:
                raise InputError(
                    f"training_strategy.audio: {condition.type} is a condition of the picture; "
                    "a sound takes prefix, suffix, mask and reference."
                )
            if not 0 <= condition.probability <= 1:
                raise InputError(
                    f"training_strategy.{name}: the probability of {condition.type} must be from "
                    f"0 to 1; got {condition.probability:g}."
                )


def needed_tensors(mode: Mode) -> list[str]:
    """What the parts of a data set must hold for this mode."""
    names = []
    for name, stream in (("video", mode.video), ("audio", mode.audio)):
        if stream is None:
            continue
        names.append(tensor_name(name, stream.latents_dir))
        for condition in stream.conditions:
            if condition.type == "reference":
                names.append(tensor_name(name, condition.latents_dir, "reference"))
            elif condition.type == "mask":
                names.append(tensor_name(name, condition.mask_dir, "mask"))
    return names


def reference_factors(mode: Mode, bucket: Bucket) -> tuple[int, int]:
    """By how much the mode's references are smaller than the clip in space and in time.

    Raises InputError where their shape is no whole fraction of the clip's. (1, 1) without any.
    """
    for condition in () if mode.video is None else mode.video.conditions:
        if condition.type != "reference":
            continue
        assert mode.video is not None
        clip = bucket.shapes[tensor_name("video", mode.video.latents_dir)]
        name = tensor_name("video", condition.latents_dir, "reference")
        return _factors(name, clip, bucket.shapes[name])
    return 1, 1


def _factors(name: str, clip: tuple[int, ...], reference: tuple[int, ...]) -> tuple[int, int]:
    (frames, height, width), (f, h, w) = clip[-3:], reference[-3:]
    space, time = height // h, (frames - 1) // (f - 1) if f > 1 else 1
    # A reference may also be shorter than the clip: it then steers its beginning.
    if (h * space, w * space) != (height, width) or (f > 1 and time < 1):
        raise InputError(
            f"{name} is {[f, h, w]} (frames, height, width) in latents and the clip "
            f"{[frames, height, width]}; a reference must be smaller by a whole factor."
        )
    return space, time


def condition_batch(
    mode: Mode,
    batch: Batch,
    rng: np.random.Generator,  # of the step, shared by all its batches
    *,
    scale: ScaleFactors,
    fps: float,
    sample_rate: int = 16000,
    hop_length: int = 160,
    device: torch.device | str = "cpu",
) -> dict[str, Conditioned]:
    """The streams of a mode with their conditions, by "video" and "audio"."""
    tensors = {"video": batch.video, "audio": batch.audio, **batch.extras}
    window = rng.random()  # one moment cuts picture and sound
    streams: dict[str, Conditioned] = {}
    for name, stream in (("video", mode.video), ("audio", mode.audio)):
        if stream is None:
            continue
        latent = tensors[tensor_name(name, stream.latents_dir)]
        assert latent is not None
        latent = latent.to(device)
        if name == "video":
            grid = VideoGrid(VideoLatentShape(*latent.shape), scale, fps)
            state = conditioning.video_state(grid, latent)
        else:
            shape = AudioLatentShape(*latent.shape)
            grid = AudioGrid(shape, sample_rate=sample_rate, hop_length=hop_length)
            state = conditioning.audio_state(grid, latent)
        if not stream.is_generated:
            streams[name] = Conditioned(state, grid, is_given=True, is_uniform=True)
            continue
        is_uniform = True
        for condition in stream.conditions:
            is_used = rng.random() < condition.probability
            region = _region(condition, rng)
            if is_used:
                state = _apply(condition, name, state, grid, tensors, window, region)
                is_uniform = False
        streams[name] = Conditioned(state, grid, is_given=False, is_uniform=is_uniform)
    return streams


def _apply(
    condition: Condition,
    stream: str,
    state: LatentState,
    grid: VideoGrid | AudioGrid,
    tensors: dict[str, Tensor | None],
    window: float,
    region: tuple[float, float, float, float],
) -> LatentState:
    if condition.type == "reference":
        reference = tensors[tensor_name(stream, condition.latents_dir, "reference")]
        assert reference is not None
        return _append_reference(condition, state, grid, reference.to(state.latent.device))
    if condition.type == "mask":
        mask = tensors[tensor_name(stream, condition.mask_dir, "mask")]
        assert mask is not None
        given = mask.flatten(1)[..., None].to(state.denoise_mask)  # (B, N, 1)
    elif condition.type == "first_frame":
        assert isinstance(grid, VideoGrid)
        given = (torch.arange(grid.num_tokens) < grid.tokens_per_frame)[None, :, None]
    elif condition.type == "spatial_crop":
        given = _inside(state.positions[:1, :, : grid.num_tokens], region)
    else:
        times = state.positions[:1, 0, : grid.num_tokens]  # (1, N, 2)
        duration = float(times[..., 1].max())
        boundary = condition.temporal_boundary
        if boundary is None:
            boundary = window * duration
        is_before = times[..., 1] <= boundary
        given = (is_before if condition.type == "prefix" else times[..., 0] >= boundary)[..., None]
    given = given.to(state.denoise_mask)
    mask = state.denoise_mask.clone()
    mask[:, : grid.num_tokens] *= 1 - given
    return replace(state, denoise_mask=mask)


def _append_reference(
    condition: Condition, state: LatentState, grid: VideoGrid | AudioGrid, reference: Tensor
) -> LatentState:
    if isinstance(grid, AudioGrid):
        return conditioning.append_reference_audio(state, grid, reference)
    name = condition.latents_dir or "reference_latents"
    downscale, temporal_scale = _factors(name, tuple(grid.shape), tuple(reference.shape))
    return conditioning.append_reference_video(
        state, grid, reference, downscale=downscale, temporal_scale=temporal_scale
    )


def _region(condition: Condition, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """The condition's region, or a rectangle of random place with sides of 0.4 to 0.9."""
    size, place = rng.uniform(0.4, 0.9, 2), rng.random(2)
    if condition.spatial_region is not None:
        return condition.spatial_region
    left, top = (1 - size) * place
    return left, top, left + size[0], top + size[1]


def _inside(positions: Tensor, region: tuple[float, float, float, float]) -> Tensor:
    """(1, N, 1): tokens whose centre lies in the region. positions (1, 3, N, 2)."""
    left, top, right, bottom = region
    centre = positions[:, 1:].mean(dim=-1) / positions[:, 1:, :, 1].amax(dim=-1, keepdim=True)
    row, column = centre.unbind(dim=1)  # (1, N) each, 0 to 1
    is_inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return is_inside[..., None]
