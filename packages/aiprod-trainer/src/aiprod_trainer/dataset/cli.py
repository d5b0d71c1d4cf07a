"""`aiprod dataset ...`: from footage to a folder that `aiprod train` reads.

Flags keep the names of LTX-2's preparation scripts. torch is imported inside the commands.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aiprod_pipelines.terminal import JsonFlag, explains_errors

if TYPE_CHECKING:
    from aiprod_trainer.dataset.prepare import Summary

app = typer.Typer(
    name="dataset",
    help="Cut, caption and encode footage for `aiprod train`. Killed at any point, a command goes "
    "on where it was when it is run again.",
    no_args_is_help=True,
)

Source = Annotated[
    Path,
    typer.Argument(
        metavar="DATASET",
        help="A CSV, JSON, JSONL or Parquet table with columns video and caption (and audio, "
        "reference_video, reference_audio, video_mask, audio_mask), or a folder of clips with "
        "captions in .txt files beside them.",
    ),
]
OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Default: `.precomputed` beside the dataset."),
]
ModelPath = Annotated[
    str,
    typer.Option(
        "--model-path",
        "--model",
        "-m",
        help="The model to be trained: `nano`, a .safetensors file or folder, or a hub repository.",
    ),
]
Buckets = Annotated[
    str | None,
    typer.Option(
        "--resolution-buckets",
        metavar="WxHxF;WxHxF",
        help="Sizes that clips are brought to, in pixels and frames; each clip takes the one "
        "nearest in shape, then the longest. Default: the model's own size.",
    ),
]
FrameRate = Annotated[
    float | None,
    typer.Option(help="Frames per second that clips are brought to. Default: the model's."),
]
Reshape = Annotated[
    str, typer.Option("--reshape-mode", help="Which part a crop keeps: center, or random.")
]
WithAudio = Annotated[
    bool, typer.Option("--with-audio/--no-audio", help="Encode the clips' sound too.")
]
Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        help="Make a reference for an IC-LoRA of each clip: canny, depth, pose or blur. Repeat.",
    ),
]
Downscale = Annotated[
    int,
    typer.Option("--reference-downscale-factor", help="References are smaller by this factor."),
]
TemporalScale = Annotated[
    int,
    typer.Option(
        "--reference-temporal-scale-factor", help="References have one of so many frames."
    ),
]
VideoColumn = Annotated[str | None, typer.Option(help="The table's name for the video column.")]
CaptionColumn = Annotated[str | None, typer.Option(help="The table's name for the captions.")]
ReferenceColumn = Annotated[
    str | None, typer.Option(help="The table's name for the reference videos.")
]
ClipsPerPart = Annotated[
    int, typer.Option(min=1, help="Clips in a file, and what a kill can lose of the work.")
]
TextEncoder = Annotated[
    str | None,
    typer.Option(
        "--text-encoder-path",
        "--text-encoder",
        help="Folder or hub id; default: `text_encoder` beside the model.",
    ),
]
LoraTrigger = Annotated[
    str | None, typer.Option(help="A word put before every caption, which calls the LoRA later.")
]
NumWorkers = Annotated[int, typer.Option("--workers", min=1, help="Processes on this machine.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Work on a Ray cluster instead: its address, `auto`, or `local` for one started here. "
        "All machines must see the files at the same paths.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; default: the best.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: by the device.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", "--override", help="Make everything anew.")]


def resumable(command: Callable[..., None]) -> Callable[..., None]:
    """As the other commands', but an interrupt says that the work can go on."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted: run the same command again to go on", err=True)
            raise typer.Exit(130) from None

    return explains_errors(wrapped)


@app.command("process-dataset")
@resumable
def process_dataset(
    dataset: Source,
    model_path: ModelPath,
    output_dir: OutputDir = None,
    resolution_buckets: Buckets = None,
    frame_rate: FrameRate = None,
    reshape_mode: Reshape = "center",
    with_audio: WithAudio = True,
    control: Controls = None,
    reference_downscale_factor: Downscale = 1,
    reference_temporal_scale_factor: TemporalScale = 1,
    video_column: VideoColumn = None,
    caption_column: CaptionColumn = None,
    reference_column: ReferenceColumn = None,
    clips_per_part: ClipsPerPart = 64,
    text_encoder_path: TextEncoder = None,
    lora_trigger: LoraTrigger = None,
    workers: NumWorkers = 1,
    ray: Ray = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Check, encode and report a whole data set: process-videos, then process-captions.

    [dim]aiprod dataset process-dataset clips.csv --model nano -o prepared[/dim]
    [dim]aiprod dataset process-dataset clips.jsonl -m ltx-2-19b-dev.safetensors --text-encoder
    gemma --resolution-buckets "768x512x121;512x768x121" --control canny[/dim]
    """
    from aiprod_trainer.dataset import prepare

    _encode(prepare.process_dataset, locals(), text_encoder_path, lora_trigger=lora_trigger)


@app.command("process-videos")
@resumable
def process_videos(
    dataset: Source,
    model_path: ModelPath,
    output_dir: OutputDir = None,
    resolution_buckets: Buckets = None,
    frame_rate: FrameRate = None,
    reshape_mode: Reshape = "center",
    with_audio: WithAudio = True,
    control: Controls = None,
    reference_downscale_factor: Downscale = 1,
    reference_temporal_scale_factor: TemporalScale = 1,
    video_column: VideoColumn = None,
    caption_column: CaptionColumn = None,
    reference_column: ReferenceColumn = None,
    clips_per_part: ClipsPerPart = 64,
    workers: NumWorkers = 1,
    ray: Ray = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Encode pictures, sounds, references and masks to latents.

    [dim]aiprod dataset process-videos clips.csv --model nano -o prepared[/dim]
    """
    from aiprod_trainer.dataset import prepare

    _encode(prepare.process_videos, locals())


@app.command("process-captions")
@resumable
def process_captions(
    dataset: Source,
    output_dir: OutputDir = None,
    text_encoder_path: TextEncoder = None,
    lora_trigger: LoraTrigger = None,
    video_column: VideoColumn = None,
    caption_column: CaptionColumn = None,
    reference_column: ReferenceColumn = None,
    workers: NumWorkers = 1,
    ray: Ray = None,
    device: Device = None,
    as_json: JsonFlag = False,
) -> None:
    """Encode captions to text features, for a folder that process-videos made.

    [dim]aiprod dataset process-captions clips.csv -o prepared[/dim]
    """
    from aiprod_trainer.dataset import prepare

    columns = _columns(video_column, caption_column, reference_column)
    clips, folder = _open(dataset, output_dir, columns)
    summary = prepare.process_captions(
        clips,
        folder,
        _run(workers, ray, device, overwrite=False),
        text_encoder=text_encoder_path,
        device=device,
        lora_trigger=lora_trigger,
    )
    _say(summary, folder, as_json)


@app.command("split-scenes")
@resumable
def split_scenes(
    video: Annotated[Path, typer.Argument(help="A video, or a folder of them at any depth.")],
    output_dir: Annotated[Path, typer.Argument(help="Where clips and scenes.jsonl are written.")],
    detector: Annotated[
        str,
        typer.Option(
            help="content (cuts), adaptive (cuts despite fast cameras), threshold (fades to black) "
            "or histogram."
        ),
    ] = "content",
    threshold: Annotated[
        float | None, typer.Option(help="What counts as a cut; default: the detector's own.")
    ] = None,
    min_scene_length: Annotated[
        float, typer.Option(help="Seconds; cuts closer than this are one.")
    ] = 0.6,
    filter_shorter_than: Annotated[
        float, typer.Option(help="Seconds; shorter scenes are left out.")
    ] = 0.0,
    max_scenes: Annotated[int | None, typer.Option(min=1, help="Of each video.")] = None,
    skip_start: Annotated[float, typer.Option(help="Seconds left out at the start.")] = 0.0,
    skip_end: Annotated[float, typer.Option(help="Seconds left out at the end.")] = 0.0,
    duration: Annotated[
        float | None, typer.Option(help="Seconds that are looked at, from the start.")
    ] = None,
    downscale: Annotated[
        int | None, typer.Option(min=1, help="Look for cuts in a smaller picture; default: auto.")
    ] = None,
    frame_skip: Annotated[
        int, typer.Option(min=0, help="Frames skipped between two that are compared.")
    ] = 0,
    save_images: Annotated[int, typer.Option(min=0, help="JPEG images of each scene.")] = 0,
    stats_file: Annotated[
        Path | None, typer.Option(help="A CSV of what the detector measured, for one video.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Cut long footage into clips of one scene each (PySceneDetect).

    [dim]aiprod dataset split-scenes film.mp4 clips --filter-shorter-than 2[/dim]
    """
    from aiprod_pipelines.progress import RichProgress
    from aiprod_trainer.dataset import scenes

    rows, skipped = scenes.split_scenes(
        video,
        output_dir,
        scenes.SceneSettings(
            detector=detector,
            threshold=threshold,
            min_scene_length=min_scene_length,
            filter_shorter_than=filter_shorter_than,
            max_scenes=max_scenes,
            skip_start=skip_start,
            skip_end=skip_end,
            duration=duration,
            downscale=downscale,
            frame_skip=frame_skip,
            save_images=save_images,
        ),
        stats_file=stats_file,
        progress=RichProgress(),
        overwrite=overwrite,
    )
    table = output_dir / "scenes.jsonl"
    if as_json:
        typer.echo(json.dumps({"output": str(table), "scenes": len(rows), "skipped": skipped}))
        return
    typer.echo(f"{table}: {len(rows)} scenes")
    _say_skipped(skipped)


@app.command("caption-videos")
@resumable
def caption_videos(
    videos: Annotated[Path, typer.Argument(help="A folder of clips, a table of them, or one.")],
    captioner: Annotated[
        str,
        typer.Option(
            "--captioner",
            metavar="URL | MODEL",
            help="A server with OpenAI's chat protocol, e.g. http://localhost:8000/v1 (its key in "
            "OPENAI_API_KEY), or a video model of transformers by folder or hub id.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .json, .jsonl, .csv, .txt or .parquet table; default: "
            "captions.jsonl with the clips.",
        ),
    ] = None,
    captioner_model: Annotated[
        str, typer.Option(help="The model's name on the server.")
    ] = "default",
    instruction: Annotated[
        str | None, typer.Option(help="What to ask instead of the built-in instruction.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames a second that the model sees.")] = 2.0,
    max_frames: Annotated[int, typer.Option(min=1, help="And at most so many.")] = 32,
    with_audio: Annotated[
        bool, typer.Option("--with-audio/--no-audio", help="Let the model hear the sound.")
    ] = True,
    extensions: Annotated[
        str, typer.Option(help="Which files of a folder are clips.")
    ] = "mp4,mov,mkv,webm,avi,m4v",
    recursive: Annotated[
        bool, typer.Option("--recursive/--no-recursive", help="Look in folders of the folder.")
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="Clips asked for at a time.")] = 1,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Caption clips, picture and sound, with a language model that sees and hears.

    [dim]aiprod dataset caption-videos clips --captioner http://localhost:8000/v1[/dim]
    [dim]aiprod dataset caption-videos clips --captioner Qwen/Qwen2.5-Omni-7B -o clips.csv[/dim]
    """
    from dataclasses import replace

    from aiprod_pipelines.progress import RichProgress
    from aiprod_trainer.dataset import captions
    from aiprod_trainer.dataset.tables import check_table_suffix

    folder = videos if videos.is_dir() else videos.parent
    output = output or folder / "captions.jsonl"
    check_table_suffix(output)
    settings = captions.CaptionSettings(fps=fps, max_frames=max_frames, with_audio=with_audio)
    if instruction is not None:
        settings = replace(settings, instruction=instruction)
    rows, failed = captions.caption_videos(
        videos,
        output,
        captions.choose_captioner(captioner, captioner_model, device),
        settings,
        extensions=extensions.split(","),
        recursive=recursive,
        workers=workers,
        overwrite=overwrite,
        progress=RichProgress(),
    )
    if as_json:
        typer.echo(json.dumps({"output": str(output), "captions": len(rows), "failed": failed}))
        return
    typer.echo(f"{output}: {len(rows)} captions")
    _say_skipped(failed)


def _encode(
    process: Callable[..., "Summary"],
    options: dict[str, Any],  # of process-videos
    text_encoder: str | None = None,
    **text: Any,
) -> None:
    """Runs one of `prepare`'s functions with a command's options and says what came of it."""
    from aiprod_trainer.dataset.prepare import Model

    columns = _columns(
        options["video_column"], options["caption_column"], options["reference_column"]
    )
    clips, folder = _open(options["dataset"], options["output_dir"], columns)
    same = (
        "reshape_mode",
        "with_audio",
        "reference_downscale_factor",
        "reference_temporal_scale_factor",
        "clips_per_part",
    )
    model_path, device = options["model_path"], options["device"]
    settings = _settings(
        model_path,
        options["resolution_buckets"],
        options["frame_rate"],
        controls=tuple(options["control"] or ()),
        **{name: options[name] for name in same},
    )
    run = _run(options["workers"], options["ray"], device, options["overwrite"])
    model = Model(model_path, text_encoder, device, options["dtype"])
    _say(process(clips, folder, model, settings, run, **text), folder, options["as_json"])


def _columns(video: str | None, caption: str | None, reference: str | None) -> dict[str, str]:
    named = {"video": video, "caption": caption, "reference_video": reference}
    return {key: name for key, name in named.items() if name is not None}


def _open(dataset: Path, output_dir: Path | None, columns: dict[str, str]) -> tuple[list, Path]:
    from aiprod_trainer.dataset.tables import read_clips

    clips = read_clips(dataset.resolve(), columns)
    beside = dataset if dataset.is_dir() else dataset.parent
    return clips, output_dir or beside / ".precomputed"


def _settings(model_path: str, buckets: str | None, frame_rate: float | None, **values: Any) -> Any:
    from aiprod_trainer.dataset.clips import Bucket, Settings, parse_buckets
    from aiprod_trainer.dataset.encode import open_models

    profile = open_models(model_path, None, None).profile
    own = (Bucket(profile.width, profile.height, profile.num_frames),)
    return Settings(
        parse_buckets(buckets) if buckets else own, frame_rate or profile.frame_rate, **values
    )


def _run(workers: int, ray: str | None, device: str | None, overwrite: bool) -> Any:
    from aiprod_pipelines.components import choose_device
    from aiprod_pipelines.progress import RichProgress
    from aiprod_trainer.dataset.prepare import RunOptions
    from aiprod_trainer.dataset.workers import Workers

    gpus = 1 if ray is not None and choose_device(device).type == "cuda" else 0
    return RunOptions(Workers(workers, ray, gpus), RichProgress(), overwrite)


def _say(summary: "Summary", folder: Path, as_json: bool) -> None:
    skipped = [
        {"video": row.clip.name, "reason": str(row.reason)}
        for row in summary.rows
        if row.state != "kept"
    ]
    if as_json:
        values = summary.as_json() | {"output": str(folder), "left_out": skipped}
        typer.echo(json.dumps(values))
        return
    typer.echo(
        f"{folder}: {summary.count('kept')} of {len(summary.rows)} clips in {summary.num_parts} "
        f"parts; look at {folder / 'report.html'}"
    )
    _say_skipped(skipped)


def _say_skipped(skipped: list[dict[str, str]], at_most: int = 20) -> None:
    for row in skipped[:at_most]:
        typer.echo(f"  left out: {row['video']}: {row['reason']}", err=True)
    if len(skipped) > at_most:
        typer.echo(f"  and {len(skipped) - at_most} more, in skipped.jsonl", err=True)
