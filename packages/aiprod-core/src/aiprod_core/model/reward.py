"""A judge of clips that looks at latents: picture, motion, text and synchrony, a score each.

It works beside a diffusion transformer: `sigma` tells it how far the clip is denoised, so that the
clean estimate of an early step can be judged before the other steps are taken. A score is a log
odds: the difference of two clips' scores is that of one being preferred to the other (Bradley and
Terry, 1952), so the axes add up.

The picture's tokens, the sound's and the words' have towers of their own. Words look at both
streams. Synchrony has a path that compares what moves with what sounds, moment by moment: a latent
frame covers several moments of sound, and from what it holds and the place within it the network
tells the motion at each of them; both signals are also correlated at time lags about zero, which
makes a shifted sound plain to see.

Letters: B batch, C channels, F latent frames, H W latent height and width, N tokens, T audio
latent frames, S text tokens, D width, E width of the compared signals, L lags.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError
from aiprod_core.model.layers import Attention, FeedForward, TimestepEmbedder, rms_norm
from aiprod_core.model.rope import Rotary, rotary_table

AXES = ("visual", "motion", "text", "sync")
HARMONICS = 4  # of the place within a latent frame


@dataclass(frozen=True)
class RewardConfig:
    """Layout of a reward model. The sizes of latents and text are those of the model it judges."""

    video_channels: int
    audio_channels: int  # of a token: channels times frequency bins
    text_width: int
    width: int = 96
    heads: int = 3
    video_layers: int = 2
    audio_layers: int = 1
    text_layers: int = 1
    sync_width: int = 48
    lags: int = 13  # on either side of zero, in audio latent frames
    theta: float = 200.0
    max_positions: tuple[float, float, float] = (8.0, 256.0, 256.0)  # seconds, pixels, pixels

    @classmethod
    def from_metadata(cls, config: Mapping[str, Any]) -> "RewardConfig":
        """Reads the section `reward`. Raises CheckpointError naming an unknown or missing key."""
        known = cls.__dataclass_fields__.keys()
        unknown = sorted(config.keys() - known)
        missing = sorted({"video_channels", "audio_channels", "text_width"} - config.keys())
        if unknown or missing:
            what = f"has unknown {unknown}" if unknown else f"lacks {missing}"
            raise CheckpointError(f"config: reward {what}; this AIPROD reads {', '.join(known)}")
        values = dict(config)
        if "max_positions" in values:
            values["max_positions"] = tuple(values["max_positions"])
        return cls(**values)

    def to_metadata(self) -> dict[str, Any]:
        """The section that `from_metadata` reads back to an equal one."""
        return asdict(self)


class RewardModel(nn.Module):
    """Latents and text to scores, one (B,) for each axis that can be judged.

    Without a sound there is no `sync`, without a picture only `text`.
    """

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.heads
        # A token is shown with what has changed since the frame before.
        self.video_in = nn.Linear(2 * config.video_channels, width)
        self.audio_in = nn.Linear(2 * config.audio_channels, width)
        self.text_in = nn.Linear(config.text_width, width)
        self.sigma = TimestepEmbedder(width)
        self.video_blocks = nn.ModuleList(Block(width, heads) for _ in range(config.video_layers))
        self.audio_blocks = nn.ModuleList(Block(width, heads) for _ in range(config.audio_layers))
        self.text_blocks = nn.ModuleList(Block(width, heads) for _ in range(config.text_layers))
        self.stream = nn.Parameter(torch.zeros(2, width))  # tells words what they look at
        self.visual = Head(2 * width)
        self.motion = MotionHead(width)
        self.text = Head(2 * width)
        self.sync = SyncHead(config)

    def forward(
        self,
        video: Tensor | None,  # (B, C, F, H, W), normalised as the transformer's
        audio: Tensor | None,  # (B, z, T, bins)
        text: Tensor,  # (B, S, text_width), see `text_states`
        text_mask: Tensor,  # (B, S), 1 on tokens
        sigma: Tensor,  # (B,) how much noise the estimate was made under; 0 for a finished clip
        *,
        video_positions: Tensor | None = None,  # (1, 3, N, 2), see VideoGrid.positions
        audio_positions: Tensor | None = None,  # (1, 1, T, 2)
    ) -> dict[str, Tensor]:
        level = self.sigma(1000 * sigma[:, None])  # (B, 1, D)
        scores: dict[str, Tensor] = {}
        seen = heard = None
        if video is not None:
            assert video_positions is not None
            seen = self.look(video, video_positions, level)
            scores["visual"] = self.visual(pooled(seen))
            scores["motion"] = self.motion(seen, video.shape[2])
        if audio is not None:
            assert audio_positions is not None
            heard = self.listen(audio, audio_positions, level)
        scores["text"] = self.read(text, text_mask, seen, heard, level)
        if seen is not None and heard is not None:
            assert video_positions is not None and audio_positions is not None
            scores["sync"] = self.compare(seen, heard, video_positions, audio_positions)
        return scores

    def look(self, video: Tensor, positions: Tensor, level: Tensor) -> Tensor:
        """The picture's tokens (B, N, D)."""
        change = video - F.pad(video, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        tokens = rearrange(torch.cat((video, change), 1), "b c f h w -> b (f h w) c")
        x = self.video_in(tokens) + level
        rotary = self._rotary(positions.mean(dim=-1))
        for block in self.video_blocks:
            x = block(x, rotary=rotary)
        return x

    def listen(self, audio: Tensor, positions: Tensor, level: Tensor) -> Tensor:
        """The sound's tokens (B, T, D)."""
        change = audio - F.pad(audio, (0, 0, 1, 0))[:, :, :-1]
        tokens = rearrange(torch.cat((audio, change), 1), "b c t m -> b t (c m)")
        x = self.audio_in(tokens) + level
        times = positions.mean(dim=-1)  # (1, 1, T)
        middle = torch.tensor(self.config.max_positions[1:], device=times.device)[None, :, None] / 2
        rotary = self._rotary(torch.cat((times, middle.expand(-1, -1, times.shape[2])), 1))
        for block in self.audio_blocks:
            x = block(x, rotary=rotary)
        return x

    def read(
        self, text: Tensor, mask: Tensor, seen: Tensor | None, heard: Tensor | None, level: Tensor
    ) -> Tensor:
        """How well the words (B, S, text_width) describe what is seen and heard: (B,)."""
        streams = [
            x + tag for x, tag in zip((seen, heard), self.stream, strict=True) if x is not None
        ]
        looked_at = torch.cat(streams, dim=1)
        x = self.text_in(text) + level
        for block in self.text_blocks:
            x = block(x, looked_at)
        weight = mask[..., None].to(x.dtype)
        mean = (x * weight).sum(1) / weight.sum(1).clamp_min(1)
        largest = x.masked_fill(weight == 0, -torch.inf).amax(1)
        return self.text(torch.cat((mean, largest), -1))

    def compare(
        self, seen: Tensor, heard: Tensor, video_positions: Tensor, audio_positions: Tensor
    ) -> Tensor:
        """How well picture and sound of `look` and `listen` keep time: (B,)."""
        times = video_positions[0, 0].unique_consecutive(dim=0)  # (F, 2) seconds
        frames = rearrange(seen, "b (f n) d -> b f n d", f=len(times))
        return self.sync(frames, heard, times, audio_positions[0, 0])

    def _rotary(self, positions: Tensor) -> Rotary:
        config = self.config
        # rotary_table compares with whole limits; seconds and pixels are both.
        limits = tuple(int(limit) for limit in config.max_positions)
        return rotary_table(positions, limits, config.width, theta=config.theta)


class Block(nn.Module):
    """Attention, to itself or to a context, and a feed-forward network, both before a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads=heads, head_dim=width // heads)
        self.ff = FeedForward(width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, rotary: Rotary | None = None
    ) -> Tensor:
        context = None if context is None else rms_norm(context)
        x = x + self.attn(rms_norm(x), context, rotary=rotary)
        return x + self.ff(rms_norm(x))


class Head(nn.Module):
    """Features (B, K) to a score (B,)."""

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(rms_norm(x)))).float()[:, 0]


def pooled(x: Tensor) -> Tensor:
    """(B, N, D) to its mean and its largest over tokens, (B, 2 D)."""
    return torch.cat((x.mean(dim=1), x.amax(dim=1)), dim=-1)


class MotionHead(nn.Module):
    """Scores how frames (B, F H W, D) follow each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(2 * width, width, 3, padding=1)
        self.head = Head(2 * width)

    def forward(self, tokens: Tensor, num_frames: int) -> Tensor:
        frames = rearrange(tokens, "b (f n) d -> (b f) n d", f=num_frames)
        frames = rearrange(pooled(rms_norm(frames)), "(b f) d -> b d f", f=num_frames)
        return self.head(pooled(F.silu(self.mix(frames)).transpose(1, 2)))


class SyncHead(nn.Module):
    """Compares motion and sound at each moment of the sound, and at lags about it."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        width, signal, self.lags = config.width, config.sync_width, config.lags
        self.frame = nn.Conv1d(2 * width, width, 3, padding=1)
        self.place = nn.Linear(2 * HARMONICS, width)
        self.motion = nn.Linear(width, signal)
        self.mix = nn.Conv1d(width, width, 5, padding=2)
        self.sound = nn.Linear(width, signal)
        self.moment = nn.Linear(3 * signal, signal)
        self.head = Head(2 * signal + 2 * config.lags + 1)

    def forward(
        self,
        frames: Tensor,  # (B, F, H W, D)
        sound: Tensor,  # (B, T, D)
        frame_times: Tensor,  # (F, 2) seconds, [start, end)
        sound_times: Tensor,  # (T, 2)
    ) -> Tensor:
        num_frames = frames.shape[1]
        flat = pooled(rms_norm(frames.flatten(0, 1)))
        flat = rearrange(flat, "(b f) d -> b d f", f=num_frames)
        frame = self.frame(flat).transpose(1, 2)  # (B, F, D)
        index, place = within_frames(frame_times, sound_times.mean(dim=-1))
        moments = F.silu(frame[:, index] + self.place(harmonics(place).to(frame.dtype)))
        motion = self.motion(moments)  # (B, T, E)
        mixed = F.silu(self.mix(rms_norm(sound).transpose(1, 2))).transpose(1, 2)
        heard = self.sound(mixed)  # (B, T, E)
        together = torch.cat((motion, heard, motion * heard), -1)
        compared = pooled(F.silu(self.moment(together)))
        return self.head(torch.cat((compared, lag_profile(motion, heard, self.lags)), -1))


def within_frames(frame_times: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `times` (T,) the latent frame that covers it, and the place in it from 0 to 1."""
    index = torch.searchsorted(frame_times[:, 1].contiguous(), times, right=True)
    index = index.clamp(max=len(frame_times) - 1)
    start, end = frame_times[index].unbind(-1)
    return index, ((times - start) / (end - start)).clamp(0, 1)


def harmonics(place: Tensor) -> Tensor:
    """(T,) in [0, 1] to (T, 2 HARMONICS): half waves, so that both ends differ."""
    angles = torch.pi * place[:, None] * torch.arange(1, HARMONICS + 1, device=place.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def lag_profile(motion: Tensor, sound: Tensor, lags: int) -> Tensor:
    """Mean products of two signals (B, T, E) at lags of -lags to +lags moments, (B, 2 lags + 1).

    Both are centred and of unit deviation over time, so the values are correlations.
    """

    def standard(x: Tensor) -> Tensor:
        x = x.float() - x.float().mean(dim=1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-4)

    count = motion.shape[1]
    motion = standard(motion)
    padded = F.pad(standard(sound), (0, 0, lags, lags))
    windows = padded.unfold(1, count, 1)  # (B, L, E, T)
    products = torch.einsum("bte,blet->bl", motion, windows)
    return products / (count * motion.shape[2])


def text_states(hidden: Tensor) -> Tensor:
    """A language model's stacked hidden states (B, S, D, L) as one: the mean of normalised ones.

    Early states know the word, late ones its context.
    """
    return F.rms_norm(hidden.movedim(-1, -2).float(), hidden.shape[2:3], eps=1e-6).mean(dim=-2)


def init_reward(model: RewardModel, generator: torch.Generator | None = None) -> None:
    """Small random weights; every block begins as the identity."""
    for name, parameter in model.named_parameters():
        if name.endswith(("to_out.0.weight", "net.2.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim >= 2 and name != "stream":
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
