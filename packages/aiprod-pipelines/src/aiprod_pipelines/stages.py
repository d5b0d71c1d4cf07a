"""The verbs that every pipeline shares, each one stage of a run.

Networks are borrowed from the ModelSet for the length of a stage. Latents and tokens stay on the
model's device; random numbers come from one generator on the CPU, so a seed means the same there
and on a GPU.

Letters: B batch (1 here), C channels, F latent frames, H W height and width, N tokens, S text
tokens, D context width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from aiprod_core.components import conditioning
from aiprod_core.components.guiders import Guidance, GuidedDenoiser, GuidedModality, Model
from aiprod_core.components.noisers import noisy_start
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.components.samplers import euler
from aiprod_core.model.transformer import Perturbations, Transformer
from aiprod_core.tiling import decode_chunks, default_tiling
from aiprod_core.types import AV, LatentState, Modality
from aiprod_pipelines import media
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest

FRAMES_AT_ONCE = 16  # converted to bytes and handed to the video encoder together


class Context(NamedTuple):
    """A prompt as the transformer reads it: (1, S, D) for each modality."""

    video: Tensor
    audio: Tensor


class ImageLatent(NamedTuple):
    """An encoded image (1, C, 1, H, W), the pixel frame that shows it, and how strictly."""

    latent: Tensor
    frame: int
    strength: float


@dataclass(frozen=True)
class States:
    """Both modalities before noise, with their grids. `audio` is None for a silent clip."""

    video: LatentState
    video_grid: VideoGrid
    audio: LatentState | None
    audio_grid: AudioGrid | None


def encode_prompts(models: ModelSet, prompts: list[str], progress: Progress) -> list[Context]:
    """Text to contexts, one for each prompt, in one batch."""
    with progress.stage("encode prompt"):
        with models.text_encoder() as encoder:
            hidden, mask = encoder.encode(prompts)
        with models.text_projector() as projector:
            hidden = hidden.to(models.device, models.dtype)
            video, audio, _ = projector(hidden, mask.to(models.device))
        return [Context(video[i : i + 1], audio[i : i + 1]) for i in range(len(prompts))]


def encode_images(
    models: ModelSet, request: GenerationRequest, progress: Progress
) -> list[ImageLatent]:
    """Images to latents at the clip's size, after the H.264 round trip that the model expects."""
    if not request.images:
        return []
    height, width = request.shape.height, request.shape.width
    encoded = []
    count = len(request.images)
    with progress.stage("encode images", count) as advance, models.video_encoder() as encoder:
        for image in request.images:
            frame = media.compress_frame(media.read_image(image.path), request.image_crf or 0)
            frame = media.prepare_frame(frame, height, width)
            pixels = (torch.tensor(frame).to(models.device) / 127.5 - 1).to(models.dtype)
            latent = encoder(rearrange(pixels, "h w c -> 1 c 1 h w"))
            encoded.append(ImageLatent(latent.float(), image.frame, image.strength))
            advance(1)
    return encoded


def initial_states(models: ModelSet, request: GenerationRequest) -> States:
    """Everything to be generated, on the grids that the request and the model give."""
    channels = models.transformer_config.in_channels
    latent_shape = request.shape.latent(channels, models.profile.scale)
    video_grid = VideoGrid(latent_shape, models.profile.scale, request.shape.fps)
    video = conditioning.video_state(video_grid, device=models.device)
    if not request.generate_audio:
        return States(video, video_grid, None, None)
    config = models.audio_config
    audio_grid = AudioGrid(
        request.shape.audio_latent(
            config.z_channels, config.latent_mel_bins, config.latents_per_second
        ),
        sample_rate=config.sampling_rate,
        hop_length=config.hop_length,
    )
    audio = conditioning.audio_state(audio_grid, device=models.device)
    return States(video, video_grid, audio, audio_grid)


def apply_images(states: States, images: list[ImageLatent]) -> States:
    """The first frame's image takes the place of latent frame 0; others are shown as keyframes."""
    video = states.video
    for image in images:
        if image.frame == 0:
            video = conditioning.replace_frames(
                video, states.video_grid, image.latent, strength=image.strength
            )
        else:
            video = conditioning.append_keyframe(
                video,
                states.video_grid,
                image.latent,
                frame=image.frame,
                strength=image.strength,
            )
    return States(video, states.video_grid, states.audio, states.audio_grid)


def guidance_of(request: GenerationRequest, modality: str) -> Guidance:
    """How a resolved request guides "video" or "audio"."""
    scales = {
        name: getattr(getattr(request, name), modality)
        for name in ("cfg_scale", "stg_scale", "rescale_scale", "modality_scale")
    }
    return Guidance(
        cfg_scale=scales["cfg_scale"],
        stg_scale=scales["stg_scale"],
        stg_blocks=request.stg_blocks or (),
        rescale=scales["rescale_scale"],
        modality_scale=scales["modality_scale"],
    )


def denoise(
    models: ModelSet,
    states: States,
    sigmas: Tensor,
    contexts: list[Context],  # the prompt's and, where the run is guided by one, the negative's
    guidance: Mapping[str, Guidance],  # by modality
    generator: torch.Generator,
    progress: Progress,
) -> AV:
    """Noise to clean latents: video (1, C, F, H, W), audio (1, C, T, bins) or None, in float32."""
    positive, negative = contexts[0], contexts[1] if len(contexts) > 1 else None
    video = GuidedModality(
        states.video, positive.video, negative and negative.video, guidance["video"]
    )
    audio = None
    if states.audio is not None:
        audio = GuidedModality(
            states.audio, positive.audio, negative and negative.audio, guidance["audio"]
        )
    with progress.stage("denoise", len(sigmas) - 1) as advance, models.transformer() as transformer:
        x = euler(
            GuidedDenoiser(_computing_in(models.dtype, transformer), sigmas, video, audio),
            noisy_start(states.video, states.audio, generator=generator),
            sigmas,
            generator=generator,
            blend=conditioning.keep_conditions(states.video, states.audio),
            callback=lambda step, sigma, x, denoised: advance(1),
        )
    assert x.video is not None
    video_latent = states.video_grid.unpatchify(x.video)
    if states.audio_grid is None or x.audio is None:
        return AV(video_latent)
    return AV(video_latent, states.audio_grid.unpatchify(x.audio))


def _computing_in(dtype: torch.dtype, transformer: Transformer) -> Model:
    """The transformer for a float32 state: tokens and text are cast to its dtype on the way in."""

    def cast(modality: Modality | None) -> Modality | None:
        if modality is None:
            return None
        return replace(
            modality, latent=modality.latent.to(dtype), context=modality.context.to(dtype)
        )

    def model(
        video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        return transformer(cast(video), cast(audio), perturbations)

    return model


@torch.inference_mode()
def decode_video(models: ModelSet, latent: Tensor, progress: Progress) -> Iterator[Tensor]:
    """Yields the clip as chunks (frames, height, width, 3) of uint8 on the CPU.

    Long or large clips are decoded in overlapping tiles, so that memory holds one tile in time.
    """
    scale = models.profile.scale
    num_frames = (latent.shape[2] - 1) * scale.time + 1
    tiling = default_tiling(latent.shape[3] * scale.height, latent.shape[4] * scale.width, scale)
    generator = torch.Generator(models.device).manual_seed(0)  # for decoders that inject noise
    with progress.stage("decode video", num_frames) as advance, models.video_decoder() as decoder:
        latent = latent.to(models.device, models.dtype)
        for pixels in decode_chunks(decoder, latent, tiling, generator=generator):
            for part in pixels[0].split(FRAMES_AT_ONCE, dim=1):
                frames = ((part.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                advance(frames.shape[1])
                yield rearrange(frames, "c f h w -> f h w c").cpu()


@torch.inference_mode()
def decode_audio(
    models: ModelSet, latent: Tensor, duration_s: float, progress: Progress
) -> media.Audio:
    """The waveform, cut or filled with silence to the clip's duration."""
    with progress.stage("decode audio"):
        with models.audio_decoder() as decoder:
            mel = decoder(latent.to(models.device, models.dtype))
        with models.vocoder() as vocoder:
            waveform = vocoder(mel)[0].float().clamp(-1, 1)  # (channels, samples)
            sample_rate = vocoder.output_sample_rate
        missing = round(duration_s * sample_rate) - waveform.shape[1]
        waveform = torch.nn.functional.pad(waveform, (0, missing))  # negative padding cuts
        return media.Audio(waveform.cpu().numpy(), sample_rate)
