"""Where a server keeps its files, all below one folder.

    inputs/JOB/         what a job was given: images, sounds, clips
    uploads/OWNER/      uploaded and not used yet
    work/JOB-ATTEMPT/   what a worker is writing: seen by nobody but for previews and live streams
    latents/JOB         final latents of a job that is not decoded yet
    results/JOB-ATTEMPT/  video.mp4, thumbnail.webp, spritesheet.jpg: whole or not there

A result is made in `work` and moved as a whole, then its job is called completed. Paths in requests
are relative to the folder, which is every process's working directory: recipes, which carry them,
tell nobody where the server lives.
"""

import os
import shutil
import time
from pathlib import Path

from aiprod_serve.jobs import Job

FOLDERS = ("inputs", "uploads", "work", "latents", "results")
VIDEO, THUMBNAIL, SPRITESHEET = "video.mp4", "thumbnail.webp", "spritesheet.jpg"
PREVIEW, LIVE = "preview.jpg", "live.mp4"

# Kept free for a full disk, on which it must still be recorded that a job failed.
RESERVE, RESERVE_BYTES = "reserve", 4 * 2**20

# What no job names is removed only when it is older: its job may be about to be written down.
ORPHAN_AGE_S = 600.0


class Files:
    def __init__(self, root: Path) -> None:
        self.root = root

    def create_folders(self) -> None:
        for name in FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)

    def keep_reserve(self) -> None:
        """Takes room while there is some; see RESERVE."""
        path = self.root / RESERVE
        if path.exists():
            return
        try:
            path.write_bytes(bytes(RESERVE_BYTES))
        except OSError:
            path.unlink(missing_ok=True)

    def spend_reserve(self) -> None:
        (self.root / RESERVE).unlink(missing_ok=True)

    def inputs(self, job_id: str) -> Path:
        return self.root / "inputs" / job_id

    def uploads(self, owner: str) -> Path:
        return self.root / "uploads" / (owner or "anyone")

    def work(self, job: Job) -> Path:
        return self.root / "work" / f"{job.id}-{job.attempt}"

    def latents(self, job_id: str) -> Path:
        return self.root / "latents" / job_id

    def result(self, job: Job) -> Path:
        return self.root / "results" / f"{job.id}-{job.attempt}"

    def start_work(self, job: Job) -> Path:
        for left in (self.root / "work").glob(f"{job.id}-*"):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        folder = self.work(job)
        folder.mkdir()
        return folder

    def publish(self, job: Job) -> int:
        """Moves a finished result to where it is found, whole; returns its size in bytes."""
        (self.work(job) / PREVIEW).unlink(missing_ok=True)
        os.rename(self.work(job), self.result(job))
        return sum(path.stat().st_size for path in self.result(job).iterdir())

    def discard_work(self, job: Job) -> None:
        shutil.rmtree(self.work(job), ignore_errors=True)

    def discard_result(self, job: Job) -> None:
        shutil.rmtree(self.result(job), ignore_errors=True)

    def remove(self, job_id: str) -> None:
        """All files of a job. One that is being downloaded stays whole for its reader."""
        self.latents(job_id).unlink(missing_ok=True)
        shutil.rmtree(self.inputs(job_id), ignore_errors=True)
        for folder in ("work", "results"):
            for path in (self.root / folder).glob(f"{job_id}-*"):
                shutil.rmtree(path, ignore_errors=True)

    def sweep(self, known_ids: set[str], *, keep_uploads_s: float) -> None:
        """Removes what belongs to no job, and uploads that were not used in time."""
        now = time.time()
        for folder in ("inputs", "work", "latents", "results"):
            for path in (self.root / folder).iterdir():
                job_id = path.name.partition("-")[0]
                if job_id not in known_ids and now - _modified(path) > ORPHAN_AGE_S:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in (self.root / "uploads").glob("*/*"):
            if now - _modified(path) > keep_uploads_s:
                path.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
