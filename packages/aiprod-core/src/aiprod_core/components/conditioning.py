"""Conditions as edits to a LatentState: each takes a state and returns another.

A condition either rewrites tokens of the clip (an image at frame 0, an inpaint mask, a retake
window) or appends tokens after them (keyframes, references, slots). The first
`grid.num_tokens` tokens are always the clip's own; `grid.unpatchify` drops the rest at the end.
`strength` 1 keeps a condition as given, 0 generates over it; the token's mask is 1 - strength.

Letters: B batch, C channels, F latent frames, H W latent height and width, N tokens, M new tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from aiprod_core.components.patchifiers import (
    AudioGrid,
    VideoGrid,
    latent_intervals,
    pixel_intervals,
    to_seconds,
)
from aiprod_core.components.samplers import Blend
from aiprod_core.errors import InputError
from aiprod_core.types import AV, LatentState, VideoLatentShape

# ------------------------------------------------------------------------------------------- states


def video_state(
    grid: VideoGrid,
    latent: Tensor | None = None,  # (B, C, F, H, W) to start from or to edit; default zeros
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LatentState:
    """All tokens to be generated. The first latent frame is marked: it holds a single frame."""
    if latent is None:
        latent = torch.zeros(grid.shape, device=device, dtype=dtype)
    elif tuple(latent.shape) != tuple(grid.shape):
        raise InputError(f"video latent is {list(latent.shape)}, the clip's is {list(grid.shape)}")
    tokens = grid.patchify(latent)
    marker = torch.zeros_like(tokens[..., :1])
    marker[:, : grid.tokens_per_frame] = 1
    return LatentState(
        latent=tokens,
        clean_latent=tokens,
        denoise_mask=torch.ones_like(tokens[..., :1]),
        positions=grid.positions().to(tokens.device),
        keyframe_marker=marker,
    )


def audio_state(
    grid: AudioGrid,
    latent: Tensor | None = None,  # (B, C, T, bins); default zeros
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LatentState:
    """All tokens to be generated."""
    if latent is None:
        latent = torch.zeros(grid.shape, device=device, dtype=dtype)
    elif tuple(latent.shape) != tuple(grid.shape):
        raise InputError(f"audio latent is {list(latent.shape)}, the clip's is {list(grid.shape)}")
    tokens = grid.patchify(latent)
    return LatentState(
        latent=tokens,
        clean_latent=tokens,
        denoise_mask=torch.ones_like(tokens[..., :1]),
        positions=grid.positions().to(tokens.device),
    )


def freeze(state: LatentState) -> LatentState:
    """Keeps every token as it is. Pass the stream with `is_frozen`, so that its sigma is 0 too."""
    return replace(
        state, clean_latent=state.latent, denoise_mask=torch.zeros_like(state.denoise_mask)
    )


def keep_conditions(video: LatentState | None, audio: LatentState | None) -> Blend:
    """What samplers call `blend`: x mask + clean (1 - mask), in the dtype of x."""
    states = {"video": video, "audio": audio}

    def blend(x: AV) -> AV:
        def kept(name: str, tokens: Tensor | None) -> Tensor | None:
            state = states[name]
            if tokens is None or state is None:
                return tokens
            mask, clean = state.denoise_mask.to(tokens.dtype), state.clean_latent.to(tokens.dtype)
            return tokens * mask + clean * (1 - mask)

        return AV(kept("video", x.video), kept("audio", x.audio))

    return blend


# ------------------------------------------------------------------------- rewriting the clip's own


def replace_frames(
    state: LatentState,
    grid: VideoGrid,
    latent: Tensor,  # (B, C, f, H, W)
    *,
    latent_index: int = 0,
    strength: float = 1.0,
) -> LatentState:
    """Puts an encoded image or clip in the place of latent frames from `latent_index` on."""
    if tuple(latent.shape[3:]) != (grid.shape.height, grid.shape.width):
        raise InputError(
            f"image latent is {list(latent.shape[3:])} (height, width), the clip's is "
            f"{[grid.shape.height, grid.shape.width]}; encode it at the clip's size"
        )
    last_index = grid.shape.frames - latent.shape[2]
    if not 0 <= latent_index <= last_index:
        raise InputError(
            f"latent_index must be 0 to {last_index} for this image; got {latent_index}"
        )
    tokens = grid.patchify(latent)
    start = latent_index * grid.tokens_per_frame
    rows = slice(start, start + tokens.shape[1])
    clean, mask = state.clean_latent.clone(), state.denoise_mask.clone()
    clean[:, rows] = tokens.to(clean)
    mask[:, rows] = 1 - strength
    return replace(state, clean_latent=clean, denoise_mask=mask)


def replace_sound(
    state: LatentState,
    grid: AudioGrid,
    latent: Tensor,  # (B, C, t, bins)
    *,
    latent_index: int = 0,
    strength: float = 1.0,
) -> LatentState:
    """Puts an encoded sound in the place of latent frames from `latent_index` on."""
    tokens = grid.patchify(latent)
    last_index = grid.num_tokens - tokens.shape[1]
    if not 0 <= latent_index <= last_index:
        raise InputError(
            f"latent_index must be 0 to {last_index} for this sound; got {latent_index}"
        )
    rows = slice(latent_index, latent_index + tokens.shape[1])
    clean, mask = state.clean_latent.clone(), state.denoise_mask.clone()
    clean[:, rows] = tokens.to(clean)
    mask[:, rows] = 1 - strength
    return replace(state, clean_latent=clean, denoise_mask=mask)


def inpaint(
    state: LatentState,
    grid: VideoGrid,
    latent: Tensor,  # (B, C, F, H, W), the clip to keep
    mask: Tensor,  # (B, F, H, W), 1 = keep, 0 = generate; see `mask_to_latent`
    *,
    strength: float = 1.0,
) -> LatentState:
    """Keeps a clip where `mask` says so."""
    tokens = grid.patchify(latent)
    if tokens.shape[1] != grid.num_tokens or mask[0].numel() != grid.num_tokens:
        raise InputError(
            f"the clip to inpaint is {list(latent.shape[2:])} and its mask {list(mask.shape[1:])} "
            f"(frames, height, width) in latents; both must be {list(grid.shape[2:])}"
        )
    clean, denoise_mask = state.clean_latent.clone(), state.denoise_mask.clone()
    keep = rearrange(mask, "b f h w -> b (f h w) 1").to(denoise_mask)
    own = clean[:, : grid.num_tokens]
    clean[:, : grid.num_tokens] = torch.where(keep > 0, tokens.to(clean), own)
    denoise_mask[:, : grid.num_tokens] = 1 - strength * keep
    return replace(state, clean_latent=clean, denoise_mask=denoise_mask)


def regenerate_window(state: LatentState, start_s: float, end_s: float) -> LatentState:
    """Generates the tokens that overlap [start_s, end_s) and keeps the others: a retake."""
    if not start_s < end_s:
        raise InputError(f"the window must end after it starts; got {start_s} to {end_s} s")
    token_start, token_end = state.positions[:, 0, :, 0], state.positions[:, 0, :, 1]  # (B, N)
    overlaps = (token_end > start_s) & (token_start < end_s)
    return replace(state, denoise_mask=overlaps[..., None].to(state.denoise_mask))


# ---------------------------------------------------------------------------------------- appending


def append_keyframe(
    state: LatentState,
    grid: VideoGrid,
    latent: Tensor,  # (B, C, f, h, w): an image, or a short clip that starts there
    *,
    frame: int,  # pixel frame
    strength: float = 1.0,
    attention: float | Tensor | None = None,
) -> LatentState:
    """Shows the model how the clip looks at a frame, as extra tokens at that time."""
    shape = VideoLatentShape(*latent.shape)
    pixels = pixel_intervals(
        latent_intervals(shape, grid.patch_size), grid.scale, is_causal=frame == 0
    )
    pixels[:, 0] += frame
    if shape.frames == 1:
        pixels[:, 0, :, 1] = pixels[:, 0, :, 0] + 1
    return _append(
        state,
        grid.num_tokens,
        clean=grid.patchify(latent),
        positions=to_seconds(pixels.float(), grid.fps),
        denoise=1 - strength,
        attention=attention,
    )


def append_slots(
    state: LatentState,
    grid: VideoGrid,
    frames: Sequence[int],  # pixel frames
    seed: Tensor | None = None,  # (B, C, K, H, W) latents to start from, one a slot
) -> LatentState:
    """Asks for whole frames at given times besides the clip: marked, fully generated tokens.

    Read them back with `slot_latents`; each decodes as a clip of one frame.
    """
    shape = grid.shape._replace(frames=len(frames))
    if seed is None:
        seed = state.latent.new_zeros(shape)
    elif tuple(seed.shape) != tuple(shape):
        raise InputError(f"slot seeds are {list(seed.shape)}, the slots are {list(shape)}")
    pixels = pixel_intervals(latent_intervals(shape, grid.patch_size), grid.scale)
    start = repeat(torch.tensor(list(frames)), "k -> (k n)", n=grid.tokens_per_frame)
    pixels[:, 0] = torch.stack((start, start + 1), dim=-1)
    tokens = grid.patchify(seed)
    return _append(
        state,
        grid.num_tokens,
        latent=tokens,
        clean=torch.zeros_like(tokens),
        positions=to_seconds(pixels.float(), grid.fps),
        denoise=1.0,
        marker=1.0,
    )


def slot_latents(tokens: Tensor, state: LatentState, grid: VideoGrid) -> Tensor:
    """The generated slots (B, C, K, H, W) among sampled `tokens`, in the order of appending."""
    if state.keyframe_marker is None:
        raise InputError("the state has no keyframe marker, so no slots to read")
    appended = torch.arange(tokens.shape[1], device=tokens.device) >= grid.num_tokens
    slots = tokens[:, appended & (state.keyframe_marker[0, :, 0] > 0)]
    shape = grid.shape._replace(frames=slots.shape[1] // grid.tokens_per_frame)
    return VideoGrid(shape, grid.scale, grid.fps, grid.patch_size).unpatchify(slots)


def append_reference_video(
    state: LatentState,
    grid: VideoGrid,
    latent: Tensor,  # (B, C, f, h, w)
    *,
    strength: float = 1.0,
    downscale: int = 1,  # the reference is this much smaller in height and width
    temporal_scale: int = 1,  # it holds frame 0, then every S-th frame: `subsample_reference`
    attention: float | Tensor | None = None,
) -> LatentState:
    """Shows the model another clip alongside (IC-LoRA), laid over the same time and space."""
    reference = VideoGrid(
        VideoLatentShape(*latent.shape), grid.scale, grid.fps / temporal_scale, grid.patch_size
    )
    positions = reference.positions()
    positions[:, 1:] *= downscale
    if temporal_scale > 1:
        # The first frame still covers one frame of the clip, not S.
        positions[:, 0] = (positions[:, 0] - (temporal_scale - 1) / grid.fps).clamp(min=0)
    return _append(
        state,
        grid.num_tokens,
        clean=grid.patchify(latent),
        positions=positions,
        denoise=1 - strength,
        attention=attention,
    )


def append_reference_audio(
    state: LatentState,
    grid: AudioGrid,
    latent: Tensor,  # (B, C, t, bins)
    *,
    strength: float = 1.0,
) -> LatentState:
    """Lets the model hear another sound: one that ended a token before time 0."""
    reference = replace(grid, shape=grid.shape._replace(frames=latent.shape[2]))
    positions = reference.positions()
    end_s = positions[:, :, -1:, 1:]
    return _append(
        state,
        grid.num_tokens,
        clean=grid.patchify(latent),
        positions=positions - end_s - grid.seconds_per_token,
        denoise=1 - strength,
    )


def _append(
    state: LatentState,
    num_target: int,  # the clip's own tokens
    *,
    clean: Tensor,  # (B or 1, M, C)
    positions: Tensor,  # (B or 1, axes, M, 2)
    denoise: float,
    latent: Tensor | None = None,  # default zeros: the noiser brings `clean` in
    marker: float = 0.0,
    attention: float | Tensor | None = None,
) -> LatentState:
    batch, new = state.latent.shape[0], clean.shape[1]
    if clean.shape[0] not in (1, batch) or clean.shape[2] != state.latent.shape[2]:
        raise InputError(
            f"a condition's tokens are {list(clean.shape)} (batch, tokens, channels), the clip's "
            f"are {list(state.latent.shape)}: batch and channels must agree"
        )
    if latent is None:
        latent = torch.zeros_like(clean)
    column = state.denoise_mask.new_ones(batch, new, 1)

    def joined(own: Tensor, other: Tensor, dim: int) -> Tensor:
        other = other.to(own).expand(batch, *other.shape[1:])
        return torch.cat((own, other), dim=dim)

    keyframe_marker = state.keyframe_marker
    if keyframe_marker is not None:
        keyframe_marker = joined(keyframe_marker, column * marker, 1)
    return LatentState(
        latent=joined(state.latent, latent, 1),
        clean_latent=joined(state.clean_latent, clean, 1),
        denoise_mask=joined(state.denoise_mask, column * denoise, 1),
        positions=joined(state.positions, positions, 2),
        attention_mask=_extended_attention(state, num_target, new, attention),
        keyframe_marker=keyframe_marker,
    )


def _extended_attention(
    state: LatentState, num_target: int, new: int, attention: float | Tensor | None
) -> Tensor | None:
    """(B, N + M, N + M) in which new tokens see the clip's and are seen by them with weight
    `attention`, (B, M) or one number; themselves with 1, and no other condition.

    No mask is made before the first condition that asks for one. It then lets the earlier ones see
    each other; later ones that ask for nothing see the clip with weight 1.
    """
    old = state.attention_mask
    if old is None and attention is None:
        return None
    batch, num_tokens, _ = state.latent.shape
    if old is None:
        old = state.denoise_mask.new_ones(batch, num_tokens, num_tokens)
    weight = torch.as_tensor(1.0 if attention is None else attention).to(old)
    if weight.ndim == 2 and weight.shape[1] != new:
        raise InputError(f"attention has {weight.shape[1]} weights for {new} new tokens")
    weight = weight.expand(batch, new)
    mask = old.new_zeros(batch, num_tokens + new, num_tokens + new)
    mask[:, :num_tokens, :num_tokens] = old
    mask[:, num_tokens:, num_tokens:] = 1
    mask[:, num_tokens:, :num_target] = weight[:, :, None]
    mask[:, :num_target, num_tokens:] = weight[:, None, :]
    return mask


# --------------------------------------------------------------------------- from pixels to latents


def mask_to_latent(
    mask: Tensor,  # (B, 1, frames, height, width)
    height: int,  # latent rows
    width: int,  # latent columns
    time_scale: int = 8,
) -> Tensor:
    """A pixel mask on the latent grid (B, F, H, W): mean over what each latent covers.

    In time as a causal codec: the first frame alone, the others in groups of `time_scale`.
    """
    num_frames = mask.shape[2]
    if (num_frames - 1) % time_scale:
        nearest = max(1, round((num_frames - 1) / time_scale) * time_scale + 1)
        raise InputError(
            f"a mask must have {time_scale}k+1 frames; got {num_frames}, try {nearest}"
        )
    frames = rearrange(mask.float(), "b 1 f h w -> b f h w")
    frames = F.interpolate(frames, size=(height, width), mode="area")
    rest = reduce(frames[:, 1:], "b (f s) h w -> b f h w", "mean", s=time_scale)
    return torch.cat((frames[:, :1], rest), dim=1)


def subsample_reference(video: Tensor, temporal_scale: int) -> Tensor:
    """(B, C, frames, H, W): frame 0, then every S-th frame from frame 1."""
    return torch.cat((video[:, :, :1], video[:, :, 1::temporal_scale]), dim=2)
