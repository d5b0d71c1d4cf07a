import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_vocoder
from aiprod_core.model.vocoder import (
    BandwidthExtensionConfig,
    CausalMel,
    GeneratorConfig,
    SnakeBeta,
    Vocoder,
    VocoderConfig,
    upsample_hann,
)

PLAIN = VocoderConfig(
    GeneratorConfig(
        num_mels=16,
        upsample_rates=(5, 4),
        upsample_kernel_sizes=(11, 8),
        upsample_initial_channel=16,
        resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((1, 3), (1, 3)),
    ),
    generator_sampling_rate=16000,
)
AMP = replace(PLAIN.generator, resblock="AMP1", use_tanh_at_final=False, use_bias_at_final=False)
EXTENDED = VocoderConfig(
    AMP,
    BandwidthExtensionConfig(
        replace(AMP, upsample_rates=(6, 4), upsample_kernel_sizes=(12, 8)),
        input_sampling_rate=16000,
        output_sampling_rate=48000,
        hop_length=8,
        n_fft=32,
    ),
    generator_sampling_rate=16000,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("config,rate,samples", [(PLAIN, 16000, 20), (EXTENDED, 48000, 60)])
def test_a_mel_frame_becomes_its_share_of_samples_within_full_scale(
    config: VocoderConfig, rate: int, samples: int
):
    vocoder = Vocoder(config)
    waveform = vocoder(20 * torch.randn(1, 2, 7, 16))
    assert waveform.shape == (1, 2, 7 * samples)  # 140 samples are no multiple of the hop of 8
    assert waveform.abs().max() <= 1
    assert vocoder.output_sample_rate == rate


@pytest.mark.parametrize("config", [PLAIN, EXTENDED, VocoderConfig(replace(AMP, is_stereo=False))])
def test_config_survives_the_header_unchanged(config: VocoderConfig):
    assert VocoderConfig.from_metadata(config.to_metadata()) == config


def test_a_header_that_names_nothing_means_the_released_plain_vocoder():
    with torch.device("meta"):
        vocoder = Vocoder(VocoderConfig.from_metadata({}))
    assert round(sum(p.numel() for p in vocoder.parameters()) / 1e6) == 56
    assert vocoder.output_sample_rate == 24000


def test_the_released_extended_vocoder_has_its_published_number_of_parameters():
    section = {
        "vocoder": {
            "resblock": "AMP1",
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
            "upsample_initial_channel": 1536,
            "use_bias_at_final": False,
        },
        "bwe": {
            "resblock": "AMP1",
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "upsample_initial_channel": 512,
            "use_bias_at_final": False,
        },
    }
    with torch.device("meta"):
        vocoder = Vocoder(VocoderConfig.from_metadata(section))
    assert round(sum(p.numel() for p in vocoder.parameters()) / 1e6) == 129


@torch.no_grad()
def test_half_precision_changes_nothing_in_an_extended_vocoder():
    vocoder = Vocoder(EXTENDED)
    mel = torch.randn(1, 2, 6, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        waveform = vocoder(mel)
    assert waveform.dtype == torch.float32
    assert torch.equal(waveform, vocoder(mel.float()))


@torch.no_grad()
def test_without_a_residual_the_extension_is_plain_resampling():
    vocoder = Vocoder(EXTENDED)
    vocoder.bwe_generator.conv_post.weight.zero_()
    t = torch.arange(800) / 16000
    low_rate = 0.5 * torch.sin(2 * torch.pi * 440 * t).expand(1, 2, -1)
    want = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(2400) / 48000)
    inside = slice(100, -100)
    # Six zero crossings leave a ripple of a few thousandths in the pass band.
    assert torch.allclose(vocoder.extend(low_rate)[0, 0, inside], want[inside], atol=5e-3)


def test_upsampling_keeps_a_constant_up_to_the_very_edges():
    got = upsample_hann(torch.full((1, 2, 30), 0.7), 3)
    assert got.shape == (1, 2, 90)
    assert torch.allclose(got, torch.tensor(0.7), atol=2e-3)


def test_the_anti_aliased_activation_keeps_a_constant():
    activation = Vocoder(EXTENDED).vocoder.act_post
    x = torch.full((1, 4, 12), 0.3)
    want = SnakeBeta(4)(x)
    assert torch.allclose(activation(x), want, atol=1e-5)


def test_anti_aliasing_halves_what_a_high_tone_folds_back():
    # sin^2 doubles the frequency: 0.4 of the rate folds to 0.2. Twelve taps cannot do much better.
    activation = Vocoder(EXTENDED).vocoder.act_post
    x = torch.sin(2 * torch.pi * 0.4 * torch.arange(400.0)).expand(1, 4, -1)
    folded = torch.fft.rfft(activation(x)[0, 0, 100:300]).abs()[40]
    naive = torch.fft.rfft(SnakeBeta(4)(x)[0, 0, 100:300]).abs()[40]
    assert folded < 0.5 * naive


@torch.no_grad()
def test_mel_frames_of_the_extension_do_not_hear_later_samples():
    assert EXTENDED.bwe is not None
    mel = CausalMel(EXTENDED.bwe)
    sound = torch.randn(1, 2, 80)
    changed = sound.clone()
    changed[..., 40:] = 0
    assert torch.equal(mel(sound)[:, :, :5], mel(changed)[:, :, :5])
    assert not torch.allclose(mel(sound)[:, :, 5], mel(changed)[:, :, 5])


@pytest.mark.parametrize("config", [PLAIN, EXTENDED])
def test_silence_gives_finite_gradients(config: VocoderConfig):
    vocoder = Vocoder(config)
    mel = torch.zeros(1, 2, 4, 16, requires_grad=True)
    if config.bwe:
        torch.nn.init.zeros_(vocoder.vocoder.conv_post.weight)
    vocoder(mel).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vocoder.parameters())


def test_names_are_the_published_ones_with_the_prefix_off():
    assert "resblocks.3.convs2.1.bias" in Vocoder(PLAIN).state_dict()
    assert {
        "vocoder.resblocks.0.acts1.0.act.alpha",
        "vocoder.resblocks.0.acts2.1.downsample.lowpass.filter",
        "bwe_generator.act_post.upsample.filter",
        "mel_stft.stft_fn.forward_basis",
        "mel_stft.mel_basis",
    } <= set(Vocoder(EXTENDED).state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "config,dtype", [(PLAIN, torch.bfloat16), (EXTENDED, torch.float32)], ids=["plain", "extended"]
)
def test_a_file_in_bfloat16_loads_as_asked_except_for_the_extension(
    config: VocoderConfig, dtype: torch.dtype, tmp_path: Path
):
    saved = Vocoder(config).bfloat16()
    tensors = {f"vocoder.{name}": tensor for name, tensor in saved.state_dict().items()}
    if config.bwe:
        tensors["vocoder.mel_stft.stft_fn.inverse_basis"] = torch.zeros(34, 1, 32)
    header = {"config": json.dumps({"vocoder": config.to_metadata()})}
    save_file(tensors, tmp_path / "vocoder.safetensors", header)
    checkpoint = open_checkpoint(tmp_path / "vocoder.safetensors")
    loaded = load_vocoder(checkpoint, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    mel = torch.randn(1, 2, 4, 16).to(dtype)
    assert torch.equal(loaded(mel), saved.to(dtype)(mel))


@pytest.mark.parametrize(
    "change,named",
    [
        ({"resblock": "2"}, 'resblock "2"'),
        ({"resblock": "AMP1", "activation": "snake"}, 'activation "snake"'),
        ({"upsample_rates": [2, 2]}, "upsample_kernel_sizes"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name_and_value(change: dict, named: str):
    with pytest.raises(CheckpointError, match=named):
        VocoderConfig.from_metadata(change)


def test_rates_that_do_not_reach_the_output_rate_are_refused():
    section = EXTENDED.to_metadata()
    section["bwe"]["hop_length"] = 10
    with pytest.raises(CheckpointError, match="multiply to 30"):
        VocoderConfig.from_metadata(section)


def test_a_mel_of_another_size_is_refused():
    with pytest.raises(InputError, match="16 mel bins"):
        Vocoder(PLAIN)(torch.randn(1, 2, 4, 8))
