"""Turns training runs into checkpoints in LTX-2's format.

    python -m aiprod_trainer.export codecs --video runs/video_codec --audio runs/audio_codec \\
        --vocoder runs/vocoder --out runs/codecs.safetensors
    python -m aiprod_trainer.export model --codecs runs/codecs.safetensors \\
        --transformer runs/transformer --generation configs/nano/generation.yaml \\
        --out nano-dev.safetensors
    python -m aiprod_trainer.export upsampler --run runs/spatial --out FILE
    python -m aiprod_trainer.export lora --run runs/lora --strength 1.5 --out FILE
    python -m aiprod_trainer.export scores --model nano-dev.safetensors --scores scores.json

`codecs` also measures the statistics that normalise the latents, on clips of the world. Averaged
weights are exported, in float16 unless asked otherwise.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import open_checkpoint, save_checkpoint
from aiprod_core.loader.networks import (
    load_audio_decoder,
    load_audio_encoder,
    load_video_decoder,
    load_video_encoder,
    load_vocoder,
)
from aiprod_core.model.audio_vae import AudioVAEConfig
from aiprod_core.model.mel import log_mel
from aiprod_core.model.text_connector import TextConfig, TextProjector
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.upsampler import LatentUpsampler, UpsamplerConfig
from aiprod_core.model.video_vae import VideoVAEConfig
from aiprod_core.model.vocoder import Vocoder, VocoderConfig
from aiprod_pipelines.request import ModelProfile
from aiprod_trainer.checkpoints import published_file
from aiprod_trainer.run import read_state
from aiprod_trainer.train_audio_codec import AudioVAE
from aiprod_trainer.train_base import TextToClip, start_from
from aiprod_trainer.train_video_codec import VideoVAE
from aiprod_trainer.world.render import render
from aiprod_trainer.world.scene import WORLDS, sample_scene
from aiprod_trainer.world.sound import synthesise

MODEL_VERSION = "2.3.0"  # nano follows LTX-2.3: gated attention, modulated text, own projections


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    codecs = commands.add_parser("codecs", help="both codecs and the vocoder in one file")
    codecs.add_argument("--video", type=Path, required=True, help="run of train_video_codec")
    codecs.add_argument("--audio", type=Path, help="run of train_audio_codec")
    codecs.add_argument("--vocoder", type=Path, help="run of train_vocoder")
    codecs.add_argument(
        "--sound-of",
        type=Path,
        metavar="CHECKPOINT",
        help="instead of both: a checkpoint whose sound is kept, with the statistics of the "
        "video latents, for a video run that went on from it and kept its latents",
    )
    codecs.add_argument("--clips", type=int, default=256, help="clips that give the statistics")
    model = commands.add_parser("model", help="codecs, transformer and text projection")
    model.add_argument("--codecs", type=Path, required=True)
    model.add_argument("--transformer", type=Path, required=True, help="run of train_base")
    model.add_argument(
        "--vocoder", type=Path, help="run of train_vocoder, instead of the codecs' vocoder"
    )
    model.add_argument(
        "--generation", type=Path, required=True, help="YAML with the settings to generate with"
    )
    model.add_argument(
        "--world", choices=WORLDS, default="v1", help="that it was trained on; `eval` asks for it"
    )
    model.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="how far to go from the checkpoint that the run started from, 0 to 1; halfway a model "
        "often keeps what it knew beside what it learnt",
    )
    upsampler = commands.add_parser("upsampler", help="a latent upsampler, in a file of its own")
    upsampler.add_argument("--run", type=Path, required=True, help="run of train_upsampler")
    lora = commands.add_parser(
        "lora", help="a LoRA of `aiprod train`, at the strength that is best"
    )
    lora.add_argument("--run", type=Path, required=True, help="run of aiprod train")
    lora.add_argument(
        "--strength", type=float, default=1.0, help="that will be 1; `--lora FILE:1.5` tries one"
    )
    lora.add_argument("--out", type=Path, required=True)
    scores = commands.add_parser(
        "scores", help="write what `aiprod eval --json` found into a model's header"
    )
    scores.add_argument("--model", type=Path, required=True, help="the file that is changed")
    scores.add_argument("--scores", type=Path, required=True, help="what `eval` wrote")
    for command in (codecs, model, upsampler):
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    arguments = parser.parse_args(argv)
    try:
        {
            "codecs": export_codecs,
            "model": export_model,
            "upsampler": export_upsampler,
            "lora": export_lora,
            "scores": write_scores,
        }[arguments.command](arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def export_codecs(arguments: argparse.Namespace) -> None:
    """Writes video VAE, audio VAE and vocoder with the world's latent statistics.

    Raises InputError where the sound comes from nowhere or from two places.
    """
    if (arguments.sound_of is None) == (arguments.audio is None or arguments.vocoder is None):
        raise InputError("export codecs: give --audio and --vocoder, or --sound-of CHECKPOINT.")
    video_config = _config(arguments.video)
    video = VideoVAE(VideoVAEConfig.from_metadata(video_config["vae"]))
    video.load_state_dict(read_state(arguments.video / "state.safetensors", "average"))
    if arguments.sound_of is not None:
        start = open_checkpoint(arguments.sound_of)
        sections = {name: start.section(name) for name in ("audio_vae", "vocoder")}
        audio_encoder, audio_decoder = load_audio_encoder(start), load_audio_decoder(start)
        vocoder = load_vocoder(start)
    else:
        sections = {
            "audio_vae": _config(arguments.audio)["audio_vae"],
            "vocoder": _config(arguments.vocoder)["vocoder"],
        }
        audio = AudioVAE(AudioVAEConfig.from_metadata(sections["audio_vae"]))
        audio.load_state_dict(read_state(arguments.audio / "state.safetensors", "average"))
        vocoder = _trained_vocoder(arguments.vocoder)
        _measure_statistics(video, audio, video_config, arguments.clips)
        audio_encoder, audio_decoder = audio.encoder, audio.decoder
    save_checkpoint(
        arguments.out,
        [
            (key_maps.VIDEO_ENCODER, video.encoder),
            (key_maps.VIDEO_DECODER, video.decoder),
            (key_maps.AUDIO_ENCODER, audio_encoder),
            (key_maps.AUDIO_DECODER, audio_decoder),
            (key_maps.VOCODER, vocoder),
        ],
        {
            "model_version": MODEL_VERSION,
            "config": {
                "vae": video_config["vae"],
                **sections,
                "text_encoder": {"type": "minilm", "max_length": 64},
            },
        },
        dtype=getattr(torch, arguments.dtype),
    )


def export_model(arguments: argparse.Namespace) -> None:
    """Writes the whole model: the codecs' file plus transformer and text projection."""
    codecs = open_checkpoint(arguments.codecs)
    training = _config(arguments.transformer)
    generation = yaml.safe_load(arguments.generation.read_text())
    scale = VideoVAEConfig.from_metadata(codecs.section("vae")).scale
    ModelProfile(scale).replaced(generation)  # refuses a setting that no request has
    state = read_state(arguments.transformer / "state.safetensors", "average")
    model = TextToClip(
        Transformer(TransformerConfig.from_metadata(training["transformer"])),
        TextProjector(_text_config(training["transformer"], state)),
    )
    model.load_state_dict(state)
    if arguments.share != 1:
        _turn_back(model, training.get("start"), arguments.share)
    config = codecs.config | {
        "transformer": training["transformer"],
        "text_encoder": training["text_encoder"],
        "scheduler": {"_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000},
    }
    vocoder = load_vocoder(codecs)
    if arguments.vocoder is not None:
        vocoder = _trained_vocoder(arguments.vocoder)
        config["vocoder"] = _config(arguments.vocoder)["vocoder"]
    save_checkpoint(
        arguments.out,
        [
            (key_maps.VIDEO_ENCODER, load_video_encoder(codecs)),
            (key_maps.VIDEO_DECODER, load_video_decoder(codecs)),
            (key_maps.AUDIO_ENCODER, load_audio_encoder(codecs)),
            (key_maps.AUDIO_DECODER, load_audio_decoder(codecs)),
            (key_maps.VOCODER, vocoder),
            (key_maps.TRANSFORMER, model.transformer),
            (key_maps.TEXT_PROJECTOR, model.projector),
        ],
        {
            "model_version": MODEL_VERSION,
            "config": config,
            "generation": generation,
            "world": arguments.world,
        },
        dtype=getattr(torch, arguments.dtype),
    )


def _trained_vocoder(run: Path) -> Vocoder:
    vocoder = Vocoder(VocoderConfig.from_metadata(_config(run)["vocoder"]))
    vocoder.load_state_dict(read_state(run / "state.safetensors", "average"))
    return vocoder


@torch.no_grad()
def _turn_back(model: TextToClip, start: str | None, share: float) -> None:
    """Weights between those a run started from and those it ended with (Wortsman et al., 2022,
    arXiv:2109.01903): the further training's gains with less of its losses."""
    if not 0 <= share <= 1:
        raise InputError(f"--share {share} is not between 0 and 1")
    if start is None:
        raise InputError("--share needs a run that went on from a checkpoint (its `start`)")
    before = copy.deepcopy(model)
    start_from(before, Path(start))
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        new.copy_(old.lerp(new, share))


def export_upsampler(arguments: argparse.Namespace) -> None:
    """Writes an upsampler; its metadata's config is flat, as published."""
    config = UpsamplerConfig.from_metadata(_config(arguments.run)["upsampler"])
    upsampler = LatentUpsampler(config)
    upsampler.load_state_dict(read_state(arguments.run / "state.safetensors", "average"))
    save_checkpoint(
        arguments.out,
        [(key_maps.UPSAMPLER, upsampler)],
        {"model_version": MODEL_VERSION, "config": config.to_metadata()},
        dtype=getattr(torch, arguments.dtype),
    )


def export_lora(arguments: argparse.Namespace) -> None:
    """Writes a run's last LoRA, multiplied by a strength. Raises InputError where there is none."""
    tensors, metadata = _read(published_file(arguments.run))
    for name in tensors:
        if name.endswith("lora_B.weight"):  # the product of both is what is added
            tensors[name] = (tensors[name].float() * arguments.strength).to(tensors[name].dtype)
    _replace(arguments.out, tensors, metadata)


def write_scores(arguments: argparse.Namespace) -> None:
    """Puts an evaluation's single figures into the header, for `aiprod models show`."""
    try:
        found = json.loads(arguments.scores.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{arguments.scores}: {error}; give what `eval --json` wrote.") from error
    tensors, metadata = _read(arguments.model)
    found.pop("model", None)  # where the file lay then
    scores = {key: value for key, value in found.items() if isinstance(value, int | float | str)}
    metadata["scores"] = json.dumps(scores)
    _replace(arguments.model, tensors, metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return load_file(path), metadata


def _replace(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)


def _measure_statistics(
    video: VideoVAE, audio: AudioVAE, video_config: dict[str, Any], count: int
) -> None:
    """Sets per-channel mean and deviation of the latents of `count` clips, in both halves."""
    rng = np.random.default_rng(2**20)
    video_latents, audio_latents = [], []
    for _ in range(count):
        scene = sample_scene(rng, world=video_config["world"])
        frames = torch.from_numpy(render(scene, video_config["size"]))
        pixels = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        video_latents.append(video.encoder.moments(pixels)[0])
        mel = log_mel(torch.from_numpy(synthesise(scene))[None], audio.config)
        audio_latents.append(audio.encoder.moments(mel)[0])
    latents = torch.cat(video_latents)
    scales = channel_scales(video.decoder, latents[:8])
    _set_statistics(video, latents.transpose(0, 1).flatten(1), scales)
    tokens = torch.cat(audio_latents).permute(0, 2, 1, 3).flatten(2)  # (B, T, z bins)
    values = tokens.flatten(0, 1).T
    # Channels that hardly vary are not blown up to unit deviation: they say nothing to the
    # decoder that its training noise has not drowned.
    deviation = values.std(dim=1)
    _set_statistics(audio, values, (deviation / (0.5 * deviation.mean())).clamp_max(1))


def channel_scales(decoder: nn.Module, latents: Tensor) -> Tensor:
    """(channels,) deviations that the latents (B, channels, F, H, W) get for the transformer.

    The square root of what a channel changes in the picture when it is levelled to its mean,
    mean square 1. Noise then hides what matters least first, so that a clip's layout is settled
    before its details, and the transformer's error goes where it shows least.
    """
    whole = decoder(latents)
    change = []
    for channel in range(latents.shape[1]):
        levelled = latents.clone()
        levelled[:, channel] = latents[:, channel].mean()
        change.append((decoder(levelled) - whole).square().mean().sqrt())
    scales = torch.stack(change).sqrt()
    return (scales / scales.square().mean().sqrt()).clamp_min(0.2)


def _set_statistics(codec: nn.Module, values: Tensor, scales: Tensor) -> None:
    """Normalised values (channels, samples) will have mean 0 and deviations `scales`."""
    for half in (codec.encoder, codec.decoder):
        buffers = half.per_channel_statistics._buffers
        buffers["mean-of-means"] = values.mean(dim=1)
        buffers["std-of-means"] = values.std(dim=1) / scales


def _text_config(section: dict[str, Any], state: dict[str, Tensor]) -> TextConfig:
    features = state["projector.feature_extractor.video_aggregate_embed.weight"].shape[1]
    return TextConfig.from_metadata(section, hidden_size=features, num_states=1)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; give the folder of a training run.")
    return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
