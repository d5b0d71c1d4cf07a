"""How much and how smoothly a picture moves, and what the camera does, by optical flow (OpenCV).

Lengths are in frame widths, so that they do not depend on the resolution; x to the right, y down.

Shapes: F frames, h w the reduced picture that flow is measured on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

FLOW_SIDE = 96  # flow is measured on pictures whose longer side has about this many pixels
CORNER_SIDE = 256  # corners are followed on finer ones
SURE = 0.15
STILL = 0.003  # frame widths per frame; below this nothing moves


@dataclass(frozen=True)
class CameraMotion:
    """Mean velocity of the camera over a clip, from the scenery that most of the picture shows.

    `right` and `down` are frame widths per second (scenery then moves left and up), `zoom` is the
    natural logarithm of the magnification per second, `roll` clockwise radians per second.
    `confidence` is the share of tracked points that follow the camera, less where those cover under
    half of the picture; below `SURE` it may be an object that moves before an even background.
    """

    right: float
    down: float
    zoom: float
    roll: float
    confidence: float

    @property
    def name(self) -> str:
        """ "static", "dolly in/out/left/right", "jib up/down", "roll", by the largest part.

        A zoom counts by how fast it moves the picture's border; what is not sure is "static".
        """
        if self.confidence < SURE:
            return "static"
        moves = {
            "dolly right": self.right,
            "dolly left": -self.right,
            "jib down": self.down,
            "jib up": -self.down,
            "dolly in": self.zoom / 2,
            "dolly out": -self.zoom / 2,
            "roll": abs(self.roll) / 2,
        }
        best = max(moves, key=moves.__getitem__)
        return best if moves[best] > 0.03 else "static"


def optical_flow(frames: np.ndarray) -> np.ndarray:
    """Dense flow from each frame to the next, float32 (F - 1, h, w, 2), in frame widths.

    By dense inverse search (Kroeger et al. 2016) on grey pictures.
    """
    grey = reduced(frames)
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)
    with _one_thread():
        flows = [search.calc(a, b, None) for a, b in pairwise(grey)]  # pyright: ignore
    if not flows:
        return np.zeros((0, *grey.shape[1:], 2), np.float32)
    return np.stack(flows) / grey.shape[2]


def motion_amount(flow: np.ndarray, fps: float) -> float:
    """Mean speed over the picture, in frame widths per second."""
    return float(np.linalg.norm(flow, axis=-1).mean() * fps) if len(flow) else 0.0


def motion_smoothness(flow: np.ndarray) -> float:
    """1 for steady motion or none, towards 0 for motion that changes wholly with every frame.

    1 / (1 + r), r being the median over time of the change of flow from frame to frame over the
    flow itself, both averaged over the picture: a few impacts do not count, jitter does.
    """
    speed = np.linalg.norm(flow, axis=-1).mean(axis=(1, 2))
    if len(flow) < 3 or speed.max() < STILL / 10:
        return 1.0
    change = np.linalg.norm(np.diff(flow, axis=0), axis=-1).mean(axis=(1, 2))
    return float(1 / (1 + np.median(change) / max(np.median(speed), STILL / 10)))


def camera_motion(frames: np.ndarray, fps: float) -> CameraMotion:
    """Follows corners from frame to frame and fits a shift, zoom and roll to most of them (RANSAC).

    A picture without texture shows no camera: `confidence` is then 0.
    """
    grey = reduced(frames, CORNER_SIDE)
    with _one_thread():
        return _fit_camera(grey, fps)


def _fit_camera(grey: np.ndarray, fps: float) -> CameraMotion:
    height, width = grey.shape[1:]
    moves: list[np.ndarray] = []
    shares: list[float] = []
    for before, after in pairwise(grey):
        # Apart from each other, weak ones too: the scenery must outvote what moves before it.
        points = cv2.goodFeaturesToTrack(before, 500, 0.002, CORNER_SIDE / 28)
        if points is None or len(points) < 12:
            continue
        moved, status, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None)  # pyright: ignore
        found = status[:, 0] == 1
        if found.sum() < 12:
            continue
        centre = np.array([width, height], np.float32) / 2
        start, end = points[found, 0] - centre, moved[found, 0] - centre
        fit, inliers = cv2.estimateAffinePartial2D(start, end, ransacReprojThreshold=0.5)
        if fit is not None:
            zoom = np.hypot(fit[0, 0], fit[1, 0])
            shift = -fit[:, 2] / width
            roll = -np.arctan2(fit[1, 0], fit[0, 0])
            moves.append(np.array([*shift, np.log(zoom), roll]))
            cells = np.floor(points[found, 0][inliers[:, 0] == 1] / [width / 4, height / 4])
            spread = len(np.unique(cells, axis=0)) / 16  # of the parts of the picture
            shares.append(float(inliers.mean()) * min(2 * spread, 1.0))
    if not moves:
        return CameraMotion(0.0, 0.0, 0.0, 0.0, 0.0)
    right, down, zoom, roll = (float(v) for v in np.median(moves, axis=0) * fps)
    return CameraMotion(right, down, zoom, roll, float(np.mean(shares)) * len(moves) / len(grey))


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV's threads wait for each other by spinning: on small pictures and a busy machine that
    made flow eighty times slower."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def reduced(frames: np.ndarray, side: int = FLOW_SIDE) -> np.ndarray:
    """Grey uint8 pictures (F, h, w) whose longer side is `side`; small ones are enlarged."""
    height, width = frames.shape[1:3]
    scale = side / max(height, width)
    size = (max(round(width * scale), 16), max(round(height * scale), 16))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    pictures = np.clip(np.nan_to_num(frames), 0, 255).astype(np.uint8)
    grey = [cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in pictures]
    return np.stack([cv2.resize(g, size, interpolation=how) for g in grey])
