"""Golden conditions: which one a case is about shows in its parameters and inputs."""

import re
from typing import Any

from torch import Tensor

from aiprod_core.components import conditioning
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.parity.case import Case
from aiprod_core.types import AudioLatentShape, LatentState, ScaleFactors, VideoLatentShape


def run(case: Case) -> dict[str, Tensor]:
    if case.optional_input("video") is not None:
        return _pixels_to_latents(case)
    if len(case.params["target"]) == 4:
        grid = AudioGrid(AudioLatentShape(*case.params["target"]))
        state = conditioning.audio_state(grid, case.optional_input("initial_latent"))
        state = _edit_audio(case, state, grid)
        return _fields(state, grid.num_tokens)
    grid = VideoGrid(
        VideoLatentShape(*case.params["target"]),
        ScaleFactors(*case.params["scale_factors"]),
        case.params["fps"],
    )
    state = conditioning.video_state(grid, case.optional_input("initial_latent"))
    state = _edit_video(case, state, grid)
    got = _fields(state, grid.num_tokens)
    if "out.cleared.generated_keyframes" in case.tensors:
        slots = conditioning.slot_latents(state.latent, state, grid)
        got["out.cleared.generated_keyframes"] = slots
    return got


def _fields(state: LatentState, num_tokens: int) -> dict[str, Tensor]:
    fields = {
        "latent": state.latent,
        "clean_latent": state.clean_latent,
        "denoise_mask": state.denoise_mask,
        "positions": state.positions,
        "attention_mask": state.attention_mask,
        "keyframes_mask": state.keyframe_marker,
        "cleared.latent": state.latent[:, :num_tokens],
    }
    return {f"out.{name}": value for name, value in fields.items() if value is not None}


def _edit_audio(case: Case, state: LatentState, grid: AudioGrid) -> LatentState:
    params = case.params
    if "start" in params:
        return conditioning.regenerate_window(state, params["start"], params["end"])
    return conditioning.append_reference_audio(
        state, grid, case.input("reference"), strength=params.get("strength", 1.0)
    )


def _edit_video(case: Case, state: LatentState, grid: VideoGrid) -> LatentState:
    params = case.params
    strength = params.get("strength", 1.0)
    if "order" in params:
        for item in params["order"]:
            state = _described_edit(case, state, grid, item)
        return state
    if "start" in params:
        return conditioning.regenerate_window(state, params["start"], params["end"])
    if (mask := case.optional_input("mask")) is not None:
        return conditioning.inpaint(state, grid, case.input("latent"), mask, strength=strength)
    if "latent_idx" in params:
        latent = case.optional_input("image")
        if latent is None:
            latent = case.input("latent")
        return conditioning.replace_frames(
            state, grid, latent, latent_index=params["latent_idx"], strength=strength
        )
    if "positions" in params:
        seed = case.optional_input("initial_keyframes")
        state = conditioning.append_slots(state, grid, params["positions"], seed)
        keyframe = case.optional_input("keyframes")
        if keyframe is None:
            return state
        # Such cases do not name the keyframe that follows the slots: frame 9, half strength.
        return conditioning.append_keyframe(
            state,
            grid,
            keyframe,
            frame=params.get("frame_idx", 9),
            strength=params.get("strength", 0.5),
        )
    if (keyframe := case.optional_input("keyframes")) is not None:
        return conditioning.append_keyframe(
            state, grid, keyframe, frame=params["frame_idx"], strength=strength
        )
    return conditioning.append_reference_video(
        state,
        grid,
        case.input("reference"),
        strength=strength,
        downscale=params.get("downscale_factor", 1),
        temporal_scale=params.get("temporal_scale_factor", 1),
        attention=params.get("attention_strength", case.optional_input("attention_mask")),
    )


def _described_edit(case: Case, state: LatentState, grid: VideoGrid, item: str) -> LatentState:
    """One entry of a case's `order`, such as "keyframe@5 s=1.0" or "ref(down2) ... mask"."""
    if match := re.match(r"keyframe@(\d+) s=([\d.]+)", item):
        return conditioning.append_keyframe(
            state, grid, case.input("keyframes"), frame=int(match[1]), strength=float(match[2])
        )
    downscale = re.search(r"down(\d+)", item)
    scalar = re.search(r"scalar ([\d.]+)", item)
    options: dict[str, Any] = {"attention": None}
    if scalar:
        options["attention"] = float(scalar[1])
    elif "mask" in item:
        options["attention"] = case.input("attention_mask")
    return conditioning.append_reference_video(
        state,
        grid,
        case.input("reference_small" if downscale else "reference"),
        downscale=int(downscale[1]) if downscale else 1,
        **options,
    )


def _pixels_to_latents(case: Case) -> dict[str, Tensor]:
    mask, video = case.input("mask"), case.input("video")
    meaning = case.description["tensors"]["out.weights"]["meaning"]
    frames, height, width = (int(size) for size in re.findall(r"\d+", meaning)[-3:])
    time_scale = (mask.shape[2] - 1) // max(1, frames - 1)
    got = {"out.weights": conditioning.mask_to_latent(mask, height, width, time_scale).flatten(1)}
    for key in case.tensors:
        if match := re.fullmatch(r"out\.subsample(\d+)", key):
            got[key] = conditioning.subsample_reference(video, int(match[1]))
    return got
