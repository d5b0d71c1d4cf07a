"""Pairs of clips of which one is better, as latents: what a reward model learns from.

Clips of the world are spoilt by graded degradations, each of which hits one axis: blur, noise, a
colour cast or blocks for the picture; a freeze, jitter, a time warp or a cut for the motion; a
sound that comes too early or too late; a caption with one wrong attribute. A clip, its mild and
its strong form are in order by construction.

A model's own clips are drawn beside them, several to a prompt: the finished latents, and the clean
estimates of early steps, by which a reward model learns to foretell the finish.

Letters: K clips, C channels, F latent frames, H W latent height and width, z channels and T frames
of a sound's latent, S text tokens, D width of the text states.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor

from aiprod_core.components import conditioning, denoising
from aiprod_core.components.guiders import GuidedModality
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.loader.lora import Lora
from aiprod_core.model.mel import log_mel
from aiprod_core.model.reward import text_states
from aiprod_core.types import AV, AudioLatentShape, VideoLatentShape
from aiprod_pipelines import encoding, stages
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest
from aiprod_trainer.world.captions import WORDS, describe
from aiprod_trainer.world.judge import sync_error_ms
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import (
    ALL_BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    sample_scene,
    visible_colours,
)
from aiprod_trainer.world.sound import SAMPLE_RATE, synthesise

CLIPS_PER_PART = 64
MAX_TEXT = 64  # tokens; longer captions are cut
MILD, STRONG = (0.25, 0.5), (0.65, 1.0)  # severities of the two grades
# People notice sound that is early by 45 ms or late by 125 ms (ITU-R BS.1359-1).
NOTICEABLE_MS = 90
SHIFTS_S = {"mild": (0.12, 0.3), "strong": (0.3, 0.8)}

# -------------------------------------------------------------------------------------- the picture

Degrade = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def blur(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    radius = (0.5 + 2.0 * severity) * frames.shape[1] / 64
    return ndimage.gaussian_filter(frames, (0, radius, radius, 0))


def noise(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    grain = rng.standard_normal(frames.shape, dtype=np.float32)
    return frames + grain * (10 + 45 * severity)


def colour_cast(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """One of the primary colours, or two, too weak."""
    gain = np.ones(3, np.float32)
    gain[rng.permutation(3)[: rng.integers(1, 3)]] = 0.85 - 0.5 * severity
    return frames * gain


def blocks(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """As at too low a bit rate."""
    side = (4, 8)[int(severity > 0.5)] * frames.shape[1] // 64
    f, h, w, c = frames.shape
    means = frames.reshape(f, h // side, side, w // side, side, c).mean((2, 4))
    coarse = means.repeat(side, 1).repeat(side, 2)
    return frames + (coarse - frames) * (0.5 + 0.5 * severity)


def freeze(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Holds one frame for a part of the clip, then jumps to where the clip is."""
    count = len(frames)
    held = round(count * (0.2 + 0.6 * severity))
    start = int(rng.integers(0, count - held + 1))
    index = np.arange(count)
    index[start : start + held] = start
    return frames[index]


def jitter(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """The picture jumps about from frame to frame."""
    reach = (1.0 + 4.0 * severity) * frames.shape[1] / 64
    shifts = rng.uniform(-reach, reach, (len(frames), 2))
    shifted = [
        ndimage.shift(frame, (*offset, 0), order=1, mode="nearest")
        for frame, offset in zip(frames, shifts, strict=True)
    ]
    return np.stack(shifted)


def time_warp(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Runs too fast and too slow in turn, in whole frames."""
    count = len(frames)
    t = np.linspace(0, 1, count)
    turns = rng.integers(1, 3)
    swing = severity * 0.9 / (2 * np.pi * turns) * rng.choice((-1, 1))
    warped = t + (1 + severity) * swing * np.sin(2 * np.pi * turns * t)
    return frames[np.clip(np.round(warped * (count - 1)), 0, count - 1).astype(int)]


def teleport(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Two stretches of the clip change places: things jump there and back."""
    count = len(frames)
    length = max(3, round(count * (0.12 + 0.2 * severity)))
    first = int(rng.integers(0, count - 2 * length))
    second = int(rng.integers(first + length, count - length + 1))
    index = np.arange(count)
    index[first : first + length], index[second : second + length] = (
        np.arange(second, second + length),
        np.arange(first, first + length),
    )
    return frames[index]


VISUAL: tuple[Degrade, ...] = (blur, noise, colour_cast, blocks)
MOTION: tuple[Degrade, ...] = (freeze, jitter, time_warp, teleport)


def graded(
    frames: np.ndarray, kinds: Sequence[Degrade], rng: np.random.Generator
) -> list[np.ndarray]:
    """A mild and a strong form of one degradation; a kind that shows nothing here is passed over.

    A frozen frame of a thing at rest is no fault. Frames are uint8 (F, side, side, 3).
    """
    original = frames.astype(np.float32)
    for kind in (*(kinds[i] for i in rng.permutation(len(kinds))), kinds[1]):
        severities = rng.uniform(*MILD), rng.uniform(*STRONG)
        found = [np.clip(kind(original, s, rng), 0, 255).astype(np.uint8) for s in severities]
        change = [np.abs(f - original).mean() for f in found]
        if 0.8 < change[0] < change[1]:
            return found
    return found


# ---------------------------------------------------------------------------------- sound and words


def shifted_sounds(
    scene: Scene, audio: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray] | None:
    """The sound a little and much too early or too late, turned round at the ends of the clip.

    None where no shift makes a difference: without events, or where they come again in time.
    """
    times = tuple(event.time_s for event in scene.events)
    found: list[tuple[float, np.ndarray]] = []
    for low, high in SHIFTS_S.values():
        for _ in range(8):
            shift = rng.uniform(low, high) * rng.choice((-1, 1))
            moved = tuple((t + shift) % scene.duration_s for t in times)
            error = sync_error_ms(times, moved)
            if error is not None and error > NOTICEABLE_MS:
                found.append((error, np.roll(audio, round(shift * SAMPLE_RATE), axis=1)))
                break
    if len(found) < 2 or found[1][0] < found[0][0] + 20:
        return None
    return [audio for _, audio in found]


def captions(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A true caption, and the same sentence with one attribute wrong."""
    seed = int(rng.integers(2**31))
    caption = describe(scene, np.random.default_rng(seed))
    wrong = [
        describe(changed, np.random.default_rng(seed)).text
        for what, changed in _altered(scene, rng)
        if what in caption.stated
    ]
    wrong = [text for text in wrong if text != caption.text]
    if not wrong:  # what it states cannot be changed alone: another scene's words
        return caption.text, describe(sample_scene(rng, world=scene.world), rng).text
    return caption.text, wrong[int(rng.integers(len(wrong)))]


def _altered(scene: Scene, rng: np.random.Generator) -> list[tuple[str, Scene]]:
    """The scene with one attribute changed, each in turn; only words are made of these."""

    def other(options: Sequence[str], now: str) -> str:
        left = [option for option in options if option != now]
        return left[int(rng.integers(len(left)))]

    body = scene.body
    motions = ("bounce", "roll left", "roll right", "fall", "pulse")
    choices = {
        "colour": other(visible_colours(scene.background), body.colour)
        if len(visible_colours(scene.background)) > 1
        else other(tuple(COLOURS), body.colour),
        "size": other(tuple(SIZES), body.size),
    }
    if body.shape in SHAPES:
        choices["shape"] = other(SHAPES, body.shape)
        if len(scene.bodies) == 1:
            choices["motion"] = other(motions, body.motion)
    changed = [
        (what, replace(scene, bodies=(replace(body, **{what: word}), *scene.bodies[1:])))
        for what, word in choices.items()
    ]
    place = other(tuple(ALL_BACKGROUNDS), scene.background)
    return [*changed, ("background", replace(scene, background=place))]


SWAPPED = ("colour", "shape", "size", "background", "motion")


def swapped_words(text: str, rng: np.random.Generator) -> str | None:
    """A caption of the world with the words for one attribute exchanged for another's.

    None where it says nothing that could be. Needs no scene, so it serves captions on disk.
    """
    found = []
    for what in SWAPPED:
        for value, phrases in WORDS[what].items():
            for phrase in phrases:
                # What rolls and what slides is said in one of three verbs.
                words = re.escape(phrase).replace(r"\{rolls\}", "(?:rolls|slides|moves)")
                if re.search(rf"(?<![\w-]){words}(?![\w-])", text, re.IGNORECASE):
                    found.append((what, value, words))
    # The longest phrase of an attribute is the one that was said: "blue" is in "navy blue".
    said = {
        what: max((f for f in found if f[0] == what), key=lambda f: len(f[2])) for what, *_ in found
    }
    for index in rng.permutation(len(said)):
        what, value, words = list(said.values())[index]
        others = [v for v in WORDS[what] if v != value and "{other}" not in WORDS[what][v][0]]
        phrases = WORDS[what][others[int(rng.integers(len(others)))]]
        phrase = phrases[int(rng.integers(len(phrases)))].replace("{rolls}", "rolls")
        changed = re.sub(rf"(?<![\w-]){words}(?![\w-])", phrase, text, flags=re.IGNORECASE)
        if changed != text:
            return changed
    return None


# ------------------------------------------------------------------------------- pairs of the world


@torch.inference_mode()
def prepare_pairs(
    models: ModelSet, folder: Path, *, clips: int, world: str, size: int, seed: int
) -> None:
    """Makes every missing part of 64 clips in `folder`; a part is a function of (seed, its number).

    video (K, 5, C, F, H, W): true, picture mildly and strongly spoilt, motion the same; audio
    (K, 3, z, T, bins): true, shifted, shifted more; has_sync (K,): whether that shows; text
    (K, 2, S, D) with text_mask: true, with a wrong attribute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = [min(CLIPS_PER_PART, clips - k) for k in range(0, clips, CLIPS_PER_PART)]
    for number, count in enumerate(track(counts, description=f"pairs of {world}")):
        path = folder / f"pairs-{number:05d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng([seed, number])
        rows = [_pairs_of(sample_scene(rng, world=world), size, rng) for _ in range(count)]
        tensors = {
            "video": encode_videos(models, np.concatenate([row.frames for row in rows])),
            "audio": encode_sounds(models, np.concatenate([row.audio for row in rows])),
            "has_sync": torch.tensor([row.has_sync for row in rows]),
        }
        text, mask = encode_texts(models, [caption for row in rows for caption in row.captions])
        tensors |= {"text": text, "text_mask": mask}
        tensors = {
            name: t if name == "has_sync" else t.unflatten(0, (count, -1)).contiguous()
            for name, t in tensors.items()
        }
        path.with_suffix(".jsonl").write_text(
            "".join(json.dumps(row.captions) + "\n" for row in rows)
        )
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"fps": "12"})
        temporary.replace(path)


@dataclass(frozen=True, eq=False)
class _Pairs:
    frames: np.ndarray  # (5, frames, side, side, 3)
    audio: np.ndarray  # (3, 2, samples)
    has_sync: bool
    captions: tuple[str, str]


def _pairs_of(scene: Scene, size: int, rng: np.random.Generator) -> _Pairs:
    frames, audio = render(scene, size), synthesise(scene).astype(np.float32)
    spoilt = [*graded(frames, VISUAL, rng), *graded(frames, MOTION, rng)]
    shifted = shifted_sounds(scene, audio, rng)
    sounds = [audio, *(shifted or (audio, audio))]
    return _Pairs(
        np.stack([frames, *spoilt]), np.stack(sounds), shifted is not None, captions(scene, rng)
    )


def encode_videos(models: ModelSet, frames: np.ndarray, batch: int = 20) -> Tensor:
    """(K, frames, side, side, 3) of uint8 to latents (K, C, F, H, W) in float16."""
    with models.video_encoder() as encoder, torch.autocast("cpu", torch.bfloat16):
        found = [
            encoder(torch.from_numpy(part).permute(0, 4, 1, 2, 3).float() / 127.5 - 1).half()
            for part in np.split(frames, range(batch, len(frames), batch))
        ]
    return torch.cat(found)


def encode_sounds(models: ModelSet, audio: np.ndarray, batch: int = 32) -> Tensor:
    """(K, 2, samples) at 16 kHz to latents (K, z, T, bins) in float16."""
    config = models.audio_config
    with models.audio_encoder() as encoder:
        found = []
        for part in np.split(audio, range(batch, len(audio), batch)):
            mel = log_mel(torch.from_numpy(part), config)
            found.append(encoder(mel[:, :, : mel.shape[2] // 4 * 4]).half())
    return torch.cat(found)


def encode_texts(models: ModelSet, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Text states (K, S, D) in float16 and their mask (K, S)."""
    with models.text_encoder() as encoder:
        hidden, mask = encoder.encode(list(texts))
    states = text_states(hidden)[:, :MAX_TEXT] * mask[:, :MAX_TEXT, None]
    short = MAX_TEXT - states.shape[1]
    return F.pad(states, (0, 0, 0, short)).half(), F.pad(mask[:, :MAX_TEXT], (0, short)).long()


# ----------------------------------------------------------------------------- a model's own clips


@dataclass(frozen=True, eq=False)
class Sampled:
    """Clips of one model: the finished latents, and the clean estimate after some of the steps.

    estimates: step -> (sigma at which it was made, latents).
    """

    finished: AV  # video (K, C, F, H, W), audio (K, z, T, bins)
    estimates: dict[int, tuple[float, AV]]


@torch.inference_mode()
def sample_clips(
    models: ModelSet,
    prompts: Sequence[str],
    seeds: Sequence[int],  # as many as prompts
    *,
    keep_steps: Sequence[int] = (),  # how many steps are done when an estimate is kept
    settings: Mapping[str, object] | None = None,  # fields of the request
    loras: Sequence[tuple[Lora, float]] = (),
    batch: int = 16,
) -> Sampled:
    """What the one-stage pipeline makes of each prompt and seed, several clips at a time.

    A clip's noise is that of its seed in the pipeline; sums in another order leave small
    differences. The transformer may be one that is lent by `models.use`.
    """
    parts = [
        _sample(
            models, prompts[k : k + batch], seeds[k : k + batch], keep_steps, settings or {}, loras
        )
        for k in track(range(0, len(prompts), batch), description="clips", transient=True)
    ]

    def joined(items: Sequence[AV]) -> AV:
        return AV(
            torch.cat([item.video for item in items if item.video is not None]),
            torch.cat([item.audio for item in items if item.audio is not None]),
        )

    return Sampled(
        joined([part.finished for part in parts]),
        {
            step: (parts[0].estimates[step][0], joined([part.estimates[step][1] for part in parts]))
            for step in parts[0].estimates
        },
    )


def _sample(
    models: ModelSet,
    prompts: Sequence[str],
    seeds: Sequence[int],
    keep_steps: Sequence[int],
    settings: Mapping[str, object],
    loras: Sequence[tuple[Lora, float]],
) -> Sampled:
    requests = [
        GenerationRequest.from_dict({**settings, "prompt": text}).resolved(models.profile)
        for text in prompts
    ]
    request, quiet = requests[0], Progress()
    known: dict[str, list[stages.Context]] = {}
    for each in requests:
        known.setdefault(each.text, encoding.encode_prompts(models, each, quiet))
    contexts = [known[each.text] for each in requests]
    single = stages.initial_states(models, request)
    assert single.video_grid is not None and single.audio_grid is not None
    video_grid = VideoGrid(
        single.video_grid.shape._replace(batch=len(prompts)),
        single.video_grid.scale,
        single.video_grid.fps,
    )
    audio_grid = replace(
        single.audio_grid, shape=single.audio_grid.shape._replace(batch=len(prompts))
    )
    states = {
        "video": conditioning.video_state(video_grid, device=models.device),
        "audio": conditioning.audio_state(audio_grid, device=models.device),
    }

    def guided(name: str) -> GuidedModality:
        own, *negative = (
            torch.cat([getattr(context[k], name) for context in contexts])
            for k in range(len(contexts[0]))
        )
        negative_context = negative[0] if negative else None
        return GuidedModality(
            states[name], own, negative_context, stages.guidance_of(request, name)
        )

    def noise_of_seeds(like: AV) -> AV:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = {
            name: torch.cat([torch.randn((1, *x.shape[1:]), generator=g) for g in generators])
            for name, x in (("video", like.video), ("audio", like.audio))
            if x is not None
        }
        return AV(**draws).map(lambda x: x.to(models.device))

    estimates: dict[int, tuple[float, AV]] = {}

    def latents(x: AV) -> AV:
        assert x.video is not None and x.audio is not None
        return AV(
            video_grid.unpatchify(x.video).half().cpu(), audio_grid.unpatchify(x.audio).half().cpu()
        )

    def keep(step: int, sigma: float, x: AV, denoised: AV) -> None:
        if step + 1 in keep_steps:
            estimates[step + 1] = sigma, latents(denoised)

    with models.transformer(loras) as transformer:
        x = denoising.denoise(
            stages.computing_in(models.dtype, transformer),
            stages.schedule_of(request),
            guided("video"),
            guided("audio"),
            sampler=stages.sampler_of(request.sampler or "euler", seeds[0]),
            noise_sampler=noise_of_seeds,
            callback=keep,
        )
    return Sampled(latents(x), estimates)


def grids_of(
    models: ModelSet, video: Tensor, audio: Tensor, fps: float
) -> tuple[VideoGrid, AudioGrid]:
    """Where the tokens of latents (K, C, F, H, W) and (K, z, T, bins) lie."""
    config = models.audio_config
    return (
        VideoGrid(VideoLatentShape(1, *video.shape[-4:]), models.profile.scale, fps),
        AudioGrid(
            AudioLatentShape(1, *audio.shape[-3:]),
            sample_rate=config.sampling_rate,
            hop_length=config.hop_length,
        ),
    )


def read_parts(folder: Path, pattern: str) -> dict[str, Tensor]:
    """All parts of a folder as one."""
    files = sorted(folder.glob(pattern))
    parts = [load_file(file) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
