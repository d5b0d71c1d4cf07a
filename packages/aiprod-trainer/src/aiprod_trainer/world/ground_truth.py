"""What is true of every frame beside its colours: depth, edges, key points, the object's track.

Control adapters (depth, canny, pose) learn from these, and their adherence is measured on them.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from aiprod_trainer.world.figure import JOINTS, LIMBS, joints
from aiprod_trainer.world.render import HORIZON, object_mask
from aiprod_trainer.world.scene import FIGURE, FLOOR_Y, Scene, trajectory

FAR, NEAR = 0.1, 1.0  # inverse depth of the wall and of the floor at the lower edge
LIMB_COLOURS = ((255, 80, 80), (80, 255, 80), (80, 160, 255), (255, 220, 60), (220, 90, 255))


@dataclass(frozen=True, eq=False)
class BodyTrack:
    """A body on screen, one value for each frame: centre in frame widths, radius, angle."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


def body_track(scene: Scene, index: int = 0) -> BodyTrack:
    """Where the camera sees a body in each frame."""
    body = scene.bodies[index]
    path, seen = trajectory(body, scene.frame_times_s), scene.view(scene.frame_times_s)
    x, y = seen.to_screen(path.x, path.y)
    return BodyTrack(x, y, body.radius * path.scale * seen.zoom, path.angle)


def depth(scene: Scene, size: int = 64) -> np.ndarray:
    """Inverse depth, float32 (F, size, size): 0.1 at the wall, growing to 1 towards the front of
    the floor; an object is as near as the floor it stands over."""
    at = (np.arange(size) + 0.5)[:, None] / size
    _, y = scene.view(scene.frame_times_s).to_world(at, at)  # (size, F)
    rows = _floor_depth(y.T).astype(np.float32)  # (F, size)
    scenery = np.repeat(rows[:, :, None], size, axis=2)
    inside = object_mask(scene, size)
    return scenery + (np.float32(_floor_depth(np.array(FLOOR_Y))) - scenery) * inside


def _floor_depth(y: np.ndarray) -> np.ndarray:
    return FAR + (NEAR - FAR) * np.clip((y - HORIZON) / (1 - HORIZON), 0, 1)


def edges(frames: np.ndarray) -> np.ndarray:
    """Canny edges of uint8 frames (F, H, W, 3) as uint8 0 or 255, (F, H, W)."""
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    return np.stack([cv2.Canny(picture, 60, 140) for picture in grey])


def key_points(scene: Scene, index: int = 0) -> np.ndarray:
    """The figure's joints on screen in the order of figure.JOINTS, or the centre of any other
    object, (F, points, 2) in frame widths."""
    body = scene.bodies[index]
    times_s = scene.frame_times_s
    if body.shape == FIGURE:
        places = joints(body, times_s)
    else:
        path = trajectory(body, times_s)
        places = np.stack([path.x, path.y], -1)[:, None]
    seen = scene.view(times_s)
    x, y = seen.to_screen(places[..., 0].T, places[..., 1].T)
    return np.stack([x.T, y.T], -1)


def pose(scene: Scene, size: int = 64) -> np.ndarray:
    """Key points drawn as coloured limbs and dots on black, uint8 (F, size, size, 3)."""
    canvas = np.zeros((scene.num_frames, size, size, 3), dtype=np.uint8)
    thick = max(size // 48, 1)
    for index, body in enumerate(scene.bodies):
        points = np.round(key_points(scene, index) * size - 0.5).astype(int)
        for picture, places in zip(canvas, points, strict=True):
            if body.shape == FIGURE:
                for (start, end, _), colour in zip(LIMBS, LIMB_COLOURS, strict=True):
                    a, b = (places[JOINTS.index(name)].tolist() for name in (start, end))
                    cv2.line(picture, a, b, colour, thick)
            for place in places:
                cv2.circle(picture, place.tolist(), thick + 1, (255, 255, 255), -1)
    return canvas
