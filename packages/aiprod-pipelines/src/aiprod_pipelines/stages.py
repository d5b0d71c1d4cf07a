"""From what is encoded to clean latents: the verbs that every recipe shares.

Networks are borrowed from the ModelSet for the length of a stage. Latents and tokens stay on the
model's device; random numbers come from one generator on the CPU, so a seed means the same there
and on a GPU.

A recipe reads: encode (encoding.py), initial_states, conditions, denoise, and for a second stage
upsample, initial_states, conditions, refine. What `denoise`, `upsample` and `refine` give comes
window by window, each made when it is asked for; most clips are one window. A Clip decodes them
(decoding.py).

Letters: B batch (1 here), C channels, F latent frames, H W height and width, N tokens, S text
tokens, D context width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from aiprod_core.components import conditioning, denoising, schedulers
from aiprod_core.components.constants import computed_ahead, computed_once
from aiprod_core.components.denoising import Sampler
from aiprod_core.components.guiders import Guidance, GuidedDenoiser, GuidedModality, Model
from aiprod_core.components.nag import NAG, both_prompts, guided_text_attention
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.components.samplers import SAMPLERS, Callback, ignore_step
from aiprod_core.components.step_cache import POLICIES
from aiprod_core.components.tiled_model import in_tiles
from aiprod_core.components.windows import Place, denoise_in_windows
from aiprod_core.loader.lora import Lora, coverage, open_lora
from aiprod_core.model.transformer import Perturbations, Transformer
from aiprod_core.model.upsampler import upsample_latent
from aiprod_core.parallel import in_parallel
from aiprod_core.types import AV, LatentState, Modality, VideoShape
from aiprod_pipelines import analytics
from aiprod_pipelines.best_of import Draft, Verdict, contest, draft_of, early_step, open_verdict
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Advance, Progress
from aiprod_pipelines.request import GenerationRequest, LoraFile
from aiprod_pipelines.tiles import refine_tiles

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


# How a resolved request wants it made.


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


# Noise to clean latents.


@torch.inference_mode()
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
    is_contest = request.best_of > 1 and stage == "denoise"
    shared = _Stage(
        name=stage,
        models=models,
        request=request,
        states=states,
        contexts=contexts,
        generators=generators,
        progress=progress,
        sigmas=schedule_of(request) if sigmas is None else sigmas,
        adapters=[(open_lora(lora.path), lora.strength) for lora in loras],
        is_guided=is_guided,
        sampler_name=sampler or request.sampler or "euler",
        tiles=tiles,
        verdict=open_verdict(models, request.text) if is_contest else None,
    )
    if is_contest and is_guided:
        draft = draft_of(models, request, shared.steps, loras)
        if draft is not None:
            _settle_on_a_seed(shared, draft)
            shared = replace(shared, verdict=None)
    if models.stays_loaded:
        return _windows(shared, starts, borrow=partial(_borrow_transformer, shared))
    with _borrow_transformer(shared) as lent:
        return iter(list(_windows(shared, starts, borrow=lambda number: nullcontext(lent))))


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


# What `denoise` is made of.


@dataclass(frozen=True)
class _Stage:
    """What the windows of one `denoise` share: its arguments, with their defaults filled in."""

    name: str
    models: ModelSet
    request: GenerationRequest
    states: States  # of the whole clip
    contexts: list[Context]
    generators: Sequence[torch.Generator]
    progress: Progress
    sigmas: Tensor
    adapters: list[tuple[Lora, float]]
    is_guided: bool
    sampler_name: str
    tiles: Tensor | None
    verdict: Verdict | None  # where several seeds are tried and the best is finished

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @cached_property
    def sampler(self) -> Sampler:
        """One for all windows. First asked for when an earlier stage has settled on a seed."""
        return sampler_of(self.sampler_name, self.generators[0].initial_seed())

    def nag(self, name: str) -> NAG:
        return NAG() if name in self.states.frozen else nag_of(self.request, name)

    def guided(self, name: str, state: LatentState | None) -> GuidedModality | None:
        """A window's state of one modality, with its texts.

        A frozen modality has neither a negative text nor guidance of its own.
        """
        if state is None:
            return None
        context, *negative = (getattr(context, name) for context in self.contexts)
        is_frozen = name in self.states.frozen
        is_guided = self.is_guided and not is_frozen
        guidance = guidance_of(self.request, name) if is_guided else Guidance()
        if self.nag(name).is_on:
            return GuidedModality(state, both_prompts(context, negative[0]), guidance=guidance)
        negative = negative[0] if negative and is_guided else None
        return GuidedModality(state, context, negative, guidance, is_frozen=is_frozen)


class _Loan(NamedTuple):
    """The transformer while a stage has it."""

    model: Model  # as it is to be called
    lighten: Callable[[GuidedDenoiser], bool] | None  # for when memory runs out
    advance: Advance  # the stage's progress, by steps


@contextmanager
def _borrow_transformer(stage: _Stage, windows_done: int = 0, *, clips: int = 1) -> Iterator[_Loan]:
    """With the stage's LoRAs and negative prompts in it, and the stage shown as running."""
    models, progress = stage.models, stage.progress
    total = stage.steps * len(stage.request.windows(models.profile.scale.time)) * clips
    if stage.verdict is not None:
        total += early_step(stage.steps) * (stage.request.best_of - 1)
    with (
        progress.stage(stage.name, total) as advance,
        models.transformer(stage.adapters, audio_only=stage.states.video is None) as transformer,
        guided_text_attention(transformer, video=stage.nag("video"), audio=stage.nag("audio")),
        # Where blocks come and go to save memory, nothing of them is kept.
        computed_once(transformer) if models.offload in ("none", "model") else nullcontext(),
        computed_ahead(transformer, stage.sigmas),
        in_parallel(models.parallel, transformer) as shared,
    ):
        advance(stage.steps * windows_done)
        if windows_done == 0:
            for lora, strength in stage.adapters:
                covered = coverage(transformer, lora)
                progress.note(f"{lora.name}: {covered} at strength {strength:g}")
        model = computing_in(models.dtype, shared)
        if stage.tiles is not None:
            model = in_tiles(model, stage.tiles, models.profile.scale)
        lighten = partial(_lighten, models, transformer, progress)
        yield _Loan(model, lighten if models.parallel == "none" else None, advance)


def _lighten(
    models: ModelSet, transformer: Transformer, progress: Progress, denoiser: GuidedDenoiser
) -> bool:
    """Makes the next call of the model smaller; False where nothing is left to do."""
    if denoiser.max_batch_size != 1:
        denoiser.max_batch_size, way = 1, "one guidance pass at a time"
    else:
        way = models.lighten(transformer)
    if way is not None:
        progress.note(f"out of memory: going on with {way}")
    return way is not None


@torch.inference_mode()
def _windows(
    stage: _Stage,
    starts: Iterable[AV] | None,
    borrow: Callable[[int], AbstractContextManager[_Loan]],  # for the window of a number
) -> Iterator[Latents]:
    """The clip after each of its windows."""
    models, states = stage.models, stage.states
    window = window_shape(models, stage.request)
    own_tokens, window_tokens, tokens_per_frame = {}, {}, {}
    if states.video_grid is not None:
        own_tokens["video"] = states.video_grid.num_tokens
        window_tokens["video"] = video_grid(models, window).num_tokens
        tokens_per_frame["video"] = states.video_grid.tokens_per_frame
    if states.audio_grid is not None:
        own_tokens["audio"] = states.audio_grid.num_tokens
        window_tokens["audio"] = audio_grid(models, window).num_tokens
        tokens_per_frame["audio"] = 1

    def run(number: int, video: LatentState | None, audio: LatentState | None, place: Place) -> AV:
        guided = stage.guided("video", video), stage.guided("audio", audio)
        with borrow(number) as loan:
            sample = partial(_sample, stage, loan, *guided, place)
            if stage.verdict is not None:
                return _sample_best(stage, stage.verdict, sample, place)
            return sample(stage.sampler, stage.generators[number], ignore_step)

    for made in denoise_in_windows(
        run,
        stage.request.windows(models.profile.scale.time),
        states.video,
        states.audio,
        own_tokens=own_tokens,
        window_tokens=window_tokens,
        frozen=states.frozen,
        starts=starts,
    ):
        final = {name: count // tokens_per_frame[name] for name, count in made.final.items()}
        seed = stage.generators[0].initial_seed()
        yield Latents(_latents(made.clip, states), final, made.window, seed)


def _sample(
    stage: _Stage,
    loan: _Loan,
    video: GuidedModality | None,
    audio: GuidedModality | None,
    place: Place,  # puts a window's tokens into the clip's
    sampler: Sampler,
    noise: torch.Generator,
    callback: Callback,
) -> AV:
    """Noise to a window's clean tokens; every step is timed, shown and offered as a preview."""
    request = stage.request
    end_step = analytics.laps("step")

    def after_step(step: int, sigma: float, x: AV, denoised: AV) -> None:
        end_step()
        loan.advance(1)
        stage.progress.preview(lambda: _latents(place(denoised), stage.states))
        callback(step, sigma, x, denoised)

    return denoising.denoise(
        loan.model,
        stage.sigmas,
        video,
        audio,
        sampler=sampler,
        generator=noise,
        max_batch_size=request.max_batch_size,
        min_cosine=request.adaptive_guidance,
        cache_policy=POLICIES.get(request.step_cache),
        lighten=loan.lighten,
        callback=after_step,
    )


def _settle_on_a_seed(stage: _Stage, draft: Draft) -> None:
    """Seeds the stage's noise with that of the request's seeds which has the best draft."""
    assert stage.verdict is not None
    states, request = stage.states, stage.request
    drafts = replace(
        stage,
        name="draft",
        request=replace(request, step_cache="off"),
        sigmas=schedulers.distilled(draft.steps),
        adapters=[*stage.adapters, (open_lora(draft.lora.path), draft.lora.strength)],
        is_guided=False,
        sampler_name="euler",
        verdict=None,
    )
    seeds = _seeds(request)
    scores = []
    with _borrow_transformer(drafts, clips=len(seeds)) as lent:
        for seed in seeds:
            own = replace(drafts, generators=[torch.Generator().manual_seed(seed)])
            (made,) = _windows(own, None, borrow=lambda number: nullcontext(lent))
            grids = states.video_grid, states.audio_grid
            scores.append(stage.verdict.total(made.clip, 0.0, *grids))
    best = seeds[scores.index(max(scores))]
    stage.generators[0].manual_seed(best)
    _note_best(stage, best, scores, "drafts")


def _seeds(request: GenerationRequest) -> list[int]:
    return [(request.seed + k) % 2**63 for k in range(request.best_of)]


def _note_best(stage: _Stage, seed: int, scores: list[float], judged: str) -> None:
    listed = ", ".join(f"{score:+.2f}" for score in scores)
    stage.progress.note(f"best of {len(scores)}: seed {seed} (scores of {judged} {listed})")


def _sample_best(
    stage: _Stage,
    verdict: Verdict,
    sample: Callable[[Sampler, torch.Generator, Callback], AV],
    place: Place,
) -> AV:
    """`sample` with that of the request's seeds which the verdict finds best early on."""
    states = stage.states
    seeds = _seeds(stage.request)
    noises = {seed: torch.Generator().manual_seed(seed) for seed in seeds}

    def attempt(seed: int, callback: Callback) -> AV:
        return sample(sampler_of(stage.sampler_name, seed), noises[seed], callback)

    def judge(denoised: AV, sigma: float) -> float:
        latents = _latents(place(denoised), states)
        return verdict.total(latents, sigma, states.video_grid, states.audio_grid)

    x, seed, scores = contest(attempt, seeds, stage.steps, judge)
    # What follows draws on: its noise is that of the seed alone.
    stage.generators[0].set_state(noises[seed].get_state())
    _note_best(stage, seed, scores, "early steps")
    return x


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
