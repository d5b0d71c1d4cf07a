"""Published names to ours: one table per component, both generations.

Our modules spell their parameters as the published checkpoints do, so a map is a list of prefixes.
"""

from aiprod_core.loader.checkpoint import KeyMap

TRANSFORMER = KeyMap(
    prefixes=(("model.diffusion_model.", ""),),
    ignored=("video_embeddings_connector.", "audio_embeddings_connector."),
)

# Feature extractor and both connectors, under TextProjector's own member names.
TEXT_PROJECTOR = KeyMap(
    prefixes=(
        ("text_embedding_projection.", "feature_extractor."),
        ("model.diffusion_model.video_embeddings_connector.", "video_connector."),
        ("model.diffusion_model.audio_embeddings_connector.", "audio_connector."),
    )
)

# The published statistics come with three more that nothing uses.
_EXTRA_STATISTICS = (
    "per_channel_statistics.mean-of-stds",
    "per_channel_statistics.mean-of-stds_over_std-of-means",
    "per_channel_statistics.channel",
)

_VIDEO_STATISTICS = (
    ("vae.per_channel_statistics.", "per_channel_statistics."),
    ("per_channel_statistics.", "per_channel_statistics."),
)

# A stand-alone video VAE file may leave out the "vae." prefix.
VIDEO_ENCODER = KeyMap(
    (("vae.encoder.", ""), ("encoder.", ""), *_VIDEO_STATISTICS), _EXTRA_STATISTICS
)
VIDEO_DECODER = KeyMap(
    (("vae.decoder.", ""), ("decoder.", ""), *_VIDEO_STATISTICS), _EXTRA_STATISTICS
)

_AUDIO_STATISTICS = (("audio_vae.per_channel_statistics.", "per_channel_statistics."),)
AUDIO_ENCODER = KeyMap((("audio_vae.encoder.", ""), *_AUDIO_STATISTICS), _EXTRA_STATISTICS)
AUDIO_DECODER = KeyMap((("audio_vae.decoder.", ""), *_AUDIO_STATISTICS), _EXTRA_STATISTICS)

# Only the first "vocoder." goes: the 2.3 file has vocoder.vocoder., vocoder.bwe_generator., ...
# The inverse transform that is stored with the forward one is never used.
VOCODER = KeyMap((("vocoder.", ""),), ignored=("stft_fn.inverse_basis",))

UPSAMPLER = KeyMap((("", ""),))
DURATION_HEAD = KeyMap((("duration_head.", ""),))
REWARD = KeyMap((("reward.", ""),))
