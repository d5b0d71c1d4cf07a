"""Frames of a scene: antialiased signed-distance shapes with soft shading and a contact shadow.

Shapes are evaluated only in a box around the object, for all frames at once.

Shapes: F frames, S image side, K side of the box in pixels.
"""

import numpy as np

from aiprod_trainer.world.camera import View
from aiprod_trainer.world.figure import figure_distance, joints, segment_distance
from aiprod_trainer.world.scene import (
    ALL_BACKGROUNDS,
    COLOURS,
    FIGURE,
    FLOOR_Y,
    ROUND,
    Body,
    Scene,
    trajectory,
)

HORIZON = FLOOR_Y - 0.1  # where the wall meets the floor
REACH = 1.25  # no shape extends further than this, in radii
GLOSS = {"rubber": 0.0, "wood": 0.12, "metal": 0.55, "glass": 0.8}


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draws the clip as uint8 (F, size, size, 3), sRGB."""
    still = scene.camera == "static"
    stage = backdrop(scene.background, size, None if still else scene.view(scene.frame_times_s))
    frames = np.repeat(stage, scene.num_frames, axis=0) if still else stage  # (F, S, S, 3)
    for body in scene.bodies:
        _draw_shadow(frames, scene, body)
    for body in scene.bodies:
        if body.motion == "pendulum":
            _draw_rope(frames, scene, body)
        _draw_body(frames, scene, body)
    return (np.clip(frames, 0, 255) + 0.5).astype(np.uint8)


def object_mask(scene: Scene, size: int = 64) -> np.ndarray:
    """How much of each pixel an object covers, float32 (F, size, size) in [0, 1]."""
    mask = np.zeros((scene.num_frames, size, size), dtype=np.float32)
    for body in scene.bodies:
        box = _Box(scene, body, size)
        cover = box.cover()
        for frame, rows, columns, inner in box.windows():
            part = mask[frame, rows, columns]
            np.maximum(part, cover[frame][inner], out=part)
    return mask


def backdrop(background: str, size: int, seen: View | None = None) -> np.ndarray:
    """The empty stage, float32 (F, size, size, 3) in 0..255: a frame for each time of the view,
    one frame for the view at rest."""
    tones = ALL_BACKGROUNDS[background]
    x = y = (np.arange(size, dtype=np.float32) + 0.5)[None] / size  # (1, S)
    pixel = np.full(1, 1 / size)
    if seen is not None:
        x, y = seen.to_world(x[0][:, None], y[0][:, None])
        x, y = x.T.astype(np.float32), y.T.astype(np.float32)  # (F, S)
        pixel = 1 / (size * seen.zoom)
    wall = _mix(tones.top, tones.bottom, np.clip(y / HORIZON, 0, 1))  # (F, S, 3)
    floor = _mix(tones.floor_far, tones.floor_near, np.clip((y - HORIZON) / (1 - HORIZON), 0, 1))
    # One pixel of antialiasing at the horizon.
    on_floor = np.clip((y - HORIZON) / pixel[:, None] + 0.5, 0, 1)[..., None]
    light = (1.04 - 0.16 * np.square(x - 0.4))[:, None, :, None]  # a broad light from the left
    if tones.texture == "plain":
        picture = (wall + (floor - wall) * on_floor)[:, :, None] * light
    else:
        factor = _texture(tones.texture, x[:, None, :], y[:, :, None], pixel[:, None, None])
        wall = wall[:, :, None] * factor[..., None]
        picture = (wall + (floor[:, :, None] - wall) * on_floor[:, :, None]) * light
        picture *= _floor_pattern(x, y, on_floor, pixel)
    return picture.astype(np.float32)


def _texture(kind: str, x: np.ndarray, y: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Brightness of the wall at world points, about 1; edges are a pixel soft."""

    def wave(phase: np.ndarray, softness: np.ndarray) -> np.ndarray:
        """A square wave in [-1, 1] of period 1."""
        triangle = 1 - 4 * np.abs(phase % 1 - 0.5)
        return np.clip(triangle / (4 * softness), -1, 1)

    if kind == "brick":
        rows = (y - HORIZON) / 0.2
        shift = 0.5 * (np.floor(rows) % 2)
        columns = x / 0.4 + shift
        joint = 0.022
        from_row = np.abs(rows - np.round(rows)) * 0.2
        from_column = np.abs(columns - np.round(columns)) * 0.4
        gap = np.minimum(from_row, from_column)
        return 1 + 0.45 * np.clip((joint - gap) / pixel + 0.5, 0, 1)
    if kind == "checker":
        return 1 + 0.18 * wave(x / 0.6 + 0.25, pixel / 0.6) * wave(y / 0.6, pixel / 0.6)
    if kind == "stripes":
        return 1 + 0.18 * np.sin(2 * np.pi * x / 0.36) * np.ones_like(y)
    ridge = 0.42 + 0.13 * np.sin(7 * x) + 0.05 * np.sin(16 * x + 1)
    nearer = 0.60 + 0.08 * np.sin(11 * x + 2)
    return (
        1
        - 0.30 * np.clip((y - ridge) / pixel + 0.5, 0, 1)
        - 0.24 * np.clip((y - nearer) / pixel + 0.5, 0, 1)
    )


def _floor_pattern(x: np.ndarray, y: np.ndarray, on_floor: np.ndarray, pixel: np.ndarray):
    """Soft patches on a textured stage's floor, so that sideways moves show there too."""
    patches = np.sin(2 * np.pi * x / 0.34)[:, None, :] * np.cos((y - HORIZON) * 14)[:, :, None]
    return 1 + 0.05 * (patches * on_floor)[..., None]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of radius 1, negative inside; y points up.

    Star and heart follow Inigo Quilez, "2D distance functions"; cube and triangle are bounds that
    are exact near the outline, which is all that antialiasing needs.
    """
    if shape == "ball":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    if shape == "cube":
        dx, dy = np.abs(x) - 0.76, np.abs(y) - 0.76
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        return outside + np.minimum(np.maximum(dx, dy), 0) - 0.1
    if shape == "triangle":
        # Three half planes at 0.6 from the centroid, which sits below the middle of the height.
        y = y + 0.33
        half = 0.866 * np.abs(x) + 0.5 * y
        return np.maximum(half, -y) - 0.61
    if shape == "star":
        return _star(x, y)
    return _heart(x, y)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A five-pointed star with tips at 1.2 and notches at 0.55 of the radius."""
    fold = ((0.809017, -0.587785), (-0.809017, -0.587785))
    x = np.abs(x)
    for fx, fy in fold:
        d = 2 * np.maximum(fx * x + fy * y, 0)
        x, y = x - d * fx, y - d * fy
    x = np.abs(x)
    y = y - 1.2
    # The edge from the tip (0, 0) to the notch at 36 degrees.
    ex, ey = 0.55 * 0.587785, 0.55 * 0.809017 - 1.2
    h = np.clip((x * ex + y * ey) / (ex * ex + ey * ey), 0, 1)
    return np.hypot(x - ex * h, y - ey * h) * np.sign(y * ex - x * ey)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    scale = 1.75  # the published heart is about 1.1 high, with its tip at the origin
    x, y = np.abs(x) / scale, (y + 1.0) / scale
    lobe = np.hypot(x - 0.25, y - 0.75) - 0.353553
    m = 0.5 * np.maximum(x + y, 0)
    tip = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - m) ** 2 + (y - m) ** 2))
    return scale * np.where(x + y > 1, lobe, tip * np.sign(x - y))


class _Box:
    """The pixels around a body in every frame, with their place in the body's own frame."""

    def __init__(self, scene: Scene, body: Body, size: int):
        times_s = scene.frame_times_s
        path = trajectory(body, times_s)
        self.body, self.size = body, size
        # The figure is measured in half heights from its hip.
        self.unit = body.radius if body.shape != FIGURE else body.height / 2
        self.radius_px = self.unit * path.scale * size  # (F,)
        cx, cy = path.x * size, path.y * size
        if scene.camera != "static":
            seen = scene.view(times_s)
            cx, cy = (at * size for at in seen.to_screen(path.x, path.y))
            self.radius_px = self.radius_px * seen.zoom
        self.joints = (
            (joints(body, times_s) - np.stack([path.x, path.y], -1)[:, None]) / self.unit
            if body.shape == FIGURE
            else None
        )
        half = int(np.ceil(self.radius_px.max() * REACH)) + 2
        self.left = np.floor(cx).astype(int) - half
        self.top = np.floor(cy).astype(int) - half
        self.side = 2 * half + 1
        steps = np.arange(self.side) + 0.5
        inverse = 1 / self.radius_px
        x = ((self.left[:, None] + steps - cx[:, None]) * inverse[:, None])[:, None, :]
        y = ((self.top[:, None] + steps - cy[:, None]) * -inverse[:, None])[:, :, None]
        shape = (scene.num_frames, self.side, self.side)
        # Screen-aligned coordinates carry the light, turned ones the object.
        self.screen_x = np.broadcast_to(x.astype(np.float32), shape)
        self.screen_y = np.broadcast_to(y.astype(np.float32), shape)
        self.x, self.y = self.screen_x, self.screen_y
        self.angle = path.angle
        if np.any(path.angle):
            c, s = (f(path.angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
            self.x, self.y = (
                c * self.screen_x - s * self.screen_y,
                s * self.screen_x + c * self.screen_y,
            )

    def cover(self) -> np.ndarray:
        """Share of each pixel inside the outline, (F, K, K)."""
        if self.joints is not None:
            d = figure_distance(self.x, -self.y, self.joints.astype(np.float32), 2.0)
        else:
            d = signed_distance(self.body.shape, self.x, self.y)
        return np.clip(0.5 - d * self.radius_px[:, None, None].astype(np.float32), 0, 1)

    def windows(self):
        """Yields (frame, rows, columns, window inside the box) with the box cut at the border."""
        for frame, (top, left) in enumerate(zip(self.top, self.left, strict=True)):
            rows = slice(max(top, 0), min(top + self.side, self.size))
            columns = slice(max(left, 0), min(left + self.side, self.size))
            if rows.start < rows.stop and columns.start < columns.stop:
                inner = (
                    slice(rows.start - top, rows.stop - top),
                    slice(columns.start - left, columns.stop - left),
                )
                yield frame, rows, columns, inner


def _draw_body(frames: np.ndarray, scene: Scene, body: Body) -> None:
    box = _Box(scene, body, frames.shape[1])
    cover = box.cover()
    light = _shade(box)  # (F, K, K)
    colour = np.array(COLOURS[body.colour], dtype=np.float32)
    gloss = _highlight(box) * GLOSS[body.material]
    for frame, rows, columns, inner in box.windows():
        alpha = cover[frame][inner][..., None]
        paint = colour * light[frame][inner][..., None]
        paint += (255 - paint) * gloss[frame][inner][..., None]
        part = frames[frame, rows, columns]
        part += (paint - part) * alpha


def _shade(box: _Box) -> np.ndarray:
    """Brightness of the paint: light from above left, with a mark on things that roll."""
    x, y = box.screen_x, box.screen_y
    light = 0.98 + 0.10 * (y - 0.6 * x) - 0.06 * (x * x + y * y)
    if box.body.shape == "cube":  # a lit upper face and a shaded right one
        light = light + 0.14 * np.clip((box.y - 0.42) * 6, 0, 1)
        light = light - 0.16 * np.clip((box.x - 0.42) * 6, 0, 1)
    if box.body.shape in ROUND:
        place = 0.74 if box.body.shape == "ring" else 0.55
        spot = np.square(box.x) + np.square(box.y - place)
        darken = np.exp(-np.square(spot / 0.075))
        if box.body.colour == "black":
            return light + 3.0 * darken
        light = light * (1 - 0.5 * darken)
    return light


def _highlight(box: _Box) -> np.ndarray:
    x, y = box.screen_x + 0.32, box.screen_y - 0.38
    return np.exp(-(x * x + y * y) / 0.07)


def _draw_rope(frames: np.ndarray, scene: Scene, body: Body) -> None:
    """A thin dark line from above the picture to the object."""
    size = frames.shape[1]
    times_s = scene.frame_times_s
    path, seen = trajectory(body, times_s), scene.view(times_s)
    ends = []
    for x, y in ((np.full_like(path.x, body.x), np.full_like(path.y, body.y - 0.3)),
                 (path.x, path.y)):  # fmt: skip
        ends.append(np.stack(seen.to_screen(x, y), -1)[..., None, None].astype(np.float32) * size)
    at = np.arange(size, dtype=np.float32) + 0.5
    distance = segment_distance(at[None, None, :], at[None, :, None], *ends)
    cover = np.clip(0.5 + size * 0.008 - distance, 0, 1)[..., None]
    frames += (60 - frames) * (0.85 * cover)


def _draw_shadow(frames: np.ndarray, scene: Scene, body: Body) -> None:
    """Darkens the floor below the body: narrow and dark at contact, wide and faint when high."""
    size = frames.shape[1]
    path = trajectory(body, scene.frame_times_s)
    gap = np.clip(body.rest_y - path.y, 0, None)  # (F,)
    width = body.radius * (0.95 + 0.5 * gap)
    depth = 0.42 / (1 + 9 * gap)
    rows = slice(int((FLOOR_Y - 0.09) * size), min(int((FLOOR_Y + 0.12) * size), size))
    x, y = (np.arange(size) + 0.5) / size, ((np.arange(size)[rows] + 0.5) / size)[None]
    if scene.camera != "static":
        rows = slice(0, size)
        x, y = (at.T for at in scene.view(scene.frame_times_s).to_world(x[:, None], x[:, None]))
    down = (y - FLOOR_Y - 0.005) / 0.028  # (1 or F, rows)
    side = (x - path.x[:, None]) / width[:, None]  # (F, S)
    across = np.exp(-np.power(side, 4)) * depth[:, None]
    shade = across[:, None, :] * np.exp(-np.square(down))[:, :, None]
    frames[:, rows] *= (1 - shade)[..., None].astype(np.float32)


def _mix(a: tuple[int, ...], b: tuple[int, ...], share: np.ndarray) -> np.ndarray:
    first, second = np.array(a, np.float32), np.array(b, np.float32)
    return first + (second - first) * share[..., None]
