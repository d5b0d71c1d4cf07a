"""Golden cases of the latent upsamplers, with and without the VAE's statistics around them."""

import torch
from torch import Tensor

from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.networks import load_upsampler, load_video_encoder
from aiprod_core.model.upsampler import upsample_latent
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Tensor]:
    upsampler = load_upsampler(case.checkpoint, dtype=torch.float32)
    latent = case.input("latent")
    out = {"out.raw": upsampler(latent)}
    if "vae_checkpoint" in case.params:
        vae = open_checkpoint(case.path(case.params["vae_checkpoint"]))
        statistics = load_video_encoder(vae, dtype=torch.float32).per_channel_statistics
        out["out.with_vae_stats"] = upsample_latent(upsampler, latent, statistics)
    return out
