"""Golden noising. An output's name ends in its noise scale."""

from torch import Tensor

from aiprod_core.components.noisers import add_noise
from aiprod_core.parity.case import Case
from aiprod_core.types import LatentState


def run(case: Case) -> dict[str, Tensor]:
    latent = case.input("latent")
    state = LatentState(
        latent=latent,
        clean_latent=case.input("clean"),
        denoise_mask=case.input("denoise_mask"),
        positions=latent.new_zeros(latent.shape[0], 1, latent.shape[1], 2),
    )
    prefix = "out.scale"
    return {
        key: add_noise(state, case.input("noise"), float(key.removeprefix(prefix)))
        for key in case.tensors
        if key.startswith(prefix)
    }
