"""Golden token layouts, grids and times, and the frame-count tables."""

from typing import Any

import torch

from aiprod_core.components import patchifiers
from aiprod_core.components.conditioning import video_state
from aiprod_core.components.patchifiers import VideoGrid
from aiprod_core.parity.case import Case
from aiprod_core.types import ScaleFactors, VideoLatentShape, VideoShape


def run(case: Case) -> dict[str, Any]:
    scale = ScaleFactors(8, 32, 32)
    fps = case.params["fps"]
    latent, latent2 = case.input("video.latent"), case.input("video.latent2")
    audio = case.input("audio.latent")
    tokens_p2 = patchifiers.patchify_video(latent2, 2)
    shape2 = VideoLatentShape(*latent2.shape)
    # Grids are wanted for two samples whatever the batch of the second latent.
    pair2 = shape2._replace(batch=case.tensors["out.video.grid_p1"].shape[0])
    single = VideoLatentShape(*latent.shape)._replace(batch=1)
    grid = patchifiers.latent_intervals(single)
    state = video_state(VideoGrid(single, scale, fps))
    audio_tokens = patchifiers.patchify_audio(audio)

    def times(key: str, **options: Any) -> torch.Tensor:
        batch, _, num_frames, _ = case.tensors[key].shape
        return patchifiers.audio_times(num_frames, **options).expand(batch, -1, -1, -1)

    got: dict[str, Any] = {
        "out.video.tokens_p1": patchifiers.patchify_video(latent),
        "out.video.tokens_p2": tokens_p2,
        "out.video.unpatchify_p2": patchifiers.unpatchify_video(tokens_p2, shape2, 2),
        "out.video.grid_p1": patchifiers.latent_intervals(pair2),
        "out.video.grid_p2": patchifiers.latent_intervals(pair2, 2),
        "out.video.pixel_causal": patchifiers.pixel_intervals(grid, scale),
        "out.video.pixel_plain": patchifiers.pixel_intervals(grid, scale, is_causal=False),
        "out.video.pixel_4_16": patchifiers.pixel_intervals(grid, ScaleFactors(4, 16, 16)),
        "out.video.state.positions": state.positions,
        "out.video.state.denoise_mask": state.denoise_mask,
        "out.video.state.keyframes_mask": state.keyframe_marker,
        "out.audio.tokens": audio_tokens,
        "out.audio.unpatchify": patchifiers.unpatchify_audio(audio_tokens, audio.shape[-1]),
        "out.audio.times": times("out.audio.times"),
        "out.audio.times_shift3": times("out.audio.times_shift3", start=3),
        "out.audio.times_noncausal": times("out.audio.times_noncausal", is_causal=False),
        # At 24 kHz the spectrogram's hop is 240 samples, so that columns stay 10 ms apart.
        "out.audio.times_sr24k": times("out.audio.times_sr24k", sample_rate=24000, hop_length=240),
    }
    return got | _tables(case, scale)


def _tables(case: Case, scale: ScaleFactors) -> dict[str, Any]:
    params = case.params
    got: dict[str, Any] = {}
    if table := params.get("audio_frames_table"):
        rows = []
        for num_frames, fps, *_ in table["rows"]:
            shape = VideoShape(1, num_frames, scale.height, scale.width, fps)
            audio = shape.audio_latent(8, 16, 25.0)
            rows.append([num_frames, fps, shape.latent(128, scale).frames, audio.frames])
        got["params.audio_frames_table"] = {"columns": table["columns"], "rows": rows}
    if table := params.get("snap_frames"):
        got["params.snap_frames"] = {n: patchifiers.snap_num_frames(int(n)) for n in table}
    if table := params.get("seconds_to_frames"):
        got["params.seconds_to_frames"] = {
            key: patchifiers.num_frames_for(*map(float, key.split("@"))) for key in table
        }
    if table := params.get("keyframe_positions"):
        got["params.keyframe_positions"] = {
            key: patchifiers.slot_frames(*map(int, key.split("in"))) for key in table
        }
    return got
