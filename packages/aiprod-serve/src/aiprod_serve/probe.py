"""Looks into uploaded files where a malicious one can do little: in a forked, limited child.

    python -I -m aiprod_serve.probe        one request a line on stdin, one answer on stdout

The process imports its libraries once and forks for every file. The child may use so much memory
and processor time, write one file of a bounded size and open few; its parent ends it after a while.
FFmpeg is held to formats that hold their media themselves: playlists, which name other files and
addresses, are refused. Images are written anew, so that what is kept is our encoder's file.
"""

import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError

# FFmpeg's demuxers, and the suffix under which a file of theirs is kept.
FORMATS = {
    "mov,mp4,m4a,3gp,3g2,mj2": ".mp4",
    "matroska,webm": ".mkv",
    "avi": ".avi",
    "wav": ".wav",
    "flac": ".flac",
    "mp3": ".mp3",
    "ogg": ".ogg",
    "aac": ".aac",
}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


@dataclass(frozen=True)
class Limits:
    """What a file may be, and what looking at it may cost."""

    max_pixels: int  # of an image or a frame
    max_duration_s: float
    timeout_s: float
    memory_mb: int


@dataclass(frozen=True)
class Found:
    """A file that can be used, under its own suffix. Fields of an absent track are None."""

    kind: str  # image, video or audio
    suffix: str
    width: int | None = None
    height: int | None = None
    duration_s: float | None = None
    has_audio: bool = False


class Prober:
    """A probing process, kept for many files; made anew when it died. Safe from any thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def probe(self, path: Path) -> Found:
        """What a file is; an image is rewritten in place. Raises InputError for what is refused."""
        with self._lock:
            answer = self._ask({"path": str(path), "limits": asdict(self.limits)})
        if "refused" in answer:
            raise InputError(answer["refused"])
        return Found(**answer)

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "aiprod_serve.probe"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # One thread: only so may it fork.
                env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PATH": os.defpath},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"refused": "the file cannot be read."}


def main() -> None:
    import numpy  # noqa: F401  loaded once, before any fork
    from PIL import Image

    from aiprod_pipelines import media  # noqa: F401

    Image.init()  # its plug-ins too
    for line in sys.stdin:
        question = json.loads(line)
        answer = _in_child(Path(question["path"]), Limits(**question["limits"]))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _in_child(path: Path, limits: Limits) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _confine(limits)
        try:
            answer = asdict(look(path, limits))
        except InputError as error:
            # The client knows no path here.
            answer = {"refused": str(error).replace(f"{path}: ", "").replace(str(path), "the file")}
        except MemoryError:
            answer = {"refused": "the file needs too much memory to be read."}
        except Exception as error:
            answer = {"refused": f"the file cannot be read ({type(error).__name__})."}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    text = _read_until(reading, time.monotonic() + limits.timeout_s)
    os.close(reading)
    try:
        if text is None:
            os.kill(child, 9)
            return {"refused": f"reading the file takes longer than {limits.timeout_s:g} s."}
    finally:
        os.waitpid(child, 0)
    return json.loads(text) if text else {"refused": "the file is damaged or too demanding."}


def _read_until(pipe: int, deadline: float) -> bytes | None:
    """All that is written to a pipe; None when it is still open at the deadline."""
    text = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(pipe, 65536)
        if not part:
            return text
        text += part


def _confine(limits: Limits) -> None:
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(0, 2)  # decoders complain about every damaged file
    memory = limits.memory_mb * 2**20
    seconds = int(limits.timeout_s) + 1
    for what, amount in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits.max_pixels * 4 + 2**20),  # the rewritten image
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (amount, amount))


def look(path: Path, limits: Limits) -> Found:
    """Decodes a file from end to end within the limits. Raises InputError for what is refused."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = limits.max_pixels // 2  # Pillow refuses at twice as many
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            size = image.size
    except UnidentifiedImageError:
        return _look_at_stream(path, limits)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the image is damaged or too large ({type(error).__name__}).") from None
    _check_pixels(*size, limits)
    return _rewrite_image(path)


def _rewrite_image(path: Path) -> Found:
    from PIL import Image

    from aiprod_pipelines import media

    frame = media.read_image(path)
    part = path.with_suffix(".part")
    Image.fromarray(frame).save(part, format="PNG", compress_level=1)
    os.replace(part, path)
    return Found("image", ".png", frame.shape[1], frame.shape[0])


def _look_at_stream(path: Path, limits: Limits) -> Found:
    with _opened(path) as (container, suffix):
        video = next(iter(container.streams.video), None)
        audio = next(iter(container.streams.audio), None)
        if video is None and audio is None:
            raise InputError("neither a picture nor a sound in this file.")
        if video is not None:
            _check_pixels(video.width, video.height, limits)
            if not (video.average_rate or video.guessed_rate):
                raise InputError("the video has no frame rate.")
        if audio is not None and not (audio.sample_rate and audio.channels):
            raise InputError("the sound has no sample rate or no channels.")
        counts, end_s = {"video": 0, "audio": 0}, 0.0
        for frame in container.decode(*(stream for stream in (video, audio) if stream)):
            counts["video" if hasattr(frame, "pict_type") else "audio"] += 1
            if hasattr(frame, "pict_type"):
                _check_pixels(frame.width, frame.height, limits)
            end_s = max(end_s, frame.time or 0.0)
            if end_s > limits.max_duration_s:
                raise InputError(f"the file lasts longer than {limits.max_duration_s:g} s.")
        if video is not None and not counts["video"]:
            raise InputError("no frame of the video can be decoded.")
        if audio is not None and not counts["audio"]:
            raise InputError("no sound of the file can be decoded.")
        if video is None:
            return Found("audio", suffix, duration_s=end_s, has_audio=True)
        return Found("video", suffix, video.width, video.height, end_s, audio is not None)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, str]]:
    import av
    import av.error

    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
    try:
        with av.open(str(path), options=options) as container:
            suffix = FORMATS.get(container.format.name)
            if suffix is None:
                raise InputError(f"files of format {container.format.name} are not taken.")
            yield container, suffix
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            "not an image, video or sound that can be read; give PNG, JPEG, WebP, MP4, WebM, "
            "WAV, FLAC, MP3 or Ogg."
        ) from None


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise InputError("the picture has no size.")
    if width * height > limits.max_pixels:
        raise InputError(
            f"{width}x{height} is more than {limits.max_pixels} pixels; give a smaller picture."
        )


if __name__ == "__main__":
    main()
