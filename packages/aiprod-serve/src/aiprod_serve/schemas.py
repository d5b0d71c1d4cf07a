"""The bodies of requests and answers. Unknown fields are refused, everywhere.

Ranges that only a model knows are checked against it when the request is built (submission.py).
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from aiprod_serve.jobs import Job


def _no_control_characters(text: str) -> str:
    if any(ord(character) < 32 and character not in "\t\n\r" for character in text):
        raise ValueError("must not hold control characters")
    return text


Text = Annotated[
    str,
    StringConstraints(min_length=1, max_length=100_000),
    AfterValidator(_no_control_characters),
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\w./=-]+$")]
Size = Annotated[
    str,
    StringConstraints(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"),
    Field(description="WIDTHxHEIGHT in pixels; brought to the model's grid."),
]
Number = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
# A file: its data: URI, or the storage_uri of an upload.
Uri = Annotated[str, StringConstraints(min_length=1, max_length=64_000_000)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileReference(Strict):
    """A file that was uploaded (`POST /v1/files`), one sent along as a data: URI, or a clip that
    was made here."""

    file_id: str | None = Field(None, max_length=100)
    image_url: Uri | None = None
    video_id: str | None = Field(None, pattern=r"^video_[0-9a-f]{24}$")


class PerModalityScale(Strict):
    video: Number
    audio: Number


Scale = Number | PerModalityScale
FileInput = FileReference | Uri


class ImageInput(Strict):
    file: FileInput
    frame: int = Field(0, ge=0, le=100_000, description="The pixel frame that shows the image.")
    strength: float = Field(1.0, ge=0, le=1)


class ControlInput(Strict):
    kind: Literal[
        "canny", "depth", "pose", "canny-made", "depth-made", "pose-made", "detailer", "reference"
    ]
    file: FileInput
    strength: float = Field(1.0, ge=0, le=1)


class Generation(Strict):
    """What AIPROD adds to OpenAI's fields: those of `aiprod generate`, by the same names."""

    pipeline: Name | None = Field(None, description="A way to make a clip; see /v1/models.")
    negative_prompt: Text | None = None
    seed: Seed | None = Field(None, description="The same seed gives the same clip; default 10.")
    num_frames: int | None = Field(None, ge=1, le=1_000_000)
    width: int | None = Field(None, ge=1, le=100_000)
    height: int | None = Field(None, ge=1, le=100_000)
    frame_rate: float | None = Field(None, gt=0, le=1000)
    num_inference_steps: int | None = Field(None, ge=1, le=10_000)
    cfg_scale: Scale | None = None
    stg_scale: Scale | None = None
    modality_scale: Scale | None = None
    rescale_scale: Scale | None = None
    sampler: Name | None = None
    schedule: Name | None = None
    step_cache: Name | None = Field(None, description="off, safe or fast: steps are forecast.")
    generate_audio: bool | None = None
    audio_prompt: Text | None = None
    images: list[ImageInput] | None = Field(None, max_length=32)
    keyframes: list[ImageInput] | None = Field(None, max_length=32)
    controls: list[ControlInput] | None = Field(None, max_length=4)
    audio: FileInput | None = Field(None, description="A sound that the picture follows.")
    audio_start_time: Number | None = None
    source: FileInput | None = Field(None, description="The clip to retake or to extend.")
    start_time: Number | None = None
    end_time: Number | None = None
    modality: Literal["video", "audio", "both"] | None = None
    camera_motion: Name | None = Field(None, description="A camera LoRA beside the model.")
    skip_stage_2: bool | None = None
    enlarge: int | None = Field(None, ge=1, le=64)
    enlarge_method: Name | None = None
    crf: int | None = Field(None, ge=0, le=51)
    stream: bool = Field(False, description="Can be watched while it is made (/stream).")


class VideoCreate(Generation):
    """`POST /v1/videos`, as OpenAI's, and AIPROD's own fields."""

    prompt: Text
    model: Name | None = None
    seconds: str | float | None = Field(None, description="Duration; the frame count follows it.")
    size: Size | None = None
    input_reference: FileInput | None = Field(None, description="The clip's first image.")


class VideoRemix(Generation):
    """`POST /v1/videos/{id}/remix`: the request of that video with these fields changed."""

    prompt: Text


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A job, as OpenAI's; status "cancelled" and the last four fields are AIPROD's."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    size: str
    seconds: str
    prompt: str
    error: VideoError | None
    remixed_from_video_id: str | None
    stage: str
    pipeline: str
    seed: int
    timings: dict[str, float]

    @classmethod
    def of(cls, job: Job) -> "Video":
        error = None
        if job.error_code is not None:
            error = VideoError(code=job.error_code, message=job.error_message or "")
        return cls(
            id=job.id,
            model=job.model,
            status=job.status,  # pyright: ignore[reportArgumentType]
            progress=job.progress,
            created_at=int(job.created_at),
            completed_at=int(job.finished_at or 0) if job.status == "completed" else None,
            expires_at=int(job.expires_at) if job.expires_at else None,
            size=job.size,
            seconds=f"{job.seconds:g}",
            prompt=job.request["prompt"],
            error=error,
            remixed_from_video_id=job.remixed_from,
            stage=job.stage,
            pipeline=job.pipeline,
            seed=job.request["seed"],
            timings={name: round(seconds, 3) for name, seconds in job.timings.items()},
        )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "aiprod"
    defaults: dict[str, Any]
    grid: dict[str, int]
    has_audio: bool
    pipelines: list[str]
    camera_motions: list[str]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Frame(BaseModel):
    """What a clip is when nothing is said: pixels, the grid they lie on, and steps."""

    width: int
    height: int
    grid_width: int
    grid_height: int
    num_inference_steps: int


class PipelineChoice(BaseModel):
    name: str
    summary: str
    takes: list[str]  # of the inputs that only some pipelines use
    needs: list[str]
    frame: Frame


class PresetChoice(BaseModel):
    name: str
    summary: str
    settings: dict[str, Any]  # fields of `POST /v1/videos`
    frame: Frame


class RequestLimits(BaseModel):
    max_clip_s: float
    max_pixels: int
    max_steps: int
    max_prompt_chars: int
    max_upload_mb: float


class Choices(BaseModel):
    """What a page can offer for a model, on this server."""

    model: str
    default_pipeline: str
    num_frames: int
    frame_rate: float
    grid_frames: int  # num_frames is a multiple of it, and 1
    has_audio: bool
    presets: list[PresetChoice]
    pipelines: list[PipelineChoice]
    camera_motions: list[str]
    controls: list[str]
    samplers: list[str]
    schedules: list[str]
    step_caches: list[str]
    cfg_scale: PerModalityScale
    limits: RequestLimits


class Recipe(BaseModel):
    """What a clip was made from, as its file carries it; `aiprod replay` takes the same."""

    model_config = ConfigDict(extra="allow")

    pipeline: str
    request: dict[str, Any]


class FileObject(BaseModel):
    """An upload, as OpenAI's files; `storage_uri` is what LTX-style requests take."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    storage_uri: str
    media: dict[str, Any]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    error: ErrorBody


# LTX's public API.


class LtxText(Strict):
    prompt: Text
    model: Name | None = None
    duration: float | None = Field(None, gt=0, le=3600, description="seconds")
    resolution: Size | None = None
    fps: float | None = Field(None, gt=0, le=1000)
    generate_audio: bool | None = None
    camera_motion: Name | None = None
    seed: Seed | None = None
    negative_prompt: Text | None = None
    num_inference_steps: int | None = Field(None, ge=1, le=10_000)


class LtxImage(LtxText):
    image_uri: Uri


class LtxAudio(LtxText):
    audio_uri: Uri
    image_uri: Uri | None = None


class LtxRetake(Strict):
    video_uri: Uri
    start_time: Number
    duration: float = Field(gt=0, le=3600)
    prompt: Text | None = None
    mode: Literal["replace_audio_and_video", "replace_video", "replace_audio"] = (
        "replace_audio_and_video"
    )
    resolution: Size | None = None
    model: Name | None = None
    seed: Seed | None = None


class LtxExtend(Strict):
    video_uri: Uri
    duration: float = Field(gt=0, le=3600, description="seconds to add")
    prompt: Text | None = None
    mode: Literal["end"] = "end"
    model: Name | None = None
    seed: Seed | None = None


class LtxUpload(BaseModel):
    upload_url: str
    storage_uri: str
    expires_at: str
    required_headers: dict[str, str]


class LtxJob(BaseModel):
    id: str
    created_at: str
    status: Literal["pending", "processing", "completed", "failed"]
    completed_at: str | None = None
    result: dict[str, str] | None = None
    error: ErrorBody | None = None
