"""What goes into a file comes back out of it: pictures, colours, sound, timing."""

import io
import itertools
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_pipelines.media import Audio


def moving_pattern(num_frames: int = 17, height: int = 64, width: int = 96) -> np.ndarray:
    """A smooth coloured gradient that drifts: (frames, height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack(
            [
                128 + 100 * np.sin((x + 2 * t) / 15),
                255 * y / height,
                128 + 60 * np.cos((x + y) / 20),
            ],
            -1,
        )
        for t in range(num_frames)
    ]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def click_at(
    time_s: float, duration_s: float, sample_rate: int = 24000, channels: int = 2
) -> Audio:
    samples = np.zeros((channels, round(duration_s * sample_rate)), np.float32)
    start = round(time_s * sample_rate)
    length = sample_rate // 50
    samples[:, start : start + length] = 0.8 * np.sin(
        np.arange(length) * 2 * np.pi * 1000 / sample_rate
    )
    return Audio(samples, sample_rate)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_frames_come_back_in_order_and_close_to_what_was_written(tmp_path: Path):
    frames = moving_pattern()
    written = media.write_video(tmp_path / "clip.mp4", [frames[:5], frames[5:]], 12)
    read = np.stack(list(media.read_frames(tmp_path / "clip.mp4")))
    assert written == 17
    assert read.shape == frames.shape
    assert min(psnr(a, b) for a, b in zip(read, frames, strict=True)) > 35


def test_flat_colours_survive_within_the_rounding_of_yuv(tmp_path: Path):
    colours = np.array([[200, 30, 40], [10, 220, 60], [20, 40, 230], [255, 255, 255], [0, 0, 0]])
    for colour in colours:
        frames = np.broadcast_to(colour.astype(np.uint8), (3, 32, 32, 3))
        media.write_video(tmp_path / "flat.mp4", [frames], 12, crf=5)
        read = next(iter(media.read_frames(tmp_path / "flat.mp4")))
        assert np.abs(read.astype(int) - colour).max() <= 4


def test_the_file_is_tagged_bt709_limited(tmp_path: Path):
    media.write_video(tmp_path / "clip.mp4", [moving_pattern(3)], 24)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == 1
        assert context.pix_fmt == "yuv420p"


def test_index_comes_before_the_data_so_that_players_start_at_once(tmp_path: Path):
    media.write_video(tmp_path / "clip.mp4", [moving_pattern(3)], 24)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("fps", [12, 24, 25, 23.976])
def test_probe_reports_size_rate_length_and_metadata(tmp_path: Path, fps: float):
    path = tmp_path / "clip.mp4"
    media.write_video(
        path, [moving_pattern(25)], fps, audio=click_at(0.5, 25 / fps), metadata={"comment": "{}"}
    )
    info = media.probe(path)
    assert (info.width, info.height, info.num_frames) == (96, 64, 25)
    assert info.fps == pytest.approx(fps, abs=1e-3)
    assert info.duration_s == pytest.approx(25 / fps, abs=1e-3)
    assert (info.video_codec, info.audio_codec) == ("h264", "aac")
    assert (info.audio_sample_rate, info.audio_channels) == (24000, 2)
    assert info.metadata["comment"] == "{}"


def test_sound_stays_where_it_was_to_within_5_milliseconds(tmp_path: Path):
    media.write_video(tmp_path / "clip.mp4", [moving_pattern(25)], 12, audio=click_at(1.0, 25 / 12))
    audio = media.read_audio(tmp_path / "clip.mp4")
    onset = np.argmax(np.abs(audio.samples[0]) > 0.2) / audio.sample_rate
    assert onset == pytest.approx(1.0, abs=0.005)
    assert audio.duration_s == pytest.approx(25 / 12, abs=0.05)


def test_sound_and_picture_are_interleaved(tmp_path: Path):
    media.write_video(tmp_path / "clip.mp4", [moving_pattern(97)], 24, audio=click_at(1.0, 97 / 24))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        kinds = [
            packet.stream.type
            for packet in sorted(
                (p for p in container.demux() if p.size), key=lambda packet: packet.pos or 0
            )
        ]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes > 10


def test_an_odd_side_grows_by_one_repeated_row_or_column(tmp_path: Path):
    frames = moving_pattern(5, height=33, width=47)
    media.write_video(tmp_path / "odd.mp4", [frames], 12)
    read = np.stack(list(media.read_frames(tmp_path / "odd.mp4")))
    assert read.shape == (5, 34, 48, 3)
    assert psnr(read[:, :33, :47], frames) > 33


def test_audio_of_any_file_is_resampled_and_mixed(tmp_path: Path):
    with av.open(str(tmp_path / "mono.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        tone = (8000 * np.sin(np.arange(8000) * 2 * np.pi * 440 / 8000)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    audio = media.read_audio(tmp_path / "mono.wav", sample_rate=16000, channels=2)
    assert audio.samples.shape == (2, pytest.approx(16000, abs=40))
    spectrum = np.abs(np.fft.rfft(audio.samples[0, :16000]))
    assert abs(int(np.argmax(spectrum)) - 440) <= 1
    assert media.resample(audio, 24000, channels=1).samples.shape == (
        1,
        pytest.approx(24000, abs=80),
    )


def test_nothing_is_left_when_encoding_stops_half_way(tmp_path: Path):
    def interrupted():
        yield moving_pattern(5)
        raise KeyboardInterrupt

    (tmp_path / "clip.mp4").write_bytes(b"the older clip")
    with pytest.raises(KeyboardInterrupt):
        media.write_video(tmp_path / "clip.mp4", interrupted(), 12)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == b"the older clip"


def test_at_most_two_chunks_of_frames_are_alive_while_writing(tmp_path: Path):
    alive: list[weakref.ref] = []

    def chunks():
        for _ in range(5):
            chunk = moving_pattern(4)
            alive.append(weakref.ref(chunk))
            assert sum(reference() is not None for reference in alive) <= 2
            yield chunk

    assert media.write_video(tmp_path / "clip.mp4", chunks(), 12) == 20


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 100], ids=["empty", "garbage"])
def test_bad_media_is_refused_in_one_sentence_that_names_the_file(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    for read in (
        media.probe,
        media.read_image,
        media.read_audio,
        lambda p: list(media.read_frames(p)),
    ):
        with pytest.raises(InputError, match=r"bad\.mp4"):
            read(path)
    with pytest.raises(InputError, match="no such file"):
        media.read_image(tmp_path / "absent.png")


def test_a_truncated_video_is_refused(tmp_path: Path):
    media.write_video(tmp_path / "clip.mp4", [moving_pattern(9)], 12)
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[:600])
    with pytest.raises(InputError, match=r"cut\.mp4"):
        list(media.read_frames(tmp_path / "cut.mp4"))


def test_a_truncated_image_is_refused(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(InputError, match=r"cut\.png.*damaged"):
        media.read_image(tmp_path / "cut.png")


def test_silent_video_has_no_sound_to_read(tmp_path: Path):
    media.write_video(tmp_path / "clip.mp4", [moving_pattern(3)], 12)
    with pytest.raises(InputError, match="no sound track"):
        media.read_audio(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is a directory"),
        ("absent/clip.mp4", "does not exist"),
        ("clip.avi", r"try .*clip\.mp4"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=message):
        media.check_output_path(tmp_path / name)


def test_images_are_turned_upright_by_their_exif_tag(tmp_path: Path):
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    read = media.read_image(tmp_path / "turned.png")
    assert read.shape == (40, 20, 3)
    assert read[:10].min() == 255 and read[10:].max() == 0


def test_transparent_pixels_become_black_and_grey_becomes_rgb(tmp_path: Path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert media.read_image(tmp_path / "clear.png").max() == 0
    assert np.unique(media.read_image(tmp_path / "grey.png")).tolist() == [77]


def test_sixteen_bit_greys_keep_their_brightness(tmp_path: Path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert media.read_image(tmp_path / "deep.png")[0, 0].tolist() == [128, 128, 128]


def test_an_embedded_profile_is_converted_to_srgb(tmp_path: Path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    Image.new("RGB", (8, 8), (90, 120, 200)).save(
        tmp_path / "tagged.png", icc_profile=lab.tobytes()
    )
    assert (
        np.abs(media.read_image(tmp_path / "tagged.png")[0, 0].astype(int) - (90, 120, 200)).max()
        <= 1
    )


def test_preparing_covers_the_clip_and_keeps_the_centre():
    wide = np.zeros((50, 200, 3), np.uint8)
    wide[:, 75:125] = 255
    prepared = media.prepare_frame(wide, 64, 64)
    assert prepared.shape == (64, 64, 3)
    assert prepared[:, 2:-2].min() > 250
    assert np.array_equal(media.prepare_frame(wide, 50, 200), wide)


def test_a_stronger_round_trip_loses_more_and_zero_loses_nothing():
    grey = np.random.default_rng(1).integers(0, 255, (65, 64, 1), np.uint8)
    picture = np.repeat(grey, 3, axis=-1)
    assert media.compress_frame(picture, 0) is picture
    mild, strong = media.compress_frame(picture, 18), media.compress_frame(picture, 40)
    assert mild.shape == (64, 64, 3)
    assert psnr(mild, picture[:64]) > psnr(strong, picture[:64]) + 3


def test_enlarging_by_nearest_repeats_pixels_exactly():
    frames = moving_pattern(3, 8, 8)
    (large,) = media.enlarge([frames], height=32, width=32, method="nearest")
    assert np.array_equal(large[:, ::4, ::4], frames)
    (smooth,) = media.enlarge([frames], height=20, width=28)
    assert smooth.shape == (3, 20, 28, 3)


def test_a_longer_recipe_than_any_tag_limit_survives(tmp_path: Path):
    text = '{"prompt": "' + "a red ball, " * 5000 + '\u00e9"}'
    media.write_video(tmp_path / "clip.mp4", [moving_pattern(3)], 12, metadata={"comment": text})
    assert media.probe(tmp_path / "clip.mp4").metadata["comment"] == text


def test_a_video_shot_upright_is_read_upright(tmp_path: Path):
    buffer = io.BytesIO()
    media.write_video(tmp_path / "clip.mp4", [moving_pattern(3, 32, 64)], 12)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    # The display matrix of the track header: a quarter turn, as phones write it.
    start = data.index(b"tkhd") + 4 + 40
    one = (0x10000).to_bytes(4, "big")
    minus = (0xFFFF0000).to_bytes(4, "big")
    zero, w = bytes(4), (0x40000000).to_bytes(4, "big")
    data[start : start + 36] = zero + one + zero + minus + zero + zero + zero + zero + w
    buffer.write(data)
    (tmp_path / "turned.mp4").write_bytes(buffer.getvalue())
    plain = next(iter(media.read_frames(tmp_path / "clip.mp4")))
    turned = next(iter(media.read_frames(tmp_path / "turned.mp4")))
    assert np.array_equal(turned, np.rot90(plain, -1))


@pytest.mark.parametrize("fps", [6, 12, 24])
def test_frames_at_another_rate_are_those_on_screen(fps: int, tmp_path: Path):
    frames = np.stack([np.full((32, 32, 3), 20 * i, np.uint8) for i in range(12)])
    media.write_video(tmp_path / "clip.mp4", [frames], 12)
    read = list(media.read_frames_at(tmp_path / "clip.mp4", fps, 100))
    assert len(read) == fps  # one second
    levels = [float(frame.mean()) for frame in read]
    assert np.allclose(levels, [20 * (i * 12 // fps) for i in range(fps)], atol=3)
    assert len(list(media.read_frames_at(tmp_path / "clip.mp4", fps, 4))) == 4


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path):
    picture = moving_pattern(1)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    (frame,) = media.read_frames_at(tmp_path / "a.png", 24, 9)
    assert np.array_equal(frame, picture)


@pytest.mark.parametrize("suffix", media.SOUND_SUFFIXES)
def test_sound_alone_comes_back_from_every_format(suffix: str, tmp_path: Path):
    path = tmp_path / f"click{suffix}"
    media.write_audio(path, click_at(0.5, 1.0), metadata={"comment": "a recipe"})
    read = media.read_span(path, 0.4, 1.0)  # 0.4 s more than there is
    assert read.samples.shape == (2, 24000)
    loud = np.flatnonzero(np.abs(read.samples[0]) > 0.3)
    assert loud[0] / 24000 == pytest.approx(0.1, abs=0.005)
    assert not read.samples[:, -9000:].any()
    assert media.probe(path).metadata.get("comment") == "a recipe"


def test_sound_is_not_written_under_a_name_of_another_kind(tmp_path: Path):
    with pytest.raises(InputError, match=r"WAV or M4A or FLAC or MP4; try .*a\.wav"):
        media.write_audio(tmp_path / "a.ogg", click_at(0.1, 0.5))
    assert list(tmp_path.iterdir()) == []
