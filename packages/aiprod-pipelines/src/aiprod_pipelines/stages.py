"""The verbs that every pipeline shares, each one stage of a run.

Networks are borrowed from the ModelSet for the length of a stage. Latents and tokens stay on the
model's device; random numbers come from one generator on the CPU, so a seed means the same there
and on a GPU.

A recipe reads: encode_prompts, initial_states, conditions, denoise, and for a second stage
upsample, initial_states, conditions, refine. What `denoise`, `upsample` and `refine` give comes
window by window, each made when it is asked for; most clips are one window.

Letters: B batch (1 here), C channels, F latent frames, H W height and width, N tokens, S text
tokens, D context width.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from aiprod_core.components import conditioning, denoising, schedulers
from aiprod_core.components.constants import computed_once
from aiprod_core.components.denoising import Sampler
from aiprod_core.components.guiders import Guidance, GuidedDenoiser, GuidedModality, Model
from aiprod_core.components.nag import NAG, both_prompts, guided_text_attention
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.components.samplers import SAMPLERS, Callback, ignore_step
from aiprod_core.components.step_cache import POLICIES
from aiprod_core.components.tiled_model import in_tiles
from aiprod_core.components.windows import Place, denoise_in_windows
from aiprod_core.errors import InputError, is_out_of_memory
from aiprod_core.loader.lora import coverage, open_lora
from aiprod_core.model.audio_vae import DOWNSAMPLE
from aiprod_core.model.mel import log_mel
from aiprod_core.model.transformer import Perturbations, Transformer
from aiprod_core.model.upsampler import upsample_latent
from aiprod_core.parallel import in_parallel
from aiprod_core.tiling import decode_chunks, default_tiling, encode_tiled
from aiprod_core.types import AV, LatentState, Modality, ScaleFactors, VideoShape
from aiprod_pipelines import analytics, media, recipe
from aiprod_pipelines.best_of import Verdict, contest, early_step, open_verdict
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Advance, Progress
from aiprod_pipelines.request import GenerationRequest, ImageCondition, LoraFile
from aiprod_pipelines.tiles import choose_tiling, refine_tiles

FRAMES_AT_ONCE = 16  # converted to bytes and handed to the video encoder together
# Samplers that draw noise have generators of their own, so that a seed's first noise is the same
# with every sampler.
SAMPLER_SEED_OFFSET = 10_000
# Windows have noise of their own, the same in whatever order stages and windows are made.
WINDOW_SEED_STEP = 1_000_003


class Context(NamedTuple):
    """A prompt as the transformer reads it: (1, S, D) for each modality."""

    video: Tensor
    audio: Tensor


class ImageLatent(NamedTuple):
    """An encoded image (1, C, 1, H, W), the pixel frame that shows it, and how strictly."""

    latent: Tensor
    frame: int
    strength: float


class Latents(NamedTuple):
    """A clip as far as it is made; the next one knows one window more."""

    clip: AV  # video (1, C, F, H, W), audio (1, C, T, bins); windows to come are as they started
    final: dict[str, int]  # of "video", "audio": latent frames from the first on that stay
    window: AV  # of the window that was made last: video (1, C, f, H, W), audio tokens (1, n, D)
    seed: int  # of its noise: the request's, or the best of several


@dataclass(frozen=True)
class States:
    """The modalities before noise, with their grids. One that is not made is None.

    A frozen one is shown to the other as it is.
    """

    video: LatentState | None = None
    video_grid: VideoGrid | None = None
    audio: LatentState | None = None
    audio_grid: AudioGrid | None = None
    frozen: frozenset[str] = frozenset()


# Text, pictures and sound to what the model reads.


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


# What is to be made, and what of it is given.


def video_grid(models: ModelSet, shape: VideoShape) -> VideoGrid:
    latent_shape = shape.latent(models.transformer_config.in_channels, models.profile.scale)
    return VideoGrid(latent_shape, models.profile.scale, shape.fps)


def audio_grid(models: ModelSet, shape: VideoShape) -> AudioGrid:
    config = models.audio_config
    return AudioGrid(
        shape.audio_latent(config.z_channels, config.latent_mel_bins, config.latents_per_second),
        sample_rate=config.sampling_rate,
        hop_length=config.hop_length,
    )


def initial_states(
    models: ModelSet,
    request: GenerationRequest,
    start: AV | None = None,  # latents to start from or to edit
    *,
    given_audio: Tensor | None = None,  # kept as it is
) -> States:
    """Everything to be generated, on the grids that the request and the model give."""
    start = start or AV()
    grid = video_grid(models, request.shape)
    video = conditioning.video_state(grid, start.video, device=models.device)
    if not request.generate_audio:
        return States(video, grid)
    sound_grid = audio_grid(models, request.shape)
    if given_audio is not None:
        frozen = conditioning.freeze(
            conditioning.audio_state(sound_grid, given_audio, device=models.device)
        )
        return States(video, grid, frozen, sound_grid, frozenset({"audio"}))
    audio = conditioning.audio_state(sound_grid, start.audio, device=models.device)
    return States(video, grid, audio, sound_grid)


def add_images(states: States, images: Sequence[ImageLatent]) -> States:
    """The first frame's image takes the place of latent frame 0; others are shown as keyframes."""
    video, grid = states.video, states.video_grid
    assert video is not None and grid is not None
    for image in images:
        if image.frame == 0:
            video = conditioning.replace_frames(video, grid, image.latent, strength=image.strength)
        else:
            video = conditioning.append_keyframe(
                video, grid, image.latent, frame=image.frame, strength=image.strength
            )
    return replace(states, video=video)


def add_keyframes(states: States, images: Sequence[ImageLatent]) -> States:
    """Shows every image beside the clip at its time, that of frame 0 too."""
    video, grid = states.video, states.video_grid
    assert video is not None and grid is not None
    for image in images:
        video = conditioning.append_keyframe(
            video, grid, image.latent, frame=image.frame, strength=image.strength
        )
    return replace(states, video=video)


# Noise to clean latents.


def guidance_of(request: GenerationRequest, modality: str) -> Guidance:
    """How a resolved request guides "video" or "audio"."""
    scales = {
        name: getattr(getattr(request, name), modality)
        for name in ("cfg_scale", "stg_scale", "rescale_scale", "modality_scale", "skip_step")
    }
    return Guidance(
        cfg_scale=scales["cfg_scale"],
        stg_scale=scales["stg_scale"],
        stg_blocks=request.stg_blocks or (),
        rescale=scales["rescale_scale"],
        modality_scale=scales["modality_scale"],
        skip_step=int(scales["skip_step"]),
        interval=request.guidance_interval,
    )


def nag_of(request: GenerationRequest, modality: str) -> NAG:
    """How the text attention of "video" or "audio" is guided by the negative prompt."""
    scale = getattr(request.nag_scale, modality)
    return NAG(scale, tau=request.nag_tau, alpha=request.nag_alpha)


def schedule_of(request: GenerationRequest, num_tokens: int = 4096) -> Tensor:
    """The sigmas of a resolved request. Only the shifted schedule looks at the number of tokens."""
    name, steps = request.schedule or "shifted", request.num_inference_steps or 1
    if name == "distilled":
        return schedulers.distilled(steps)
    if name == "shifted":
        return schedulers.shifted(steps, num_tokens=num_tokens)
    return schedulers.SCHEDULES[name](steps)


def window_generators(models: ModelSet, request: GenerationRequest) -> list[torch.Generator]:
    """The source of each window's noise in all stages; the first window's is the clip's seed."""
    windows = request.windows(models.profile.scale.time)
    seeds = [(request.seed + k * WINDOW_SEED_STEP) % 2**63 for k in range(len(windows))]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def denoise(
    models: ModelSet,
    request: GenerationRequest,
    states: States,
    contexts: list[Context],
    generators: Sequence[torch.Generator],  # one a window
    progress: Progress,
    *,
    starts: Iterable[AV] | None = None,  # video and audio tokens that each window starts from
    sigmas: Tensor | None = None,  # default: the request's schedule
    loras: Sequence[LoraFile] = (),
    is_guided: bool = True,
    sampler: str | None = None,  # default: the request's
    tiles: Tensor | None = None,  # (tiles, H, W): what of the picture the model sees at once
    stage: str = "denoise",
) -> Iterator[Latents]:
    """Noise to clean latents in float32, a window at a time.

    A small model, which stays loaded, makes each window when it is asked for. One that is read for
    its stage makes all of them at once.
    """
    sigmas = schedule_of(request) if sigmas is None else sigmas
    # A frozen modality has neither a negative text nor guidance of its own.
    nag = {
        name: NAG() if name in states.frozen else nag_of(request, name)
        for name in ("video", "audio")
    }

    def guided(name: str, state: LatentState | None) -> GuidedModality | None:
        if state is None:
            return None
        context, *negative = (getattr(context, name) for context in contexts)
        is_frozen = name in states.frozen
        guidance = guidance_of(request, name) if is_guided and not is_frozen else Guidance()
        if nag[name].is_on:
            return GuidedModality(state, both_prompts(context, negative[0]), guidance=guidance)
        negative = negative[0] if negative and is_guided and not is_frozen else None
        return GuidedModality(state, context, negative, guidance, is_frozen=is_frozen)

    windows = request.windows(models.profile.scale.time)
    steps = len(sigmas) - 1
    sampler_name = sampler or request.sampler or "euler"
    is_contest = request.best_of > 1 and stage == "denoise"
    verdict = open_verdict(models, request.text) if is_contest else None
    seeds = [(request.seed + k) % 2**63 for k in range(request.best_of if is_contest else 1)]
    adapters = [(open_lora(lora.path), lora.strength) for lora in loras]
    is_lazy = models.stays_loaded

    @contextmanager
    def transformer_for() -> Iterator[tuple[Transformer, Model, Advance]]:
        with (
            progress.stage(
                stage, steps * len(windows) + early_step(steps) * (len(seeds) - 1)
            ) as advance,
            models.transformer(adapters, audio_only=states.video is None) as transformer,
            guided_text_attention(transformer, **nag),
            # Where blocks come and go to save memory, nothing of them is kept.
            computed_once(transformer) if models.offload in ("none", "model") else nullcontext(),
            in_parallel(models.parallel, transformer) as shared,
        ):
            yield transformer, computing_in(models.dtype, shared), advance

    @torch.inference_mode()
    def make() -> Iterator[Latents]:
        with ExitStack() as stack:
            lent = None if is_lazy else stack.enter_context(transformer_for())

            def run(
                number: int, video: LatentState | None, audio: LatentState | None, place: Place
            ) -> AV:
                with nullcontext(lent) if lent else transformer_for() as borrowed:
                    transformer, model, advance = borrowed
                    if is_lazy:
                        advance(steps * number)  # what windows before have done
                    if number == 0:
                        for lora, strength in adapters:
                            covered = coverage(transformer, lora)
                            progress.note(f"{lora.name}: {covered} at strength {strength:g}")
                    if tiles is not None:
                        model = in_tiles(model, tiles, models.profile.scale)

                    def lighten(denoiser: GuidedDenoiser) -> bool:
                        way: str | None = "one guidance pass at a time"
                        if denoiser.max_batch_size != 1:
                            denoiser.max_batch_size = 1
                        else:
                            way = models.lighten(transformer)
                        if way is not None:
                            progress.note(f"out of memory: going on with {way}")
                        return way is not None

                    def denoise_with(
                        sample: Sampler, noise: torch.Generator, callback: Callback
                    ) -> AV:
                        end_step = analytics.laps("step")

                        def after_step(step: int, sigma: float, x: AV, denoised: AV) -> None:
                            end_step()
                            advance(1)
                            progress.preview(lambda: _latents(place(denoised), states))
                            callback(step, sigma, x, denoised)

                        return denoising.denoise(
                            model,
                            sigmas,
                            guided("video", video),
                            guided("audio", audio),
                            sampler=sample,
                            generator=noise,
                            max_batch_size=request.max_batch_size,
                            min_cosine=request.adaptive_guidance,
                            cache_policy=POLICIES.get(request.step_cache),
                            lighten=lighten if models.parallel == "none" else None,
                            callback=after_step,
                        )

                    if verdict is None:
                        return denoise_with(sample(), generators[number], ignore_step)
                    return best_of_seeds(denoise_with, verdict, place)

            @cache  # when it is asked for: an earlier stage may have chosen another seed
            def sample() -> Sampler:
                return sampler_of(sampler_name, generators[0].initial_seed())

            def best_of_seeds(
                denoise_with: Callable[[Sampler, torch.Generator, Callback], AV],
                verdict: Verdict,
                place: Place,
            ) -> AV:
                noises = {seed: torch.Generator().manual_seed(seed) for seed in seeds}

                def attempt(seed: int, callback: Callback) -> AV:
                    return denoise_with(sampler_of(sampler_name, seed), noises[seed], callback)

                def judged(denoised: AV, sigma: float) -> float:
                    latents = _latents(place(denoised), states)
                    grids = states.video_grid, states.audio_grid
                    return sum(verdict(latents, sigma, *grids).values())

                x, seed, scores = contest(attempt, seeds, steps, judged)
                # What follows draws on: its noise is that of the seed alone.
                generators[0].set_state(noises[seed].get_state())
                early = ", ".join(f"{score:+.2f}" for score in scores)
                progress.note(f"best of {len(seeds)}: seed {seed} (early scores {early})")
                return x

            grids = {"video": states.video_grid, "audio": states.audio_grid}
            window = window_shape(models, request)
            made = denoise_in_windows(
                run,
                windows,
                states.video,
                states.audio,
                own_tokens={name: grid.num_tokens for name, grid in grids.items() if grid},
                window_tokens={
                    name: grid_of(models, window).num_tokens
                    for name, grid_of in (("video", video_grid), ("audio", audio_grid))
                    if grids[name]
                },
                frozen=states.frozen,
                starts=starts,
            )
            per_frame = {"audio": 1}
            if states.video_grid is not None:
                per_frame["video"] = states.video_grid.tokens_per_frame
            for window_tokens, clip, final in made:
                frames = {name: count // per_frame[name] for name, count in final.items()}
                seed = generators[0].initial_seed()
                yield Latents(_latents(clip, states), frames, window_tokens, seed)

    return make() if is_lazy else iter(list(make()))


def finished(windows: Iterable[Latents]) -> AV:
    """The latents of a clip, all of its windows made."""
    *_, last = windows
    return last.clip


def window_shape(models: ModelSet, request: GenerationRequest) -> VideoShape:
    """Of what the model sees of a resolved request's clip at once."""
    is_one = len(request.windows(models.profile.scale.time)) == 1
    num_frames = request.shape.num_frames if is_one else request.window_frames
    return request.shape._replace(num_frames=num_frames)


@torch.inference_mode()
def upsample(
    models: ModelSet,
    request: GenerationRequest,  # of the larger picture
    windows: Iterable[Latents],
    progress: Progress,
) -> Iterator[AV]:
    """What each window of a second stage starts from, as tokens: the picture at twice the height
    and width, the sound as it is."""
    shape = window_shape(models, request)
    large = video_grid(models, shape)
    small = video_grid(models, shape._replace(height=shape.height // 2, width=shape.width // 2))
    assert request.spatial_upsampler is not None
    for made in windows:
        assert made.window.video is not None
        with (
            progress.stage("upsample"),
            models.upsampler(request.spatial_upsampler) as upsampler,
            models.video_encoder() as encoder,
        ):
            raw = small.unpatchify(made.window.video).to(models.dtype)
            latent = upsample_latent(upsampler, raw, encoder.per_channel_statistics).float()
        yield AV(large.patchify(latent), made.window.audio)


def refine(
    models: ModelSet,
    request: GenerationRequest,
    states: States,
    starts: Iterable[AV],
    contexts: list[Context],
    generators: Sequence[torch.Generator],
    progress: Progress,
    *,
    loras: Sequence[LoraFile] = (),
    sampler: str = "euler",
) -> Iterator[Latents]:
    """The second stage: a few steps from little noise over `starts`, unguided."""
    return denoise(
        models,
        request,
        states,
        contexts,
        generators,
        progress,
        starts=starts if models.stays_loaded else list(starts),
        sigmas=schedulers.table((*(request.stage_2_sigmas or ()), 0.0)),
        loras=loras,
        is_guided=False,
        sampler=sampler,
        tiles=refine_tiles(request.refine_tile, models.profile.scale, request.shape),
        stage="refine",
    )


def with_sound_of(sounds: Iterable[Latents], pictures: Iterable[Latents]) -> Iterator[Latents]:
    """The picture of one stage with the sound of another, window by window."""
    for picture, sound in zip(pictures, sounds, strict=False):
        final = {**sound.final, "video": picture.final["video"]}
        yield picture._replace(clip=AV(picture.clip.video, sound.clip.audio), final=final)


def sampler_of(name: str, seed: int) -> Sampler:
    """A sampler of SAMPLERS with its own generator."""
    generator = torch.Generator().manual_seed(seed + SAMPLER_SEED_OFFSET)
    return partial(SAMPLERS[name], generator=generator)


def _latents(x: AV, states: States) -> AV:
    return AV(
        _latent(x.video, states.video, states.video_grid),
        _latent(x.audio, states.audio, states.audio_grid),
    )


def _latent(
    tokens: Tensor | None, state: LatentState | None, grid: VideoGrid | AudioGrid | None
) -> Tensor | None:
    """The clip's own tokens as a latent; those that were to be kept are so bit for bit."""
    if tokens is None or state is None or grid is None:
        return None
    return grid.unpatchify(torch.where(state.denoise_mask == 0, state.clean_latent, tokens))


def computing_in(dtype: torch.dtype, transformer: Model) -> Model:
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
        analytics.count("model_calls")
        return transformer(cast(video), cast(audio), perturbations)

    return model


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
                for frames in analytics.each("frames", _from(done, chunks)):
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


def _from(start: int, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
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
        with models.audio_decoder() as decoder:
            mel = decoder(latent.to(models.device, models.dtype))
        with models.vocoder() as vocoder:
            waveform = vocoder(mel)[0].float().clamp(-1, 1)  # (channels, samples)
            sample_rate = vocoder.output_sample_rate
        missing = round(duration_s * sample_rate) - waveform.shape[1]
        waveform = torch.nn.functional.pad(waveform, (0, missing))  # negative padding cuts
        return media.Audio(waveform.cpu().numpy(), sample_rate)


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
            latent = until(last)[:, :, first:last].to(models.device, models.dtype)
            with progress.stage("decode audio"):
                with models.audio_decoder() as decoder:
                    mel = decoder(latent)
                with models.vocoder() as vocoder:
                    waveform = vocoder(mel)[0].float().clamp(-1, 1)
            begin = max(0, start * per_latent - early)
            end = max(begin, stop * per_latent - early if stop < count else total)
            shift = first * per_latent  # a tile of time begins with its first latent's last frame
            part = waveform[:, begin - shift : end - shift]
            yield F.pad(part, (0, end - begin - part.shape[1])).cpu().numpy()

    return media.StreamedAudio(parts(), sample_rate)
