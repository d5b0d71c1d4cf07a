"""Signals that IC-LoRAs follow, made from a video or an image: edges, depth, pose, blur.

Every maker turns frames (frames, height, width, 3) of uint8 into as many of the same size, as the
published control LoRAs expect them: white edges on black; near is bright; coloured limbs on black.
Networks are loaded when they are needed and their files come by path or hub id.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aiprod_core.errors import InputError
from aiprod_pipelines.media import Frame, Frames

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"

# Set to a folder or hub id to estimate depth with another model.
DEPTH_MODEL_VARIABLE = "AIPROD_DEPTH_MODEL"

# The 17 key points of COCO: pairs that a limb joins, and each limb's place on the colour wheel.
LIMBS = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (7, 9),
    (6, 8), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4),
)  # fmt: skip
SURE = 0.3  # key points below this score are not drawn

# MediaPipe's 33 key points in the order of COCO's 17.
MEDIAPIPE_TO_COCO = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)


def make_control(kind: str, frames: Frames, **options: Any) -> Frames:
    """The signal of a kind. Raises InputError for another kind or a package that is not there."""
    if kind not in MAKERS:
        raise InputError(f"control must be one of {', '.join(MAKERS)}; got {kind}.")
    return MAKERS[kind](frames, **options)


def canny(frames: Frames, *, low: int = 100, high: int = 200) -> Frames:
    """Canny edges by OpenCV, white on black. Gradients above `high` start an edge, those above
    `low` continue it."""
    import cv2

    edges = [cv2.Canny(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), low, high) for frame in frames]
    return np.repeat(np.stack(edges)[..., None], 3, axis=-1)


def blur(frames: Frames, *, sigma: float | None = None) -> Frames:
    """What a detailer sharpens: `sigma` in pixels, by default a hundredth of the long side."""
    import cv2

    radius = max(frames.shape[1:3]) / 100 if sigma is None else sigma
    return np.stack([cv2.GaussianBlur(frame, (0, 0), radius) for frame in frames])


def depth(
    frames: Frames, *, model: str | Path | None = None, device: Any = None, batch_size: int = 8
) -> Frames:
    """Relative depth by a transformers depth-estimation model; near is white.

    Scaled over the whole clip, so that brightness means the same in every frame. `model` is a
    folder or hub id. Raises InputError when it cannot be had.
    """
    import cv2
    from PIL import Image
    from transformers import pipeline

    model = str(model or os.environ.get(DEPTH_MODEL_VARIABLE) or DEPTH_MODEL)
    try:
        estimate: Any = pipeline("depth-estimation", model=model, device=device)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"{model}: no depth-estimation model can be loaded from there ({first_line}); set "
            f"{DEPTH_MODEL_VARIABLE} to a folder or hub id."
        ) from error
    height, width = frames.shape[1:3]
    maps = []
    for start in range(0, len(frames), batch_size):
        images = [Image.fromarray(frame) for frame in frames[start : start + batch_size]]
        for result in estimate(images):
            predicted = np.asarray(result["predicted_depth"], dtype=np.float32).squeeze()
            maps.append(cv2.resize(predicted, (width, height), interpolation=cv2.INTER_LINEAR))
    clip = np.stack(maps)
    low, high = clip.min(), clip.max()
    grey = ((clip - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def pose(frames: Frames, *, find: Callable[[Frame], Any] | None = None) -> Frames:
    """Skeletons on black. `find` gives a frame's people as key points (people, 17, 3): x and y in
    pixels and a score; by default rtmlib or MediaPipe, whichever is installed."""
    find = find or _pose_finder()
    return np.stack([draw_skeletons(find(frame), *frame.shape[:2]) for frame in frames])


def draw_skeletons(people: Any, height: int, width: int) -> Frame:
    """Coloured limbs of key points (people, 17, 3) on black, as wide as the picture asks for."""
    import cv2

    canvas = np.zeros((height, width, 3), np.uint8)
    thickness = max(1, round(max(height, width) / 160))
    for person in np.asarray(people, dtype=np.float32).reshape(-1, 17, 3):
        points = [(round(float(x)), round(float(y))) for x, y, _ in person]
        sure = person[:, 2] >= SURE
        for index, (a, b) in enumerate(LIMBS):
            if sure[a] and sure[b]:
                colour = _hue(index / len(LIMBS))
                cv2.line(canvas, points[a], points[b], colour, thickness, cv2.LINE_AA)
        for index in np.flatnonzero(sure):
            cv2.circle(canvas, points[index], thickness + 1, (255, 255, 255), -1, cv2.LINE_AA)
    return canvas


def _pose_finder() -> Callable[[Frame], Any]:
    """A function from a frame to its people's key points, by what is installed."""
    try:
        from rtmlib import Body  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        body = Body(mode="balanced", backend="onnxruntime", device="cpu")

        def by_rtmlib(frame: Frame) -> Any:
            points, scores = body(np.ascontiguousarray(frame[..., ::-1]))  # it expects BGR
            return np.concatenate([points, scores[..., None]], axis=-1)

        return by_rtmlib
    try:
        from mediapipe.python.solutions.pose import Pose  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "control pose needs rtmlib or MediaPipe: pip install rtmlib onnxruntime, or give a "
            "ready-made skeleton video as --control pose-made=PATH."
        ) from None
    tracker = Pose(static_image_mode=False)

    def by_mediapipe(frame: Frame) -> Any:
        found = tracker.process(frame).pose_landmarks
        if found is None:
            return np.zeros((0, 17, 3), np.float32)
        height, width = frame.shape[:2]
        marks = [found.landmark[index] for index in MEDIAPIPE_TO_COCO]
        return [[(m.x * width, m.y * height, m.visibility) for m in marks]]

    return by_mediapipe


def _hue(turn: float) -> tuple[int, int, int]:
    """A full colour at a place on the wheel, 0 to 1."""
    red, green, blue = (
        round(255 * min(1.0, max(0.0, abs((turn * 6 + shift) % 6 - 3) - 1))) for shift in (0, 4, 2)
    )
    return red, green, blue


MAKERS: dict[str, Callable[..., Frames]] = {
    "canny": canny,
    "depth": depth,
    "pose": pose,
    "blur": blur,
}
