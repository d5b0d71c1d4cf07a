"""What `aiprod bench` runs: pieces of work in two forms, and what is reported of them.

On a CPU the other form is `diffusers` in float32 with the same weights, each side as its own
pipelines run it: ours with the kernels for this device and with constants kept over the steps. On
CUDA there is no second copy of 19B weights; there the other form is plain PyTorch.

Letters: B batch, C channels, F latent frames, H W latent height and width, N tokens, S text tokens.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aiprod_core.components import denoising, schedulers
from aiprod_core.components.constants import computed_ahead, computed_once
from aiprod_core.components.guiders import GuidedModality
from aiprod_core.components.noisers import noisy_start
from aiprod_core.errors import InputError
from aiprod_core.kernels.apply import compile_blocks, enable_kernels
from aiprod_core.model.conv_blocks import VAEBlock
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from aiprod_core.parity import diffusers_peers as peers
from aiprod_core.quantization.fp8 import cast_linears
from aiprod_core.types import AV, LatentState
from aiprod_pipelines.bench.timing import (
    Paired,
    Rates,
    Recorder,
    Run,
    UnequalError,
    measure_rates,
    paired,
    peak_memory_mib,
)

Note = Callable[[str], None]
Save = Callable[[dict[str, Any]], None]  # called with the report so far after every case

PROMPT = "a red rubber ball bounces on the floor, with a thud at each bounce"

STEP_50M = TransformerConfig(
    num_attention_heads=8,
    attention_head_dim=64,
    audio_num_attention_heads=8,
    audio_attention_head_dim=32,
    num_layers=8,
    cross_attention_dim=512,
    audio_cross_attention_dim=256,
    caption_channels=512,
    frequencies_precision="float64",
    av_ca_timestep_scale_multiplier=1000,
)
STYLE_2_3: dict[str, Any] = {
    "caption_channels": None,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
}
STEP_300M = replace(
    STEP_50M,
    num_attention_heads=16,
    audio_num_attention_heads=16,
    num_layers=12,
    cross_attention_dim=1024,
    audio_cross_attention_dim=512,
)
STEP_NANO = replace(
    STEP_50M,
    **STYLE_2_3,
    attention_head_dim=32,
    audio_attention_head_dim=16,
    num_layers=6,
    cross_attention_dim=256,
    audio_cross_attention_dim=128,
)
STEP_19B = TransformerConfig(
    caption_channels=3840, frequencies_precision="float64", av_ca_timestep_scale_multiplier=1000
)

# The published layout of 2.0 at half its width.
VAE = VideoVAEConfig(
    encoder_blocks=(
        VAEBlock("res_x", 2),
        VAEBlock("compress_space_res", multiplier=2),
        VAEBlock("res_x", 2),
        VAEBlock("compress_time_res", multiplier=2),
        VAEBlock("res_x", 2),
        VAEBlock("compress_all_res", multiplier=2),
        VAEBlock("res_x", 2),
        VAEBlock("compress_all_res", multiplier=1),
        VAEBlock("res_x", 2),
    ),
    decoder_blocks=(
        VAEBlock("res_x", 3),
        VAEBlock("compress_all", multiplier=2, residual=True),
        VAEBlock("res_x", 3),
        VAEBlock("compress_all", multiplier=2, residual=True),
        VAEBlock("res_x", 3),
        VAEBlock("compress_all", multiplier=2, residual=True),
        VAEBlock("res_x", 3),
    ),
    latent_channels=64,
    encoder_base_channels=64,
    decoder_base_channels=64,
)


@dataclass(frozen=True)
class Settings:
    turns: int = 5
    threads: int | None = None
    clock: str = "wall"


class Sizes(NamedTuple):
    video: int
    audio: int
    text: int


class Case(NamedTuple):
    """One piece of work in both forms; `floor` names the ratio to its heavy operations alone."""

    ours: Run
    theirs: Run
    tolerance: float
    floor: str | None = None


def run_cpu(
    settings: Settings, only: Sequence[str] | None, note: Note, save: Save
) -> dict[str, Any]:
    """All CPU cases, or those named. Raises InputError without diffusers or for an unknown case."""
    try:
        import diffusers
    except ImportError as error:
        message = "aiprod bench compares with diffusers; run pip install diffusers"
        raise InputError(message) from error
    cases: dict[str, Callable[[], Case]] = {
        "transformer_step_nano": lambda: step_case(STEP_NANO, Sizes(112, 52, 64)),
        "transformer_step_50m": lambda: step_case(STEP_50M, Sizes(384, 50, 1024)),
        "transformer_step_300m": lambda: step_case(STEP_300M, Sizes(384, 50, 1024)),
        "denoise_loop_eager": lambda: loop_case(STEP_50M, floor="over_matmul_floor"),
        "denoise_loop_eager_23": lambda: loop_case(replace(STEP_50M, **STYLE_2_3)),
        "video_vae_decode": decode_case,
        "video_vae_encode": encode_case,
        "audio_decode": audio_case,
        "end_to_end_distilled": clip_case,
        "denoise_loop_compiled": lambda: loop_case(STEP_50M, is_compiled=True),
    }
    report, rates = _start(settings, torch.device("cpu"), torch.float32)
    report["machine"]["diffusers"] = diffusers.__version__
    _check_names(only, [*cases, "import"])
    for name, make in cases.items():
        if only is None or name in only:
            _run(report, rates, settings, name, make, note)
            save(report)
    if only is None or "import" in only:
        report["import_seconds"], report["import_runs_s"] = measure_import(settings)
        note(f"import: {report['import_seconds']:.2f} s")
        save(report)
    return report


def run_cuda(
    settings: Settings, only: Sequence[str] | None, note: Note, save: Save
) -> dict[str, Any]:
    """A step of a random 19B transformer in bfloat16 with kernels against none, and in FP8."""
    if not torch.cuda.is_available():
        raise InputError("aiprod bench --cuda needs a CUDA GPU, and PyTorch finds none here.")
    cases: dict[str, Callable[[], Case]] = {
        "transformer_step_19b_kernels": lambda: cuda_case(is_fp8=False),
        "transformer_step_19b_fp8": lambda: cuda_case(is_fp8=True),
    }
    _check_names(only, list(cases))
    report, rates = _start(settings, torch.device("cuda"), torch.bfloat16)
    report["machine"]["gpu"] = torch.cuda.get_device_name()
    for name, make in cases.items():
        if only is None or name in only:
            _run(report, rates, settings, name, make, note)
            save(report)
            torch.cuda.empty_cache()
    return report


def _check_names(only: Sequence[str] | None, names: list[str]) -> None:
    for name in only or ():
        if name not in names:
            raise InputError(f"no case {name}; there are {', '.join(names)}.")


def _start(
    settings: Settings, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any], Rates]:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    rates = measure_rates(device, dtype, settings.clock)
    report: dict[str, Any] = {
        "ratios": {},
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "clock": settings.clock,
            "turns": settings.turns,
            "gflop_per_s": round(rates.flops_per_s / 1e9, 1),
            "gb_per_s": round(rates.bytes_per_s / 1e9, 1),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "cases": {},
    }
    return report, rates


@torch.inference_mode()
def _run(
    report: dict[str, Any],
    rates: Rates,
    settings: Settings,
    name: str,
    make: Callable[[], Case],
    note: Note,
) -> None:
    case = make()
    try:
        times = paired(
            case.ours,
            case.theirs,
            turns=settings.turns,
            tolerance=case.tolerance,
            clock=settings.clock,
        )
    except UnequalError as error:
        raise InputError(f"{name}: {error}; no time was taken.") from error
    found = report["cases"][name] = times.to_json()
    found["peak_memory_mib"] = {
        "ours": peak_memory_mib(case.ours),
        "theirs": peak_memory_mib(case.theirs),
    }
    report["ratios"][name] = found["ratio"]
    if name.endswith("compiled"):
        note(_line(name, times))
        return
    with Recorder() as recorder:
        case.ours()
    # The floor is taken in turns with the work itself.
    floor = paired(
        lambda: _silent(recorder.replay), lambda: _silent(case.ours), turns=settings.turns,
        tolerance=0, clock=settings.clock,
    )  # fmt: skip
    median_s = statistics.median(times.ours_s)
    found["floor"] = {
        "seconds": round(statistics.median(floor.ours_s), 5),
        "over_floor": round(floor.ratio, 3),
        "gflop": round(recorder.flops / 1e9, 2),
        "gbytes": round(recorder.bytes / 1e9, 3),
        "share_of_roofline": round(rates.floor_s(recorder) / median_s, 3),
    }
    if case.floor is not None:
        found[case.floor] = round(floor.ratio, 3)
        # Of decoding and encoding the slower counts.
        report["ratios"][case.floor] = max(found[case.floor], report["ratios"].get(case.floor, 0.0))
    note(
        f"{_line(name, times)}; {floor.ratio:.2f}x its heavy operations alone, "
        f"{found['floor']['share_of_roofline']:.0%} of the roofline "
        f"({recorder.flops / 1e9:.1f} GFLOP, {recorder.bytes / 1e9:.2f} GB)"
    )


def _silent(run: Run) -> Tensor:
    run()
    return torch.ones(1)


def _line(name: str, times: Paired) -> str:
    return (
        f"{name}: {times.ratio:.2f}x ({statistics.median(times.ours_s):.4f} s against "
        f"{statistics.median(times.theirs_s):.4f} s, outputs within {times.max_error:.1e})"
    )


# The cases.


def random_transformer(config: TransformerConfig) -> Transformer:
    """With weights of the size that keeps activations near 1."""
    torch.manual_seed(0)
    transformer = Transformer(config).requires_grad_(False).eval()
    for parameter in transformer.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5)
    return transformer


def random_modality(config: TransformerConfig, is_audio: bool, tokens: int, text: int):
    width = config.audio_width if is_audio else config.width
    channels = config.audio_in_channels if is_audio else config.in_channels
    start = 10 * torch.rand(1, 1 if is_audio else 3, tokens, 1)
    latent = torch.zeros(1, tokens, channels)
    state = LatentState(latent, latent, torch.ones(1, tokens, 1), torch.cat((start, start + 1), -1))
    return GuidedModality(state, torch.randn(1, text, config.caption_channels or width))


class LoopInputs(NamedTuple):
    video: GuidedModality
    audio: GuidedModality
    noise: AV


def loop_inputs(config: TransformerConfig, sizes: Sizes) -> LoopInputs:
    torch.manual_seed(1)
    video = random_modality(config, False, sizes.video, sizes.text)
    audio = random_modality(config, True, sizes.audio, sizes.text)
    noise = AV(torch.randn_like(video.state.latent), torch.randn_like(audio.state.latent))
    return LoopInputs(video, audio, noise)


def our_loop(transformer: Transformer, inputs: LoopInputs, sigmas: Tensor) -> tuple[Any, Any]:
    with computed_once(transformer), computed_ahead(transformer, sigmas):
        x = denoising.denoise(
            transformer, sigmas, inputs.video, inputs.audio, noise_sampler=lambda _: inputs.noise
        )
    return x.video, x.audio


def their_loop(theirs: nn.Module, inputs: LoopInputs, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Euler around their transformer, called as their pipeline does."""
    x_v, x_a = inputs.noise.video, inputs.noise.audio
    assert x_v is not None and x_a is not None
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        timestep = torch.full((1,), 1000 * sigma)
        v_v, v_a = theirs(
            hidden_states=x_v,
            audio_hidden_states=x_a,
            encoder_hidden_states=inputs.video.context,
            audio_encoder_hidden_states=inputs.audio.context,
            timestep=timestep,
            sigma=timestep,
            video_coords=inputs.video.state.positions,
            audio_coords=inputs.audio.state.positions,
            use_cross_timestep=True,
            return_dict=False,
        )
        x_v, x_a = (x + v * (sigma_next - sigma) for x, v in ((x_v, v_v), (x_a, v_a)))
    return x_v, x_a


def loop_case(
    config: TransformerConfig, *, is_compiled: bool = False, floor: str | None = None
) -> Case:
    """The 8 steps of the distilled schedule."""
    ours = random_transformer(config)
    theirs: Any = peers.transformer_peer(ours)
    enable_kernels(ours)
    if is_compiled:
        compile_blocks(ours)
        theirs.compile_repeated_blocks()
    inputs = loop_inputs(config, Sizes(384, 50, 1024))
    sigmas = schedulers.table(schedulers.DISTILLED)
    return Case(
        lambda: our_loop(ours, inputs, sigmas),
        lambda: their_loop(theirs, inputs, sigmas),
        tolerance=1e-3,  # of float32 rounding over 8 steps of 8 layers
        floor=floor,
    )


def step_case(config: TransformerConfig, sizes: Sizes) -> Case:
    """One step by itself: nothing was kept from a step before."""
    ours = random_transformer(config)
    theirs = peers.transformer_peer(ours)
    enable_kernels(ours)
    inputs, sigmas = loop_inputs(config, sizes), torch.tensor([1.0, 0.9])
    return Case(
        lambda: our_loop(ours, inputs, sigmas),
        lambda: their_loop(theirs, inputs, sigmas),
        tolerance=1e-4,
    )


def random_vae() -> tuple[VideoEncoder, VideoDecoder, Any]:
    torch.manual_seed(0)
    encoder, decoder = VideoEncoder(VAE), VideoDecoder(VAE)
    for module in (encoder, decoder):
        enable_kernels(module.requires_grad_(False).eval())
    return encoder, decoder, peers.video_vae_peer(encoder, decoder)


def decode_case() -> Case:
    """33 frames of 128 x 128 from their latent."""
    _, decoder, theirs = random_vae()
    latent = torch.randn(1, VAE.latent_channels, 5, 4, 4)
    return Case(
        lambda: decoder(latent),
        lambda: theirs.decode(latent, causal=False, return_dict=False)[0],
        tolerance=1e-3,
        floor="over_conv_floor",
    )


def encode_case() -> Case:
    encoder, _, theirs = random_vae()
    pixels = torch.rand(1, 3, 33, 128, 128) * 2 - 1
    return Case(
        lambda: encoder.moments(pixels)[0],
        lambda: theirs.encode(pixels, return_dict=False)[0].mean,
        tolerance=1e-3,
        floor="over_conv_floor",
    )


def audio_case() -> Case:
    """Two seconds of nano's sound, latent to waveform."""
    from aiprod_pipelines.components import ModelSet

    models = ModelSet.open("nano", device="cpu")
    config = models.audio_config
    latent = torch.randn(1, config.z_channels, 50, config.latent_mel_bins)
    with models.audio_decoder() as decoder, models.vocoder() as vocoder:
        their_vae, their_vocoder = peers.audio_vae_peer(decoder), peers.vocoder_peer(vocoder)
    raw = decoder.per_channel_statistics.denormalise(latent)
    return Case(
        lambda: vocoder(decoder(latent)),
        lambda: their_vocoder(their_vae.decode(raw, return_dict=False)[0]),
        tolerance=1e-3,
    )


def clip_case() -> Case:
    """Nano's clip, warm, by the distilled schedule of 8 steps: prompt to frames and waveform."""
    from aiprod_pipelines import decoding, encoding, stages
    from aiprod_pipelines.components import ModelSet
    from aiprod_pipelines.progress import Progress
    from aiprod_pipelines.request import GenerationRequest, PerModality

    models = replace(ModelSet.open("nano", device="cpu"), cache=None)
    unguided = {
        "cfg_scale": PerModality(1.0, 1.0),
        "stg_scale": PerModality(0.0, 0.0),
        "modality_scale": PerModality(1.0, 1.0),
        "rescale_scale": PerModality(0.0, 0.0),
    }
    request = GenerationRequest(
        prompt=PROMPT, seed=1, schedule="distilled", num_inference_steps=8, **unguided
    ).resolved(models.profile)

    def ours() -> tuple[Tensor, Tensor]:
        progress = Progress()
        contexts = encoding.encode_prompts(models, request, progress)
        states = stages.initial_states(models, request)
        generators = stages.window_generators(models, request)
        windows = stages.denoise(models, request, states, contexts, generators, progress)
        latents = stages.finished(windows)
        assert latents.video is not None and latents.audio is not None
        frames = torch.cat(list(decoding.decode_video(models, latents.video, progress, tile="off")))
        sound = decoding.decode_audio(models, latents.audio, request.shape.duration_s, progress)
        return frames.float() / 255, torch.from_numpy(sound.samples)

    states = stages.initial_states(models, request)
    generator = torch.Generator().manual_seed(request.seed)
    noise = noisy_start(states.video, states.audio, generator=generator, noise_scale=1.0)
    theirs = _their_pipeline(models)
    # Their pipeline normalises a sound that it is given, noise or not.
    raw_sound = noise.audio * theirs.audio_vae.latents_std + theirs.audio_vae.latents_mean

    def their_clip() -> tuple[Tensor, Tensor]:
        with models.text_encoder() as encoder:
            hidden, mask = encoder.encode([request.text])
        padding = int((mask == 0).sum())
        made = theirs(
            prompt_embeds=hidden.roll(padding, dims=1),  # to the left, where they expect it
            prompt_attention_mask=mask.roll(padding, dims=1),
            height=request.shape.height,
            width=request.shape.width,
            num_frames=request.shape.num_frames,
            frame_rate=request.shape.fps,
            sigmas=schedulers.DISTILLED[:-1],
            guidance_scale=1.0,
            stg_scale=0.0,
            modality_scale=1.0,
            guidance_rescale=0.0,
            audio_guidance_scale=1.0,
            audio_modality_scale=1.0,
            latents=noise.video,
            audio_latents=raw_sound,
            output_type="pt",
            return_dict=False,
        )
        frames = made[0][0].movedim(1, -1).mul(255).round().div(255)  # (F, H, W, 3)
        samples = round(request.shape.duration_s * models.audio_config.sampling_rate)
        sound = made[1][0].float()
        return frames, nn.functional.pad(sound, (0, samples - sound.shape[-1]))

    # Rounding may put a pixel on either side of a byte: up to 1 % of what is brightest.
    return Case(ours, their_clip, tolerance=0.01)


def _their_pipeline(models: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline

    with (
        models.text_encoder() as encoder,
        models.text_projector() as projector,
        models.transformer() as transformer,
        models.video_decoder() as video_decoder,
        models.audio_decoder() as audio_decoder,
        models.vocoder() as vocoder,
    ):
        pipeline = LTX2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=peers.video_vae_peer(None, video_decoder),
            audio_vae=peers.audio_vae_peer(audio_decoder),
            text_encoder=None,  # pyright: ignore[reportArgumentType]
            tokenizer=None,  # pyright: ignore[reportArgumentType]
            connectors=peers.text_connectors_peer(
                projector, encoder.hidden_size, encoder.num_states
            ),
            transformer=peers.transformer_peer(transformer, models.profile.scale),
            vocoder=peers.vocoder_peer(vocoder),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cuda_case(*, is_fp8: bool) -> Case:
    """A step of 19B random weights: 121 frames of 768 x 512 (6,144 tokens), 1,024 text tokens.

    With the kernels against without; with `is_fp8` both sides hold the weights in 8 bits.
    """
    device, dtype = torch.device("cuda"), torch.bfloat16
    transformer = _random_on(device, dtype)
    if is_fp8:
        cast_linears(transformer)
    with torch.device(device):
        inputs = loop_inputs(STEP_19B, Sizes(6144, 126, 1024))
    sigmas = torch.tensor([1.0, 0.9])

    def ours() -> tuple[Any, Any]:
        with kernels(transformer):
            return our_loop(transformer, inputs, sigmas)

    return Case(ours, lambda: our_loop(transformer, inputs, sigmas), tolerance=0.05)


def _random_on(device: torch.device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        transformer = Transformer(STEP_19B).to(dtype).requires_grad_(False).eval()
    transformer.to_empty(device=device)
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5)
    return transformer


@contextmanager
def kernels(model: nn.Module) -> Iterator[None]:
    enabled = enable_kernels(model)
    try:
        yield
    finally:
        enabled.disable()


def measure_import(settings: Settings) -> tuple[float, list[float]]:
    """Seconds of `import aiprod_pipelines` and `aiprod --help` in new processes, the median."""
    code = "import aiprod_pipelines; from aiprod_pipelines.cli import main; main(['--help'])"

    def now() -> float:
        if settings.clock == "wall":
            return time.perf_counter()
        times = os.times()
        return times.children_user + times.children_system

    runs = []
    for _ in range(settings.turns + 1):  # the first fills the disk cache
        start = now()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        runs.append(round(now() - start, 3))
    return statistics.median(runs[1:]), runs
