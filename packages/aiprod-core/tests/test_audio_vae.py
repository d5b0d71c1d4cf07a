from dataclasses import replace

import pytest
import torch

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig

TINY = AudioVAEConfig(
    base_channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, z_channels=2, mel_bins=16
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("frames,latents", [(1, 1), (4, 1), (5, 2), (16, 4), (21, 6)])
def test_four_mel_frames_make_a_latent_and_a_rest_makes_one_more(frames: int, latents: int):
    assert AudioEncoder(TINY)(torch.randn(1, 2, frames, 16)).shape == (1, 2, latents, 4)


@pytest.mark.parametrize("latents", [1, 2, 7])
def test_the_first_latent_decodes_to_one_frame_and_the_others_to_four(latents: int):
    mel = AudioDecoder(TINY)(torch.randn(2, 2, latents, 4))
    assert mel.shape == (2, 2, 4 * latents - 3, 16)


@torch.no_grad()
def test_later_mel_frames_do_not_change_earlier_latents():
    encoder = AudioEncoder(TINY)
    mel = torch.randn(1, 2, 21, 16)
    changed = mel.clone()
    changed[:, :, 13:] = torch.randn(1, 2, 8, 16)
    before, after = encoder(mel), encoder(changed)
    # Latent i ends with mel frame 4i, so frame 13 first reaches latent 4.
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.allclose(before[:, :, 4], after[:, :, 4])


@torch.no_grad()
def test_later_latents_do_not_change_earlier_mel_frames():
    decoder = AudioDecoder(TINY)
    latent = torch.randn(1, 2, 6, 4)
    changed = latent.clone()
    changed[:, :, 3:] = torch.randn(1, 2, 3, 4)
    before, after = decoder(latent), decoder(changed)
    # Latent 3 covers mel frames 9 to 12.
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.allclose(before[:, :, 9], after[:, :, 9])


@torch.no_grad()
def test_statistics_scale_the_entry_of_the_token_they_are_named_for():
    encoder, decoder = AudioEncoder(TINY), AudioDecoder(TINY)
    mel = torch.randn(1, 2, 9, 16)
    mean, _ = encoder.moments(mel)
    encoder.per_channel_statistics.get_buffer("mean-of-means")[5] = 3.0  # channel 1, bin 1
    encoder.per_channel_statistics.get_buffer("std-of-means")[5] = 2.0
    latent = encoder(mel)
    assert torch.allclose(latent[:, 1, :, 1], (mean[:, 1, :, 1] - 3) / 2)
    assert torch.equal(latent[:, 0], mean[:, 0])
    decoder.per_channel_statistics.load_state_dict(encoder.per_channel_statistics.state_dict())
    assert torch.allclose(decoder.per_channel_statistics.denormalise(latent), mean, atol=1e-6)


def test_config_survives_the_header_unchanged():
    config = replace(
        TINY,
        causality_axis="width",
        mid_block_add_attention=True,
        attn_resolutions=(64,),
        n_fft=512,
    )
    assert AudioVAEConfig.from_metadata(config.to_metadata()) == config


def test_derived_sizes_are_those_of_the_released_model_by_default():
    config = AudioVAEConfig()
    assert config.latents_per_second == 25
    assert (config.latent_mel_bins, config.token_channels) == (16, 128)


def test_attention_is_on_where_the_header_does_not_mention_it():
    section = TINY.to_metadata()
    for key in ("mid_block_add_attention", "attn_resolutions"):
        del section["model"]["params"]["ddconfig"][key]
    config = AudioVAEConfig.from_metadata(section)
    assert config.mid_block_add_attention
    assert config.attn_resolutions == (8, 16, 32)


def test_no_causal_axis_may_be_written_as_null_and_keeps_four_frames_a_latent():
    section = TINY.to_metadata()
    section["model"]["params"]["ddconfig"]["causality_axis"] = None
    config = AudioVAEConfig.from_metadata(section)
    assert AudioDecoder(config)(torch.randn(1, 2, 3, 4)).shape == (1, 2, 12, 16)


@pytest.mark.parametrize(
    "key,value",
    [
        ("causality_axis", "depth"),
        ("norm_type", "layer"),
        ("norm_type", "group"),
        ("double_z", False),
        ("attn_type", "linear"),
        ("resamp_with_conv", False),
    ],
)
def test_an_unsupported_setting_is_refused_by_name_and_value(key: str, value: object):
    section = TINY.to_metadata()
    section["model"]["params"]["ddconfig"][key] = value
    with pytest.raises(CheckpointError) as error:
        AudioVAEConfig.from_metadata(section)
    assert key in str(error.value) and str(value) in str(error.value)


def test_mono_sound_is_refused_with_the_remedy():
    with pytest.raises(InputError, match="twice"):
        AudioEncoder(TINY)(torch.randn(1, 1, 8, 16))


def test_latents_of_another_model_are_refused():
    with pytest.raises(InputError, match="8 statistics"):
        AudioDecoder(TINY)(torch.randn(1, 4, 3, 4))


def test_a_few_steps_of_training_lower_the_reconstruction_error():
    encoder, decoder = AudioEncoder(TINY), AudioDecoder(TINY)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    mel = torch.randn(2, 2, 17, 1).expand(-1, -1, -1, 16)
    losses = []
    for _ in range(30):
        mean, _ = encoder.moments(mel)
        loss = (decoder(mean) - mel).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_released_networks_have_their_published_number_of_parameters():
    with torch.device("meta"):
        encoder, decoder = AudioEncoder(AudioVAEConfig()), AudioDecoder(AudioVAEConfig())
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (encoder, decoder)]
    assert [round(m) for m in millions] == [21, 32]
