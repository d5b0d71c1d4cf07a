"""What happens in a clip of the procedural world: who moves, when, and which events can be heard.

A `Scene` is a frozen description; picture (`render.py`), sound (`sound.py`), words (`captions.py`)
and measured truth (`ground_truth.py`) are deterministic functions of it, so that the time of every
impact is known exactly in both modalities.

Coordinates: the frame is the unit square, x to the right, y down; lengths are in frame widths,
times in seconds, angles in radians (positive turns clockwise on screen).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from aiprod_core.errors import InputError

WORLDS = ("v1",)
SHAPES = ("ball", "cube", "star", "triangle", "ring", "heart")
MATERIALS = ("rubber", "wood", "metal", "glass")
MOTIONS = ("bounce", "roll left", "roll right", "fall", "pulse")
SIZES = {"small": 0.11, "medium": 0.14, "large": 0.17, "huge": 0.20}  # name -> radius

COLOURS = {
    "red": (214, 28, 36),
    "orange": (252, 132, 12),
    "yellow": (250, 226, 40),
    "green": (34, 158, 58),
    "cyan": (36, 206, 220),
    "blue": (36, 70, 222),
    "purple": (122, 40, 176),
    "pink": (252, 128, 192),
    "white": (246, 246, 246),
    "black": (22, 22, 24),
}

FLOOR_Y = 0.82  # where things touch the floor
GRAVITY = 4.4  # frame heights per second squared: a drop over half the frame takes half a second
PULSE_S = 0.45  # one swelling; longer than a latent frame (4 frames of 1/12 s)
PULSE_GROWTH = 0.4
ROUND = ("ball", "ring")  # these roll; the other shapes slide

# Lowest point of each upright shape below its centre, in radii (see render.signed_distance).
BOTTOM = {"ball": 1.0, "cube": 0.86, "star": 0.97, "triangle": 0.94, "ring": 1.0, "heart": 1.0}
RESTITUTION = {"rubber": 0.87, "wood": 0.77, "metal": 0.79, "glass": 0.82}


@dataclass(frozen=True)
class Backdrop:
    """Colours of a wall or sky (top to horizon) and of a floor (horizon to front), sRGB 0..255."""

    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    floor_far: tuple[int, int, int]
    floor_near: tuple[int, int, int]


BACKGROUNDS = {
    "grey": Backdrop((172, 174, 178), (158, 160, 164), (122, 123, 127), (106, 107, 111)),
    "cream": Backdrop((226, 214, 190), (216, 202, 176), (140, 108, 84), (118, 90, 70)),
    "sky": Backdrop((104, 160, 226), (176, 206, 236), (112, 146, 82), (88, 122, 62)),
    "night": Backdrop((12, 16, 44), (36, 42, 82), (44, 46, 62), (30, 32, 46)),
    "sunset": Backdrop((112, 96, 140), (236, 172, 132), (104, 80, 84), (78, 60, 66)),
    "sand": Backdrop((150, 190, 206), (206, 216, 210), (206, 184, 140), (186, 160, 114)),
}


@dataclass(frozen=True)
class Event:
    """Something that can be seen and heard at `time_s`.

    `kind` is "impact" or "pulse"; `strength` in (0, 1] is the speed of the impact over the
    world's fastest; `x` is where it happens; `body` indexes `Scene.bodies`.
    """

    time_s: float
    kind: str
    strength: float
    x: float
    body: int = 0


@dataclass(frozen=True)
class Body:
    """One object and its motion. Fields that a motion does not use stay at their defaults."""

    shape: str
    colour: str
    size: str
    material: str
    motion: str
    x: float  # start, or the only place
    y: float = FLOOR_Y  # centre of an object that floats (pulse)
    drop: float = 0.0  # height of the lower edge above the floor at the start
    delay_s: float = 0.0  # how long it hangs before it falls
    speed: float = 0.0  # frame widths per second, positive to the right
    restitution: float = 0.0
    pulses_s: tuple[float, ...] = ()  # onsets of the swellings

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def rest_y(self) -> float:
        """Centre of the upright object when it stands on the floor."""
        return FLOOR_Y - BOTTOM[self.shape] * self.radius


@dataclass(frozen=True)
class Scene:
    """A whole clip. `noise_seed` seeds the grain of rolling noise, nothing else."""

    bodies: tuple[Body, ...]
    background: str
    noise_seed: int = 0
    num_frames: int = 25
    fps: float = 12.0

    @property
    def body(self) -> Body:
        return self.bodies[0]

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    @property
    def frame_times_s(self) -> np.ndarray:
        return np.arange(self.num_frames) / self.fps

    @property
    def events(self) -> tuple[Event, ...]:
        """All events within the clip, in order of time."""
        found = [e for i, body in enumerate(self.bodies) for e in _events(body, i, self.duration_s)]
        return tuple(sorted(found, key=lambda e: e.time_s))


@dataclass(frozen=True)
class Trajectory:
    """Centre, scale (times the radius) and angle of a body, one value for each time asked for."""

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    angle: np.ndarray


def trajectory(body: Body, times_s: np.ndarray) -> Trajectory:
    """Where `body` is at each of `times_s` (any shape, any density: frames or audio samples)."""
    t = np.asarray(times_s, dtype=np.float64)
    x = np.full_like(t, body.x)
    y = np.full_like(t, body.rest_y)
    scale, angle = np.ones_like(t), np.zeros_like(t)
    if body.motion in ("bounce", "fall"):
        y = body.rest_y - _height(body, t)
    elif body.motion in ("roll left", "roll right"):
        x = body.x + body.speed * t
        if body.shape in ROUND:  # no slip: the arc turned equals the way travelled
            angle = body.speed * t / body.radius
    elif body.motion == "pulse":
        y = np.full_like(t, body.y)
        for onset in body.pulses_s:
            phase = np.clip((t - onset) / PULSE_S, 0.0, 1.0)
            scale = scale + PULSE_GROWTH * np.sin(np.pi * phase) ** 2
    else:
        raise InputError(f"no motion {body.motion!r}; there are {', '.join(MOTIONS)}")
    return Trajectory(x, y, scale, angle)


def _height(body: Body, t: np.ndarray) -> np.ndarray:
    """Height of the lower edge above the floor: free flights between the impacts."""
    impacts, speeds = _impacts(body, float(np.max(t, initial=0.0)))
    height = np.where(
        t < body.delay_s, body.drop, body.drop - 0.5 * GRAVITY * (t - body.delay_s) ** 2
    )
    for time, speed in zip(impacts, speeds, strict=True):
        flight = t - time
        after = np.maximum(body.restitution * speed * flight - 0.5 * GRAVITY * flight**2, 0.0)
        height = np.where(t >= time, after, height)
    return height


def _impacts(body: Body, until_s: float) -> tuple[list[float], list[float]]:
    """Times and speeds of the impacts of a dropped body, up to `until_s`."""
    times, speeds = [], []
    time, speed = body.delay_s + np.sqrt(2 * body.drop / GRAVITY), np.sqrt(2 * GRAVITY * body.drop)
    while time <= until_s:
        times.append(float(time))
        speeds.append(float(speed))
        speed *= body.restitution
        if speed < 0.05:
            break
        time += 2 * speed / GRAVITY
    return times, speeds


def _events(body: Body, index: int, duration_s: float) -> list[Event]:
    if body.motion in ("bounce", "fall"):
        fastest = np.sqrt(2 * GRAVITY * 0.6)
        times, speeds = _impacts(body, duration_s)
        return [
            Event(time, "impact", min(speed / fastest, 1.0), body.x, index)
            for time, speed in zip(times, speeds, strict=True)
        ]
    if body.motion == "pulse":
        return [Event(onset, "pulse", 1.0, body.x, index) for onset in body.pulses_s]
    return []


def sample_scene(
    rng: np.random.Generator,
    *,
    world: str = "v1",
    shape: str | None = None,
    colour: str | None = None,
    size: str | None = None,
    material: str | None = None,
    motion: str | None = None,
    background: str | None = None,
) -> Scene:
    """Draws a scene; an attribute that is given is kept, the others are drawn around it.

    Raises InputError for an unknown word or for a colour that would vanish before the background.
    """
    _check("world", WORLDS, world)
    size = _choose(rng, "size", tuple(SIZES), size)
    shape = _choose(rng, "shape", SHAPES, shape)
    material = _choose(rng, "material", MATERIALS, material)
    motion = _choose(rng, "motion", MOTIONS, motion)
    if background is not None:
        _check("background", tuple(BACKGROUNDS), background)
    colours = tuple(COLOURS) if background is None else visible_colours(background)
    colour = _choose(rng, "colour", colours, colour)
    fitting = tuple(name for name in BACKGROUNDS if colour in visible_colours(name))
    background = _choose(rng, "background", fitting, background)

    radius = SIZES[size]
    margin = 1.2 * radius + 0.02
    numbers: dict = {}
    if motion in ("bounce", "fall"):
        highest = FLOOR_Y - 2.1 * radius - 0.02
        numbers["x"] = rng.uniform(margin, 1 - margin)
        numbers["drop"] = highest * rng.uniform(0.85, 1.0)
        numbers["delay_s"] = rng.uniform(0.0, 0.5 if motion == "bounce" else 0.9)
        if motion == "bounce":
            numbers["restitution"] = RESTITUTION[material] + rng.uniform(-0.02, 0.02)
    elif motion == "pulse":
        count = int(rng.integers(1, 4))
        gap = rng.uniform(0.08, 0.2)
        first = rng.uniform(0.1, 2.0 - count * PULSE_S - (count - 1) * gap)
        numbers["x"] = rng.uniform(0.34, 0.66)
        numbers["y"] = rng.uniform(0.42, 0.55)
        numbers["pulses_s"] = tuple(first + i * (PULSE_S + gap) for i in range(count))
    else:
        way = (1 - 2 * margin) * rng.uniform(0.85, 1.0)
        start = margin + rng.uniform(0.0, 1 - 2 * margin - way)
        right = motion == "roll right"
        numbers["x"] = start if right else 1 - start
        numbers["speed"] = (way if right else -way) / 2.0  # the last frame is shown after 2 s
    body = Body(shape=shape, colour=colour, size=size, material=material, motion=motion, **numbers)
    return Scene((body,), background, noise_seed=int(rng.integers(2**31)))


@lru_cache
def visible_colours(background: str) -> tuple[str, ...]:
    """The object colours that stand out clearly before every part of a background."""
    backdrop = BACKGROUNDS[background]
    parts = np.array([backdrop.top, backdrop.bottom, backdrop.floor_far, backdrop.floor_near])
    return tuple(
        name
        for name, rgb in COLOURS.items()
        if np.linalg.norm(lab(parts) - lab(np.array(rgb)), axis=-1).min() > 38
    )


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB values 0..255, over the last axis (perceived distances)."""
    c = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _RGB_TO_XYZ.T / _WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


_RGB_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
_WHITE = np.array([0.9505, 1.0, 1.089])


def _choose(rng: np.random.Generator, what: str, words: Sequence[str], given: str | None) -> str:
    """The given word after a check, or one drawn; always draws, so that seeds stay comparable."""
    drawn = words[int(rng.integers(len(words)))]
    if given is None:
        return drawn
    _check(what, words, given)
    return given


def _check(what: str, words: Sequence[str], given: str) -> None:
    if given not in words:
        raise InputError(f"{what} {given!r} is not possible; choose from {', '.join(words)}")
