"""The audio networks against an independent implementation, with the same random weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from aiprod_core.model.vocoder import (
    BandwidthExtensionConfig,
    GeneratorConfig,
    Vocoder,
    VocoderConfig,
)
from aiprod_core.parity.diffusers_peers import VOCODER_NAMES, replaced

pytest.importorskip("diffusers")
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_agree(got: Tensor, want: Tensor) -> None:
    """Up to rounding in float32 over some ten layers."""
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def vocoder_weights(theirs: nn.Module) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in theirs.state_dict().items():
        if "inverse_basis" not in name:  # stored, but nothing uses it
            ours[replaced(name, VOCODER_NAMES)] = tensor
    return ours


def randomise(module: nn.Module) -> None:
    """Fills what starts at zero, so that no term hides."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.normal_(std=0.3)


@torch.no_grad()
@pytest.mark.parametrize("axis", ["height", "width", "width-compatibility", "none"])
@pytest.mark.parametrize("has_attention", [False, True])
def test_audio_vae_agrees_with_diffusers(axis: str, has_attention: bool):
    config = AudioVAEConfig(
        base_channels=8,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        z_channels=2,
        mel_bins=16,
        causality_axis=axis,
        mid_block_add_attention=has_attention,
        attn_resolutions=(128,) if has_attention else (),
    )
    theirs = AutoencoderKLLTX2Audio(
        base_channels=8,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        latent_channels=2,
        mel_bins=16,
        causality_axis=axis,
        mid_block_add_attention=has_attention,
        attn_resolutions=config.attn_resolutions,
    ).eval()
    encoder, decoder = AudioEncoder(config), AudioDecoder(config)
    for ours, part in ((encoder, theirs.encoder), (decoder, theirs.decoder)):
        ours.load_state_dict(part.state_dict() | statistics(ours))
    mel = torch.randn(2, 2, 21, 16)
    posterior = theirs.encode(mel, return_dict=False)[0]
    mean, logvar = encoder.moments(mel)
    assert_agree(mean, posterior.mean)
    assert_agree(logvar, posterior.logvar)
    latent = torch.randn(2, 2, 6, 4)
    want = theirs.decode(latent, return_dict=False)[0]
    # They cut to 4T - 3 frames even where nothing is causal; we keep all 4T there.
    assert_agree(decoder(latent)[:, :, : want.shape[2]], want)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if k.startswith("per_channel_statistics")}


@torch.no_grad()
def test_group_norm_agrees_with_diffusers():
    sizes = {"base_channels": 32, "num_res_blocks": 1, "causality_axis": "none"}
    theirs = AutoencoderKLLTX2Audio(
        **sizes, ch_mult=(1, 1, 1), latent_channels=2, mel_bins=16, norm_type="group"
    ).eval()
    encoder = AudioEncoder(
        AudioVAEConfig(
            **sizes, channel_multipliers=(1, 1, 1), z_channels=2, mel_bins=16, norm_type="group"
        )
    )
    encoder.load_state_dict(theirs.encoder.state_dict() | statistics(encoder))
    mel = torch.randn(1, 2, 12, 16)
    assert_agree(encoder(mel), theirs.encode(mel, return_dict=False)[0].mean)


@torch.no_grad()
def test_plain_vocoder_agrees_with_diffusers():
    theirs = LTX2Vocoder(
        in_channels=32,
        hidden_channels=16,
        upsample_kernel_sizes=[16, 15, 4],
        upsample_factors=[6, 5, 2],
    ).eval()
    ours = Vocoder(
        VocoderConfig(
            GeneratorConfig(
                num_mels=16,
                upsample_rates=(6, 5, 2),
                upsample_kernel_sizes=(16, 15, 4),
                upsample_initial_channel=16,
            )
        )
    )
    ours.load_state_dict(vocoder_weights(theirs))
    mel = torch.randn(2, 2, 9, 16)
    assert_agree(ours(mel), theirs(mel))


@torch.no_grad()
def test_extended_vocoder_agrees_with_diffusers():
    theirs = LTX2VocoderWithBWE(
        in_channels=32,
        hidden_channels=16,
        upsample_kernel_sizes=[11, 4, 4],
        upsample_factors=[5, 2, 2],
        final_act_fn="clamp",
        bwe_in_channels=32,
        bwe_hidden_channels=16,
        bwe_upsample_kernel_sizes=[12, 11],
        bwe_upsample_factors=[6, 5],
        filter_length=32,
        hop_length=10,
        window_length=32,
        num_mel_channels=16,
    ).eval()
    randomise(theirs)
    generator = GeneratorConfig(
        resblock="AMP1",
        num_mels=16,
        upsample_rates=(5, 2, 2),
        upsample_kernel_sizes=(11, 4, 4),
        upsample_initial_channel=16,
        use_tanh_at_final=False,
        use_bias_at_final=False,
    )
    extension = replace(generator, upsample_rates=(6, 5), upsample_kernel_sizes=(12, 11))
    bwe = BandwidthExtensionConfig(extension, 16000, 48000, hop_length=10, n_fft=32)
    ours = Vocoder(VocoderConfig(generator, bwe, 16000))
    # Their spectral bases start as zeros, ours as the transform; their filters as ours.
    names = ours.state_dict()
    weights = vocoder_weights(theirs)
    for name, tensor in weights.items():
        if name.startswith("mel_stft."):
            theirs.get_buffer(name).copy_(names[name])
        elif name.endswith(".filter"):
            assert torch.allclose(names[name], tensor, atol=1e-6)
    ours.load_state_dict(vocoder_weights(theirs))
    mel = torch.randn(1, 2, 8, 16)
    assert_agree(ours(mel), theirs(mel))
