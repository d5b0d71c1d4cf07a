"""What a pipeline returns: final latents, decoded when they are asked for."""

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.types import AV
from aiprod_pipelines import analytics, decoding, media, stages
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.recipe import circumstances, embed, make_recipe, trailer
from aiprod_pipelines.request import GenerationRequest


@dataclass
class Clip:
    """A clip as latents. `save` decodes it chunk by chunk into a file; nothing is decoded twice.

    One that is to be streamed may have windows to come: its latents are made as they are decoded.
    """

    pipeline: str
    models: ModelSet
    request: GenerationRequest  # resolved: every field is set
    latents: AV
    progress: Progress = field(default_factory=Progress)
    soundtrack: media.Audio | None = None  # a given sound, which stands for the latents' own
    healing: dict[str, Any] | None = None  # what was found and mended, where that was asked for
    _to_come: Iterator[stages.Latents] = field(default_factory=lambda: iter(()), repr=False)
    _final: dict[str, int] | None = None  # latent frames that stay as they are; None = all
    _at_once: int | None = None  # latent frames that a stream decodes together

    def expect(self, windows: Iterator[stages.Latents], final: dict[str, int]) -> None:
        """Says that of these latents only `final` are made, and the others will come."""
        if len(self.request.windows(self.models.profile.scale.time)) > 1:
            self._to_come, self._final, self._at_once = windows, final, final.get("video")

    def finish(self) -> None:
        """Makes what is still to come."""
        for made in self._to_come:
            self.latents = made.clip
        self._final = None

    def _until(self, modality: str, count: int) -> Tensor:
        """A modality's latent, with `count` frames of it made."""
        while self._final is not None and self._final[modality] < count:
            made = next(self._to_come)
            self.latents, self._final = made.clip, made.final
        return getattr(self.latents, modality)

    def frames(self, *, is_streamed: bool = False) -> Iterator[Tensor]:
        """Chunks (frames, height, width, 3) of uint8, in order, at the model's own size."""
        assert self.latents.video is not None
        return decoding.decode_video(
            self.models,
            self.latents.video,
            self.progress,
            tile=self.request.tile,
            is_tiny=self.request.decoder == "tiny",
            is_streamed=is_streamed,
            at_once=self._at_once,
            until=partial(self._until, "video") if self._final is not None else None,
        )

    @cached_property
    def audio(self) -> media.Audio | None:
        """The sound, as long as the picture; None in a silent clip."""
        if self.soundtrack is not None or self.latents.audio is None:
            return self.soundtrack
        duration_s = self.request.shape.duration_s
        return decoding.decode_audio(self.models, self.latents.audio, duration_s, self.progress)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """All that is needed to make the clip again, and a hash of its latents."""
        return self._make_recipe(is_whole=True)

    def _make_recipe(self, *, is_whole: bool) -> dict[str, Any]:
        latents = {"video": self.latents.video, "audio": self.latents.audio}
        computed_on = circumstances(self.models.device, self.models.dtype)
        if self.models.quantization is not None:
            computed_on["quantization"] = self.models.quantization
        with analytics.span("recipe"):
            recipe = make_recipe(
                self.pipeline,
                self.models.name,
                self.models.checkpoint,
                self.request,
                {name: latent for name, latent in latents.items() if latent is not None}
                if is_whole
                else None,
                computed_on,
                self.models.text_encoder_source,
                self.models.other_parts,
            )
        return recipe if self.healing is None else recipe | {"healing": self.healing}

    def save(self, path: str | Path) -> Path:
        """Writes an MP4 that carries the recipe; a clip without picture also as WAV, FLAC or M4A.

        Raises InputError where it cannot be written.
        """
        with analytics.run("write"):
            return self._write(Path(path))

    def _write(self, path: Path) -> Path:
        if self.latents.video is None:
            assert self.audio is not None
            media.write_audio(path, self.audio, metadata=embed(self.recipe))
            return path
        media.check_output_path(path)
        height, width = self.size
        chunks = media.enlarge(
            self.frames(), height=height, width=width, method=self.request.enlarge_method
        )
        media.write_video(
            path,
            chunks,
            self.request.shape.fps,
            audio=self.audio,
            metadata=embed(self.recipe),
            crf=self.request.crf,
        )
        return path

    def stream(self) -> Iterator[bytes]:
        """Yields the clip as the segments of a fragmented MP4, each before the next is decoded."""
        if self.latents.video is None:
            raise InputError("a sound alone cannot be streamed; save it.")
        height, width = self.size
        chunks = media.enlarge(
            self.frames(is_streamed=True),
            height=height,
            width=width,
            method=self.request.enlarge_method,
        )
        is_whole = self._final is None
        yield from media.fragments(
            chunks,
            self.request.shape.fps,
            audio=self._streamed_audio(),
            metadata=embed(self.recipe if is_whole else self._make_recipe(is_whole=False)),
            crf=self.request.crf,
        )
        self.finish()
        if not is_whole:
            yield trailer(self.recipe["latents_sha256"])

    def _streamed_audio(self) -> media.Audio | media.StreamedAudio | None:
        """The sound of a clip in windows a second at a time; else as it is."""
        if self._at_once is None or self.soundtrack is not None or self.latents.audio is None:
            return self.audio
        duration_s = self.request.shape.duration_s
        until = partial(self._until, "audio")
        return decoding.decode_audio_parts(self.models, until, duration_s, self.progress)

    @property
    def sample_rate(self) -> int | None:
        """Of the written sound, in Hz; None in a silent clip."""
        if self.soundtrack is not None:
            return self.soundtrack.sample_rate
        return None if self.latents.audio is None else self.models.sample_rate

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the written file, in pixels."""
        shape = self.request.shape
        return shape.height * self.request.enlarge, shape.width * self.request.enlarge

    def report(self, output: str | Path) -> dict[str, Any]:
        """What `aiprod generate --json` prints of a saved clip."""
        height, width = self.size
        has_picture = self.latents.video is not None
        return {
            "output": str(output),
            "model": self.models.name,
            "pipeline": self.pipeline,
            "seed": self.request.seed,
            "width": width if has_picture else None,
            "height": height if has_picture else None,
            "num_frames": self.request.num_frames if has_picture else 0,
            "frame_rate": self.request.frame_rate,
            "audio_sample_rate": self.sample_rate,
            "seconds": {name: round(s, 3) for name, s in self.progress.seconds.items()},
            "peak_memory_mib": round(peak_memory_mib(self.models.device), 1),
            "enlarge": self.request.enlarge,
            "latents_sha256": self.recipe["latents_sha256"],
            "healing": self.healing,
        }


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far: of the GPU by PyTorch, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":
        # Not getrusage: its peak begins with that of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB
