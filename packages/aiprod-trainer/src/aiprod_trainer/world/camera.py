"""Camera moves: a pan or zoom over the flat stage, steady from the first frame to the last.

A move is symmetric about the resting view, so that what is seen halfway is what a static camera
sees.
"""

from dataclasses import dataclass

import numpy as np

CAMERAS = ("static", "dolly in", "dolly out", "dolly left", "dolly right", "jib up", "jib down")
TRAVEL_X, TRAVEL_Y, ZOOM = 0.30, 0.22, 1.7  # whole way across a clip, in frames; zoom ratio


@dataclass(frozen=True)
class View:
    """What the camera sees at each time: the world point in mid frame and the magnification."""

    x: np.ndarray
    y: np.ndarray
    zoom: np.ndarray

    def to_screen(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (x - self.x) * self.zoom + 0.5, (y - self.y) * self.zoom + 0.5

    def to_world(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (x - 0.5) / self.zoom + self.x, (y - 0.5) / self.zoom + self.y


def view(camera: str, progress: np.ndarray, amount: float = 1.0) -> View:
    """The view at `progress` 0 to 1 through the clip; `amount` scales the whole move."""
    along = (np.asarray(progress, dtype=np.float64) - 0.5) * amount
    way_x = {"dolly left": -TRAVEL_X, "dolly right": TRAVEL_X}.get(camera, 0.0)
    way_y = {"jib up": -TRAVEL_Y, "jib down": TRAVEL_Y}.get(camera, 0.0)
    growth = {"dolly in": 1.0, "dolly out": -1.0}.get(camera, 0.0)
    return View(0.5 + way_x * along, 0.5 + way_y * along, ZOOM ** (growth * along))
