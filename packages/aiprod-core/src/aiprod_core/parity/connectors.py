"""Feature extraction and connectors: hidden states and mask to contexts."""

import torch
from torch import Tensor

from aiprod_core.loader.networks import load_text_projector
from aiprod_core.model.text_connector import tokens_first
from aiprod_core.parity.case import Case


def run(case: Case) -> dict[str, Tensor]:
    projector = load_text_projector(case.checkpoint, dtype=torch.float32)
    hidden_states, mask = case.input("hidden_states"), case.input("attention_mask")
    video_features, audio_features = projector.feature_extractor(hidden_states, mask)
    video, audio, out_mask = projector(hidden_states, mask)
    return {
        "mid.video_features": video_features,
        "mid.audio_features": audio_features,
        "mid.sort_index": tokens_first(mask),
        "out.video": video,
        "out.audio": audio,
        "out.mask": out_mask,
    }
