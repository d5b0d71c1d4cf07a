"""Conditions as edits to a state, and what is left of them after sampling."""

import pytest
import torch

from aiprod_core.components import conditioning
from aiprod_core.components.patchifiers import AudioGrid, VideoGrid
from aiprod_core.errors import InputError
from aiprod_core.types import AV, AudioLatentShape, ScaleFactors, VideoLatentShape

GRID = VideoGrid(VideoLatentShape(1, 3, 3, 2, 4), ScaleFactors(8, 32, 32), 24.0)
AUDIO = AudioGrid(AudioLatentShape(1, 2, 9, 4))


def image(frames: int = 1) -> torch.Tensor:
    return torch.randn(1, 3, frames, 2, 4)


def test_a_new_state_generates_everything_and_marks_the_first_frame() -> None:
    state = conditioning.video_state(GRID)
    assert state.denoise_mask.min() == 1 and state.attention_mask is None
    assert state.keyframe_marker[0, :, 0].tolist() == [1.0] * 8 + [0.0] * 16


def test_an_edit_leaves_the_state_it_was_given_alone() -> None:
    state = conditioning.video_state(GRID)
    conditioning.replace_frames(state, GRID, image())
    conditioning.append_keyframe(state, GRID, image(), frame=3)
    assert state.denoise_mask.min() == 1 and state.clean_latent.abs().max() == 0
    assert state.latent.shape == (1, 24, 3)


def test_an_image_at_frame_0_changes_only_that_frame() -> None:
    latent = image()
    state = conditioning.replace_frames(conditioning.video_state(GRID), GRID, latent, strength=0.75)
    clean = GRID.unpatchify(state.clean_latent)
    assert torch.equal(clean[:, :, :1], latent) and clean[:, :, 1:].abs().max() == 0
    assert state.denoise_mask[0, :, 0].tolist() == [0.25] * 8 + [1.0] * 16


@pytest.mark.parametrize("index", [-1, 2, 3])
def test_frames_beyond_the_clip_are_refused_with_the_last_index(index: int) -> None:
    state = conditioning.video_state(GRID)
    with pytest.raises(InputError, match=f"0 to 1 .*got {index}"):
        conditioning.replace_frames(state, GRID, image(2), latent_index=index)


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="encode it at the clip's size"):
        conditioning.replace_frames(
            conditioning.video_state(GRID), GRID, torch.zeros(1, 3, 1, 4, 4)
        )


@pytest.mark.parametrize("frame", [0, 5])
def test_a_keyframe_spans_its_one_frame(frame: int) -> None:
    state = conditioning.append_keyframe(conditioning.video_state(GRID), GRID, image(), frame=frame)
    spans = state.positions[0, 0, 24:] * 24
    torch.testing.assert_close(spans, torch.tensor([frame, frame + 1.0]).expand(8, 2))


def test_appended_tokens_are_dropped_and_slots_read_back() -> None:
    state = conditioning.video_state(GRID, torch.randn(GRID.shape))
    seed = image(2)
    state = conditioning.append_keyframe(state, GRID, image(), frame=4)
    state = conditioning.append_slots(state, GRID, [2, 9], seed)
    state = conditioning.append_keyframe(state, GRID, image(), frame=11)
    assert torch.equal(conditioning.slot_latents(state.latent, state, GRID), seed)
    assert torch.equal(GRID.patchify(GRID.unpatchify(state.latent)), state.latent[:, :24])


def test_a_reference_lies_over_the_clip_it_shows() -> None:
    state = conditioning.append_reference_video(
        conditioning.video_state(GRID), GRID, torch.randn(1, 3, 3, 1, 2), downscale=2
    )
    own, reference = state.positions[:, :, :24], state.positions[:, :, 24:]
    torch.testing.assert_close(reference[..., 1].amax(2), own[..., 1].amax(2))
    torch.testing.assert_close(reference[..., 0].amin(2), own[..., 0].amin(2))


def test_a_slow_reference_ends_where_its_frames_do() -> None:
    # 33 frames, of which frame 0 and every 4th from frame 1 are kept: 9 frames, 2 latents.
    video = torch.arange(33.0).view(1, 1, 33, 1, 1)
    kept = conditioning.subsample_reference(video, 4)
    assert kept.flatten().tolist() == [0, 1, 5, 9, 13, 17, 21, 25, 29]
    state = conditioning.append_reference_video(
        conditioning.video_state(GRID), GRID, image(2), temporal_scale=4
    )
    end = state.positions[0, 0, -1, 1] * 24
    torch.testing.assert_close(end.item(), 33.0)


def test_a_reference_sound_ends_a_token_before_the_clip_starts() -> None:
    state = conditioning.append_reference_audio(
        conditioning.audio_state(AUDIO), AUDIO, torch.randn(1, 2, 5, 4)
    )
    times = state.positions[0, 0, 9:]
    torch.testing.assert_close(times[-1, 1].item(), -AUDIO.seconds_per_token)
    torch.testing.assert_close(times[1:, 0], times[:-1, 1])


def test_plain_conditions_make_no_attention_mask() -> None:
    state = conditioning.append_keyframe(conditioning.video_state(GRID), GRID, image(), frame=5)
    assert state.attention_mask is None


def test_references_see_the_clip_but_not_each_other() -> None:
    state = conditioning.video_state(GRID)
    state = conditioning.append_reference_video(state, GRID, image(), attention=0.5)
    weights = torch.linspace(0, 1, 8)[None]
    state = conditioning.append_reference_video(state, GRID, image(), attention=weights)
    mask = state.attention_mask[0]
    assert torch.equal(mask, mask.T)
    assert mask[:24, :24].min() == 1
    assert (mask[24:32, :24] == 0.5).all() and torch.equal(mask[32:, 0], weights[0])
    assert mask[24:32, 32:].max() == 0
    assert mask[24:32, 24:32].min() == 1 and mask[32:, 32:].min() == 1


def test_a_wrong_number_of_attention_weights_is_refused() -> None:
    with pytest.raises(InputError, match="3 weights for 8 new tokens"):
        conditioning.append_reference_video(
            conditioning.video_state(GRID), GRID, image(), attention=torch.ones(1, 3)
        )


def test_a_retake_generates_what_overlaps_its_window() -> None:
    audio = conditioning.regenerate_window(conditioning.audio_state(AUDIO), 0.06, 0.13)
    start, end = audio.positions[0, 0].unbind(-1)
    assert torch.equal(audio.denoise_mask[0, :, 0] == 1, (end > 0.06) & (start < 0.13))
    with pytest.raises(InputError, match="end after it starts"):
        conditioning.regenerate_window(audio, 0.3, 0.3)


def test_a_sound_is_kept_where_it_is_put_and_nowhere_else() -> None:
    grid = AudioGrid(AudioLatentShape(1, 2, 10, 4))
    state = conditioning.audio_state(grid)
    sound = torch.randn(1, 2, 3, 4)
    edited = conditioning.replace_sound(state, grid, sound, latent_index=2, strength=0.75)
    assert torch.equal(edited.clean_latent[:, 2:5], grid.patchify(sound))
    kept = torch.tensor([i in (2, 3, 4) for i in range(10)])
    assert torch.equal(edited.denoise_mask[0, :, 0], torch.where(kept, 0.25, 1.0))
    assert torch.equal(edited.latent, state.latent)
    with pytest.raises(InputError, match="0 to 7 for this sound; got 8"):
        conditioning.replace_sound(state, grid, sound, latent_index=8)


def test_inpainting_keeps_the_clip_where_the_mask_says() -> None:
    clip, mask = torch.randn(GRID.shape), torch.zeros(1, 3, 2, 4)
    mask[:, 1:] = 1
    state = conditioning.inpaint(conditioning.video_state(GRID), GRID, clip, mask)
    kept = conditioning.keep_conditions(state, None)(AV(video=torch.full((1, 24, 3), 7.0)))
    latent = GRID.unpatchify(kept.video)
    assert (latent[:, :, 0] == 7).all() and torch.equal(latent[:, :, 1:], clip[:, :, 1:])


def test_a_pixel_mask_is_averaged_over_each_latent() -> None:
    mask = torch.zeros(1, 1, 9, 4, 4)
    mask[:, :, 0] = 1  # the first frame is a latent of its own
    mask[:, :, 1:5, :2, :2] = 1  # half of the second latent's frames, in one quarter
    got = conditioning.mask_to_latent(mask, 2, 2)
    assert got.shape == (1, 2, 2, 2)
    assert got[0, 0].min() == 1
    assert got[0, 1].flatten().tolist() == [0.5, 0, 0, 0]
    with pytest.raises(InputError, match="got 10, try 9"):
        conditioning.mask_to_latent(torch.zeros(1, 1, 10, 4, 4), 2, 2)


def test_a_frozen_sound_does_not_move() -> None:
    latent = torch.randn(AUDIO.shape)
    state = conditioning.freeze(conditioning.audio_state(AUDIO, latent))
    blend = conditioning.keep_conditions(None, state)
    kept = blend(AV(audio=torch.randn(1, 9, 8)))
    assert torch.equal(AUDIO.unpatchify(kept.audio), latent)
