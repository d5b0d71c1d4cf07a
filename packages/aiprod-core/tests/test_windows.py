"""Windows over a long clip: where they lie, what each is shown, what becomes of the overlap."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiprod_core.components import conditioning
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.components.windows import Window, denoise_in_windows, split_into_windows
from aiprod_core.errors import InputError
from aiprod_core.types import AV, AudioLatentShape, ScaleFactors, VideoLatentShape

FPS = 24.0
SCALE = ScaleFactors(8, 32, 32)
FRAMES = 97  # 13 latents
GRID = VideoGrid(VideoLatentShape(1, 4, 13, 2, 3), SCALE, FPS)
AUDIO = AudioGrid(AudioLatentShape(1, 2, round(FRAMES / FPS * 25), 2))
OWN = {"video": GRID.num_tokens, "audio": AUDIO.num_tokens}


def states():
    return conditioning.video_state(GRID), conditioning.audio_state(AUDIO)


class Run:
    """A stand-in for denoising: fills what is to be generated with the number of the window."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, number, video, audio, place) -> AV:
        self.seen.append((video, audio))
        number = float(number + 1)

        def made(state):
            blended = state.clean_latent * (1 - state.denoise_mask) + number * state.denoise_mask
            return blended + 1e-7  # as arithmetic on kept tokens is never exact

        x = AV(*(None if state is None else made(state) for state in (video, audio)))
        place(x)  # a preview changes nothing
        return x


def run_windows(video, audio, size=49, overlap=16, **options):
    run = Run()
    tokens = {"video": GRID.tokens_per_frame * (size // 8 + 1), "audio": round(size / FPS * 25)}
    windows = split_into_windows(FRAMES, FPS, size=size, overlap=overlap)
    made = denoise_in_windows(
        run, windows, video, audio, own_tokens=OWN, window_tokens=tokens, **options
    )
    *_, last = made
    return run, last.clip


@given(st.integers(0, 60), st.integers(2, 20), st.integers(1, 10))
def test_windows_cover_the_clip_are_of_one_length_and_share_the_overlap(latents, length, shared):
    frames, size, overlap = 8 * latents + 1, 8 * length + 1, 8 * shared
    if frames > size and length < shared + 1:
        with pytest.raises(InputError, match="adds nothing"):
            split_into_windows(frames, FPS, size=size, overlap=overlap)
        return
    windows = split_into_windows(frames, FPS, size=size, overlap=overlap)
    assert windows[0].start_s == 0 and windows[-1].end_s == math.inf
    for before, after in pairwise(windows):
        assert before.end_s - before.start_s == pytest.approx(size / FPS)
        # The window's first latent ends with the frame it starts at.
        assert before.end_s - after.start_s >= (overlap + 1) / FPS - 1e-9
        assert after.start_s > before.start_s
    if len(windows) > 1:
        assert windows[-1].start_s == pytest.approx((frames - size) / FPS)


@pytest.mark.parametrize(
    ("size", "overlap", "message"),
    [(48, 16, "window_frames must be 8k.1; got 48, try 49"), (49, 12, "multiple of 8.*try 16"),
     (17, 16, "adds nothing to an overlap of 16; try window_frames 33")],
)  # fmt: skip
def test_sizes_off_the_grid_are_refused_with_the_nearest(size, overlap, message) -> None:
    with pytest.raises(InputError, match=message):
        split_into_windows(FRAMES, FPS, size=size, overlap=overlap)


def test_one_window_is_the_run_on_the_states_themselves() -> None:
    video, audio = states()
    run, x = run_windows(video, audio, size=FRAMES)
    assert run.seen[0][0] is video and run.seen[0][1] is audio
    assert x.video.mean() == pytest.approx(1.0, abs=1e-5)


def test_every_window_is_a_clip_of_its_own_on_the_usual_positions() -> None:
    run, x = run_windows(*states())
    assert len(run.seen) == 3  # 7 latents, 4 more, and 2 more, the last moved back
    own = replace(GRID, shape=GRID.shape._replace(frames=7)).positions()
    for video, audio in run.seen:
        torch.testing.assert_close(video.positions, own, rtol=0, atol=1e-5)
        assert float(video.keyframe_marker.sum()) == GRID.tokens_per_frame
        assert float(video.keyframe_marker[:, : GRID.tokens_per_frame].mean()) == 1
        sound = audio.positions[0, 0]
        assert sound[0, 0] == 0 and sound[0, 1] < 0.045
        assert abs(float(sound[-1, 1]) - 49 / FPS) < 0.06
        torch.testing.assert_close(sound[1:, 0], sound[:-1, 1], rtol=0, atol=1e-5)
    assert x.video.shape[1] == OWN["video"] and x.audio.shape[1] == OWN["audio"]


def test_the_overlap_is_carried_over_exactly_then_gives_way() -> None:
    run, x = run_windows(*states(), overlap=32)
    first_video, first_audio = run.seen[0]
    video, audio = run.seen[1]
    per_frame = GRID.tokens_per_frame
    mask = video.denoise_mask[0, ::per_frame, 0]
    # Cut latent, two kept, two that give way, then what is new.
    torch.testing.assert_close(mask, torch.tensor([1, 0, 0, 0.25, 0.75, 1, 1]))
    assert first_video.denoise_mask.min() == 1 == first_audio.denoise_mask.min()
    clean = video.clean_latent[0, ::per_frame, 0]
    torch.testing.assert_close(clean[1:5], torch.ones(4), rtol=0, atol=1e-5)
    frames = x.video[0, ::per_frame, 0]
    start = 7 - 5  # the second window's first latent in the clip
    assert torch.equal(frames[start + 1 : start + 3], torch.full((2,), 1.0) + 1e-7)
    torch.testing.assert_close(frames[start + 3 : start + 5], torch.tensor([1.25, 1.75]))
    sound = audio.denoise_mask[0, :, 0]
    assert sound[0] == 1 and sound[1] == 0
    carried = sound[1:][sound[1:] < 1]
    assert len(carried) == pytest.approx(32 / FPS * 25, abs=1.5)
    assert bool((carried.diff() >= 0).all()) and carried[-1] > 0.9


def test_without_a_seam_the_thrown_away_latents_never_reach_the_clip() -> None:
    _, x = run_windows(*states(), overlap=8)
    counts = x.video[0, :: GRID.tokens_per_frame, 0].round()
    assert counts.tolist() == sorted(counts.tolist())  # no later window writes into an earlier one
    assert x.audio[0, :, 0].round().diff().min() >= 0


def test_conditions_go_to_the_windows_they_belong_to() -> None:
    video, audio = states()
    image = torch.full((1, 4, 1, 2, 3), 9.0)
    video = conditioning.append_keyframe(video, GRID, image, frame=60)
    run, _ = run_windows(video, audio)
    counts = [len(v.latent[0]) - 7 * GRID.tokens_per_frame for v, _ in run.seen]
    # Windows of 49 frames from frames 0, 32, 48 (moved back).
    windows = split_into_windows(FRAMES, FPS, size=49, overlap=16)
    expected = [6 if w.start_s <= 60 / FPS < w.end_s else 0 for w in windows]
    assert counts == expected and sum(expected) > 0
    for window, (part, _) in zip(windows, run.seen, strict=True):
        if window.start_s <= 60 / FPS < window.end_s:
            assert float(part.positions[0, 0, -1, 0]) == pytest.approx(60 / FPS - window.start_s)
            assert bool((part.clean_latent[:, -6:] == 9).all())


def test_a_window_with_nothing_to_generate_is_left_out() -> None:
    video, audio = (conditioning.regenerate_window(state, 0.1, 0.3) for state in states())
    run, x = run_windows(video, audio)
    assert len(run.seen) == 1
    kept = video.denoise_mask == 0
    assert bool((x.video[kept.expand_as(x.video)] == 0).all())


def test_a_frozen_sound_is_shown_to_each_window_as_it_is() -> None:
    video, audio = states()
    sound = torch.arange(OWN["audio"], dtype=torch.float32)[None, :, None].expand(1, -1, 4)
    audio = conditioning.freeze(replace(audio, latent=sound))
    run, x = run_windows(video, audio, frozen=frozenset({"audio"}))
    assert torch.equal(x.audio, sound)
    for _, part in run.seen:
        assert not part.denoise_mask.any()
        assert bool((part.latent[0, :, 0].diff() == 1).all())


def test_sound_alone_is_windowed_too() -> None:
    _, audio = states()
    run, x = run_windows(None, audio)
    assert x.video is None and x.audio.shape[1] == OWN["audio"]
    assert [video for video, _ in run.seen] == [None] * 3
    assert Window(0.0, math.inf) not in split_into_windows(FRAMES, FPS, size=49, overlap=16)
