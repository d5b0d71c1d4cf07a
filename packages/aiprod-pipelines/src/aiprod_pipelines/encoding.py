"""Text, pictures and sound to what a stage takes: contexts and latents.

Networks are borrowed from the ModelSet for as long as one thing is encoded; prompts and images
that were encoded before are recalled.

Letters: B batch (1 here), C channels, F latent frames, H W height and width, T latent frames of
sound, S text tokens, D context width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.model.mel import log_mel
from aiprod_core.tiling import default_tiling, encode_tiled
from aiprod_core.types import AV, ScaleFactors
from aiprod_pipelines import media, recipe
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest, ImageCondition
from aiprod_pipelines.stages import Context, ImageLatent, audio_grid, guidance_of, nag_of


def encode_prompts(
    models: ModelSet, request: GenerationRequest, progress: Progress
) -> list[Context]:
    """The contexts of `prompts_of`, in order; known ones are not encoded again."""
    prompts = prompts_of(request)
    with progress.stage("encode prompt"):
        found = {text: models.recall(text_identity(text), "text_encoder") for text in prompts}
        unknown = [text for text in found if found[text] is None]
        if unknown:
            # One prompt at a time, so that a context does not depend on what else was asked for.
            with models.text_encoder() as encoder:
                hidden = {text: encoder.encode([text]) for text in unknown}
            with models.text_projector() as projector:
                for text, (states, mask) in hidden.items():
                    states = states.to(models.device, models.dtype)
                    video, audio, _ = projector(states, mask.to(models.device))
                    made = {"video": video, "audio": audio}
                    models.keep(text_identity(text), made, "text_encoder")
                    found[text] = made
        return [Context(**found[text]) for text in prompts]  # pyright: ignore[reportCallIssue]


def prompts_of(request: GenerationRequest) -> list[str]:
    """The prompt and, where the request is guided by one, the negative prompt."""
    modalities = ("video", "audio") if request.generate_audio else ("video",)
    if any(
        guidance_of(request, name).cfg_scale != 1 or nag_of(request, name).is_on
        for name in modalities
    ):
        return [request.text, request.negative_prompt or ""]
    return [request.text]


def text_identity(text: str) -> dict[str, str]:
    return {"kind": "prompts", "text": text}


def encode_images(
    models: ModelSet,
    request: GenerationRequest,
    images: Sequence[ImageCondition],
    progress: Progress,
) -> list[ImageLatent]:
    """Images to latents at the clip's size, after the H.264 round trip that the model expects."""
    if not images:
        return []
    height, width = request.shape.height, request.shape.width
    encoded = []
    with progress.stage("encode images", len(images)) as advance:
        for image in images:
            identity = {
                "kind": "images",
                "image": recipe.input_sha256(image.path),
                "size": [height, width],
                "crf": request.image_crf,
            }
            known = models.recall(identity, "video_encoder")
            if known is None:
                frame = media.compress_frame(media.read_image(image.path), request.image_crf or 0)
                frame = media.prepare_frame(frame, height, width)
                with models.video_encoder() as encoder:
                    known = {"latent": encoder(_to_pixels(models, frame[None])).float()}
                models.keep(identity, known, "video_encoder")
            encoded.append(ImageLatent(known["latent"], image.frame, image.strength))
            advance(1)
    return encoded


def encode_frames(models: ModelSet, frames: media.Frames, progress: Progress) -> Tensor:
    """A clip (frames, height, width, 3) of uint8 to its latent (1, C, F, H, W), in tiles."""
    tiling = default_tiling(frames.shape[1], frames.shape[2], models.profile.scale)
    with progress.stage("encode video"), models.video_encoder() as encoder:
        return encode_tiled(encoder, _to_pixels(models, frames), tiling).float()


def encode_audio(
    models: ModelSet, audio: media.Audio, num_latent_frames: int, progress: Progress
) -> Tensor:
    """A sound to its latent (1, C, T, bins), cut or filled with silence to T."""
    config = models.audio_config
    audio = media.resample(audio, config.sampling_rate, channels=2)
    # The mel is centred and needs some more sound than the latent covers.
    needed = round(num_latent_frames / config.latents_per_second * config.sampling_rate)
    needed += config.n_fft
    samples = torch.from_numpy(audio.samples[:, :needed])
    samples = F.pad(samples, (0, needed - samples.shape[1]))[None].to(models.device)
    with progress.stage("encode audio"), models.audio_encoder() as encoder:
        latent = encoder(log_mel(samples, config).to(models.dtype))
    return latent[:, :, :num_latent_frames].float()


def encode_given_audio(
    models: ModelSet, request: GenerationRequest, progress: Progress
) -> Tensor | None:
    """The latent of the sound that the clip is to follow, or None."""
    if request.audio is None:
        return None
    duration_s = request.shape.duration_s
    audio = media.read_span(request.audio, request.audio_start_time, duration_s)
    return encode_audio(models, audio, audio_grid(models, request.shape).shape.frames, progress)


def read_clip(path: Path, request: GenerationRequest, *, scale_time: int) -> media.Frames:
    """A video or an image at the request's size and rate, no longer than the clip and on the grid.

    Frames are the nearest in time; raises InputError when the file gives not one.
    """
    shape = request.shape
    frames = [
        media.prepare_frame(frame, shape.height, shape.width)
        for frame in media.read_frames_at(path, shape.fps, shape.num_frames)
    ]
    num_frames = (len(frames) - 1) // scale_time * scale_time + 1
    return np.stack(frames[:num_frames])


def fitted_to_source(request: GenerationRequest, scale: ScaleFactors) -> GenerationRequest:
    """With size, rate and length of the clip to edit where the request leaves them open.

    They are brought down to the grid. A clip that AIPROD enlarged for viewing counts with its own
    size. A clip without sound gives one without.
    """
    assert request.source is not None
    info = media.probe(request.source)
    if info.width is None or info.height is None or not info.fps:
        raise InputError(f"{request.source}: no picture in this file.")
    enlarged = _enlargement(info.metadata)
    height, width = info.height // enlarged, info.width // enlarged
    frame_rate = request.frame_rate or info.fps
    num_frames = max(1, round((info.num_frames or 1) * frame_rate / info.fps))
    return replace(
        request,
        height=request.height or max(scale.height, height // scale.height * scale.height),
        width=request.width or max(scale.width, width // scale.width * scale.width),
        frame_rate=frame_rate,
        num_frames=request.num_frames or (num_frames - 1) // scale.time * scale.time + 1,
        generate_audio=request.generate_audio and info.audio_codec is not None,
    )


def _enlargement(metadata: Mapping[str, str]) -> int:
    try:
        return int(json.loads(metadata.get(recipe.TAG, ""))["request"]["enlarge"])
    except (ValueError, KeyError, TypeError):
        return 1


def encode_source(
    models: ModelSet,
    request: GenerationRequest,
    progress: Progress,
    *,
    is_whole: bool = False,
) -> AV:
    """The clip to edit as latents, no longer than the request's clip.

    With `is_whole`, the last frame stands for those that the file announced and does not have.
    """
    assert request.source is not None
    frames = read_clip(request.source, request, scale_time=models.profile.scale.time)
    if is_whole:
        missing = request.shape.num_frames - len(frames)
        frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
    video = encode_frames(models, frames, progress)
    if not request.generate_audio:
        return AV(video)
    shape = request.shape._replace(num_frames=len(frames))
    audio = media.read_span(request.source, 0.0, shape.duration_s)
    return AV(video, encode_audio(models, audio, audio_grid(models, shape).shape.frames, progress))


def _to_pixels(models: ModelSet, frames: media.Frames) -> Tensor:
    """(frames, height, width, 3) of uint8 to (1, 3, frames, height, width) in [-1, 1]."""
    pixels = torch.tensor(frames).to(models.device)  # a copy: frames may be read-only
    return rearrange((pixels / 127.5 - 1).to(models.dtype), "f h w c -> 1 c f h w")
