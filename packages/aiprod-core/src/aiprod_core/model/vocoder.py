"""Vocoders: log-mel spectrograms to stereo waveforms.

Two kinds. The plain one (LTX-2.0) is a HiFi-GAN generator (Kong et al. 2020) with both channels in
one spectrogram. The other (LTX-2.3) is a BigVGAN generator (Lee et al. 2023) at 16 kHz, followed by
bandwidth extension: a second generator looks at the mel of the first one's sound and predicts what
a plain x3 resampling lacks at 48 kHz. Weights are plain convolutions, without weight norm.

Letters: B batch, C channels, t mel frames.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.model.mel import LOG_FLOOR, mel_filterbank


@dataclass(frozen=True)
class GeneratorConfig:
    """One generator. Defaults are the plain vocoder of LTX-2.0.

    `resblock` is "1" (leaky ReLU) or "AMP1" (anti-aliased SnakeBeta); a block per kernel size and
    upsampling stage, a round per dilation.
    """

    resblock: str = "1"
    is_stereo: bool = True
    num_mels: int = 64
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    upsample_rates: tuple[int, ...] = (6, 5, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 15, 8, 4, 4)
    upsample_initial_channel: int = 1024
    use_tanh_at_final: bool = True
    use_bias_at_final: bool = True

    def __post_init__(self) -> None:
        if self.resblock not in ("1", "AMP1"):
            raise CheckpointError(
                f'vocoder: resblock "{self.resblock}" is not supported; use "1" or "AMP1"'
            )
        for first, second in (
            ("upsample_rates", "upsample_kernel_sizes"),
            ("resblock_kernel_sizes", "resblock_dilation_sizes"),
        ):
            if len(getattr(self, first)) != len(getattr(self, second)):
                raise CheckpointError(
                    f"vocoder: {first} {getattr(self, first)} and {second} "
                    f"{getattr(self, second)} must be equally long"
                )

    @property
    def channels(self) -> int:
        return 2 if self.is_stereo else 1

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.upsample_rates)

    @property
    def is_snake(self) -> bool:
        return self.resblock == "AMP1"

    @classmethod
    def from_metadata(cls, section: Mapping[str, Any]) -> "GeneratorConfig":
        resblock = str(section.get("resblock", cls.resblock))
        activation = section.get("activation", "snakebeta")
        if resblock == "AMP1" and activation != "snakebeta":
            raise CheckpointError(
                f'vocoder: activation "{activation}" is not supported; only snakebeta is'
            )
        dilations = section.get("resblock_dilation_sizes", cls.resblock_dilation_sizes)
        return cls(
            resblock=resblock,
            is_stereo=section.get("stereo", cls.is_stereo),
            num_mels=section.get("num_mels", cls.num_mels),
            resblock_kernel_sizes=tuple(
                section.get("resblock_kernel_sizes", cls.resblock_kernel_sizes)
            ),
            resblock_dilation_sizes=tuple(tuple(rounds) for rounds in dilations),
            upsample_rates=tuple(section.get("upsample_rates", cls.upsample_rates)),
            upsample_kernel_sizes=tuple(
                section.get("upsample_kernel_sizes", cls.upsample_kernel_sizes)
            ),
            upsample_initial_channel=section.get(
                "upsample_initial_channel", cls.upsample_initial_channel
            ),
            use_tanh_at_final=section.get("use_tanh_at_final", cls.use_tanh_at_final),
            use_bias_at_final=section.get("use_bias_at_final", cls.use_bias_at_final),
        )

    def to_metadata(self) -> dict[str, Any]:
        section: dict[str, Any] = {
            "resblock": self.resblock,
            "stereo": self.is_stereo,
            "num_mels": self.num_mels,
            "resblock_kernel_sizes": list(self.resblock_kernel_sizes),
            "resblock_dilation_sizes": [list(rounds) for rounds in self.resblock_dilation_sizes],
            "upsample_rates": list(self.upsample_rates),
            "upsample_kernel_sizes": list(self.upsample_kernel_sizes),
            "upsample_initial_channel": self.upsample_initial_channel,
            "use_tanh_at_final": self.use_tanh_at_final,
            "use_bias_at_final": self.use_bias_at_final,
        }
        return section | ({"activation": "snakebeta"} if self.is_snake else {})


@dataclass(frozen=True)
class BandwidthExtensionConfig:
    """The second half of an LTX-2.3 vocoder; `hop_length` and `n_fft` are at the input rate."""

    generator: GeneratorConfig
    input_sampling_rate: int = 16000
    output_sampling_rate: int = 48000
    hop_length: int = 80
    n_fft: int = 512

    def __post_init__(self) -> None:
        if self.output_sampling_rate % self.input_sampling_rate:
            raise CheckpointError(
                f"vocoder: output_sampling_rate {self.output_sampling_rate} must be a multiple of "
                f"input_sampling_rate {self.input_sampling_rate}"
            )
        if self.generator.samples_per_frame != self.hop_length * self.ratio:
            raise CheckpointError(
                f"vocoder: the bwe upsample_rates {self.generator.upsample_rates} must multiply to "
                f"{self.hop_length * self.ratio} (hop_length x rate ratio)"
            )

    @property
    def ratio(self) -> int:
        return self.output_sampling_rate // self.input_sampling_rate

    @classmethod
    def from_metadata(cls, section: Mapping[str, Any]) -> "BandwidthExtensionConfig":
        return cls(
            generator=GeneratorConfig.from_metadata(section),
            input_sampling_rate=section.get("input_sampling_rate", cls.input_sampling_rate),
            output_sampling_rate=section.get("output_sampling_rate", cls.output_sampling_rate),
            hop_length=section.get("hop_length", cls.hop_length),
            n_fft=section.get("n_fft", cls.n_fft),
        )

    def to_metadata(self) -> dict[str, Any]:
        return self.generator.to_metadata() | {
            "input_sampling_rate": self.input_sampling_rate,
            "output_sampling_rate": self.output_sampling_rate,
            "hop_length": self.hop_length,
            "n_fft": self.n_fft,
        }


@dataclass(frozen=True)
class VocoderConfig:
    """A vocoder: one generator at `output_sampling_rate`, or one followed by `bwe`."""

    generator: GeneratorConfig = GeneratorConfig()
    bwe: BandwidthExtensionConfig | None = None
    generator_sampling_rate: int = 24000

    @property
    def output_sampling_rate(self) -> int:
        return self.bwe.output_sampling_rate if self.bwe else self.generator_sampling_rate

    @classmethod
    def from_metadata(cls, section: Mapping[str, Any]) -> "VocoderConfig":
        """Reads the header's `vocoder` section, flat (plain) or with `vocoder` and `bwe` inside."""
        if "bwe" in section:
            bwe = BandwidthExtensionConfig.from_metadata(section["bwe"])
            generator = GeneratorConfig.from_metadata(section["vocoder"])
            return cls(generator, bwe, bwe.input_sampling_rate)
        rate = section.get("output_sampling_rate", cls.generator_sampling_rate)
        return cls(GeneratorConfig.from_metadata(section), None, rate)

    def to_metadata(self) -> dict[str, Any]:
        """The `vocoder` section that `from_metadata` reads back to an equal config."""
        if self.bwe:
            return {"vocoder": self.generator.to_metadata(), "bwe": self.bwe.to_metadata()}
        return self.generator.to_metadata() | {"output_sampling_rate": self.generator_sampling_rate}


class Generator(nn.Module):
    """Log-mel (B, C, t, num_mels) to waveform (B, C, t x samples_per_frame).

    With `is_bounded` the result ends in tanh or a clamp to [-1, 1], as the config says.
    """

    def __init__(self, config: GeneratorConfig, *, is_bounded: bool = True) -> None:
        super().__init__()
        self.num_mels = config.num_mels
        self.is_snake = config.is_snake
        self.num_kernels = len(config.resblock_kernel_sizes)
        self.final = (F.tanh if config.use_tanh_at_final else _clamp) if is_bounded else None
        width = config.upsample_initial_channel
        self.conv_pre = nn.Conv1d(config.channels * config.num_mels, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        block = AMPBlock if config.is_snake else ResidualBlock
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            padding = (kernel - rate) // 2
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, padding))
            width //= 2
            for size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(block(width, size, dilations))
        # The published last LeakyReLU kept PyTorch's own slope, 0.01, where all others have 0.1.
        self.act_post = AntiAliasedSnake(width) if config.is_snake else nn.LeakyReLU(0.01)
        self.conv_post = nn.Conv1d(
            width, config.channels, 7, padding=3, bias=config.use_bias_at_final
        )

    @property
    def is_plain(self) -> bool:
        """Whether this is a single generator without snakes; two of them have none of their own."""
        return hasattr(self, "conv_pre") and not self.is_snake

    def forward(self, mel: Tensor) -> Tensor:
        if mel.shape[1] * mel.shape[3] != self.conv_pre.in_channels:
            raise InputError(
                f"this vocoder takes {self.conv_pre.in_channels // self.num_mels} channels of "
                f"{self.num_mels} mel bins; got {mel.shape[1]} of {mel.shape[3]}"
            )
        x = self.conv_pre(rearrange(mel, "b c t bins -> b (c bins) t"))
        for i, up in enumerate(self.ups):
            x = up(x if self.is_snake else F.leaky_relu(x, 0.1))
            first = i * self.num_kernels
            total = self.resblocks[first](x)
            for j in range(first + 1, first + self.num_kernels):
                total = total + self.resblocks[j](x)
            x = total / self.num_kernels
        x = self.conv_post(self.act_post(x))
        return self.final(x) if self.final else x


class Vocoder(Generator):
    """Log-mel (B, 2, t, bins) to waveform (B, 2, samples) in [-1, 1] at `output_sample_rate`.

    With bandwidth extension everything runs in float32, whatever the dtype of the mel: the sines
    lose the phase in bfloat16.
    """

    def __init__(self, config: VocoderConfig) -> None:
        if config.bwe is None:
            # Published plain vocoders have the generator's members at the top level.
            super().__init__(config.generator)
        else:
            nn.Module.__init__(self)
            self.vocoder = Generator(config.generator)
            self.bwe_generator = Generator(config.bwe.generator, is_bounded=False)
            self.mel_stft = CausalMel(config.bwe)
        self.config = config

    @property
    def output_sample_rate(self) -> int:
        return self.config.output_sampling_rate

    def forward(self, mel: Tensor) -> Tensor:
        if self.config.bwe is None:
            return super().forward(mel)
        with torch.autocast(mel.device.type, enabled=False):
            return self.extend(self.vocoder(mel.float()))

    def extend(self, low_rate: Tensor) -> Tensor:
        """The generator's waveform (B, C, samples) with the bandwidth of the higher rate."""
        bwe = self.config.bwe
        assert bwe is not None
        samples = low_rate.shape[-1]
        low_rate = F.pad(low_rate, (0, -samples % bwe.hop_length))
        residual = self.bwe_generator(self.mel_stft(low_rate))
        skip = upsample_hann(low_rate, bwe.ratio)
        return _clamp(residual + skip)[..., : samples * bwe.ratio]


class ResidualBlock(nn.Module):
    """HiFi-GAN's: per dilation, x += conv2(lrelu(conv1(lrelu(x)))), conv1 dilated."""

    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_same_conv(width, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(_same_conv(width, kernel, 1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, 0.1)), 0.1))
        return x


class AMPBlock(nn.Module):
    """BigVGAN's: as above, with an anti-aliased SnakeBeta of its own before each convolution."""

    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_same_conv(width, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(_same_conv(width, kernel, 1) for _ in dilations)
        self.acts1 = nn.ModuleList(AntiAliasedSnake(width) for _ in dilations)
        self.acts2 = nn.ModuleList(AntiAliasedSnake(width) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for act1, conv1, act2, conv2 in zip(
            self.acts1, self.convs1, self.acts2, self.convs2, strict=True
        ):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class AntiAliasedSnake(nn.Module):
    """SnakeBeta at twice the rate, so that the harmonics it makes do not fold back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.upsample = Upsample2()
        self.act = SnakeBeta(width)
        self.downsample = Downsample2()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.act(self.upsample(x)))


class SnakeBeta(nn.Module):
    """x + sin(alpha x)^2 / beta per channel, both stored as logarithms (Ziyin et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + torch.sin(x * alpha).square() / (beta + 1e-9)


class Upsample2(nn.Module):
    """Twice the rate, with the low-pass filter that the file stores: 12 taps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc().clone())

    def forward(self, x: Tensor) -> Tensor:
        width, taps = x.shape[1], self.get_buffer("filter")
        pad = taps.shape[-1] // 2 - 1
        x = F.pad(x, (pad, pad), mode="replicate")
        x = 2 * F.conv_transpose1d(x, taps.expand(width, -1, -1), stride=2, groups=width)
        crop_left = 2 * pad + (taps.shape[-1] - 2) // 2
        crop_right = 2 * pad + (taps.shape[-1] - 1) // 2
        return x[..., crop_left : x.shape[-1] - crop_right]


class Downsample2(nn.Module):
    """Half the rate, through the low-pass filter that the file stores: 12 taps."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = LowPass()

    def forward(self, x: Tensor) -> Tensor:
        width, taps = x.shape[1], self.lowpass.get_buffer("filter")
        right = taps.shape[-1] // 2
        left = right - 1 + taps.shape[-1] % 2
        x = F.pad(x, (left, right), mode="replicate")
        return F.conv1d(x, taps.expand(width, -1, -1), stride=2, groups=width)


class LowPass(nn.Module):
    """Holds a filter under its published name, `lowpass.filter`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc().clone())


class CausalMel(nn.Module):
    """Log-mel (B, C, frames, num_mels) of a waveform, from the Fourier and mel bases in the file.

    Zeros go before the sound only, so that a frame ends with its own samples:
    frames = samples / hop.
    """

    def __init__(self, config: BandwidthExtensionConfig) -> None:
        super().__init__()
        self.stft_fn = FourierBasis(config.n_fft)
        self.hop_length = config.hop_length
        filters = mel_filterbank(
            config.input_sampling_rate, config.n_fft, config.generator.num_mels
        )
        self.register_buffer("mel_basis", filters.clone())

    def forward(self, waveform: Tensor) -> Tensor:
        channels = waveform.shape[1]
        basis = self.stft_fn.get_buffer("forward_basis")
        x = rearrange(waveform, "b c samples -> (b c) 1 samples")
        x = F.pad(x, (max(0, basis.shape[-1] - self.hop_length), 0))
        spectrum = F.conv1d(x, basis, stride=self.hop_length)
        spectrum = rearrange(spectrum, "bc (part k) frames -> part bc k frames", part=2)
        # vector_norm rather than the root of squares: its gradient at silence is 0, not NaN.
        magnitude = torch.linalg.vector_norm(spectrum, dim=0)
        mel = self.get_buffer("mel_basis") @ magnitude  # (B C, bins, frames)
        mel = mel.clamp(min=LOG_FLOOR).log()
        return rearrange(mel, "(b c) bins frames -> b c frames bins", c=channels)


class FourierBasis(nn.Module):
    """Rows of a Hann-windowed Fourier transform (n_fft + 2, 1, n_fft): cosines, then sines."""

    def __init__(self, n_fft: int) -> None:
        super().__init__()
        with torch.device("cpu"):
            k = torch.arange(n_fft // 2 + 1, dtype=torch.float64)[:, None]
            angles = 2 * math.pi / n_fft * k * torch.arange(n_fft, dtype=torch.float64)
            basis = torch.cat([angles.cos(), -angles.sin()])
            basis = basis * torch.hann_window(n_fft, dtype=torch.float64)
        self.register_buffer("forward_basis", basis.float()[:, None])


def upsample_hann(x: Tensor, ratio: int) -> Tensor:
    """(B, C, samples) to (B, C, samples x ratio) with a Hann-windowed sinc, edges replicated."""
    zero_crossings, rolloff = 6, 0.99
    width = math.ceil(zero_crossings / rolloff)
    taps = 2 * width * ratio + 1
    t = (torch.arange(taps, device=x.device, dtype=torch.float64) / ratio - width) * rolloff
    window = torch.cos(t.clamp(-zero_crossings, zero_crossings) * math.pi / zero_crossings / 2)
    # The gain rolloff / ratio of the filter, times the ratio that inserting zeros takes away.
    kernel = (torch.sinc(t) * window.square() * rolloff).to(x.dtype)
    channels = x.shape[1]
    x = F.pad(x, (width, width), mode="replicate")
    x = F.conv_transpose1d(x, kernel.expand(channels, 1, -1), stride=ratio, groups=channels)
    return x[..., 2 * width * ratio : x.shape[-1] - (taps - ratio)]


@lru_cache(maxsize=1)
def kaiser_sinc() -> Tensor:
    """The 12-tap half-band filter (1, 1, 12) of the anti-aliased activations; sums to 1.

    Cutoff 0.25 of the rate, transition half-width 0.3; beta by Kaiser's formula.
    """
    taps, cutoff, half_width = 12, 0.25, 0.3
    with torch.device("cpu"), torch.inference_mode(False):  # kept, and used in training too
        attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * half_width + 7.95
        beta = 0.1102 * (attenuation - 8.7)  # the branch for more than 50 dB, here 51
        window = torch.kaiser_window(taps, periodic=False, beta=beta, dtype=torch.float64)
        t = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
        kernel = torch.sinc(2 * cutoff * t) * window
        return (kernel / kernel.sum()).float()[None, None]


def _same_conv(width: int, kernel: int, dilation: int) -> nn.Conv1d:
    return nn.Conv1d(width, width, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)


def _clamp(x: Tensor) -> Tensor:
    return x.clamp(-1, 1)
