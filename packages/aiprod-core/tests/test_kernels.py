"""Kernels against their references; Triton's run in its interpreter where there is no GPU."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_core.components.constants import computed_once
from aiprod_core.errors import InputError
from aiprod_core.kernels import convolution, cpu_norms, onednn
from aiprod_core.kernels.apply import compile_blocks, enable_kernels
from aiprod_core.kernels.convolution import form_of
from aiprod_core.kernels.onednn import is_faster_in_onednn
from aiprod_core.model.audio_vae import AudioDecoder, AudioVAEConfig
from aiprod_core.model.conv_blocks import CausalConv3d
from aiprod_core.model.layers import Attention, FeedForward
from aiprod_core.model.rope import rotary_table
from aiprod_core.model.transformer import Stream, Transformer, TransformerConfig
from aiprod_core.model.vocoder import GeneratorConfig, Vocoder, VocoderConfig
from aiprod_core.quantization.fp8 import FP8_MAX, Fp8ScaledLinear, cast_linears
from aiprod_core.types import Modality

Build = Callable[[TransformerConfig], Transformer]
Inputs = Callable[..., tuple[Modality, Modality]]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def triton() -> Any:
    return pytest.importorskip("triton")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rows(per_token: bool, seed: int) -> Tensor:
    """A modulation as blocks get it: a slice of one tensor, of all tokens or of each sample."""
    return random(2, 5 if per_token else 1, 3, 24, seed=seed)[:, :, 1]


@pytest.mark.parametrize("per_token", [False, True])
def test_norm_scale_and_shift_equal_their_reference(triton: Any, per_token: bool):
    from aiprod_core.kernels.fused_adaln import fused_adaln, reference

    x, scale, shift = random(2, 5, 24), rows(per_token, 1), rows(per_token, 2)
    torch.testing.assert_close(
        fused_adaln(x, scale, shift, 1e-6), reference(x, scale, shift, 1e-6), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_a_norm_rounded_to_8_bits_equals_its_reference(triton: Any, per_token: bool):
    from aiprod_core.kernels.fused_adaln_fp8 import fused_adaln_fp8, reference

    x, scale, shift = random(2, 5, 24), rows(per_token, 1), rows(per_token, 2)
    shift[0, 0, 0] = 900.0  # beyond the range even after scaling
    input_scale = torch.tensor(0.01, device=DEVICE)
    got = fused_adaln_fp8(x, scale, shift, 1e-6, input_scale).float()
    want = reference(x, scale, shift, 1e-6, input_scale).float()
    # Triton's interpreter loses the carry where rounding reaches a power of two: 1.97 becomes 1.
    lost = (want.frexp().mantissa.abs() == 0.5) & (got == want / 2) & (DEVICE == "cpu")
    assert ((got == want) | lost).float().mean() > 0.98  # float32 sums may fall on either side
    torch.testing.assert_close(torch.where(lost, want, got), want, atol=2**-9, rtol=0.13)
    assert got.abs().max() == FP8_MAX


@torch.inference_mode()
def test_a_feed_forward_given_8_bits_computes_as_one_that_rounds(
    triton: Any,
    tiny_config: TransformerConfig,
    randomised: Build,
    monkeypatch: pytest.MonkeyPatch,
):
    from aiprod_core.kernels import fused_adaln_fp8

    monkeypatch.setattr(fused_adaln_fp8, "fused_adaln_fp8", fused_adaln_fp8.reference)
    block: Any = randomised(tiny_config).transformer_blocks[0]
    linear = block.ff.net[0].proj
    up = block.ff.net[0].proj = Fp8ScaledLinear.quantized(linear.weight, linear.bias)
    up.input_scale = torch.tensor(0.02)
    width = linear.in_features
    modulation = random(2, 1, tiny_config.num_modulations, width).cpu()
    unread = dict.fromkeys(Stream._fields)
    stream: Any = Stream(**{**unread, "modulation": modulation})
    inputs = random(2, 5, width).cpu(), stream, block.ff, block.scale_shift_table
    want = block.feed_forward(*inputs)
    assert enable_kernels(block, torch.device("cuda")).counts["norm to FP8"] == 1
    assert torch.equal(block.feed_forward(*inputs), want)


@pytest.mark.parametrize("has_gate", [False, True])
def test_a_gated_residual_and_the_next_norm_equal_their_reference(triton: Any, has_gate: bool):
    from aiprod_core.kernels.fused_gate import fused_gate, reference

    x, out, gate = random(2, 5, 24), random(2, 5, 24, seed=1), rows(True, 2) if has_gate else None
    for got, want in zip(
        fused_gate(x, gate, out, 1e-6), reference(x, gate, out, 1e-6), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_normed_and_rotated_queries_equal_their_reference(triton: Any, is_interleaved: bool):
    from aiprod_core.kernels.fused_qk_rope import fused_qk_rope, reference

    positions = random(1, 3, 5, seed=3)  # shared by both samples
    rotary = rotary_table(positions, (1, 2, 3), 24, is_interleaved=is_interleaved)
    x, weight = random(2, 5, 24), random(24, seed=4)
    for table in (rotary, None):
        torch.testing.assert_close(
            fused_qk_rope(x, weight, 1e-6, table, 3),
            reference(x, weight, 1e-6, table, 3),
            atol=1e-6,
            rtol=1e-5,
        )


@pytest.mark.parametrize("has_bias", [False, True])
def test_bias_and_gelu_equal_their_reference(triton: Any, has_bias: bool):
    from aiprod_core.kernels.fused_gelu import fused_gelu, reference

    x, bias = 4 * random(3, 7, 96), random(96, seed=1) if has_bias else None
    want = reference(x, bias)
    torch.testing.assert_close(fused_gelu(x, bias), want, atol=2e-6, rtol=1e-5)


def test_a_transformer_with_kernels_computes_the_same(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer, inputs = randomised(tiny_config), modalities(tiny_config)
    with torch.inference_mode():
        want = transformer(*inputs)
        kernels = enable_kernels(transformer)
        got = transformer(*inputs)
        # Per block six attentions of four linears, and the second linear of two feed-forwards;
        # the norms are those of the attentions and two more. Attention to another sequence is
        # asked too, and computes as ever.
        assert kernels.counts == {
            "norm in fewer passes": 16,
            "q and k together": 12,
            "oneDNN linear": 52,
            "oneDNN linear with GELU": 4,
        }
        assert enable_kernels(transformer).counts == {}
        kernels.disable()
        restored = transformer(*inputs)
    for ours, reference, after in zip(got, want, restored, strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)
        assert torch.equal(after, reference)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("form", "channels", "outputs", "frames", "height", "width"),
    [
        ("winograd", 48, 50, 1, 32, 32),
        ("winograd", 50, 48, 2, 22, 25),  # not whole tiles
        ("winograd", 48, 48, 5, 16, 16),
        ("product", 400, 390, 1, 2, 3),
        ("product", 400, 390, 3, 4, 4),
        ("onednn", 48, 96, 3, 4, 5),
    ],
)
def test_a_convolution_in_another_form_is_the_direct_one(
    causal: bool, padding: Any, form: str, channels: int, outputs: int, frames: int, height: int,
    width: int,
):  # fmt: skip
    layer = CausalConv3d(channels, outputs, causal=causal, padding=padding)
    x = random(1, channels, frames, height, width).cpu()
    x = x.to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        want = layer(x)
        assert enable_kernels(layer).counts == {"convolution in fewer multiplications": 1}
        assert form_of(layer.conv, x) == form
        torch.testing.assert_close(layer(x), want, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_rows_of_tiles_done_apart_give_the_whole_convolution(monkeypatch: pytest.MonkeyPatch):
    layer = CausalConv3d(48, 48, causal=False, padding="reflect")
    x = random(1, 48, 3, 20, 20).cpu()
    want = layer(x)
    enable_kernels(layer)
    monkeypatch.setattr(convolution, "WINOGRAD_BYTES", 0)  # one row at a time
    torch.testing.assert_close(layer(x), want, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_large_products_by_onednn_equal_those_by_pytorch():
    feed_forward = FeedForward(256)
    x = random(1, 40, 256).cpu()
    assert is_faster_in_onednn(x, feed_forward.net[0].proj.weight)
    want = feed_forward(x)
    enable_kernels(feed_forward)
    torch.testing.assert_close(feed_forward(x), want, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("samples", [1, 2])  # of the table, for two of x
def test_queries_and_keys_normalised_together_are_those_apart(is_interleaved: bool, samples: int):
    attention = Attention(24, heads=3, head_dim=8)
    for norm in (attention.q_norm, attention.k_norm):
        nn.init.normal_(norm.weight)
    x = random(2, 5, 24).cpu()
    rotary = rotary_table(random(samples, 3, 5).cpu(), (1, 2, 3), 24, is_interleaved=is_interleaved)
    for table in (rotary, None):
        want = attention.queries_keys_values(x, x, table, table)
        got = cpu_norms.queries_keys_values(attention, x, x, table, table)
        for ours, reference in zip(got, want, strict=True):
            torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_a_vocoder_with_channels_last_sounds_the_same():
    vocoder = Vocoder(
        VocoderConfig(GeneratorConfig(upsample_initial_channel=32, num_mels=8, is_stereo=True))
    )
    mel = random(2, 2, 6, 8).cpu()
    want = vocoder(mel)
    # A convolution before, five up, of three blocks each with six, and one after.
    assert enable_kernels(vocoder).counts == {"sound with channels last": 1 + 5 + 90 + 1}
    torch.testing.assert_close(vocoder(mel), want, atol=1e-6, rtol=1e-5)
    x = random(2, 32, 9).cpu()
    assert vocoder.ups[0](x).transpose(1, 2).is_contiguous()


def test_a_vocoder_that_is_trained_or_in_16_bits_computes_as_without_kernels():
    vocoder = Vocoder(VocoderConfig(GeneratorConfig(upsample_initial_channel=32, num_mels=8)))
    mel = random(1, 2, 6, 8).cpu()
    vocoder(mel).square().sum().backward()
    want = vocoder.conv_pre.weight.grad
    vocoder.zero_grad()
    enable_kernels(vocoder)
    vocoder(mel).square().sum().backward()
    torch.testing.assert_close(vocoder.conv_pre.weight.grad, want)
    with torch.inference_mode():
        assert vocoder.bfloat16()(mel.bfloat16()).dtype == torch.bfloat16


@torch.inference_mode()
def test_an_audio_decoder_with_channels_last_decodes_the_same():
    decoder = AudioDecoder(
        AudioVAEConfig(base_channels=16, channel_multipliers=(1, 2, 2), z_channels=4, mel_bins=16)
    )
    latent = random(1, 4, 5, 4).cpu()
    want = decoder(latent)
    enable_kernels(decoder)
    got = decoder(latent)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_a_cpu_computes_as_without_kernels(dtype: torch.dtype):
    feed_forward = FeedForward(256).to(dtype)
    conv = CausalConv3d(48, 48, causal=True, padding="zeros").to(dtype)
    tokens, frames = random(1, 40, 256).cpu().to(dtype), random(1, 48, 2, 24, 24).cpu().to(dtype)
    want = feed_forward(tokens), conv(frames)
    enable_kernels(feed_forward)
    enable_kernels(conv)
    assert torch.equal(feed_forward(tokens), want[0])
    assert torch.equal(conv(frames), want[1])


@pytest.mark.parametrize("min_product", [0, 2**23])
def test_compiled_blocks_with_kernels_and_kept_constants_compute_the_same(
    tiny_config: TransformerConfig,
    randomised: Build,
    modalities: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    min_product: int,
):
    monkeypatch.setattr(onednn, "MIN_PRODUCT", min_product)
    transformer, inputs = randomised(tiny_config), modalities(tiny_config)
    with torch.inference_mode(), computed_once(transformer):
        want = transformer(*inputs)
        enable_kernels(transformer)
        # Traced as for the default backend, which would take a minute of a C++ compiler.
        compile_blocks(transformer, backend="aot_eager")
        for got, reference in zip(transformer(*inputs), want, strict=True):
            torch.testing.assert_close(got, reference, atol=2e-5, rtol=1e-4)


def test_kernels_leave_quantised_layers_alone_and_gradients_correct(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config).requires_grad_()
    video, _ = transformer(*modalities(tiny_config))
    video.sum().backward()
    want = {
        name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None
    }
    transformer.zero_grad()
    enable_kernels(transformer)
    video, _ = transformer(*modalities(tiny_config))
    video.sum().backward()
    for name, parameter in transformer.named_parameters():
        if name in want:
            assert torch.equal(parameter.grad, want[name])
    quantised = randomised(tiny_config)
    cast_linears(quantised)
    assert enable_kernels(quantised).counts.keys() == {"norm in fewer passes", "q and k together"}
    inputs = modalities(tiny_config)
    with torch.inference_mode():
        got = quantised(*inputs)
    assert all(tensor.isfinite().all() for tensor in got)


def test_kernels_for_a_gpu_are_refused_without_triton(
    tiny_config: TransformerConfig, monkeypatch: pytest.MonkeyPatch
):
    for name in ("adaln", "adaln_fp8", "gate", "gelu", "qk_rope"):
        monkeypatch.delitem(sys.modules, f"aiprod_core.kernels.fused_{name}", False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match="Triton"):
        enable_kernels(Transformer(tiny_config), torch.device("cuda"))
