"""A worker: one process, one device, one job at a time, from the store to files on disk.

    python -m aiprod_serve.worker NAME DEVICE

Started and restarted by the supervisor. The main thread computes; one other thread keeps the lease,
tells how far the job is and hears of a cancelled job, on which the main thread stops after the step
that it is in. Latents are saved before they are decoded: a worker that dies while decoding leaves
the next one only that to do.
"""

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sqlalchemy.exc import DBAPIError

from aiprod_core.errors import InputError, is_out_of_memory
from aiprod_core.types import AV
from aiprod_pipelines import analytics, companions, media
from aiprod_pipelines.catalog import find_pipeline
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Advance, Progress
from aiprod_pipelines.request import GenerationRequest
from aiprod_serve.database import Database
from aiprod_serve.errors import without_folders
from aiprod_serve.files import LIVE, PREVIEW, SPRITESHEET, THUMBNAIL, VIDEO, Files
from aiprod_serve.jobs import Job, JobStore, Standing
from aiprod_serve.settings import Settings

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.1
HEARTBEAT_S = 0.5
PREVIEW_EVERY_S = 1.0
PREVIEW_SHARE = 0.1  # of the time at most

THUMBNAIL_WIDTH = 480
SPRITE_HEIGHT, SPRITE_COLUMNS, NUM_SPRITES = 120, 5, 20

# Percent at which a stage begins and ends, in a run of one stage and of two.
STAGES = {
    "encode prompt": (0, 5),
    "encode audio": (5, 7),
    "encode video": (5, 8),
    "encode images": (5, 8),
    "draft": (8, 25),  # of best_of: its seeds in few steps
    "denoise": (8, 80),
    "upsample": (60, 62),
    "refine": (62, 80),
    "decode audio": (80, 83),
    "decode video": (83, 98),
}
DENOISED_BEFORE_REFINING = 60


class InterruptedJobError(Exception):
    """The job is cancelled or lost; raised between two steps."""


class JobProgress(Progress):
    """How far a job is, read by the heartbeat; stops the job when that says so."""

    def __init__(self, has_stage_2: bool, show_preview: Callable[[AV], None]) -> None:
        super().__init__()
        self.has_stage_2, self.show_preview = has_stage_2, show_preview
        self.percent, self.name, self.num_previews = 0, "", 0
        self.standing = Standing.KEPT
        self._next_preview = time.monotonic() + PREVIEW_EVERY_S

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        low, high = STAGES.get(name, (0, 0))
        if name == "denoise" and self.has_stage_2:
            high = DENOISED_BEFORE_REFINING
        done = 0

        def advance(parts: int) -> None:
            nonlocal done
            self.check()
            done += parts
            self.percent = max(self.percent, low + (high - low) * done // max(total, 1))

        self.check()
        self.name = name
        self.percent = max(self.percent, low)
        yield advance
        if not 0 < done < total:  # a long clip's stage comes back for its next window
            self.percent = max(self.percent, high)

    def check(self) -> None:
        if self.standing is not Standing.KEPT:
            raise InterruptedJobError

    def preview(self, latents: Callable[[], AV]) -> None:
        started = time.monotonic()
        if started < self._next_preview:
            return
        self.show_preview(latents())
        self.num_previews += 1
        took = time.monotonic() - started
        self._next_preview = time.monotonic() + max(PREVIEW_EVERY_S, took / PREVIEW_SHARE)


class Worker:
    """Claims jobs and makes them until it is stopped."""

    def __init__(self, settings: Settings, name: str, device: str) -> None:
        self.settings, self.name, self.device = settings, name, device
        self.files = Files(settings.data_dir)
        self.store = JobStore(
            Database(settings.database_url),
            keep_s=settings.keep_days * 86400,
            max_queue=settings.max_queue,
        )
        self._models: dict[tuple[str, bool], ModelSet] = {}
        self._current: tuple[Job, JobProgress] | None = None
        self._stopped = threading.Event()

    def run(self, *, until: Callable[[], bool] = lambda: False) -> None:
        """Works until stopped, by `stop` or by `until` when there is nothing to do."""
        self.register()
        try:
            while not self._stopped.is_set():
                if self.make_next():
                    continue
                if until():
                    return
                self._stopped.wait(IDLE_POLL_S)
        finally:
            self._stopped.set()

    def register(self) -> None:
        """Announces the worker; from now on it is heard of, and so is the job that it makes."""
        self.store.register_worker(self.name, self.device)
        threading.Thread(target=self._beat, daemon=True).start()

    def make_next(self) -> bool:
        """Makes the oldest job that waits; False if there is none."""
        job = self._claim()
        if job is None:
            return False
        self.work_on(job)
        return True

    def stop(self) -> None:
        self._stopped.set()

    def work_on(self, job: Job) -> None:
        """Makes a job and records how it ended."""
        # Nothing of a prompt is logged.
        logger.info("%s: %s with %s", job.id, job.pipeline, job.model)
        try:
            with analytics.run("serve"):
                self._make(job)
        except InterruptedJobError:
            self.files.discard_work(job)
            if self.store.acknowledge_cancel(job):  # else it is lost, and so is not ours to clear
                self.files.latents(job.id).unlink(missing_ok=True)
        except Exception as error:
            code, message = explain(error)
            self.files.discard_work(job)
            if code == "disk_full":
                self.files.spend_reserve()
            self.files.latents(job.id).unlink(missing_ok=True)
            is_ours = self._insist(lambda: self.store.fail(job, code, message))
            if is_ours and code == "internal_error":  # else its files went with it
                logger.error("%s failed", job.id, exc_info=error)
        except BaseException:  # asked to stop: another worker goes on from the latents
            self.files.discard_work(job)
            self.store.release(job)
            raise
        finally:
            self._current = None

    def _claim(self) -> Job | None:
        try:
            return self.store.claim(
                self.name, list(self.settings.models), lease_s=self.settings.lease_s
            )
        except DBAPIError as error:  # a full disk, a database that restarts
            logger.warning("no job can be claimed: %s", error.orig)
            self._stopped.wait(1.0)
            return None

    def _make(self, job: Job) -> None:
        folder = self.files.start_work(job)
        pipeline = self._open(job)
        request = GenerationRequest.from_dict(job.request)
        progress = JobProgress(
            pipeline.uses_stage_2(request), lambda latents: self._preview(pipeline, latents, folder)
        )
        self._current = (job, progress)
        saved = self.files.latents(job.id)
        started = time.monotonic()
        clip = load_clip(saved, pipeline, progress)
        if clip is None:
            clip = pipeline.run(request, progress=progress)
            save_clip(saved, clip)
        clip.recipe = of_names(clip.recipe)
        write(clip, folder, is_streamed=job.is_streamed)
        timings = progress.seconds | {"total": time.monotonic() - started}
        if clip.latents.video is not None:
            make_stills(folder / VIDEO, folder, clip.request.num_frames or 1)
        progress.check()
        num_bytes = self.files.publish(job)
        if self.store.complete(job, num_bytes=num_bytes, timings=timings):
            saved.unlink(missing_ok=True)
        else:
            self.files.discard_result(job)

    def _open(self, job: Job) -> Pipeline:
        """The pipeline on a model that stays open between jobs."""
        kind = find_pipeline(job.pipeline)
        key = (job.model, kind.is_distilled)
        if key not in self._models:
            self._models[key] = ModelSet.open(
                self.settings.models[job.model],
                text_encoder=self.settings.text_encoder,
                device=self.device,
                dtype=self.settings.dtype,
                prefers_distilled=kind.is_distilled,
            )
        return kind(self._models[key])

    def _preview(self, pipeline: Pipeline, latents: AV, folder: Path) -> None:
        """Decodes one frame of the estimate, where the decoder need not be loaded for it."""
        if latents.video is None or not pipeline.models.keeps_loaded:
            return
        middle = latents.video.shape[2] // 2
        models = pipeline.models
        has_tiny = companions.find_beside(models.checkpoint, "tiny-decoder") is not None
        lend = models.tiny_decoder if has_tiny else models.video_decoder
        with torch.inference_mode(), lend() as decoder:
            latent = latents.video[:, :, middle : middle + 1]
            pixels = decoder(latent.to(models.device, models.dtype))
        frame = ((pixels[0, :, 0].float() + 1) * 127.5).clamp(0, 255).byte()
        image = Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy()))
        part = folder / f"{PREVIEW}.part"
        image.save(part, format="JPEG", quality=80)
        part.replace(folder / PREVIEW)

    def _beat(self) -> None:
        parent, seen_at = os.getppid(), 0.0
        while not self._stopped.wait(HEARTBEAT_S):
            if os.getppid() != parent:  # the supervisor was killed: nobody would end this one
                os._exit(1)
            current = self._current
            try:
                if current is not None:
                    job, progress = current
                    progress.standing = self.store.heartbeat(
                        job,
                        progress=progress.percent,
                        stage=progress.name,
                        num_previews=progress.num_previews,
                        lease_s=self.settings.lease_s,
                    )
                if time.monotonic() - seen_at > 2.0:
                    seen_at = time.monotonic()
                    self.store.see_worker(self.name, current[0].id if current else None)
            except DBAPIError as error:
                logger.warning("heartbeat failed: %s", error.orig)

    def _insist(self, record: Callable[[], bool]) -> bool:
        while True:
            try:
                return record()
            except DBAPIError as error:
                logger.warning("not recorded yet: %s", error.orig)
                if self._stopped.wait(1.0):
                    return False


def explain(error: Exception) -> tuple[str, str]:
    """A code and a sentence for the client. What only the operator can mend is not detailed."""
    if _is_disk_full(error):
        return "disk_full", "the server's disk is full; try again when there is room."
    if is_out_of_memory(error):
        return "out_of_memory", "out of memory; try fewer frames or a smaller picture."
    if isinstance(error, InputError):
        return "invalid_request", without_folders(str(error))
    return "internal_error", f"the clip could not be made ({type(error).__name__})."


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, SafetensorError | DBAPIError | InputError) and (
            "No space left" in str(error) or "disk is full" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


# Latents on disk, between denoising and decoding.


def save_clip(path: Path, clip: Clip) -> None:
    tensors = {"video": clip.latents.video, "audio": clip.latents.audio}
    metadata = {"request": json.dumps(clip.request.to_dict())}
    if clip.soundtrack is not None:
        tensors["soundtrack"] = torch.from_numpy(clip.soundtrack.samples)
        metadata["sample_rate"] = str(clip.soundtrack.sample_rate)
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
    part = path.with_name(f"{path.name}-part")
    try:
        save_file(kept, part, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_clip(path: Path, pipeline: Pipeline, progress: Progress) -> Clip | None:
    """The clip that an interrupted attempt had denoised already, if there is one."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    soundtrack = None
    if "soundtrack" in tensors:
        soundtrack = media.Audio(tensors["soundtrack"].numpy(), int(metadata["sample_rate"]))
    device = pipeline.models.device
    latents = {name: tensors[name].to(device) for name in ("video", "audio") if name in tensors}
    resolved = GenerationRequest.from_dict(json.loads(metadata["request"]))
    return Clip(pipeline.name, pipeline.models, resolved, AV(**latents), progress, soundtrack)


# The files of a result.


def of_names(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that names the operator's files, as LoRAs, without their folders.

    It leaves the server in the clip. What came from the client is relative already; see files.py.
    """
    names = {path: Path(path).name for path in recipe["inputs"] if os.path.isabs(path)}
    model, encoder = recipe["model"], recipe["text_encoder"]
    if os.path.isabs(model["name"]):
        model = model | {"name": Path(model["name"]).name}
    if os.path.isabs(encoder["source"] or ""):
        encoder = encoder | {"source": None}  # the model's, or given again
    inputs = {names.get(path, path): digest for path, digest in recipe["inputs"].items()}
    request = _renamed(recipe["request"], names)
    return recipe | {
        "request": request, "inputs": inputs, "model": model, "text_encoder": encoder
    }  # fmt: skip


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def write(clip: Clip, folder: Path, *, is_streamed: bool) -> None:
    """The clip itself; one that is streamed can be read as it grows."""
    video = folder / VIDEO
    if is_streamed and clip.latents.video is not None:
        with (folder / LIVE).open("wb") as file:
            for segment in clip.stream():
                file.write(segment)
                file.flush()
        os.replace(folder / LIVE, video)  # whoever has it open reads on
    else:
        clip.save(video)


def make_stills(video: Path, folder: Path, num_frames: int) -> None:
    """A thumbnail and a sheet of small frames, read from the finished file."""
    wanted = set(np.linspace(0, num_frames - 1, min(NUM_SPRITES, num_frames)).round().astype(int))
    frames = [
        Image.fromarray(frame)
        for index, frame in enumerate(media.read_frames(video))
        if index in wanted
    ]
    middle = frames[len(frames) // 2].copy()
    middle.thumbnail((THUMBNAIL_WIDTH, THUMBNAIL_WIDTH))
    middle.save(folder / THUMBNAIL, method=2)
    width = max(1, frames[0].width * SPRITE_HEIGHT // frames[0].height)
    columns = min(SPRITE_COLUMNS, len(frames))
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * width, rows * SPRITE_HEIGHT))
    for index, frame in enumerate(frames):
        place = (index % columns * width, index // columns * SPRITE_HEIGHT)
        sheet.paste(frame.resize((width, SPRITE_HEIGHT)), place)
    sheet.save(folder / SPRITESHEET, quality=80)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(message)s")
    name, device = sys.argv[1:]
    settings = Settings.from_environment()
    os.chdir(settings.data_dir)
    if device == "cpu":
        os.nice(5)  # the web process answers first

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
    Worker(settings, name, device).run()


if __name__ == "__main__":
    main()
