"""Long clips in overlapping windows of time, so that the transformer sees no more than one of them.

The states of a whole clip, picture and sound with all their conditions, are cut by the positions of
their tokens. Each window is a clip of its own to the model: its time starts at 0, where the first
latent of a causal codec stands for a single frame. In a later window the latent that lies there
holds more than that frame, so it is generated anew and thrown away, as in tiled decoding. What
follows it is what the window before has made: kept for half of the overlap, then giving way to the
new window step by step.

Windows come one at a time and only as they are asked for, so a second stage can go over the first
window, and the first frames be shown, while later ones are still noise.

Letters: B batch, N tokens, C channels, F latent frames.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.types import AV, LatentState

# Positions are rounded to float32; no two edges of tokens lie as close as this.
TOLERANCE_S = 1e-4

Place = Callable[[AV], AV]
Run = Callable[[int, LatentState | None, LatentState | None, Place], AV]


class Window(NamedTuple):
    """From the window's first frame to the end of its last, in seconds of the clip."""

    start_s: float
    end_s: float


class Made(NamedTuple):
    """What there is when one more window is made, as clean tokens."""

    window: AV  # (B, n, C): the clip's own tokens in the window, those thrown away too
    clip: AV  # (B, N, C): of the whole clip; windows to come are as they started
    final: dict[str, int]  # of "video", "audio": own tokens from the first on that stay as they are


def split_into_windows(
    num_frames: int,
    fps: float,
    *,
    size: int,  # frames a window, time_scale k + 1
    overlap: int,  # frames that two windows share, a multiple of time_scale
    time_scale: int = 8,
) -> list[Window]:
    """Windows that cover a clip; the last is as long as the others and may share more.

    Raises InputError for sizes off the grid, and for windows that would add nothing.
    """
    if size < 1 or (size - 1) % time_scale:
        nearest = max(1, round((size - 1) / time_scale)) * time_scale + 1
        raise InputError(f"window_frames must be {time_scale}k+1; got {size}, try {nearest}")
    if overlap < time_scale or overlap % time_scale:
        nearest = max(1, round(overlap / time_scale)) * time_scale
        raise InputError(
            f"window_overlap must be a multiple of {time_scale}, at least {time_scale}; got "
            f"{overlap}, try {nearest}"
        )
    if num_frames <= size:
        return [Window(0.0, math.inf)]
    total, length, shared = ((n - 1) // time_scale + 1 for n in (num_frames, size, overlap + 1))
    if length <= shared:
        raise InputError(
            f"a window of {size} frames adds nothing to an overlap of {overlap}; try "
            f"window_frames {overlap + 2 * time_scale + 1}"
        )
    starts = [0]
    while starts[-1] + length < total:
        # `shared` counts the latent that is thrown away.
        starts.append(min(starts[-1] + length - shared, total - length))
    ends = [((start + length - 1) * time_scale + 1) / fps for start in starts[:-1]]
    return [
        Window(start * time_scale / fps, end)
        for start, end in zip(starts, [*ends, math.inf], strict=True)
    ]


def denoise_in_windows(
    run: Run,
    windows: list[Window],
    video: LatentState | None,
    audio: LatentState | None,
    *,
    own_tokens: Mapping[str, int],  # "video", "audio": of the clip, before appended conditions
    window_tokens: Mapping[str, int],  # of a clip that is as long as a window
    frozen: frozenset[str] = frozenset(),  # those that are shown as they are
    starts: Iterable[AV] | None = None,  # what each window's own tokens start from
) -> Iterator[Made]:
    """Makes the windows of a clip in turn, by a `run` that denoises the states it is given.

    `run` also gets the window's number, and what puts its tokens into the clip made so far, for
    previews. A window without anything to generate is not run. One window is run on the states as
    they are.
    """
    tracks = {
        name: _Track(state, own_tokens[name], window_tokens[name], name in frozen)
        for name, state in (("video", video), ("audio", audio))
        if state is not None
    }
    given = iter(starts) if starts is not None else None
    is_one = len(windows) == 1
    for number, (window, following) in enumerate(pairwise([*windows, None])):
        assert window is not None
        start = next(given) if given is not None else AV()
        parts: dict[str, _Part] = {}
        for name, track in tracks.items():
            part = track.whole() if is_one else track.part(window)
            parts[name] = part.starting_from(getattr(start, name))

        def place(x: AV, parts: "dict[str, _Part]" = parts) -> AV:
            merged = {name: tracks[name].with_part(parts[name], getattr(x, name)) for name in parts}
            return AV(**merged)

        own = {name: part.state.clean_latent[:, part.is_own] for name, part in parts.items()}
        if is_one or any(part.is_generated for part in parts.values()):
            states = {name: part.state for name, part in parts.items()}
            x = run(number, states.get("video"), states.get("audio"), place)
            clip = place(x)
            for name, part in parts.items():
                tracks[name].tokens = getattr(clip, name)
                own[name] = part.kept(getattr(x, name))[:, part.is_own]
        for name, part in parts.items():
            tracks[name].is_done[part.index[part.is_result]] = True
        yield Made(
            AV(**own),
            AV(**{name: track.tokens for name, track in tracks.items()}),
            {name: track.final(following) for name, track in tracks.items()},
        )


class _Part(NamedTuple):
    """A modality's share of a window."""

    state: LatentState
    index: Tensor  # (n,), its tokens among the clip's
    is_own: Tensor  # (n,), the clip's own, without appended conditions
    is_result: Tensor  # (n,), those that the window makes or keeps

    @property
    def is_generated(self) -> bool:
        return bool((self.state.denoise_mask[:, self.is_result] > 0).any())

    def starting_from(self, tokens: Tensor | None) -> "_Part":
        """With other own tokens (B, n, C) under the noise."""
        if tokens is None:
            return self
        latent = self.state.latent.clone()
        latent[:, self.is_own] = tokens.to(latent)
        return self._replace(state=replace(self.state, latent=latent))

    def kept(self, tokens: Tensor) -> Tensor:
        """A result in which what was to be kept is so exactly."""
        return torch.where(self.state.denoise_mask == 0, self.state.clean_latent, tokens)


class _Track:
    """One modality of the clip on its way through the windows."""

    def __init__(
        self, state: LatentState, own_tokens: int, window_tokens: int, is_frozen: bool
    ) -> None:
        self.state = state
        self.window_tokens = window_tokens
        self.is_frozen = is_frozen
        self.tokens = torch.where(state.denoise_mask == 0, state.clean_latent, state.latent).float()
        count = state.latent.shape[1]
        self.own_tokens = own_tokens
        self.is_own = torch.arange(count, device=state.latent.device) < own_tokens
        self.is_done = torch.zeros_like(self.is_own)

    def whole(self) -> _Part:
        """The clip as its only window."""
        index = torch.arange(len(self.is_own), device=self.is_own.device)
        return _Part(self.state, index, self.is_own, torch.ones_like(self.is_own))

    def final(self, following: Window | None) -> int:
        """Own tokens from the first on that neither the window to come nor a later one changes."""
        if following is None or self.is_frozen:
            return self.own_tokens
        part = self.part(following)
        is_changed = part.is_result & (part.state.denoise_mask[0, :, 0] > 0)
        changed = part.index[is_changed]
        return int(changed.min()) if len(changed) else self.own_tokens

    def part(self, window: Window) -> _Part:
        start, end = self.state.positions[0, 0].unbind(-1)  # (N,) seconds
        is_whole = start >= window.start_s - TOLERANCE_S
        # As many tokens as a clip of the window's length has, from the one that holds its start.
        number = self.is_own.cumsum(0)
        is_here = self.is_own & ((end > window.start_s + TOLERANCE_S) | ~self.is_done)
        last = self.window_tokens + int(number[is_here].min()) - 1
        is_here &= (number <= last) | (window.end_s == math.inf)
        # A condition that begins before the window would be shown at the wrong time.
        is_shown = ~self.is_own & is_whole & (start < window.end_s - TOLERANCE_S)
        index = (is_here | is_shown).nonzero()[:, 0]
        is_cut = ~is_whole[index]
        is_carried = self.is_done[index] & ~is_cut & self.is_own[index]
        state = _tokens_of(self.state, index, window.start_s)
        if not self.is_frozen:
            mask, marker = state.denoise_mask, state.keyframe_marker
            fade = _fade(start[index], end[index], is_carried)[:, None]
            mask = torch.where(is_cut[:, None], torch.ones_like(mask), mask * fade)
            made = self.tokens[:, index].to(state.clean_latent)
            clean = torch.where(is_carried[:, None], made, state.clean_latent)
            if marker is not None:
                marker = torch.where(is_cut[:, None], torch.ones_like(marker), marker)
            state = replace(state, denoise_mask=mask, clean_latent=clean, keyframe_marker=marker)
        return _Part(state, index, self.is_own[index], ~is_cut & self.is_own[index])

    def with_part(self, part: _Part, tokens: Tensor) -> Tensor:
        """The clip's tokens with a window's in them."""
        merged = self.tokens.clone()
        merged[:, part.index[part.is_result]] = part.kept(tokens)[:, part.is_result].float()
        return merged


def _fade(start: Tensor, end: Tensor, is_carried: Tensor) -> Tensor:
    """How far carried tokens (n,) may change: 0 in the first half, then rising, below 1."""
    if not is_carried.any():
        return torch.ones_like(start)
    first, last = start[is_carried].min(), end[is_carried].max()
    progress = ((start + end) / 2 - first) / (last - first)
    return torch.where(is_carried, (2 * progress - 1).clamp(0, 1), torch.ones_like(start))


def _tokens_of(state: LatentState, index: Tensor, start_s: float) -> LatentState:
    """Some tokens of a state, in a time that starts at `start_s`."""
    positions = state.positions[:, :, index].clone()
    positions[:, 0] = (positions[:, 0] - start_s).clamp(min=0)

    def some(tensor: Tensor) -> Tensor:
        return tensor[:, index]

    return LatentState(
        latent=some(state.latent),
        clean_latent=some(state.clean_latent),
        denoise_mask=some(state.denoise_mask),
        positions=positions,
        attention_mask=None
        if state.attention_mask is None
        else state.attention_mask[:, index][:, :, index],
        keyframe_marker=None if state.keyframe_marker is None else some(state.keyframe_marker),
    )
