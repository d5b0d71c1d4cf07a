"""Golden cases of the transformer: velocities and clean estimates of one call."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aiprod_core.loader.networks import load_transformer
from aiprod_core.model.transformer import Perturbations, Transformer, denoised_from_velocity
from aiprod_core.parity.case import Case
from aiprod_core.types import Modality


def run(case: Case) -> dict[str, Tensor]:
    transformer = load_transformer(
        case.checkpoint, dtype=torch.float32, audio_only="audio-only-model" in case.name
    )
    out: dict[str, Tensor] = {}
    keep_intermediates(transformer, out)
    video, audio = read_modality(case, "video"), read_modality(case, "audio")
    velocities = transformer(video, audio, read_perturbations(case))
    for name, modality, velocity in zip(
        ("video", "audio"), (video, audio), velocities, strict=True
    ):
        if modality is not None and velocity is not None:
            out[f"out.{name}.velocity"] = velocity
            out[f"out.{name}.denoised"] = denoised_from_velocity(
                modality.latent, velocity, modality.timesteps
            )
    return out


def read_modality(case: Case, name: str) -> Modality | None:
    """The case's "in.video.*" or "in.audio.*", or None where the case leaves it out."""
    enabled = case.params.get(f"{name}_enabled", f"in.{name}.latent" in case.tensors)
    if enabled is None or f"in.{name}.latent" not in case.tensors:
        return None
    return Modality(
        latent=case.input(f"{name}.latent"),
        sigma=case.input(f"{name}.sigma"),
        timesteps=case.input(f"{name}.timesteps"),
        positions=case.input(f"{name}.positions"),
        context=case.input(f"{name}.context"),
        context_mask=case.optional_input(f"{name}.context_mask"),
        attention_mask=case.optional_input(f"{name}.attention_mask"),
        keyframe_marker=case.optional_input(f"{name}.keyframes_mask"),
        enabled=bool(enabled),
    )


def read_perturbations(case: Case) -> Perturbations | None:
    samples = case.params.get("perturbations")
    if samples is None:
        return None
    return Perturbations(tuple(dict(sample) for sample in samples))


def keep_intermediates(transformer: Transformer, out: dict[str, Tensor]) -> None:
    """Lets the next call write the "mid.*" that locate a difference."""

    def keep(module: nn.Module | None, name: str, pick: Callable[..., Tensor]) -> None:
        if module is not None:
            module.register_forward_hook(
                lambda _module, _inputs, output: out.__setitem__(name, pick(output))
            )

    parts = dict(transformer.named_children())
    for name, prefix in (("video", ""), ("audio", "audio_")):
        for mid, part in {
            "adaln": f"{prefix}adaln_single",
            "prompt_adaln": f"{prefix}prompt_adaln_single",
            "cross_scale_shift": f"av_ca_{name}_scale_shift_adaln_single",
            "cross_gate": f"av_ca_{'a2v' if name == 'video' else 'v2a'}_gate_adaln_single",
        }.items():
            keep(parts.get(part), f"mid.{name}.{mid}", lambda output: output[0].flatten(2))
        keep(
            parts.get(f"{prefix}adaln_single"),
            f"mid.{name}.embedded_timestep",
            lambda output: output[1],
        )
        keep(parts.get(f"{prefix}caption_projection"), f"mid.{name}.context", lambda output: output)
        if f"{prefix}patchify_proj" in parts:
            keep(parts[f"{prefix}patchify_proj"], f"mid.{name}.patchify", lambda output: output)
    if transformer.config.is_joint:
        first = transformer.transformer_blocks[0]
        keep(first, "mid.video.block0", lambda output: output[0])
        keep(first, "mid.audio.block0", lambda output: output[1])
