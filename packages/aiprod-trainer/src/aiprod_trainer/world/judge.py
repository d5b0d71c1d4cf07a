"""Measures a clip of the procedural world without a network: what is seen, what is heard, when.

The picture is measured in `seeing.py`, the sound in `hearing.py`; here they are compared with each
other and with the truth. `benchmarks/judge.py` measures how often it is right on true renders.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from aiprod_core.errors import InputError
from aiprod_pipelines.metrics.sync import Events, Offset, best_offset
from aiprod_trainer.world.captions import sound_kind
from aiprod_trainer.world.hearing import find_ambience, find_pan, find_sound, heard_events
from aiprod_trainer.world.scene import Scene
from aiprod_trainer.world.seeing import Track, look
from aiprod_trainer.world.sound import SAMPLE_RATE


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the judge measured. Times are in seconds from the start of the clip.

    `motion` is one of the world's motions or "still"; `sound` a material, another kind of sound
    (see captions.sound_kind) or "silence"; `ambience` is None where a lasting sound hides it;
    `second_colour` is None with one object. `sync_ms` is None unless both something seen and
    something heard can be compared. `pan` is 0 for sound from the left, 1 from the right.
    """

    colour: str
    second_colour: str | None
    shape: str
    size: str
    background: str
    camera: str
    motion: str
    sound: str
    ambience: str | None
    seen_s: tuple[float, ...]
    heard_s: tuple[float, ...]
    sync_ms: float | None
    pan: float
    track: Track


def judge(
    frames: np.ndarray, audio: np.ndarray, sample_rate: int = SAMPLE_RATE, fps: float = 12.0
) -> Verdict:
    """Measures uint8 or float 0..255 frames (F, S, S, 3) and audio (2, samples) in [-1, 1].

    Raises InputError for other layouts, and for a side that is no multiple of 64 pixels.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.shape[1] != frames.shape[2]:
        raise InputError(f"frames must be (F, S, S, 3); got {frames.shape}")
    if audio.ndim != 2 or audio.shape[0] != 2:
        raise InputError(f"audio must be stereo, (2, samples); got {audio.shape}")
    sight = look(frames, fps)
    sound = find_sound(audio, sample_rate)
    heard = heard_events(audio, sound, sample_rate)
    last_frame_s = (len(frames) - 1) / fps
    return Verdict(
        colour=sight.colour,
        second_colour=sight.second_colour,
        shape=sight.shape,
        size=sight.size,
        background=sight.background,
        camera=sight.camera,
        motion=sight.motion,
        sound=sound,
        ambience=find_ambience(audio, sound, sample_rate),
        seen_s=sight.seen_s,
        heard_s=heard,
        sync_ms=sync_error_ms(sight.seen_s, heard, last_frame_s - 0.05),
        pan=find_pan(audio),
        track=sight.track,
    )


def agreement(verdict: Verdict, scene: Scene) -> dict[str, bool | float]:
    """Right or wrong for each attribute of the scene; `sync_ms`, and `seen_ms` and `heard_ms`
    (distance of what is seen and heard from the true events) where there are events.

    With two objects, shape and size are those of the one whose colour was named first.
    """
    body = next((b for b in scene.bodies if b.colour == verdict.colour), scene.body)
    truth = [e.time_s for e in scene.events]
    last_frame = (scene.num_frames - 1) / scene.fps
    visible = [t for t in truth if 0.1 < t < last_frame - 0.05]
    audible = [t for t in truth if 0.1 < t < scene.duration_s - 0.1]
    colours = {verdict.colour, verdict.second_colour} - {None}
    result: dict[str, bool | float] = {
        "colour": colours == {b.colour for b in scene.bodies},
        "shape": verdict.shape == body.shape,
        "size": verdict.size == body.size,
        "background": verdict.background == scene.background,
        "camera": verdict.camera == scene.camera,
        "motion": verdict.motion == body.motion,
        "sound": verdict.sound == sound_kind(body),
        "seen_events": len(visible) <= len(verdict.seen_s) <= len(truth),
        "heard_events": len(audible) <= len(verdict.heard_s) <= len(truth),
    }
    if verdict.ambience is not None:
        result["ambience"] = verdict.ambience == scene.ambience
    for name, times, expected in (
        ("seen_ms", verdict.seen_s, visible),
        ("heard_ms", verdict.heard_s, audible),
    ):
        error = sync_error_ms(tuple(expected), times, last_frame - 0.05)
        if error is not None:
            result[name] = error
    if verdict.sync_ms is not None:
        result["sync_ms"] = verdict.sync_ms
    return result


def sync_error_ms(
    seen_s: tuple[float, ...], heard_s: tuple[float, ...], until_s: float = np.inf
) -> float | None:
    """Median distance between each event of one kind and the nearest of the other, both ways, so
    that neither missing nor superfluous sounds go free. Sounds after `until_s`, when nothing is
    seen any more, need no partner. None if either side is empty."""
    if not seen_s or not heard_s:
        return None
    distance = np.abs(np.subtract.outer(seen_s, heard_s))
    due = np.asarray(heard_s) <= until_s
    return float(np.median(np.concatenate([distance.min(1), distance.min(0)[due]])) * 1000)


def sync_offset(verdict: Verdict, picture_s: float, sound_s: float) -> Offset | None:
    """By how much the sound is late as a whole, from the events seen and heard in a clip whose
    picture and sound last so long; None where either has none."""
    return best_offset(Events.at(verdict.seen_s, picture_s), Events.at(verdict.heard_s, sound_s))


def damage(frames: np.ndarray, audio: np.ndarray, rng: np.random.Generator):
    """Blur and noise like a codec's: Gaussian blur of 0.7 pixels, noise of 30 dB PSNR; in the
    sound, noise 30 dB below it."""
    blurred = ndimage.gaussian_filter(frames.astype(np.float32), (0, 0.7, 0.7, 0))
    noise = rng.standard_normal(frames.shape, dtype=np.float32) * 255 * 10 ** (-30 / 20)
    loud = np.sqrt(np.mean(np.square(audio)))
    hiss = rng.standard_normal(audio.shape, dtype=np.float32) * loud * 10 ** (-30 / 20)
    return np.clip(blurred + noise, 0, 255).astype(np.uint8), audio + hiss
