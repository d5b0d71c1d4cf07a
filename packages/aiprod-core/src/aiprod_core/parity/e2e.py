"""Golden runs of whole pipelines, from given contexts and noise to latents, frames and sound.

What a case gives says which pipeline it is: a second stage has an upsampler, a guided one a number
of steps, a retake a window, and so on.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from aiprod_core.components import conditioning, samplers, schedulers
from aiprod_core.components.denoising import Sampler, denoise
from aiprod_core.components.guiders import Guidance, GuidedModality
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.lora import fuse, open_lora
from aiprod_core.loader.networks import (
    load_audio_decoder,
    load_transformer,
    load_upsampler,
    load_video_decoder,
    load_video_encoder,
    load_vocoder,
)
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.transformer import Transformer
from aiprod_core.model.upsampler import upsample_latent
from aiprod_core.model.video_vae import VideoVAEConfig
from aiprod_core.parity.case import Case
from aiprod_core.parity.lora import find_checkpoint
from aiprod_core.types import AV, LatentState, VideoShape


def run(case: Case) -> dict[str, Tensor]:
    if "upsampler" in case.params:
        return _two_stages(case)
    if "out.video_latent" not in case.tensors:
        return _text_to_audio(case)
    return _one_stage(case)


# -------------------------------------------------------------------------------------- pipelines


def _one_stage(case: Case) -> dict[str, Tensor]:
    """Guided, keyframe interpolation, audio to video, IC-LoRA and retake."""
    params = case.params
    transformer = _transformer(case)
    grid, audio_grid = _grids(case)
    video = conditioning.video_state(grid, case.optional_input("video_latent"))
    audio = conditioning.audio_state(audio_grid, case.optional_input("audio_latent"))
    is_retake = "start" in params
    is_audio_frozen = "in.audio_latent" in case.tensors and not is_retake
    if is_retake:
        video = conditioning.regenerate_window(video, params["start"], params["end"])
        audio = conditioning.regenerate_window(audio, params["start"], params["end"])
    if is_audio_frozen:
        audio = conditioning.freeze(audio)
    video = _add_keyframes(case, video, grid)
    if (reference := case.optional_input("reference_latent")) is not None:
        video = conditioning.append_reference_video(
            video,
            grid,
            reference,
            downscale=params.get("downscale_factor", 1),
            temporal_scale=params.get("temporal_scale_factor", 1),
            attention=params.get("attention_strength"),
        )
    if "lora" in params:
        _fuse(case, transformer, [(params["lora"], params.get("lora_strength", 1.0))])
    sigmas = schedulers.table(schedulers.DISTILLED)
    if "steps" in params:
        sigmas = schedulers.shifted(params["steps"])
    x = denoise(
        transformer,
        sigmas,
        _guided(case, "video", video, is_guided=True),
        _guided(case, "audio", audio, is_guided=True, is_frozen=is_audio_frozen),
        noise_sampler=_draws(case, "in.noise."),
    )
    return {"mid.sigmas": sigmas} | _latents(x, grid, audio_grid)


def _text_to_audio(case: Case) -> dict[str, Tensor]:
    transformer = load_transformer(case.checkpoint, dtype=torch.float32, audio_only=True)
    _, audio_grid = _grids(case)
    x = denoise(
        transformer,
        schedulers.shifted(case.params["steps"]),
        None,
        _guided(case, "audio", conditioning.audio_state(audio_grid), is_guided=True),
        noise_sampler=_draws(case, "in.noise."),
    )
    assert x.audio is not None
    return {"out.audio_latent": audio_grid.unpatchify(x.audio)}


def _two_stages(case: Case) -> dict[str, Tensor]:
    """Half size, upsampled, full size: guided by Euler or by res_2s, and distilled."""
    params = case.params
    is_guided = "steps" in params
    is_hq = any(key.startswith("in.sde_noise.") for key in case.tensors)
    sampler: Sampler = samplers.euler
    if is_hq:
        sampler = partial(samplers.res_2s, noise_sampler=_draws(case, "in.sde_noise."))
    noise_sampler = _draws(case, "in.noise.")
    encoder = load_video_encoder(case.checkpoint, dtype=torch.float32)
    got: dict[str, Tensor] = {}

    # Stage 1, at half the height and width.
    grid, audio_grid = _grids(case, divisor=2)
    sigmas = schedulers.table(schedulers.DISTILLED)
    if is_guided:
        num_tokens = grid.num_tokens if is_hq else 4096
        sigmas = schedulers.shifted(params["steps"], num_tokens=num_tokens)
    video = conditioning.video_state(grid)
    if params.get("image"):
        image = encoder(case.input("image_stage1"))
        got["mid.image_latent_stage1"] = image
        video = _add_image(case, video, grid, image)
    transformer = _transformer(case)
    _fuse(case, transformer, params.get("loras_stage1") or [])
    x = denoise(
        transformer,
        sigmas,
        _guided(case, "video", video, is_guided=is_guided),
        _guided(case, "audio", conditioning.audio_state(audio_grid), is_guided=is_guided),
        sampler=sampler,
        noise_sampler=noise_sampler,
    )
    stage_1 = _latents(x, grid, audio_grid)
    video_1, audio_1 = stage_1["out.video_latent"], stage_1["out.audio_latent"]
    upsampler = load_upsampler(open_checkpoint(case.path(params["upsampler"])), dtype=torch.float32)
    upsampled = upsample_latent(upsampler, video_1, encoder.per_channel_statistics)
    got |= {
        "mid.sigmas_stage1": sigmas,
        "mid.stage1.video": video_1,
        "mid.stage1.audio": audio_1,
        "mid.upsampled": upsampled,
    }

    # Stage 2, at full size, from the upsampled result and without guidance.
    grid, audio_grid = _grids(case)
    video = conditioning.video_state(grid, upsampled)
    if params.get("image"):
        video = _add_image(case, video, grid, encoder(case.input("image_stage2")))
    transformer = _transformer(case)
    _fuse(case, transformer, params.get("loras_stage2") or [])
    audio = conditioning.audio_state(audio_grid, audio_1)
    x = denoise(
        transformer,
        schedulers.table(schedulers.STAGE_2),
        _guided(case, "video", video, is_guided=False),
        _guided(case, "audio", audio, is_guided=False),
        sampler=sampler,
        noise_sampler=noise_sampler,
    )
    got |= _latents(x, grid, audio_grid)
    if is_guided:  # guided pipelines return the sound of stage 1, distilled ones that of stage 2
        got |= {"mid.stage2.audio_discarded": got["out.audio_latent"], "out.audio_latent": audio_1}
    return got | _decoded(case, got["out.video_latent"], got["out.audio_latent"])


# ------------------------------------------------------------------------------------------ parts


def _transformer(case: Case) -> Transformer:
    return load_transformer(case.checkpoint, dtype=torch.float32)


def _fuse(case: Case, transformer: Transformer, loras: Sequence[tuple[str, float]]) -> None:
    """Adds the LoRAs exactly, without the usual rounding to bfloat16."""
    if not loras:
        return
    adapters = []
    for name, strength in loras:
        path = case.path(name)
        path = path if path.is_file() else find_checkpoint(case, Path(name).name)
        adapters.append((open_lora(path), strength))
    fuse(transformer, adapters, allow_unmatched=True)


def _grids(case: Case, divisor: int = 1) -> tuple[VideoGrid, AudioGrid]:
    params = case.params
    shape = VideoShape(
        1,
        params["frames"],
        params["height"] // divisor,
        params["width"] // divisor,
        params["fps"],
    )
    vae = VideoVAEConfig.from_metadata(case.checkpoint.section("vae"))
    audio_vae = AudioVAEConfig.from_metadata(case.checkpoint.section("audio_vae"))
    channels = case.checkpoint.section("transformer").get("in_channels", 128)
    audio_shape = shape.audio_latent(
        audio_vae.z_channels, audio_vae.latent_mel_bins, audio_vae.latents_per_second
    )
    return (
        VideoGrid(shape.latent(channels, vae.scale), vae.scale, shape.fps),
        AudioGrid(audio_shape, audio_vae.sampling_rate, audio_vae.hop_length),
    )


def _guided(
    case: Case, modality: str, state: LatentState, *, is_guided: bool, is_frozen: bool = False
) -> GuidedModality:
    settings = case.params.get(f"{modality}_guidance") if is_guided else None
    guidance, negative_context = Guidance(), None
    if settings:
        # An unguided modality has no negative text: a frozen sound hears the prompt in every pass.
        negative_context = case.optional_input(f"context.neg_{modality}")
        guidance = Guidance(
            cfg_scale=settings["cfg"],
            stg_scale=settings["stg"],
            stg_blocks=tuple(settings["stg_blocks"]),
            rescale=settings["rescale"],
            modality_scale=settings["modality"],
            skip_step=settings["skip_step"],
        )
    return GuidedModality(
        state,
        case.input(f"context.pos_{modality}"),
        negative_context,
        guidance,
        is_frozen=is_frozen,
    )


def _add_image(case: Case, state: LatentState, grid: VideoGrid, image: Tensor) -> LatentState:
    settings = case.params["image"]
    frame, strength = settings["frame"], settings["strength"]
    if frame == 0:
        return conditioning.replace_frames(state, grid, image, strength=strength)
    return conditioning.append_keyframe(state, grid, image, frame=frame, strength=strength)


def _add_keyframes(case: Case, state: LatentState, grid: VideoGrid) -> LatentState:
    """Inputs `keyframe...`; their meaning says "frame N" or "last frame", and "strength S"."""
    for key in sorted(key for key in case.tensors if key.startswith("in.keyframe")):
        meaning = case.description["tensors"][key]["meaning"]
        frame = re.search(r"frame (\d+)", meaning)
        strength = re.search(r"strength ([\d.]+)", meaning)
        state = conditioning.append_keyframe(
            state,
            grid,
            case.tensors[key],
            frame=int(frame[1]) if frame else case.params["frames"] - 1,
            strength=float(strength[1]) if strength else 1.0,
        )
    return state


def _draws(case: Case, prefix: str) -> samplers.NoiseSampler:
    """The case's draws in their order, over all stages: video, then audio, each time."""
    keys = [key for key in case.tensors if key.startswith(prefix)]
    draws = iter(sorted(keys, key=lambda key: int(key.removeprefix(prefix))))
    return lambda x: x.map(lambda _: case.tensors[next(draws)])


def _latents(x: AV, grid: VideoGrid, audio_grid: AudioGrid) -> dict[str, Tensor]:
    assert x.video is not None and x.audio is not None
    return {
        "out.video_latent": grid.unpatchify(x.video),
        "out.audio_latent": audio_grid.unpatchify(x.audio),
    }


def _decoded(case: Case, video: Tensor, audio: Tensor) -> dict[str, Any]:
    got: dict[str, Any] = {}
    if any(key.startswith("out.frames") for key in case.tensors):
        pixels = load_video_decoder(case.checkpoint, dtype=torch.float32)(video)
        frames = rearrange((pixels[0] + 1) / 2, "c f h w -> f h w c").clamp(0, 1)
        for key in case.tensors:
            if match := re.fullmatch(r"out\.frames_first(\d+)", key):
                got[key] = frames[: int(match[1])]
        got["out.frames_last"] = frames[-1:]
    if "out.waveform" in case.tensors:
        mel = load_audio_decoder(case.checkpoint, dtype=torch.float32)(audio)
        got["out.waveform"] = load_vocoder(case.checkpoint, dtype=torch.float32)(mel)[0]
    return got
