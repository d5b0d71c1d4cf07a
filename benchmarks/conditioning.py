"""Whether a model keeps to what it is shown: a first image, a camera's move, a control.

    python benchmarks/conditioning.py --count 24 --json conditioning.json
    python benchmarks/conditioning.py --parts image canny
    python benchmarks/conditioning.py --parts camera --size 128

Prompts are captions of scenes of the world that no training drew, in the training's words; a
clip's seed is its number.

image: the first frame of the scene's true render is given. `first_frame_psnr_db` is the median over
clips of the first frame's PSNR to it, beside that of the codec alone; `image_motion_present` the
share in which something moves, `image_motion_right` that of the stated motions that are right.

canny, depth, pose, detailer: the true render is the reference (of depth and pose what the scene's
truth says of them), and each clip is made with it and without, from the same prompt and seed.
Adherence is the F1 of Canny edges (within a pixel at 64), for depth and pose the mean distance of
the object's track from the true one in frame widths, for the detailer the PSNR to the render in dB.

camera: with each camera LoRA beside the model, the share of clips whose camera is as asked, by the
world's judge, beside the share without it (`_without`). Prompts are of world v2 and name a
background with a texture, before which a move can be seen, and no camera. What has no LoRA beside
the model is skipped and named.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from aiprod_core.errors import InputError
from aiprod_pipelines import decoding, encoding, media
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import CAMERAS, ControlCondition, ImageCondition
from aiprod_trainer.evaluation.prompts import Prompt
from aiprod_trainer.prepare_world import REFERENCES
from aiprod_trainer.world.captions import describe
from aiprod_trainer.world.ground_truth import body_track, edges
from aiprod_trainer.world.judge import Verdict, agreement, judge
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import TEXTURED_BACKGROUNDS, Scene, sample_scene

CONTROLS = ("canny", "depth", "pose", "detailer")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parts = ("image", "camera", *CONTROLS)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--count", type=int, default=24, help="clips of each kind")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--size", type=int, help="pixels; default: the model's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts = prompts_of(options.count, options.seed)
    side = options.size or ModelSet.open(options.model, device="cpu").profile.height
    result: dict[str, Any] = {"model": options.model, "clips": options.count, "size": side}
    result["skipped"] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            try:
                if part == "image":
                    result |= first_images(options.model, prompts, side, Path(folder))
                elif part == "camera":
                    result |= cameras(
                        options.model, options.count, options.seed, side, result["skipped"]
                    )
                else:
                    result |= control(options.model, part, prompts, side, Path(folder))
            except InputError as error:
                result["skipped"].append(f"{part}: {error}")
            print(json.dumps(result, indent=1), file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def prompts_of(count: int, seed: int) -> list[Prompt]:
    rng = np.random.default_rng([seed, 11])  # no training draws from such a pair
    prompts = []
    for _ in range(count):
        scene = sample_scene(rng, world="v1")
        caption = describe(scene, rng)
        prompts.append(Prompt(caption.text, scene, caption.stated))
    return prompts


def scene_of(prompt: Prompt) -> Scene:
    assert prompt.scene is not None
    return prompt.scene


def first_images(model: str, prompts: list[Prompt], side: int, folder: Path) -> dict[str, Any]:
    pipeline = find_pipeline("one-stage").from_model(model)
    settings: dict[str, Any] = {"height": side, "width": side}
    psnrs, coded, present, right = [], [], [], []
    for number, prompt in enumerate(prompts):
        scene = scene_of(prompt)
        truth = render(scene, side)
        Image.fromarray(truth[0]).save(folder / "first.png")
        image = ImageCondition(folder / "first.png")
        clip = pipeline(prompt.text, seed=number, images=(image,), **settings)
        frames, verdict = seen(clip)
        psnrs.append(psnr(frames[0], truth[0]))
        latent = encoding.encode_frames(pipeline.models, truth[:1], Progress())
        decoded = next(iter(decoding.decode_video(pipeline.models, latent, Progress())))
        coded.append(psnr(decoded.numpy()[0], truth[0]))
        present.append(verdict.motion != "still")
        if "motion" in prompt.stated:
            right.append(agreement(verdict, scene)["motion"])
    return {
        "first_frame_psnr_db": round(float(np.median(psnrs)), 2),
        "first_frame_of_codec_db": round(float(np.median(coded)), 2),
        "image_motion_present": share(present),
        "image_motion_right": share(right),
    }


def control(
    model: str, kind: str, prompts: list[Prompt], side: int, folder: Path
) -> dict[str, Any]:
    """The mean adherence with the control, without it, and in how many clips it is the better."""
    followed = find_pipeline("ic-lora").from_model(model)
    free = find_pipeline("distilled").from_model(model)
    adherence, is_better = ADHERENCE[kind]
    pairs = []
    for number, prompt in enumerate(prompts):
        scene = scene_of(prompt)
        shown, named = render(scene, side), kind
        if kind in ("depth", "pose"):
            shown, named = REFERENCES[kind](scene, shown), f"{kind}-made"
        media.write_video(folder / "shown.mp4", [shown], scene.fps, crf=4)
        reference = ControlCondition(named, folder / "shown.mp4")
        settings = {"seed": number, "height": side, "width": side, "skip_stage_2": True}
        clips = (
            followed(prompt.text, controls=(reference,), **settings),
            free(prompt.text, **settings),
        )
        pairs.append([adherence(*seen(clip), scene) for clip in clips])
    ours, without = (np.array(values) for values in zip(*pairs, strict=True))
    return {
        f"{kind}_adherence": round(float(np.nanmean(ours)), 4),
        f"{kind}_adherence_without": round(float(np.nanmean(without)), 4),
        f"{kind}_better": share(is_better(ours, without).tolist()),
    }


def cameras(model: str, count: int, seed: int, side: int, skipped: list[str]) -> dict[str, Any]:
    pipeline = find_pipeline("one-stage").from_model(model)
    result: dict[str, Any] = {}
    for camera in CAMERAS:
        asked = camera.replace("-", " ")
        rng = np.random.default_rng([seed, 12])  # no training draws from such a pair
        right, free = [], []
        try:
            for number in range(count):
                settings: dict[str, Any] = {"seed": number, "height": side, "width": side}
                text = cameraless_prompt(asked, rng)
                moved = pipeline(text, camera=camera, **settings)
                right.append(seen(moved)[1].camera == asked)
                free.append(seen(pipeline(text, **settings))[1].camera == asked)
        except InputError as error:
            skipped.append(f"camera {camera}: {error}")
            continue
        key = f"camera_{camera.replace('-', '_')}"
        result |= {key: share(right), f"{key}_without": share(free)}
        print(key, result[key], result[f"{key}_without"], file=sys.stderr, flush=True)
    return result


def cameraless_prompt(camera: str, rng: np.random.Generator) -> str:
    """Of a scene in which this camera can be seen, and that does not say so."""
    while True:
        background = str(rng.choice(tuple(TEXTURED_BACKGROUNDS)))
        try:
            scene = sample_scene(rng, world="v2", camera=camera, background=background)
        except InputError:
            continue  # not every object stays in view
        caption = describe(scene, rng)
        if "background" in caption.stated and "camera" not in caption.stated:
            return caption.text


def seen(clip: Clip) -> tuple[np.ndarray, Verdict]:
    frames = np.concatenate([chunk.numpy() for chunk in clip.frames()])
    assert clip.audio is not None
    sound = media.resample(clip.audio, 16000, channels=2)
    return frames, judge(frames, sound.samples, 16000, clip.request.shape.fps)


def edge_f1(frames: np.ndarray, verdict: Verdict, scene: Scene) -> float:
    """Precision and recall of edge pixels that have one of the other within a pixel at 64."""
    side = frames.shape[1]
    wanted, found = edges(render(scene, side)), edges(frames)
    reach = np.ones((2 * (side // 64) + 1,) * 2, np.uint8)

    def covered(inner: np.ndarray, outer: np.ndarray) -> float:
        wide = np.stack([cv2.dilate(picture, reach) for picture in outer])
        return float((wide[inner > 0] > 0).mean()) if (inner > 0).any() else 0.0

    precision, recall = covered(found, wanted), covered(wanted, found)
    return 2 * precision * recall / max(precision + recall, 1e-6)


def track_distance(frames: np.ndarray, verdict: Verdict, scene: Scene) -> float:
    """In frame widths, where the object is found; half a frame where it never is."""
    truth = body_track(scene)
    apart = np.hypot(verdict.track.x - truth.x, verdict.track.y - truth.y)
    return float(np.nanmean(apart)) if np.isfinite(apart).any() else 0.5


def likeness(frames: np.ndarray, verdict: Verdict, scene: Scene) -> float:
    return psnr(frames, render(scene, frames.shape[1]))


Adherence = Callable[[np.ndarray, Verdict, Scene], float]
ADHERENCE: dict[str, tuple[Adherence, Callable[..., np.ndarray]]] = {
    "canny": (edge_f1, np.greater),
    "depth": (track_distance, np.less),
    "pose": (track_distance, np.less),
    "detailer": (likeness, np.greater),
}


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    error = np.square(frames.astype(np.float32) - truth.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def share(values: list[bool]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


if __name__ == "__main__":
    main()
