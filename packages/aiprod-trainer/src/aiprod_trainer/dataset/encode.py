"""Parts of a data set: clips to latents, captions to text features, by the model's own networks.

A part is written whole, first with latents (`encode_latents`), then once more with its text
(`encode_text`); the layout is described in `aiprod_trainer.data`. Its header says from what each
was made, so that a run that was killed knows what is left to do.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.model.text_encoder import GEMMA_HUB_ID
from aiprod_core.types import ScaleFactors, VideoShape
from aiprod_pipelines import encoding, media, stages
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.recipe import contents_of, file_identity, text_encoder_identity
from aiprod_trainer.data import TEXT
from aiprod_trainer.dataset import clips
from aiprod_trainer.dataset.clips import Settings
from aiprod_trainer.dataset.journal import write_whole
from aiprod_trainer.dataset.tables import Clip

# Hidden states are stored up to this size a token, so that the projection can be trained too; what
# the projection makes of larger ones (Gemma's are 376 kB) is stored in their place.
HIDDEN_BYTES = 16 * 2**10
TEXTS_AT_ONCE = 8


@functools.lru_cache(maxsize=1)
def open_models(
    model: str, device: str | None, dtype: str | None, text_encoder: str | None = GEMMA_HUB_ID
) -> ModelSet:
    """The model, which keeps what it has loaded: a part needs the same networks as the one before.

    Latents need no text encoder; the default only keeps headers that ask for one from refusing.
    """
    models = ModelSet.open(model, text_encoder=text_encoder, device=device, dtype=dtype)
    models.keeps_loaded = True
    return models


def model_identity(models: ModelSet) -> dict[str, Any]:
    """What latents depend on: the files' contents, and the precision."""
    return {
        "files": [contents_of(file_identity(path)) for path in models.checkpoint.paths],
        "dtype": str(models.dtype).removeprefix("torch."),
    }


def encoder_identity(models: ModelSet) -> list[str]:
    """What text features depend on beside the model: the text encoder's files, or its hub id."""
    identity = text_encoder_identity(models.text_encoder_source)
    return [contents_of(file) for file in identity["files"]] or [str(identity["source"])]


def check_grid(models: ModelSet, settings: Settings) -> None:
    """Raises InputError for a bucket, or a reference in it, that is off the model's grid."""
    channels, scale = models.transformer_config.in_channels, models.profile.scale
    down, every = settings.reference_downscale_factor, settings.reference_temporal_scale_factor
    for bucket in settings.buckets:
        shape = VideoShape(1, bucket.num_frames, bucket.height, bucket.width, settings.fps)
        try:
            shape.latent(channels, scale)
            # A reference that is smaller by a whole factor must lie on the grid too.
            shape.latent(
                channels,
                ScaleFactors(scale.time * every, scale.height * down, scale.width * down),
            )
        except InputError as error:
            raise InputError(f"bucket {bucket}: {error}") from None


# The two passes. Both are tasks of `run_tasks`.


@torch.inference_mode()
def encode_latents(task: dict[str, Any]) -> bool:
    """{model, device, dtype, settings, path, clips, buckets, stamp} to a part without its text."""
    models = open_models(task["model"], task["device"], task["dtype"])
    settings = Settings.from_json(task["settings"])
    rows: list[dict[str, Tensor]] = []
    for values, bucket in zip(task["clips"], task["buckets"], strict=True):
        rows.append(latents_of(models, Clip.from_json(values), settings, bucket))
    tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    write_part(Path(task["path"]), tensors, {"latents": task["stamp"]}, settings.fps)
    return True


def latents_of(
    models: ModelSet, clip: Clip, settings: Settings, bucket_name: str
) -> dict[str, Tensor]:
    """All that a clip gives but its text, (1, ...) each, by the names of the layout, in float16."""
    [bucket] = clips.parse_buckets(bucket_name)
    progress, scale = Progress(), models.profile.scale
    shape = VideoShape(1, bucket.num_frames, bucket.height, bucket.width, settings.fps)
    found: dict[str, Tensor] = {}
    frames = None
    if "video" in clip.files:
        frames = clips.read_pixels(clip, settings, bucket)
        found["video"] = encoding.encode_frames(models, frames, progress)
    for name, reference in clips.read_references(clip, settings, bucket, frames).items():
        found[name] = encoding.encode_frames(models, reference, progress)
    if "video_mask" in clip.files:
        mask = torch.from_numpy(clips.read_mask(clip, settings, bucket))
        found["video_masks"] = mask_on_grid(mask, scale)[None]
    if settings.with_audio:
        length = stages.audio_grid(models, shape).shape.frames
        if "audio" in clip.files or media.probe(clip.files["video"]).audio_codec:
            sound = clips.read_sound(clip, shape.duration_s)
            found["audio"] = encoding.encode_audio(models, sound, length, progress)
        if "reference_audio" in clip.files:
            sound = media.read_span(clip.files["reference_audio"], 0.0, shape.duration_s)
            found["reference_audio_latents"] = encoding.encode_audio(
                models, sound, length, progress
            )
        if "audio_mask" in clip.files:
            sound = media.read_span(clip.files["audio_mask"], 0.0, shape.duration_s)
            found["audio_masks"] = mask_on_time(torch.from_numpy(sound.samples), length)[None]
    return {name: tensor.half().cpu() for name, tensor in found.items()}


@torch.inference_mode()
def encode_text(task: dict[str, Any]) -> bool:
    """{model, device, dtype, text_encoder, path, captions, stamp}: gives a part its text.

    `captions` has a list for each clip; None makes the file of the empty caption. Latents are taken
    over as they are.
    """
    path, captions = Path(task["path"]), task["captions"]
    models = open_models(task["model"], task["device"], task["dtype"], task["text_encoder"])
    if captions is None:
        text = text_features(models, [""])
        del text["lengths"]
        write_part(path, text, {"text": task["stamp"]})
        return True
    text = text_features(models, [caption for group in captions for caption in group])
    latents = {k: v for k, v in load_file(path).items() if k not in (*TEXT, "lengths")}
    lines = [json.dumps(group, ensure_ascii=False) + "\n" for group in captions]
    write_whole(path.with_suffix(".jsonl"), "".join(lines).encode())
    metadata = read_metadata(path)
    stamps = json.loads(metadata["stamps"]) | {"text": task["stamp"]}
    write_part(path, latents | text, stamps, float(metadata["fps"]))
    return True


def text_features(models: ModelSet, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts to the layout's text tensors: token features without padding, and `lengths`."""
    found: dict[str, list[Tensor]] = {}
    lengths = []
    with models.text_encoder() as encoder, models.text_projector() as projector:
        is_stored_whole = encoder.hidden_size * encoder.num_states * 2 <= HIDDEN_BYTES
        at_once = TEXTS_AT_ONCE if is_stored_whole else 1  # one padded text of Gemma's: 385 MB
        for start in range(0, len(texts), at_once):
            hidden, mask = encoder.encode(list(texts[start : start + at_once]))
            is_token = mask.bool()
            if is_stored_whole:
                features = {"hidden": hidden}
            else:
                extractor = projector.feature_extractor
                hidden, mask = hidden.to(models.device, models.dtype), mask.to(models.device)
                video, audio = extractor(hidden, mask)
                features = {"video_features": video}
                if extractor.has_own_projections:
                    features["audio_features"] = audio
            for name, tensor in features.items():
                # Gemma's range is that of bfloat16, in which it computes; MiniLM's is small.
                dtype = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float16
                rows = tensor[is_token.to(tensor.device)].to("cpu", dtype)
                found.setdefault(name, []).append(rows)
            lengths.append(mask.sum(dim=1).int().cpu())
    return {name: torch.cat(rows) for name, rows in found.items()} | {"lengths": torch.cat(lengths)}


def mask_on_grid(mask: Tensor, scale: ScaleFactors) -> Tensor:
    """Pixels (frames, height, width), True = given, to latents (F, H, W).

    A latent is given where all that it covers is: one pixel to generate needs the whole latent.
    """
    first = mask[:1].repeat_interleave(scale.time, dim=0)  # the first latent is a single frame
    blocks = rearrange(
        torch.cat([first, mask[1:]]),
        "(f t) (h r) (w c) -> f h w (t r c)",
        t=scale.time,
        r=scale.height,
        c=scale.width,
    )
    return blocks.all(dim=-1)


def mask_on_time(samples: Tensor, length: int) -> Tensor:
    """A mask as sound (channels, samples), above one half = given, to latent frames (T,)."""
    is_given = samples.amax(dim=0) > 0.5
    edges = torch.linspace(0, len(is_given), length + 1).round().int()
    return torch.stack([is_given[edges[i] : edges[i + 1]].all() for i in range(length)])


# A part's file.


def stamp(*what: Any) -> str:
    """A short hash of JSON values, by which a part knows what it was made from."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def read_stamps(path: Path) -> dict[str, str]:
    """The stamps of what a file holds; none without a file."""
    return json.loads(read_metadata(path).get("stamps", "{}")) if path.is_file() else {}


def read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: damaged ({error}); remove it and run again.") from error


def write_part(
    path: Path, tensors: Mapping[str, Tensor], stamps: Mapping[str, str], fps: float | None = None
) -> None:
    """Writes a part whole. The same content gives the same bytes."""
    metadata = {"stamps": json.dumps(stamps, sort_keys=True)}
    if fps is not None:
        metadata["fps"] = f"{fps:g}"
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    # The library keeps metadata in a table of random order; put the header's in a fixed one.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, len(text).to_bytes(8, "little") + text + data[8 + length :])
