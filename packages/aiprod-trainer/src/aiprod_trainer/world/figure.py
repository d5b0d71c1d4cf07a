"""The walking stick figure: its joints over time, and the limbs between them."""

import numpy as np

from aiprod_trainer.world.scene import FIGURE_HIP, LEG_SWING, STRIDE_RATE, Body, trajectory

JOINTS = ("head", "neck", "hip", "left hand", "right hand", "left foot", "right foot")
LIMBS = (  # from joint, to joint, half thickness in heights
    ("neck", "hip", 0.065),
    ("neck", "left hand", 0.042),
    ("neck", "right hand", 0.042),
    ("hip", "left foot", 0.052),
    ("hip", "right foot", 0.052),
)
HEAD_RADIUS = 0.115  # in heights
ARM, SHOULDER, HEAD = 0.24, 0.27, 0.40  # arm's length, heights of neck and head above the hip


def joints(body: Body, times_s: np.ndarray) -> np.ndarray:
    """Places of the `JOINTS` in the world, (times, joints, 2)."""
    t = np.asarray(times_s, dtype=np.float64)
    swing = LEG_SWING * np.sin(STRIDE_RATE * t + body.phase)
    zero = np.zeros_like(t)
    path = trajectory(body, t)
    hip = np.stack([path.x, path.y], -1)
    local = [
        (zero, zero - HEAD),
        (zero, zero - SHOULDER),
        (zero, zero),
        (-ARM * np.sin(swing), ARM * np.cos(swing) - SHOULDER),
        (ARM * np.sin(swing), ARM * np.cos(swing) - SHOULDER),
        (FIGURE_HIP * np.sin(swing), FIGURE_HIP * np.cos(swing)),
        (-FIGURE_HIP * np.sin(swing), FIGURE_HIP * np.cos(swing)),
    ]
    return hip[:, None] + body.height * np.stack([np.stack(p, -1) for p in local], axis=1)


def figure_distance(x: np.ndarray, y: np.ndarray, places: np.ndarray, height: float) -> np.ndarray:
    """Distance of world points (F, 1, K) and (F, K, 1) to the figure with joints (F, J, 2)."""
    at = {name: places[:, i, :, None, None] for i, name in enumerate(JOINTS)}
    head = at["head"]
    distance = np.hypot(x - head[:, 0], y - head[:, 1]) - HEAD_RADIUS * height
    for start, end, thick in LIMBS:
        limb = segment_distance(x, y, at[start], at[end]) - thick * height
        distance = np.minimum(distance, limb)
    return distance


def segment_distance(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of points to the segment from a to b; both (F, 2, 1, 1)."""
    ex, ey = b[:, 0] - a[:, 0], b[:, 1] - a[:, 1]
    px, py = x - a[:, 0], y - a[:, 1]
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    return np.hypot(px - ex * along, py - ey * along)
