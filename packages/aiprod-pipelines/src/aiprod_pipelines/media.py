"""Images, video and sound in and out of files, with PyAV and Pillow.

Frames are uint8 arrays in sRGB: one frame (height, width, 3), a chunk (frames, height, width, 3).
Sound is a float32 array (channels, samples) in [-1, 1]. A file that cannot be used raises
InputError with one sentence. Nothing here needs torch, so reading a file's header is quick.
"""

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from aiprod_core.errors import InputError

Frame = NDArray[np.uint8]  # (height, width, 3)
Frames = NDArray[np.uint8]  # (frames, height, width, 3)
Samples = NDArray[np.float32]

BT709 = 1  # the same number names the matrix, the primaries and the transfer curve in H.264
LIMITED_RANGE = 1
FULL_RANGE = 2

MP4_OPTIONS = {"movflags": "+faststart"}  # the index first: players need not read to the end

# Each fragment carries its own index. The header waits for the first one (delay_moov), because
# only then is the sound encoder's delay known, by which players keep it level with the picture.
FRAGMENT_OPTIONS = {
    "movflags": "+frag_keyframe+empty_moov+delay_moov+default_base_moof",
    "frag_duration": "250000",  # microseconds
}

VIDEO_SUFFIXES = (".mp4",)
SOUND_CODECS = {".wav": "pcm_s16le", ".m4a": "aac", ".flac": "flac", ".mp4": "aac"}
SOUND_SUFFIXES = tuple(SOUND_CODECS)

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Audio:
    """A sound: samples (channels, samples) in [-1, 1] and their rate in Hz."""

    samples: Samples
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return self.samples.shape[-1] / self.sample_rate


@dataclass(frozen=True)
class StreamedAudio:
    """A stereo sound in parts that are made as they are asked for, one after the other."""

    parts: Iterator[Samples]  # (2, samples) each
    sample_rate: int


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds; fields of an absent track are None. `metadata` is the container's."""

    path: Path
    duration_s: float
    width: int | None
    height: int | None
    fps: float | None
    num_frames: int | None
    video_codec: str | None
    audio_codec: str | None
    audio_sample_rate: int | None
    audio_channels: int | None
    metadata: Mapping[str, str]


# Reading.


def probe(path: str | Path) -> MediaInfo:
    """Reads the tracks' headers. `num_frames` is counted where the container does not say."""
    with _open_media(path) as container:
        video = next(iter(container.streams.video), None)
        audio = next(iter(container.streams.audio), None)
        if video is None and audio is None:
            raise InputError(f"{path}: neither a video nor a sound track in this file.")
        stream = video or audio
        duration_s = (container.duration or 0) / av.time_base
        if stream is not None and stream.duration and stream.time_base:
            duration_s = float(stream.duration * stream.time_base)
        fps = float(video.average_rate or video.guessed_rate or 0) if video else None
        num_frames = video.frames or _count_packets(container, video) if video else None
        return MediaInfo(
            path=Path(path),
            duration_s=duration_s,
            width=video.width if video else None,
            height=video.height if video else None,
            fps=fps,
            num_frames=num_frames,
            video_codec=video.codec_context.name if video else None,
            audio_codec=audio.codec_context.name if audio else None,
            audio_sample_rate=audio.sample_rate if audio else None,
            audio_channels=audio.channels if audio else None,
            metadata=dict(container.metadata),
        )


def read_image(path: str | Path) -> Frame:
    """An image as (height, width, 3): upright by its EXIF tag, in sRGB, alpha over black."""
    _check_file(path)
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            profile = image.info.get("icc_profile")
            if image.mode.startswith("I;16"):
                # Pillow's own conversion would clip 16-bit greys to white.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            has_alpha = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
            if profile and image.mode in ("RGB", "RGBA", "L", "CMYK"):
                image = _to_srgb(image, profile)
            if has_alpha:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image that can be read; give a PNG or JPEG.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: the image is damaged ({error}).") from error


def read_frames(path: str | Path) -> Iterator[Frame]:
    """Yields a video's frames (height, width, 3) in order, upright, one at a time.

    Raises InputError when the file has no picture or no frame of it can be decoded.
    """
    with _open_media(path) as container:
        if not container.streams.video:
            raise InputError(f"{path}: no video track in this file.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        count = 0
        for frame in container.decode(stream):
            count += 1
            yield _to_rgb(frame)
        if not count:
            raise InputError(f"{path}: no frame of this video can be decoded.")


def read_frames_at(path: str | Path, fps: float, num_frames: int) -> Iterator[Frame]:
    """A video at another rate: for each time i / fps the frame that is on screen, from its start.

    Ends early where the file does. An image gives one frame.
    """
    _check_file(path)
    if _is_image(path):
        yield read_image(path)
        return
    with _open_media(path) as container:
        if not container.streams.video:
            raise InputError(f"{path}: no video track in this file.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frame_s = 1 / float(stream.average_rate or stream.guessed_rate or 24)
        shown: Frame | None = None
        count, start_s, end_s = 0, None, 0.0
        for index, frame in enumerate(container.decode(stream)):
            time_s = frame.time if frame.time is not None else index * frame_s
            start_s = time_s if start_s is None else start_s
            # The tolerance is half a tick of the rates in use: times in files are rounded.
            while shown is not None and count / fps < time_s - start_s - frame_s * 0.01:
                if count == num_frames:
                    return
                yield shown
                count += 1
            shown, end_s = _to_rgb(frame), time_s - start_s + frame_s
        if shown is None:
            raise InputError(f"{path}: no frame of this video can be decoded.")
        while count < num_frames and count / fps < end_s - frame_s * 0.01:
            yield shown
            count += 1


def read_span(path: str | Path, start_s: float, duration_s: float) -> Audio:
    """A stretch of a file's sound, filled with silence where the file ends before it."""
    has_more = (probe(path).audio_channels or 0) > 2
    audio = read_audio(path, channels=2 if has_more else None)
    start, length = round(start_s * audio.sample_rate), round(duration_s * audio.sample_rate)
    samples = audio.samples[:, start : start + length]
    missing = length - samples.shape[1]
    return Audio(np.pad(samples, ((0, 0), (0, missing))), audio.sample_rate)


def _is_image(path: str | Path) -> bool:
    try:
        with Image.open(path) as file:
            return not getattr(file, "is_animated", False)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def read_audio(
    path: str | Path, *, sample_rate: int | None = None, channels: int | None = None
) -> Audio:
    """The first sound track of any file that has one, on the file's own time axis.

    Samples before time 0 (encoder delay) are dropped and a late start is filled with silence, so
    sample i sounds at i / sample_rate. `channels` 1 or 2 mixes; mono becomes stereo by doubling.
    """
    if channels not in (None, 1, 2):
        raise InputError(f"channels must be 1 or 2; got {channels}.")
    with _open_media(path) as container:
        if not container.streams.audio:
            raise InputError(f"{path}: no sound track in this file.")
        stream = container.streams.audio[0]
        rate = sample_rate or stream.sample_rate
        layout = {1: "mono", 2: "stereo"}.get(channels or stream.channels)
        resampler = AudioResampler(format="fltp", layout=layout, rate=rate)
        pieces: list[Samples] = []
        start_s: float | None = None
        for frame in container.decode(stream):
            if start_s is None:
                start_s = frame.time or 0.0
            pieces += _as_arrays(resampler.resample(frame))
        if not pieces or start_s is None:
            raise InputError(f"{path}: no sound of this file can be decoded.")
        pieces += _as_arrays(resampler.resample(None))
    samples = np.concatenate(pieces, axis=1)
    offset = round(start_s * rate)
    if offset > 0:
        samples = np.pad(samples, ((0, 0), (offset, 0)))
    return Audio(np.ascontiguousarray(samples[:, max(0, -offset) :]), rate)


def resample(audio: Audio, sample_rate: int, *, channels: int | None = None) -> Audio:
    """The same sound at another rate, mixed to `channels` (1 or 2) if given."""
    if audio.sample_rate == sample_rate and channels in (None, audio.samples.shape[0]):
        return audio
    layout = {1: "mono", 2: "stereo"}[channels or audio.samples.shape[0]]
    resampler = AudioResampler(format="fltp", layout=layout, rate=sample_rate)
    source = _to_audio_frame(audio.samples, audio.sample_rate)
    pieces = _as_arrays(resampler.resample(source)) + _as_arrays(resampler.resample(None))
    return Audio(np.concatenate(pieces, axis=1), sample_rate)


# Writing.


def write_video(
    path: str | Path,
    chunks: Iterable[Any],
    fps: float,
    *,
    audio: Audio | None = None,
    metadata: Mapping[str, str] | None = None,
    crf: int = 19,
) -> int:
    """Writes an H.264 + AAC MP4 that players can start at once; returns the number of frames.

    `chunks` (frames, height, width, 3) uint8, arrays or CPU tensors, are encoded as they come, with
    the sound interleaved by time. Pixels are yuv420p, tagged BT.709 in limited range; an odd side
    grows by one repeated row or column, which 4:2:0 needs. The file appears under its own name
    only when whole: on any error or interrupt nothing is left.
    """
    path = Path(path)
    check_output_path(path)
    rate = Fraction(fps).limit_denominator(1001)
    try:
        with (
            _replaced_when_whole(path) as temporary,
            av.open(str(temporary), "w", format="mp4", options=MP4_OPTIONS) as container,
        ):
            container.metadata.update(metadata or {})
            return sum(1 for _ in _encode(container, chunks, rate, audio, crf))
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from error


def fragments(
    chunks: Iterable[Any],
    fps: float,
    *,
    audio: Audio | StreamedAudio | None = None,
    metadata: Mapping[str, str] | None = None,
    crf: int = 19,
) -> Iterator[bytes]:
    """Yields the parts of a fragmented MP4, each as soon as its frames are encoded.

    Arguments are those of `write_video`. Put together, the parts are one file, which plays while it
    grows; the first holds the header and the metadata. A sound may come in parts, too.
    """
    rate = Fraction(fps).limit_denominator(1001)
    written = _Drain()
    with av.open(written, "w", format="mp4", options=FRAGMENT_OPTIONS) as container:
        container.metadata.update(metadata or {})
        for _ in _encode(container, chunks, rate, audio, crf, is_live=True):
            if part := written.take():
                yield part
    if part := written.take():
        yield part


def enlarge(
    chunks: Iterable[Any], *, height: int, width: int, method: str = "bicubic"
) -> Iterator[Frame]:
    """Resizes every frame of every chunk for viewing. Methods: nearest, bicubic, lanczos."""
    if method not in RESAMPLING:
        raise InputError(f"enlarge method must be one of {', '.join(RESAMPLING)}; got {method}.")
    for chunk in chunks:
        frames = np.asarray(chunk)
        yield np.stack([_resize(frame, height, width, RESAMPLING[method]) for frame in frames])


def write_audio(
    path: str | Path, audio: Audio, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes sound alone: .wav (16 bit), .flac, .m4a, or an .mp4 without a picture.

    As `write_video`, the file appears under its own name only when whole.
    """
    path = Path(path)
    check_output_path(path, SOUND_SUFFIXES)
    suffix = path.suffix.lower()
    container_format = {".wav": "wav", ".flac": "flac"}.get(suffix, "mp4")
    options = MP4_OPTIONS if container_format == "mp4" else {}
    try:
        with (
            _replaced_when_whole(path) as temporary,
            av.open(str(temporary), "w", format=container_format, options=options) as container,
        ):
            container.metadata.update(metadata or {})
            _SoundTrack(container, audio, SOUND_CODECS[suffix]).finish()
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from error


def check_output_path(path: str | Path, suffixes: Sequence[str] = VIDEO_SUFFIXES) -> None:
    """Raises InputError when a file cannot be written at `path`, before any work is done."""
    path = Path(path)
    if path.is_dir():
        example = path / f"clip{suffixes[0]}"
        raise InputError(f"{path}: is a directory; give a file name such as {example}.")
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"{path}: the output is {' or '.join(s[1:].upper() for s in suffixes)}; "
            f"try {path.with_suffix(suffixes[0])}."
        )
    parent = path.parent
    if not parent.is_dir():
        raise InputError(f"{path}: the folder {parent} does not exist; make it first.")
    if not os.access(parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{path}: cannot be written; choose a place where you may write.")


# Preparing conditions.


def prepare_frame(
    frame: Frame, height: int, width: int, *, place: tuple[float, float] = (0.5, 0.5)
) -> Frame:
    """Resizes to cover (height, width), sides rounded up, and crops: the centre, or at `place`,
    the share of the spare rows above and of the spare columns to the left.

    Bilinear, with Pillow's anti-aliasing when it shrinks: plain bilinear would alias a photograph
    that is many times larger than the clip.
    """
    scale = max(height / frame.shape[0], width / frame.shape[1])
    # The tolerance keeps 0.1 + 0.2 arithmetic from adding a row to an exact fit.
    cover_height = max(height, math.ceil(frame.shape[0] * scale - 1e-6))
    cover_width = max(width, math.ceil(frame.shape[1] * scale - 1e-6))
    covered = _resize(frame, cover_height, cover_width, Image.Resampling.BILINEAR)
    top = int((cover_height - height) * place[0])
    left = int((cover_width - width) * place[1])
    return covered[top : top + height, left : left + width]


def compress_frame(frame: Frame, crf: int) -> Frame:
    """One H.264 round trip: a still image gets the texture of the videos a model learnt from.

    An odd side loses its last row or column. `crf` 0 returns the frame as it is.
    """
    if crf == 0:
        return frame
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    if height == 0 or width == 0:
        return frame
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = _add_video_stream(container, Fraction(1), height, width, crf, "veryfast")
        container.mux(stream.encode(_to_yuv420p(frame[:height, :width])))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        return _to_rgb(next(container.decode(video=0)))


# Parts.


@contextmanager
def _open_media(path: str | Path) -> Iterator[InputContainer]:
    """Opens a file for reading; FFmpeg's errors, also later ones, become InputError."""
    _check_file(path)
    try:
        with av.open(str(path)) as container:
            yield container
    except (av.error.FFmpegError, av.error.EOFError) as error:
        raise InputError(
            f"{path}: not media that can be read, or damaged ({error.strerror})."
        ) from error


def _count_packets(container: InputContainer, stream: Any) -> int:
    """Packets of a stream, one a frame; the empty one that marks the end is none."""
    return sum(1 for packet in container.demux(stream) if packet.size)


def _check_file(path: str | Path) -> None:
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give a file.")
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty.")


@contextmanager
def _replaced_when_whole(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:  # also on KeyboardInterrupt
        temporary.unlink(missing_ok=True)


def _encode(
    container: OutputContainer,
    chunks: Iterable[Any],
    rate: Fraction,
    audio: Audio | StreamedAudio | None,
    crf: int,
    *,
    is_live: bool = False,
) -> Iterator[int]:
    """Encodes frames as they come and keeps the sound level with the picture.

    Yields after each frame how many are done. `is_live` gives up some compression so that no frame
    waits in the encoder.
    """
    frames = (frame for chunk in chunks for frame in np.asarray(chunk))
    first = next(frames, None)
    if first is None:
        raise InputError("There is no frame to write.")
    # Streams must be declared before the first packet is written.
    shape = first.shape
    height, width = (side + side % 2 for side in shape[:2])
    video_stream = _add_video_stream(container, rate, height, width, crf, "medium")
    if is_live:
        # A seek or a late joiner waits at most two seconds for a whole picture.
        video_stream.options |= {"tune": "zerolatency", "g": str(max(1, round(2 * rate)))}
    sound = _SoundTrack(container, audio) if audio is not None else None

    count = 0
    frame: Frame | None = first
    del first  # a view that would keep its whole chunk alive
    while frame is not None:
        if frame.shape != shape:
            raise InputError(f"Frame {count} is {frame.shape}, the first is {shape}.")
        picture = _to_yuv420p(_pad_to_even(frame))
        picture.pts, picture.time_base = count, 1 / rate
        container.mux(video_stream.encode(picture))
        count += 1
        if sound is not None:
            sound.write_until(float(count / rate))
        yield count
        frame = next(frames, None)
    container.mux(video_stream.encode())
    if sound is not None:
        sound.finish()


class _Drain(io.RawIOBase):
    """A file that is only written to, and emptied by `take`."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self.parts = self.parts, []
        return b"".join(parts)


class _SoundTrack:
    """The sound on its way into the container, a stretch at a time."""

    def __init__(
        self, container: OutputContainer, audio: Audio | StreamedAudio, codec: str = "aac"
    ):
        channels = 2 if isinstance(audio, StreamedAudio) else audio.samples.shape[0]
        if channels not in (1, 2):
            raise InputError(f"Sound must have 1 or 2 channels; got {channels}.")
        self.container, self.sample_rate, self.position = container, audio.sample_rate, 0
        self.parts = audio.parts if isinstance(audio, StreamedAudio) else iter((audio.samples,))
        self.waiting: Samples = np.zeros((channels, 0), np.float32)
        layout = "stereo" if channels == 2 else "mono"
        stream = container.add_stream(codec, rate=audio.sample_rate, layout=layout)
        assert isinstance(stream, AudioStream)
        self.stream = stream
        if codec == "aac":
            self.stream.bit_rate = 96_000 * channels

    def write_until(self, time_s: float) -> None:
        """Writes what comes before a time, or all where there is less."""
        wanted = round(time_s * self.sample_rate) - self.position
        while wanted > self.waiting.shape[1] and (part := next(self.parts, None)) is not None:
            self.waiting = np.concatenate([self.waiting, part], axis=1)
        self._write(max(0, wanted))

    def finish(self) -> None:
        self._write(self.waiting.shape[1])
        for part in self.parts:
            self.waiting = part
            self._write(part.shape[1])
        self.container.mux(self.stream.encode())

    def _write(self, count: int) -> None:
        piece, self.waiting = self.waiting[:, :count], self.waiting[:, count:]
        if piece.shape[1]:
            frame = _to_audio_frame(piece, self.sample_rate)
            frame.pts, frame.time_base = self.position, Fraction(1, self.sample_rate)
            self.container.mux(self.stream.encode(frame))
            self.position += piece.shape[1]


def _add_video_stream(
    container: OutputContainer,
    rate: Fraction,
    height: int,
    width: int,
    crf: int,
    preset: str,
):
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": preset})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.color_range = LIMITED_RANGE
    context.colorspace = context.color_primaries = context.color_trc = BT709
    return stream


def _to_yuv420p(frame: Frame) -> av.VideoFrame:
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_colorspace=Colorspace.ITU709,
    )
    picture.color_range, picture.colorspace = LIMITED_RANGE, BT709
    return picture


def _to_rgb(picture: av.VideoFrame) -> Frame:
    """RGB by the frame's tags, upright. Untagged: BT.709 from 720 rows up, else BT.601."""
    matrix = picture.colorspace
    if matrix not in (1, 4, 5, 6, 7, 9):
        matrix = Colorspace.ITU709 if picture.height >= 720 else Colorspace.ITU601
    known_range = picture.color_range if picture.color_range in (1, 2) else None
    rgb = picture.reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU601 if matrix == 6 else matrix,
        src_color_range=known_range,
        dst_color_range=FULL_RANGE,
    ).to_ndarray()
    quarter_turns = round(getattr(picture, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, quarter_turns), dtype=np.uint8)


def _to_audio_frame(samples: Samples, sample_rate: int) -> av.AudioFrame:
    layout = "stereo" if samples.shape[0] == 2 else "mono"
    clipped = np.ascontiguousarray(np.clip(samples, -1.0, 1.0), dtype=np.float32)
    frame = av.AudioFrame.from_ndarray(clipped, format="fltp", layout=layout)
    frame.sample_rate = sample_rate
    return frame


def _as_arrays(pieces: list[av.AudioFrame]) -> list[Samples]:
    return [piece.to_ndarray().astype(np.float32) for piece in pieces]


def _resize(frame: Frame, height: int, width: int, method: Image.Resampling) -> Frame:
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), method))


def _pad_to_even(frame: Frame) -> Frame:
    height, width, _ = frame.shape
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts from the embedded ICC profile; a broken profile leaves the pixels as they are."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = image.mode if image.mode in ("RGB", "RGBA") else "RGB"
        converted = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode=mode
        )
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted if converted is not None else image
