"""What happens in a clip of the procedural world: who moves, when, and which events can be heard.

A `Scene` is a frozen description; picture (`render.py`), sound (`sound.py`), words (`captions.py`)
and measured truth (`ground_truth.py`) are deterministic functions of it, so that the time of every
impact is known exactly in both modalities.

Coordinates: the frame is the unit square, x to the right, y down; lengths are in frame widths,
times in seconds, angles in radians (positive turns clockwise on screen).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from aiprod_core.errors import InputError
from aiprod_trainer.world.camera import CAMERAS, View, view

WORLDS = ("v1", "v2")  # v2 adds cameras, textures, ambience, more motions and a second object
SHAPES = ("ball", "cube", "star", "triangle", "ring", "heart")
MATERIALS = ("rubber", "wood", "metal", "glass")
MOTIONS = ("bounce", "roll left", "roll right", "fall", "pulse")
MOTIONS_V2 = (*MOTIONS, "pendulum", "spin", "walk left", "walk right", "collide")
AMBIENCES = ("silence", "rain", "wind", "hum")
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
FIGURE, FIGURE_HIP = "figure", 0.5  # the walker's shape; height of its hip over its whole height
STRIDE_RATE = np.pi / 0.48  # radians per second of the legs' swing: a step every 0.48 s
LEG_SWING = 0.34  # how far a leg swings forward and back
ROUND = ("ball", "ring")  # these roll; the other shapes slide

# Lowest point of each upright shape below its centre, in radii (see render.signed_distance).
BOTTOM = {"ball": 1.0, "cube": 0.86, "star": 0.97, "triangle": 0.94, "ring": 1.0, "heart": 1.0}
WIDTH = {"ball": 1.0, "cube": 0.86, "star": 1.14, "triangle": 1.06, "ring": 1.0, "heart": 1.06}
RESTITUTION = {"rubber": 0.87, "wood": 0.77, "metal": 0.79, "glass": 0.82}


@dataclass(frozen=True)
class Backdrop:
    """Colours of a wall or sky (top to horizon) and of a floor (horizon to front), sRGB 0..255."""

    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    floor_far: tuple[int, int, int]
    floor_near: tuple[int, int, int]
    texture: str = "plain"  # what is drawn over the wall, see render.stage


BACKGROUNDS = {
    "grey": Backdrop((172, 174, 178), (158, 160, 164), (122, 123, 127), (106, 107, 111)),
    "cream": Backdrop((226, 214, 190), (216, 202, 176), (140, 108, 84), (118, 90, 70)),
    "sky": Backdrop((104, 160, 226), (176, 206, 236), (112, 146, 82), (88, 122, 62)),
    "night": Backdrop((12, 16, 44), (36, 42, 82), (44, 46, 62), (30, 32, 46)),
    "sunset": Backdrop((112, 96, 140), (236, 172, 132), (104, 80, 84), (78, 60, 66)),
    "sand": Backdrop((150, 190, 206), (206, 216, 210), (206, 184, 140), (186, 160, 114)),
}
TEXTURED_BACKGROUNDS = {  # these show a moving camera
    "brick": Backdrop((150, 104, 92), (138, 94, 82), (124, 122, 120), (104, 102, 100), "brick"),
    "checker": Backdrop((186, 188, 196), (176, 178, 188), (96, 98, 112), (80, 82, 96), "checker"),
    "curtain": Backdrop((108, 140, 144), (96, 128, 132), (134, 114, 96), (112, 94, 78), "stripes"),
    "hills": Backdrop((150, 186, 220), (196, 214, 226), (140, 152, 96), (112, 126, 74), "hills"),
}
ALL_BACKGROUNDS = BACKGROUNDS | TEXTURED_BACKGROUNDS


@dataclass(frozen=True)
class Event:
    """Something that can be seen and heard at `time_s`.

    `kind` is "impact", "pulse", "swing" (lowest point of a pendulum), "step" or "clash";
    `strength` in (0, 1] is the speed of the impact over the
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
    length: float = 0.0  # of the pendulum's rope, from (x, y)
    amplitude: float = 0.0  # of its swing
    phase: float = 0.0  # of the swing or the stride
    turn_rate: float = 0.0  # of a spin, radians per second
    meets_s: float = 0.0  # when two bodies collide
    speed_after: float = 0.0

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def height(self) -> float:
        """Of the stick figure, from sole to crown."""
        return 0.26 + 1.0 * self.radius

    @property
    def rest_y(self) -> float:
        """Centre of the upright object when it stands on the floor."""
        if self.shape == FIGURE:
            return FLOOR_Y - FIGURE_HIP * self.height
        return FLOOR_Y - BOTTOM[self.shape] * self.radius


@dataclass(frozen=True)
class Scene:
    """A whole clip. `noise_seed` seeds the grain of rolling noise, nothing else."""

    bodies: tuple[Body, ...]
    background: str
    noise_seed: int = 0
    num_frames: int = 25
    fps: float = 12.0
    camera: str = "static"
    ambience: str = "silence"
    world: str = "v1"

    @property
    def body(self) -> Body:
        return self.bodies[0]

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    @property
    def frame_times_s(self) -> np.ndarray:
        return np.arange(self.num_frames) / self.fps

    def view(self, times_s: np.ndarray) -> View:
        """What the camera sees; it moves from the first frame to the last."""
        return view(self.camera, np.asarray(times_s) / ((self.num_frames - 1) / self.fps))

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
    elif body.motion == "pendulum":
        swing = body.amplitude * np.cos(_swing_rate(body) * t + body.phase)
        x, y = body.x + body.length * np.sin(swing), body.y + body.length * np.cos(swing)
        angle = -swing  # the object hangs in line with the rope
    elif body.motion == "spin":
        y, angle = np.full_like(t, body.y), body.turn_rate * t
    elif body.motion in ("walk left", "walk right"):
        x = body.x + body.speed * t
        swing = LEG_SWING * np.sin(STRIDE_RATE * t + body.phase)
        y = FLOOR_Y - FIGURE_HIP * body.height * np.cos(swing)  # the feet stay on the floor
    elif body.motion == "collide":
        x = body.x + body.speed * np.minimum(t, body.meets_s)
        x = x + body.speed_after * np.maximum(t - body.meets_s, 0)
        if body.shape in ROUND:
            angle = (x - body.x) / body.radius
    else:
        raise InputError(f"no motion {body.motion!r}; there are {', '.join(MOTIONS_V2)}")
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
    if body.motion == "pendulum":  # cos(rate t + phase) = 0
        rate = _swing_rate(body)
        times = (np.arange(-3, 8) * np.pi + np.pi / 2 - body.phase) / rate
        return [Event(float(t), "swing", 1.0, body.x, index) for t in times if 0 < t < duration_s]
    if body.motion in ("walk left", "walk right"):  # a foot lands when the legs are widest apart
        times = (np.arange(0, 12) * np.pi + np.pi / 2 - body.phase) / STRIDE_RATE
        return [
            Event(float(t), "step", 1.0, float(body.x + body.speed * t), index)
            for t in times
            if 0 < t < duration_s
        ]
    if body.motion == "collide" and index == 0:
        side = np.sign(body.speed) * body.radius
        x = body.x + body.speed * body.meets_s + side
        return [Event(body.meets_s, "clash", 1.0, float(x), index)]
    return []


def _swing_rate(body: Body) -> float:
    """Angular frequency of a small swing."""
    return float(np.sqrt(GRAVITY / body.length))


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
    camera: str | None = None,
    ambience: str | None = None,
) -> Scene:
    """Draws a scene; an attribute that is given is kept, the others are drawn around it.

    Raises InputError for an unknown word, for one that this world does not have, and for a colour
    that would vanish before the background.
    """
    _check("world", WORLDS, world)
    if world == "v1":
        if camera not in (None, "static") or ambience not in (None, "silence"):
            raise InputError("world v1 has a static camera and no ambience; use world v2")
        motions, backgrounds = MOTIONS, tuple(BACKGROUNDS)
    else:
        camera = _choose(rng, "camera", CAMERAS, camera)
        ambience = _choose(rng, "ambience", AMBIENCES, ambience)
        motions, backgrounds = MOTIONS_V2, tuple(ALL_BACKGROUNDS)
        if camera != "static" and background is None:
            backgrounds = tuple(TEXTURED_BACKGROUNDS)
    size = _choose(rng, "size", tuple(SIZES), size)
    shape = _choose(rng, "shape", SHAPES, shape)
    material = _choose(rng, "material", MATERIALS, material)
    motion = _choose(rng, "motion", motions, motion)
    if background is not None:
        _check("background", backgrounds, background)
    colours = tuple(COLOURS) if background is None else visible_colours(background)
    colour = _choose(rng, "colour", colours, colour)
    fitting = tuple(name for name in backgrounds if colour in visible_colours(name))
    if not fitting:
        raise InputError(f"no background of world {world} shows colour {colour!r} clearly")
    background = _choose(rng, "background", fitting, background)
    if motion.startswith("walk"):
        shape = FIGURE
    if motion == "spin" and shape in ROUND:  # a turning disc would not show
        shape = SHAPES[1 + int(rng.integers(3))]

    blank = Body(shape, colour, size, material, motion, x=0.5)
    for _ in range(200):
        bodies = _bodies(rng, blank, background)
        scene = Scene(bodies, background, noise_seed=int(rng.integers(2**31)))
        if world == "v1":
            return scene
        scene = replace(scene, camera=camera, ambience=ambience, world=world)
        if _in_view(scene):
            return scene
    raise InputError(f"a {size} {shape} cannot {motion} in view of a camera that moves {camera}")


def _bodies(rng: np.random.Generator, blank: Body, background: str) -> tuple[Body, ...]:
    """Places the object, or two that collide, so that it stays before a static camera."""
    radius, motion = blank.radius, blank.motion
    margin = 1.2 * radius + 0.02
    numbers: dict = {}
    if motion in ("bounce", "fall"):
        highest = FLOOR_Y - 2.1 * radius - 0.02
        numbers["x"] = rng.uniform(margin, 1 - margin)
        numbers["drop"] = highest * rng.uniform(0.85, 1.0)
        numbers["delay_s"] = rng.uniform(0.0, 0.5 if motion == "bounce" else 0.9)
        if motion == "bounce":
            numbers["restitution"] = RESTITUTION[blank.material] + rng.uniform(-0.02, 0.02)
    elif motion == "pulse":
        count = int(rng.integers(1, 4))
        gap = rng.uniform(0.08, 0.2)
        first = rng.uniform(0.1, 2.0 - count * PULSE_S - (count - 1) * gap)
        numbers["x"] = rng.uniform(0.34, 0.66)
        numbers["y"] = rng.uniform(0.42, 0.55)
        numbers["pulses_s"] = tuple(first + i * (PULSE_S + gap) for i in range(count))
    elif motion in ("roll left", "roll right"):
        way = (1 - 2 * margin) * rng.uniform(0.85, 1.0)
        start = margin + rng.uniform(0.0, 1 - 2 * margin - way)
        right = motion == "roll right"
        numbers["x"] = start if right else 1 - start
        numbers["speed"] = (way if right else -way) / 2.0  # the last frame is shown after 2 s
    elif motion == "pendulum":
        numbers["x"], numbers["y"] = rng.uniform(0.42, 0.58), 0.0
        numbers["length"] = rng.uniform(0.42, 0.52)
        numbers["amplitude"] = rng.uniform(0.45, 0.65)
        numbers["phase"] = rng.uniform(0, 2 * np.pi)
    elif motion == "spin":
        numbers["x"], numbers["y"] = rng.uniform(0.3, 0.7), rng.uniform(0.42, 0.55)
        numbers["turn_rate"] = rng.uniform(3.0, 5.0) * rng.choice((-1, 1))
    elif motion in ("walk left", "walk right"):
        # Slip-free: a step is as long as the legs are wide apart at the soles.
        step = 2 * FIGURE_HIP * blank.height * np.sin(LEG_SWING)
        right = motion == "walk right"
        way = 2.0 * step * STRIDE_RATE / np.pi
        start = rng.uniform(0.14, max(0.86 - way, 0.15))
        numbers["x"] = start if right else 1 - start
        numbers["speed"] = (way if right else -way) / 2.0
        numbers["phase"] = rng.uniform(0, np.pi)
    else:
        return _colliding(rng, blank, background)
    return (replace(blank, **numbers),)


def _colliding(rng: np.random.Generator, blank: Body, background: str) -> tuple[Body, ...]:
    """Two objects of one material that slide together and part: elastic, masses as the areas."""
    others = [name for name in visible_colours(background) if name != blank.colour]
    small_sizes = tuple(SIZES)[:2]
    first = replace(blank, size=small_sizes[int(rng.integers(2))])
    second = replace(
        blank,
        colour=others[int(rng.integers(len(others)))],
        shape=SHAPES[int(rng.integers(len(SHAPES)))],
        size=small_sizes[int(rng.integers(2))],
    )
    v1, v2 = rng.uniform(0.2, 0.3), -rng.uniform(0.2, 0.3)
    m1, m2 = first.radius**2, second.radius**2
    common = (m1 * v1 + m2 * v2) / (m1 + m2)
    meets_s, x = rng.uniform(0.7, 1.2), rng.uniform(0.42, 0.58)
    left = x - WIDTH[first.shape] * first.radius
    right = x + WIDTH[second.shape] * second.radius
    return tuple(
        replace(
            body,
            x=at - speed * meets_s,
            speed=speed,
            meets_s=meets_s,
            speed_after=2 * common - speed,
        )
        for body, at, speed in ((first, left, v1), (second, right, v2))
    )


def _in_view(scene: Scene) -> bool:
    """Whether the objects stay in the picture, but for a tenth of a frame, while it moves."""
    seen = scene.view(scene.frame_times_s)
    for body in scene.bodies:
        path = trajectory(body, scene.frame_times_s)
        x, y = seen.to_screen(path.x, path.y)
        wide = high = body.radius * path.scale * seen.zoom
        if body.shape == FIGURE:
            wide, high = 0.25 * body.height * seen.zoom, 0.5 * body.height * seen.zoom
        edges = np.concatenate([x - wide, 1 - x - wide, y - high, 1 - y - high])
        if edges.min() < -0.1:
            return False
    return True


@lru_cache
def visible_colours(background: str) -> tuple[str, ...]:
    """The object colours that stand out clearly before every part of a background."""
    backdrop = ALL_BACKGROUNDS[background]
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
