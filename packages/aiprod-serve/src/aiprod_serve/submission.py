"""From a body that a client sent to a job in the queue: checked as far as headers of models allow.

Every dialect ends here. A request is resolved against its model before it is queued, so that what
cannot be made is refused at once and not after a wait.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError
from aiprod_pipelines import companions
from aiprod_pipelines.catalog import PIPELINES, find_pipeline
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.request import GenerationRequest, LoraFile, ModelProfile
from aiprod_serve.errors import ApiError
from aiprod_serve.files import VIDEO, Files
from aiprod_serve.jobs import IdempotencyError, Job, JobStore, NewJob, QueueFullError
from aiprod_serve.schemas import FileReference, Generation, VideoCreate
from aiprod_serve.settings import Settings
from aiprod_serve.uploads import Uploads

# Fields of a body that are fields of GenerationRequest, as they are.
PLAIN = (
    "negative_prompt", "seed", "num_frames", "width", "height", "frame_rate",
    "num_inference_steps", "sampler", "schedule", "step_cache", "generate_audio", "audio_prompt",
    "audio_start_time", "start_time", "end_time", "modality", "skip_stage_2", "enlarge",
    "enlarge_method", "crf",
)  # fmt: skip
SCALES = ("cfg_scale", "stg_scale", "modality_scale", "rescale_scale")
FILES = ("audio", "source")
FILE_LISTS = ("images", "keyframes", "controls")

# Longer clips than these many frames for every second that is allowed are refused.
MAX_FPS = 60

# How soon a full queue is worth another try.
RETRY_AFTER_S = 5


class ServedModels:
    """The models by the names that clients use, their headers opened once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._opened: dict[tuple[str, bool], ModelSet] = {}

    def pipeline(self, model: str, name: str) -> Pipeline:
        """A pipeline that checks requests; it never loads weights. Raises ApiError, InputError."""
        if model not in self.settings.models:
            known = ", ".join(self.settings.models)
            raise ApiError(
                404, f"model {model} is not served here; there is {known}.",
                code="model_not_found", param="model",
            )  # fmt: skip
        kind = find_pipeline(name)
        key = (model, kind.is_distilled)
        if key not in self._opened:
            self._opened[key] = ModelSet.open(
                self.settings.models[model],
                text_encoder=self.settings.text_encoder,
                device="cpu",
                dtype=self.settings.dtype,
                prefers_distilled=kind.is_distilled,
            )
        return kind(self._opened[key])

    def profile(self, model: str) -> ModelProfile:
        return self.pipeline(model, "one-stage").models.profile

    def has_upsampler(self, model: str) -> bool:
        checkpoint = self.pipeline(model, "one-stage").models.checkpoint
        return companions.find_beside(checkpoint, "spatial-upscaler-x2") is not None

    def camera_lora(self, model: str, motion: str) -> LoraFile:
        """LTX's `dolly_in` is the published `...-lora-camera-control-dolly-in`."""
        motions = self.camera_motions(model)
        name = motion.replace("_", "-")
        if name not in motions:
            there = ", ".join(motions) or "none beside this model"
            raise InputError(f"camera_motion {motion} needs its LoRA; there is {there}.")
        return LoraFile(motions[name])

    def camera_motions(self, model: str) -> dict[str, Path]:
        checkpoint = self.pipeline(model, "one-stage").models.checkpoint
        marker = "-lora-camera-control-"
        return {
            path.stem.partition(marker)[2]: path
            for path in sorted(checkpoint.paths[0].parent.glob(f"*{marker}*.safetensors"))
        }

    def pipelines(self, model: str) -> list[str]:
        """Those whose companions are there."""
        names = []
        for name in PIPELINES:
            try:
                pipeline = self.pipeline(model, name)
                if pipeline.has_stage_2:
                    companions.spatial_upsampler(pipeline.models.checkpoint, None)
                    if not pipeline.models.is_distilled:
                        companions.distilled_lora(pipeline.models.checkpoint, None)
            except InputError:
                continue
            names.append(name)
        return names


class Submissions:
    """Builds requests and queues them."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        files: Files,
        models: ServedModels,
        uploads: Uploads,
    ) -> None:
        self.settings, self.store, self.files = settings, store, files
        self.models, self.uploads = models, uploads

    def create(
        self,
        owner: str,
        body: VideoCreate,
        *,
        idempotency_key: str | None = None,  # the same again gives the same job
    ) -> Job:
        """Queues what a body asks for. Raises ApiError or InputError."""
        fingerprint = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
        if idempotency_key is not None:
            earlier = self.store.find_by_key(owner, idempotency_key)
            if earlier is not None:
                return _same(earlier, fingerprint)
        model = body.model or next(iter(self.settings.models))
        values = self._values(owner, model, body)
        values["prompt"] = body.prompt
        if body.input_reference is not None:
            first = self._file(owner, body.input_reference, "input_reference")
            values["images"] = [{"path": first}, *values.get("images", [])]
        is_longer = body.num_frames is not None or body.seconds is not None
        name = body.pipeline or self._usual_pipeline(values, is_longer)
        self._apply_size_and_seconds(values, model, name, body.size, body.seconds)
        return self._queue(
            NewJob(
                owner, model, name, values, "", 0.0,
                is_streamed=body.stream,
                remixed_from=_made_here(body.source),
                idempotency_key=idempotency_key,
                fingerprint=fingerprint,
            )
        )  # fmt: skip

    def remix(self, owner: str, source: Job, prompt: str, body: Generation) -> Job:
        """The source's request with what the body names changed, over files of its own."""
        values = source.request | {"prompt": prompt} | self._values(owner, source.model, body)
        name = body.pipeline or source.pipeline
        return self._queue(
            NewJob(
                owner, source.model, name, values, "", 0.0,
                is_streamed=body.stream,
                remixed_from=source.id,
            )
        )  # fmt: skip

    def queue(self, owner: str, model: str | None, name: str, values: dict[str, Any]) -> Job:
        """Queues plain values of a GenerationRequest, whose paths are those of uploads."""
        model = model or next(iter(self.settings.models))
        return self._queue(NewJob(owner, model, name, values, "", 0.0))

    def nearest_size(
        self, model: str, name: str, size: str, values: Mapping[str, Any]
    ) -> tuple[int, int]:
        """(height, width) on the grid of what a pipeline makes of a model."""
        width, height = (int(side) for side in size.split("x"))
        scale = self._profile(model, name, values).scale
        return _on_grid(height, scale.height), _on_grid(width, scale.width)

    def nearest_frames(self, model: str, seconds: float, frame_rate: float | None) -> int:
        """The number of frames on the grid whose duration is nearest."""
        profile = self.models.profile(model)
        wanted = seconds * (frame_rate or profile.frame_rate)
        return max(0, round((wanted - 1) / profile.scale.time)) * profile.scale.time + 1

    # Parts.

    def check_room(self) -> None:
        """Raises ApiError 429 when the queue is full; asked before a file is looked at."""
        try:
            self.store.check_queue()
        except QueueFullError:
            raise _queue_is_full() from None

    def _values(self, owner: str, model: str, body: Generation) -> dict[str, Any]:
        """What a body says, as plain values of a GenerationRequest."""
        given = {name: getattr(body, name) for name in PLAIN}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for name in SCALES:
            scale = getattr(body, name)
            if scale is not None:
                values[name] = scale if isinstance(scale, float) else scale.model_dump()
        for name in FILES:
            reference = getattr(body, name)
            if reference is not None:
                values[name] = self._file(owner, reference, name)
        for name in FILE_LISTS:
            if (items := getattr(body, name)) is not None:
                values[name] = [
                    item.model_dump(exclude={"file"}) | {"path": self._file(owner, item.file, name)}
                    for item in items
                ]
        if body.camera_motion is not None:
            lora = self.models.camera_lora(model, body.camera_motion)
            values["loras"] = [{"path": str(lora.path), "strength": lora.strength}]
        return values

    def _file(self, owner: str, reference: FileReference | str, param: str) -> str:
        self.check_room()
        if isinstance(reference, FileReference):
            names = [reference.file_id, reference.image_url, reference.video_id]
            if names.count(None) != 2:
                raise ApiError(
                    400, f"{param} has file_id, image_url or video_id, one of them.", param=param
                )
            if reference.video_id is not None:
                return self._clip(owner, reference.video_id, param)
            reference = next(name for name in names if name is not None)
        return str(self.uploads.find(owner, reference, param))

    def _clip(self, owner: str, video_id: str, param: str) -> str:
        """The file of a clip that was made here, for its maker."""
        job = self.store.get(video_id, owner)
        if job is None or job.status != "completed":
            state = "no such video, or it has expired" if job is None else f"it is {job.status}"
            raise ApiError(400, f"{param}: {state}.", code="no_such_file", param=param)
        return str(self.files.result(job) / VIDEO)

    def _usual_pipeline(self, values: Mapping[str, Any], is_longer: bool) -> str:
        if "source" in values:
            return "extend" if is_longer else "retake"
        if values.get("controls"):
            return "ic-lora"
        return "keyframes" if values.get("keyframes") else self.settings.pipeline

    def _apply_size_and_seconds(
        self,
        values: dict[str, Any],
        model: str,
        name: str,
        size: str | None,
        seconds: str | float | None,
    ) -> None:
        if size is not None:
            if "width" in values or "height" in values:
                raise ApiError(400, "give size, or width and height.", param="size")
            values["height"], values["width"] = self.nearest_size(model, name, size, values)
        if seconds is not None:
            if "num_frames" in values:
                raise ApiError(400, "give seconds or num_frames.", param="seconds")
            try:
                duration_s = float(seconds)
            except ValueError:
                duration_s = 0.0
            if not 0 < duration_s <= self.settings.max_clip_s:
                raise ApiError(
                    400, f"seconds is above 0 and at most {self.settings.max_clip_s:g}.",
                    param="seconds",
                )  # fmt: skip
            rate = values.get("frame_rate")
            values["num_frames"] = self.nearest_frames(model, duration_s, rate)

    def _profile(self, model: str, name: str, values: Mapping[str, Any]) -> ModelProfile:
        is_skipped = bool(values.get("skip_stage_2", False))
        request = GenerationRequest(prompt="-", skip_stage_2=is_skipped)
        return self.models.pipeline(model, name).profile(request)

    def _queue(self, new: NewJob) -> Job:
        """Takes the files over, resolves the request against its model, and queues it."""
        values, links = _relocated(new.request, self.files, new.id)
        folder = self.files.inputs(new.id)
        try:
            if links:
                folder.mkdir()
                for source, target in links.items():
                    _link(source, target)
            request = GenerationRequest.from_dict(values)
            resolved = self.models.pipeline(new.model, new.pipeline).resolve(request)
            self._check_limits(resolved)
            height = (resolved.height or 0) * resolved.enlarge
            width = (resolved.width or 0) * resolved.enlarge
            new = dataclasses.replace(
                new,
                request=request.to_dict(),
                size=f"{width}x{height}",
                seconds=round(resolved.shape.duration_s, 3),
            )
            job, is_new = self.store.submit(new)
        except QueueFullError:
            self.files.remove(new.id)
            raise _queue_is_full() from None
        except IdempotencyError:
            self.files.remove(new.id)
            raise _key_is_taken() from None
        except BaseException:
            self.files.remove(new.id)
            raise
        if not is_new:
            self.files.remove(new.id)
        return job

    def _check_limits(self, request: GenerationRequest) -> None:
        shape, limits = request.shape, self.settings
        pixels = shape.height * shape.width * request.enlarge**2
        if pixels > limits.max_pixels:
            raise InputError(
                f"a frame of {pixels} pixels is above this server's {limits.max_pixels}."
            )
        if shape.duration_s > limits.max_clip_s:
            raise InputError(
                f"a clip of {shape.duration_s:.1f} s is above this server's {limits.max_clip_s:g}."
            )
        most_frames = int(limits.max_clip_s * MAX_FPS) + 1
        if shape.num_frames > most_frames:
            raise InputError(
                f"{shape.num_frames} frames are above this server's {most_frames}; give fewer."
            )
        if (request.num_inference_steps or 0) > limits.max_steps:
            raise InputError(
                f"{request.num_inference_steps} steps are above this server's {limits.max_steps}."
            )
        if len(request.text) + len(request.negative_prompt or "") > 2 * limits.max_prompt_chars:
            raise InputError(f"prompts are of at most {limits.max_prompt_chars} characters.")


def _made_here(source: FileReference | str | None) -> str | None:
    return source.video_id if isinstance(source, FileReference) else None


def _on_grid(side: int, step: int) -> int:
    return max(1, round(side / step)) * step


def _relocated(
    values: Mapping[str, Any], files: Files, job_id: str
) -> tuple[dict[str, Any], dict[Path, Path]]:
    """The request with its files in the job's own folder, and what is to be linked there.

    Paths are relative to the server's folder; see files.py. LoRAs are the operator's files.
    """
    folder = files.inputs(job_id)
    links: dict[Path, Path] = {}

    def place(path: str) -> str:
        target = folder / Path(path).name
        links[files.root / path] = target
        return str(target.relative_to(files.root))

    result = dict(values)
    for name in FILES:
        if result.get(name):
            result[name] = place(result[name])
    for name in FILE_LISTS:
        if result.get(name):
            result[name] = [item | {"path": place(item["path"])} for item in result[name]]
    return result, links


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        pass  # one file for two purposes
    except FileNotFoundError:
        raise ApiError(400, "a file of this request has expired.", code="no_such_file") from None


def _same(earlier: Job, fingerprint: str) -> Job:
    if earlier.fingerprint != fingerprint:
        raise _key_is_taken()
    return earlier


def _key_is_taken() -> ApiError:
    return ApiError(
        409, "this idempotency key came before with another request.", code="idempotency_conflict"
    )


def _queue_is_full() -> ApiError:
    return ApiError(
        429, "the queue is full; try again later.", code="queue_full",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )  # fmt: skip
