"""Clips that play while they are made: fragmented MP4 to a file, standard output or a consumer.

    for segment in pipeline.stream("a red ball bounces"):  # bytes; together one MP4
        socket.send(segment)

Each chunk of frames is decoded, encoded and handed out before the next, so memory holds one chunk
however long the clip is, and nothing is decoded that is not asked for.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from aiprod_core.errors import InputError
from aiprod_pipelines import analytics

STANDARD_OUTPUT = Path("-")


class Written(NamedTuple):
    """What a stream came to."""

    num_bytes: int
    first_segment_s: float  # from the call to the first segment's last byte
    total_s: float


def write_stream(
    segments: Iterable[bytes], target: str | Path, *, started: float | None = None
) -> Written:
    """Writes segments as they come, to a file or to standard output ("-").

    Unlike a whole clip, the file has its own name from the start, or no player could follow it; on
    an error or interrupt it is removed. `started` (time.monotonic) is where the times count from.
    Raises InputError when the reader of standard output goes away.
    """
    started = time.monotonic() if started is None else started
    num_bytes, first_s = 0, 0.0
    with analytics.span("write"), _opened(Path(target)) as file:
        for segment in segments:
            file.write(segment)
            file.flush()
            first_s = first_s or time.monotonic() - started
            num_bytes += len(segment)
    return Written(num_bytes, first_s, time.monotonic() - started)


@contextlib.contextmanager
def _opened(target: Path) -> Iterator[BinaryIO]:
    if target == STANDARD_OUTPUT:
        try:
            yield sys.stdout.buffer
        except BrokenPipeError:
            # Python would complain once more when it closes standard output on leaving.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise InputError("standard output was closed before the clip was whole.") from None
        return
    try:
        file = target.open("wb")
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}).") from error
    try:
        with file:
            yield file
    except BaseException:  # also KeyboardInterrupt
        target.unlink(missing_ok=True)
        raise
