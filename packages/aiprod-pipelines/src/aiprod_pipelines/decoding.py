"""Latents to what is seen and heard: frames chunk by chunk, a waveform whole or in parts.

Networks are borrowed from the ModelSet for the length of a decoding; what does not fit into memory
is decoded in tiles.

Letters: C channels, F latent frames, H W height and width, T latent frames of sound.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from aiprod_core.errors import is_out_of_memory
from aiprod_core.model.audio_vae import DOWNSAMPLE
from aiprod_core.tiling import decode_chunks
from aiprod_pipelines import analytics, media
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.tiles import choose_tiling

FRAMES_AT_ONCE = 16  # converted to bytes and handed to the video encoder together


@torch.inference_mode()
def decode_video(
    models: ModelSet,
    latent: Tensor,
    progress: Progress,
    *,
    tile: str = "auto",
    is_tiny: bool = False,  # the small decoder, for previews
    is_streamed: bool = False,
    at_once: int | None = None,  # latent frames that a stream decodes together at most
    until: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yields the clip as chunks (frames, height, width, 3) of uint8 on the CPU.

    Long or large clips are decoded in overlapping tiles, so that memory holds one tile in time;
    `tile` is "auto" (as the free memory allows), "off" or WxHxF. Of a clip in the making,
    `until(n)` gives the latent with n frames of it made; `latent` then says no more than its shape.
    """
    scale = models.profile.scale
    num_frames = (latent.shape[2] - 1) * scale.time + 1
    generator = torch.Generator(models.device).manual_seed(0)  # for decoders that inject noise
    lend = models.tiny_decoder if is_tiny else models.video_decoder
    with progress.stage("decode video", num_frames) as advance, lend() as decoder:
        size = (num_frames, latent.shape[3] * scale.height, latent.shape[4] * scale.width)
        choose = partial(
            choose_tiling,
            config=decoder.config,
            scale=scale,
            size=size,
            element_bytes=models.dtype.itemsize,
            is_streamed=is_streamed,
            at_once=at_once,
        )
        free = models.free_memory()
        tiling = choose(tile, free_bytes=free)
        latent = latent.to(models.device, models.dtype, copy=until is not None)

        def ready(count: int) -> None:
            if until is not None:
                latent[:, :, :count] = until(count)[:, :, :count]

        done = 0  # frames handed out
        while True:
            try:
                generator.manual_seed(0)
                chunks = decode_chunks(decoder, latent, tiling, generator=generator, ready=ready)
                for frames in analytics.each("frames", _frames_from(done, chunks)):
                    done += len(frames)
                    advance(len(frames))
                    yield frames
                return
            except (MemoryError, RuntimeError) as error:
                free //= 2
                smaller = choose("auto", free_bytes=free)
                if not is_out_of_memory(error) or smaller == tiling:
                    raise
                tiling = smaller
                progress.note("out of memory: going on with smaller tiles")


def _frames_from(start: int, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Decoded chunks (1, 3, frames, H, W) as bytes (frames, H, W, 3) from frame `start` on."""
    at = 0
    for pixels in chunks:
        for part in pixels[0].split(FRAMES_AT_ONCE, dim=1):
            skipped = min(max(start - at, 0), part.shape[1])
            at += part.shape[1]
            part = part[:, skipped:]
            if part.shape[1]:
                frames = ((part.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                yield rearrange(frames, "c f h w -> f h w c").cpu()


@torch.inference_mode()
def decode_audio(
    models: ModelSet, latent: Tensor, duration_s: float, progress: Progress
) -> media.Audio:
    """The waveform, cut or filled with silence to the clip's duration."""
    with progress.stage("decode audio"):
        waveform = _waveform(models, latent)
        missing = round(duration_s * models.sample_rate) - waveform.shape[1]
        waveform = F.pad(waveform, (0, missing))  # negative padding cuts
        return media.Audio(waveform.cpu().numpy(), models.sample_rate)


def decode_audio_parts(
    models: ModelSet,
    until: Callable[[int], Tensor],  # n to the latent (1, C, T, bins) with n frames of it made
    duration_s: float,
    progress: Progress,
) -> media.StreamedAudio:
    """The waveform of `decode_audio` in parts of a second, made as they are asked for.

    Each is decoded with a second before it and a third after it, as far as the networks see. The
    first is half as long, so that it is there early.
    """
    config = models.audio_config
    sample_rate = models.sample_rate
    total = round(duration_s * sample_rate)
    per_frame = config.hop_length * sample_rate // config.sampling_rate  # of the mel
    per_latent = DOWNSAMPLE * per_frame
    # On a causal axis the first latent stands for a single frame of the mel.
    early = 0 if config.causality_axis == "none" else (DOWNSAMPLE - 1) * per_frame
    second = round(config.latents_per_second)

    @torch.inference_mode()
    def parts() -> Iterator[media.Samples]:
        count = until(0).shape[2]
        for start in (0, *range(second // 2, count, second)):
            stop = min(start + second if start else second // 2, count)
            first, last = max(0, start - second), min(stop + second // 3, count)
            latent = until(last)[:, :, first:last]
            with progress.stage("decode audio"):
                waveform = _waveform(models, latent)
            begin = max(0, start * per_latent - early)
            end = max(begin, stop * per_latent - early if stop < count else total)
            shift = first * per_latent  # a tile of time begins with its first latent's last frame
            part = waveform[:, begin - shift : end - shift]
            yield F.pad(part, (0, end - begin - part.shape[1])).cpu().numpy()

    return media.StreamedAudio(parts(), sample_rate)


def _waveform(models: ModelSet, latent: Tensor) -> Tensor:
    """(channels, samples) in [-1, 1]."""
    with models.audio_decoder() as decoder:
        mel = decoder(latent.to(models.device, models.dtype))
    with models.vocoder() as vocoder:
        return vocoder(mel)[0].float().clamp(-1, 1)
