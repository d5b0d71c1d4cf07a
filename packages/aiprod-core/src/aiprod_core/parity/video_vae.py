"""Golden cases of the video VAE: encode, decode, and both in tiles."""

import torch
from torch import Tensor, nn

from aiprod_core.loader.networks import load_video_decoder, load_video_encoder
from aiprod_core.model.video_vae import to_frames
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if "in.video" in case.tensors or "in.image" in case.tensors:
        out |= encode(case)
    if any(key.startswith("in.latent") for key in case.tensors):
        out |= decode(case)
    return out


def encode(case: Case) -> dict[str, Tensor]:
    encoder = load_video_encoder(case.checkpoint, dtype=torch.float32)
    out: dict[str, Tensor] = {}
    image, video = case.optional_input("image"), case.optional_input("video")
    if image is not None:
        out["out.image_latent"] = encoder(image)
    if video is None:
        return out
    if "out.latent_cropped" in case.tensors:
        on_grid = (case.tensors["out.latent_cropped"].shape[2] - 1) * encoder.scale.time + 1
        out["out.latent_cropped"] = encoder(video[:, :, : on_grid + 1])  # the last one is dropped
    keep_intermediates(case, encoder, "down", encoder.down_blocks, out)
    out["out.latent"] = encoder(video)
    return out


def decode(case: Case) -> dict[str, Tensor]:
    decoder = load_video_decoder(case.checkpoint, dtype=torch.float32)
    timestep = case.optional_input("timestep")
    noise = [case.tensors[key] for key in sorted(case.tensors) if key.startswith("in.noise")]
    out: dict[str, Tensor] = {}
    if "in.latent_1f" in case.tensors:
        out["out.video_1f"] = decoder(case.input("latent_1f"), timestep=timestep, noise=noise)
    if "out.video_default_t" in case.tensors:
        out["out.video_default_t"] = decoder(case.input("latent"), noise=noise)
    keep_intermediates(case, decoder, "up", decoder.up_blocks, out)
    video = decoder(case.input("latent"), timestep=timestep, noise=noise)
    return out | {"out.video": video, "out.frames_first": to_frames(video)[:, 0]}


def keep_intermediates(
    case: Case, network: nn.Module, stem: str, blocks: nn.ModuleList, out: dict[str, Tensor]
) -> None:
    """Lets the next call write what the case wants of the blocks' outputs, corners for slices."""
    modules = {"conv_in": network.conv_in, "conv_out": network.conv_out}
    modules |= {f"{stem}{i}": block for i, block in enumerate(blocks)}
    for name, module in modules.items():
        for key in {f"mid.{name}", f"mid.{name}_slice"} & case.tensors.keys():
            corner = tuple(slice(size) for size in case.tensors[key].shape)

            def keep(
                _: nn.Module, __: object, y: Tensor, key: str = key, corner: tuple = corner
            ) -> None:
                out[key] = y[corner]

            module.register_forward_hook(keep)
