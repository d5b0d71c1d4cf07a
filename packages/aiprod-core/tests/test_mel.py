import math

import pytest
import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.mel import log_mel, mel_filterbank, resample


def tone(hz: float, rate: int, seconds: float = 0.5) -> Tensor:
    t = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hz * t).float().expand(1, 2, -1)


def test_a_tone_is_loudest_in_the_band_around_its_frequency():
    config = AudioVAEConfig()
    filters = mel_filterbank(16000, 1024, 64)
    for hz in (250, 1000, 5000):
        middle_frame = log_mel(tone(hz, 16000), config)[0, 0, 25]
        assert middle_frame.argmax() == filters[:, round(hz * 1024 / 16000)].argmax()


def test_frames_are_hops_apart_and_include_both_ends():
    config = AudioVAEConfig(mel_bins=20, hop_length=100)
    assert log_mel(torch.randn(2, 2, 1000), config).shape == (2, 2, 11, 20)


def test_silence_sits_on_the_floor_with_a_finite_gradient():
    waveform = torch.zeros(1, 2, 4000, requires_grad=True)
    mel = log_mel(waveform, AudioVAEConfig())
    mel.sum().backward()
    assert torch.allclose(mel, torch.tensor(math.log(1e-5)))
    assert waveform.grad is not None and waveform.grad.isfinite().all()


def test_tables_first_made_for_inference_serve_training():
    config = AudioVAEConfig(sampling_rate=8000)  # tables that no other test has made
    with torch.inference_mode():
        log_mel(torch.zeros(1, 2, 2000), config)
    waveform = torch.randn(1, 2, 2000, requires_grad=True)
    log_mel(waveform, config).sum().backward()
    assert waveform.grad is not None


def test_channels_and_samples_of_a_batch_do_not_mix():
    waveform = torch.randn(2, 2, 3000)
    mel = log_mel(waveform, AudioVAEConfig())
    alone = log_mel(waveform[1:, :1], AudioVAEConfig())
    assert torch.allclose(mel[1:, :1], alone, atol=1e-4)


def test_a_sound_shorter_than_half_a_window_is_refused_with_the_length_needed():
    with pytest.raises(InputError, match="513"):
        log_mel(torch.zeros(1, 2, 512), AudioVAEConfig())


def test_every_mel_band_has_the_same_area_and_overlaps_only_its_neighbours():
    # Slaney's normalisation: a triangle of height 2 / width, so of area 1 in Hz.
    filters = mel_filterbank(16000, 8192, 40).double()
    areas = filters.sum(dim=1) * 16000 / 8192
    assert torch.allclose(areas, torch.ones(40, dtype=torch.float64), atol=2e-2)
    assert (filters[:-2] * filters[2:]).max() == 0


@pytest.mark.parametrize("from_hz,to_hz", [(44100, 16000), (24000, 16000), (16000, 48000)])
def test_a_resampled_tone_is_the_tone_at_the_other_rate(from_hz: int, to_hz: int):
    got = resample(tone(700, from_hz), from_hz, to_hz)
    want = tone(700, to_hz)
    assert got.shape == want.shape
    inside = slice(to_hz // 50, -to_hz // 50)  # the filter sees zeros beyond both ends
    # Six zero crossings leave a ripple of a few thousandths in the pass band.
    assert torch.allclose(got[..., inside], want[..., inside], atol=5e-3)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    got = resample(tone(11000, 44100), 44100, 16000)
    assert got[..., 400:-400].abs().max() < 0.02


def test_the_same_rate_returns_the_very_same_samples():
    waveform = torch.randn(1, 2, 100)
    assert resample(waveform, 16000, 16000) is waveform


def test_rates_without_a_useful_common_factor_are_refused():
    with pytest.raises(InputError, match="48000"):
        resample(torch.zeros(1, 2, 100), 44101, 16000)


def test_tables_made_while_a_network_is_built_on_meta_hold_numbers():
    with torch.device("meta"):
        filters = mel_filterbank(22050, 256, 10)
    assert filters.device.type == "cpu"
