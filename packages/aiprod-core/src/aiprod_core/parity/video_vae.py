"""Golden cases of the video VAE: encode, decode, and both in tiles."""

from typing import Any

import torch
from torch import Tensor, nn

from aiprod_core.loader.networks import load_video_decoder, load_video_encoder
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, to_frames
from aiprod_core.parity.case import Case
from aiprod_core.tiling import (
    AxisTiling,
    ByCount,
    BySize,
    Tiling,
    decode_chunks,
    encode_tiled,
)


def run(case: Case) -> dict[str, Tensor]:
    if "tilings" in case.params:
        return tiled_decode(case)
    if "tiling" in case.params:
        return tiled_encode(case)
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


def tiled_decode(case: Case) -> dict[str, Tensor]:
    decoder = load_video_decoder(case.checkpoint, dtype=torch.float32)
    latent = case.input("latent")
    out = {"out.untiled": decoder(latent)}
    for name, description in case.params["tilings"].items():
        chunks = list(decode_chunks(decoder, latent, read_tiling(description)))
        out[f"out.tiled_{name}"] = torch.cat(chunks, dim=2)
        out[f"out.chunks_{name}"] = torch.tensor([chunk.shape[2] for chunk in chunks])
    return out


def tiled_encode(case: Case) -> dict[str, Tensor]:
    encoder = load_video_encoder(case.checkpoint, dtype=torch.float32)
    video = case.input("video")
    tiling = read_tiling(case.params["tiling"])
    return {"out.untiled": encoder(video), "out.tiled": encode_tiled(encoder, video, tiling)}


def read_tiling(description: dict[str, Any]) -> Tiling:
    """A tile size or count of 0 leaves the axis whole."""

    def axis(name: str) -> AxisTiling:
        given = description.get(name)
        if given is None:
            return None
        if description["by"] == "count":
            return ByCount(max(1, given["num_tiles"]), given["overlap"])
        return BySize(given["tile_size"], given["overlap"]) if given["tile_size"] else None

    return Tiling(axis("frames"), axis("height"), axis("width"))


def keep_intermediates(
    case: Case,
    network: VideoEncoder | VideoDecoder,
    stem: str,
    blocks: nn.ModuleList,
    out: dict[str, Tensor],
) -> None:
    """Lets the next call write what the case wants of the blocks' outputs, corners for slices."""
    modules: dict[str, nn.Module] = {"conv_in": network.conv_in, "conv_out": network.conv_out}
    modules |= {f"{stem}{i}": block for i, block in enumerate(blocks)}
    for name, module in modules.items():
        for key in {f"mid.{name}", f"mid.{name}_slice"} & case.tensors.keys():
            corner = tuple(slice(size) for size in case.tensors[key].shape)

            def keep(
                _: nn.Module, __: object, y: Tensor, key: str = key, corner: tuple = corner
            ) -> None:
                out[key] = y[corner]

            module.register_forward_hook(keep)
