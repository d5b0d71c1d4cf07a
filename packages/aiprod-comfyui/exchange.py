"""What passes between ComfyUI and AIPROD: models, media, progress. Imported when a node runs.

ComfyUI holds pictures as IMAGE, float (B, H, W, C) in [0, 1], and sound as AUDIO, a dict of a
waveform (B, C, T) and its sample_rate. AIPROD reads files, so what comes in is written to ComfyUI's
temporary folder under the hash of its contents: the same picture is the same file, and what AIPROD
has computed of it is found again.
"""

import hashlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.types import AV
from aiprod_pipelines import media
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Advance, Progress
from aiprod_pipelines.request import LoraFile

REFERENCE_CRF = 4  # of pictures that are written as video for AIPROD to read


def comfy(module: str) -> Any:
    """A module of ComfyUI, or None where the nodes run without it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None


@dataclass(frozen=True)
class Model:
    """A model by its options and the LoRAs to be added; opened once for all nodes that use it.

    The name of a model that is shipped in two forms stands for its distilled form in pipelines that
    want one, so it is opened for each of the two kinds.
    """

    options: dict[str, Any]
    loras: tuple[LoraFile, ...] = ()
    opened: dict[bool, ModelSet] = field(default_factory=dict, compare=False)

    def pipeline(self, name: str) -> Pipeline:
        kind = find_pipeline(name)
        if kind.is_distilled not in self.opened:
            self.opened[kind.is_distilled] = ModelSet.open(
                **self.options, prefers_distilled=kind.is_distilled
            )
        return kind(self.opened[kind.is_distilled])

    def with_lora(self, path: str, strength: float) -> "Model":
        return replace(self, loras=(*self.loras, LoraFile(Path(path), strength)))


class Text(NamedTuple):
    """A prompt's words, encoded already where AIPROD keeps what it has computed."""

    prompt: str
    negative_prompt: str | None
    audio_prompt: str | None


class Condition(NamedTuple):
    """One thing that a clip is to keep to; `field` is GenerationRequest's."""

    field: str
    given: Any  # IMAGE or AUDIO
    settings: dict[str, Any]


class NodeProgress(Progress):
    """A bar on the node that runs, a new one for each stage; stops when ComfyUI is interrupted."""

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        utils, management = comfy("comfy.utils"), comfy("comfy.model_management")
        bar = utils.ProgressBar(total) if utils else None

        def advance(parts: int) -> None:
            if management:
                management.throw_exception_if_processing_interrupted()
            if bar is not None:
                bar.update(parts)

        advance(0)
        yield advance


def device() -> str | None:
    """ComfyUI's device, which its own flags decide; None lets AIPROD choose."""
    management = comfy("comfy.model_management")
    return str(management.get_torch_device()) if management else None


def make_room() -> None:
    """Takes ComfyUI's own models off the device; AIPROD plans by the memory that is free."""
    management = comfy("comfy.model_management")
    if management:
        management.unload_all_models()
        management.soft_empty_cache()


# Media in.


def request_fields(conditions: tuple[Condition, ...], fps: float) -> dict[str, Any]:
    """Conditions as fields of a request, with their media in files; pictures play at `fps`."""
    fields: dict[str, Any] = {}
    for condition in conditions:
        if condition.field == "audio":
            if "audio" in fields:
                raise InputError("two sounds are given; the picture follows one.")
            fields |= {"audio": audio_file(condition.given), **condition.settings}
            continue
        is_moving = condition.field == "controls" and len(condition.given) > 1
        path = video_file(condition.given, fps) if is_moving else image_file(condition.given)
        fields.setdefault(condition.field, []).append({"path": path, **condition.settings})
    return fields


def image_file(images: Tensor) -> Path:
    """The first picture of an IMAGE."""
    frame = to_bytes(images[0])
    return _kept(lambda path: Image.fromarray(frame).save(path), ".png")


def video_file(images: Tensor, fps: float) -> Path:
    chunks = (to_bytes(image)[None] for image in images)
    return _kept(lambda path: media.write_video(path, chunks, fps, crf=REFERENCE_CRF), ".mp4")


def audio_file(audio: dict[str, Any]) -> Path:
    samples = audio["waveform"][0].float().cpu().numpy()
    sound = media.Audio(samples, int(audio["sample_rate"]))
    return _kept(lambda path: media.write_audio(path, sound), ".wav")


def clip_file(video: Any) -> Path:
    """A VIDEO; one that is a file already is copied without being encoded anew."""
    return _kept(lambda path: video.save_to(str(path)), ".mp4")


def to_bytes(image: Tensor) -> media.Frame:
    """One picture (H, W, C) in [0, 1] as (H, W, 3) bytes; an alpha channel is left out."""
    return (image[..., :3].float() * 255).round().clamp(0, 255).byte().cpu().numpy()


def _kept(write: Callable[[Path], object], suffix: str) -> Path:
    folders = comfy("folder_paths")
    root = Path(folders.get_temp_directory() if folders else tempfile.gettempdir()) / "aiprod"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as name:
        written = Path(name) / f"given{suffix}"
        write(written)
        digest = hashlib.sha256(written.read_bytes()).hexdigest()[:32]
        return written.replace(root / f"{digest}{suffix}")


# Clips out.


def to_latent(clip: Clip) -> dict[str, Any]:
    """A clip as LATENT: the picture's latent (1, C, F, H, W), or the sound's where there is none.

    The other entries are kept by nodes that edit the samples.
    """
    video, audio = clip.latents.video, clip.latents.audio
    return {"samples": audio if video is None else video, "audio": audio, "aiprod_clip": clip}


def to_clip(latent: dict[str, Any]) -> Clip:
    """The clip of a LATENT, with its samples as they are now."""
    if "aiprod_clip" not in latent:
        raise InputError("this latent was not sampled by an AIPROD node, so it cannot be decoded.")
    clip: Clip = latent["aiprod_clip"]
    samples, audio = latent["samples"], latent["audio"]
    latents = AV(None, samples) if clip.latents.video is None else AV(samples, audio)
    is_same = latents.video is clip.latents.video and latents.audio is clip.latents.audio
    return clip if is_same else replace(clip, latents=latents)


def to_images(clip: Clip) -> Tensor:
    if clip.latents.video is None:
        raise InputError("this clip is sound alone; connect AIPROD Decode Audio.")
    return torch.cat([chunk.float() / 255 for chunk in clip.frames()])


def to_audio(clip: Clip) -> dict[str, Any] | None:
    """None for a silent clip."""
    if clip.audio is None:
        return None
    waveform = torch.from_numpy(np.ascontiguousarray(clip.audio.samples))[None]
    return {"waveform": waveform, "sample_rate": clip.audio.sample_rate}


def output_path(prefix: str, width: int, height: int) -> tuple[Path, str]:
    """A new file in ComfyUI's output folder, and the subfolder that it is in there."""
    folders = comfy("folder_paths")
    if folders is None:
        raise InputError("the output folder is ComfyUI's; run this node there.")
    root = folders.get_output_directory()
    folder, name, counter, subfolder, _ = folders.get_save_image_path(prefix, root, width, height)
    return Path(folder) / f"{name}_{counter:05}_.mp4", subfolder
