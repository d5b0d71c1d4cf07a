"""From clips to a prepared folder: check, drop doubles, group into parts, encode, report.

    OUT/dataset.json               what the folder was made with
    OUT/part-00000.safetensors     latents and text (see aiprod_trainer.data), and its .jsonl
    OUT/empty.safetensors          text features of the empty caption
    OUT/clips.jsonl                every row of the table: kept, skipped or duplicate, and why
    OUT/skipped.jsonl              those that are not kept
    OUT/report.html, thumbnails/   to look at

All of it is a function of the clips, the settings and the model. A run that was killed at any point
goes on where it was, and ends with the same bytes as one that was not.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aiprod_core.errors import InputError
from aiprod_pipelines.controls import make_control
from aiprod_pipelines.model_files import BUNDLED
from aiprod_pipelines.progress import Progress
from aiprod_trainer.dataset import encode
from aiprod_trainer.dataset.clips import Settings, check_clip, clip_key, thumbnail_name
from aiprod_trainer.dataset.journal import Journal, claim, sole_run, write_whole
from aiprod_trainer.dataset.report import write_report
from aiprod_trainer.dataset.tables import Clip
from aiprod_trainer.dataset.workers import Function, Task, Workers, run_tasks

CHECKS = ".checks.jsonl"
KEPT, SKIPPED, DUPLICATE = "kept", "skipped", "duplicate"


@dataclass(frozen=True)
class Model:
    """Which networks encode, and where. Names are those of `ModelSet.open`."""

    name: str
    text_encoder: str | None = None
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class RunOptions:
    """How to run: the workers, what watches, and whether to start anew."""

    workers: Workers = field(default_factory=Workers)
    progress: Progress = field(default_factory=Progress)
    overwrite: bool = False


@dataclass
class Row:
    """A clip of the table and what became of it."""

    clip: Clip
    record: dict[str, Any]
    state: str = KEPT
    reason: str | None = None
    part: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "clip": self.clip.name,
            "state": self.state,
            **({"reason": self.reason} if self.reason else {}),
            **({"part": self.part} if self.part is not None else {}),
            **{k: v for k, v in self.record.items() if k != "problem"},
        }


@dataclass(frozen=True)
class Summary:
    """Counts of rows by what became of them, of parts, and of those encoded by this run."""

    rows: list[Row]
    num_parts: int
    encoded_parts: int

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        return {
            "clips": len(self.rows),
            KEPT: self.count(KEPT),
            SKIPPED: self.count(SKIPPED),
            DUPLICATE: self.count(DUPLICATE),
            "parts": self.num_parts,
            "encoded_parts": self.encoded_parts,
        }


def process_videos(
    clips: Sequence[Clip],
    folder: Path,
    model: Model,
    settings: Settings,
    run: RunOptions | None = None,
) -> Summary:
    """Encodes pictures, sounds, references and masks; the text is left to `process_captions`.

    Raises InputError when not one clip can be used, for settings off the model's grid, and for a
    folder that was made with others.
    """
    return _prepare(clips, folder, model, settings, run or RunOptions(), with_text=False)


def process_dataset(
    clips: Sequence[Clip],
    folder: Path,
    model: Model,
    settings: Settings,
    run: RunOptions | None = None,
    *,
    lora_trigger: str | None = None,
) -> Summary:
    """`process_videos` and then the text of every caption, led by `lora_trigger` if given."""
    return _prepare(
        clips,
        folder,
        model,
        settings,
        run or RunOptions(),
        with_text=True,
        lora_trigger=lora_trigger,
    )


def process_captions(
    clips: Sequence[Clip],
    folder: Path,
    run: RunOptions | None = None,
    *,
    text_encoder: str | None = None,
    device: str | None = None,
    lora_trigger: str | None = None,
) -> Summary:
    """Gives a folder of `process_videos` its text, or other captions than it had."""
    file = folder / "dataset.json"
    if not file.is_file():
        raise InputError(f"{folder}: no dataset.json; run `aiprod dataset process-videos` first.")
    made = json.loads(file.read_text())
    model = Model(made["model"], text_encoder, device, made["identity"]["dtype"])
    settings = Settings.from_json(made["settings"])
    return _prepare(
        clips,
        folder,
        model,
        settings,
        run or RunOptions(),
        with_text=True,
        lora_trigger=lora_trigger,
    )


def _prepare(
    clips: Sequence[Clip],
    folder: Path,
    model: Model,
    settings: Settings,
    run: RunOptions,
    *,
    with_text: bool,
    lora_trigger: str | None = None,
) -> Summary:
    folder = folder.resolve()
    names = {"model": _absolute(model.name), "device": model.device, "dtype": model.dtype}
    text_names = names | {"text_encoder": _absolute(model.text_encoder)}

    # What can be refused is refused now, by headers.
    models = encode.open_models(**names)
    encode.check_grid(models, settings)
    if settings.with_audio and not models.profile.has_audio:
        raise InputError(f"{model.name}: has no sound; prepare without (--no-audio).")
    for control in settings.controls:
        make_control(control, np.zeros((1, 64, 64, 3), np.uint8))
    identity = encode.model_identity(models)
    made_with = {"model": names["model"], "identity": identity, "settings": settings.as_json()}
    if with_text:
        text_identity = encode.encoder_identity(encode.open_models(**text_names))

    with sole_run(folder):
        if run.overwrite:
            (folder / CHECKS).unlink(missing_ok=True)
        elif any(folder.glob("part-*.safetensors")) and not (folder / "dataset.json").is_file():
            raise InputError(
                f"{folder}: holds parts that `aiprod dataset` did not make; give another folder."
            )
        claim(folder / "dataset.json", made_with, overwrite=run.overwrite)
        rows = _check(clips, folder, settings, run)
        _sort_out(rows, needs_caption=with_text)
        parts = _group(rows, settings.clips_per_part)
        paths = [folder / f"part-{number:05d}.safetensors" for number in range(len(parts))]
        if not parts:
            _write_lists(folder, rows)
            raise InputError(
                f"{folder}: of {len(rows)} clips not one can be used; the first: {rows[0].reason}"
            )

        tasks = []
        for path, part in zip(paths, parts, strict=True):
            stamp = encode.stamp(made_with, [row.record["content"] for row in part])
            if run.overwrite or encode.read_stamps(path).get("latents") != stamp:
                task = {"settings": settings.as_json(), "path": str(path), "stamp": stamp}
                task["clips"] = [row.clip.as_json() for row in part]
                task["buckets"] = [row.record["bucket"] for row in part]
                tasks.append(names | task)
        _run("encode clips", encode.encode_latents, tasks, run)
        encoded = len(tasks)

        if with_text:
            tasks = []
            wanted: dict[Path, Any] = {folder / "empty.safetensors": None}
            for path, part in zip(paths, parts, strict=True):
                wanted[path] = [_with_trigger(row.clip.captions, lora_trigger) for row in part]
            for path, captions in wanted.items():
                stamp = encode.stamp(identity, text_identity, captions)
                if encode.read_stamps(path).get("text") != stamp:
                    task = {"captions": captions, "path": str(path), "stamp": stamp}
                    tasks.append(text_names | task)
            _run("encode captions", encode.encode_text, tasks, run)
            encoded = max(encoded, sum(task["captions"] is not None for task in tasks))
        encode.open_models.cache_clear()

        _remove_stale(folder, rows, set(paths))
        _write_lists(folder, rows)
        write_report(folder, rows, settings, model.name)
    return Summary(rows, len(parts), encoded)


def _check(clips: Sequence[Clip], folder: Path, settings: Settings, run: RunOptions) -> list[Row]:
    """A row for each clip with what `check_clip` finds; what an earlier run found is kept."""
    thumbnails = folder / "thumbnails"
    thumbnails.mkdir(exist_ok=True)
    journal = Journal(folder / CHECKS)
    keys = [clip_key(clip) for clip in clips]
    records = dict(journal.records)
    waiting = [i for i, key in enumerate(keys) if key not in records]
    shared = {"settings": settings.as_json(), "thumbnails": str(thumbnails)}
    tasks = [shared | {"clip": clips[i].as_json()} for i in waiting]
    with run.progress.stage("check clips", len(clips)) as advance:
        advance(len(clips) - len(waiting))
        for number, record in run_tasks(check_clip, tasks, run.workers, isolated=True):
            index = waiting[number]
            record = record or {"problem": f"{clips[index].name}: it crashes the decoder."}
            records[keys[index]] = record
            if "problem" not in record:  # those are looked at again by the next run
                journal.add(keys[index], record)
            advance(1)
    journal.finish(key for key in dict.fromkeys(keys) if "problem" not in records[key])
    return [Row(clip, records[key]) for clip, key in zip(clips, keys, strict=True)]


def _sort_out(rows: Iterable[Row], *, needs_caption: bool) -> None:
    """Skips what cannot be used, and of clips with one content keeps the first."""
    seen: dict[str, Row] = {}
    for row in rows:
        if "problem" in row.record:
            row.state, row.reason = SKIPPED, row.record["problem"]
        elif needs_caption and not row.clip.captions:
            row.state, row.reason = SKIPPED, f"{row.clip.name}: has no caption."
        elif (first := seen.setdefault(row.record["content"], row)) is not row:
            row.state, row.reason = DUPLICATE, f"the same picture and sound as {first.clip.name}"


def _group(rows: Iterable[Row], clips_per_part: int) -> list[list[Row]]:
    """Parts of kept rows that agree in all that a part's clips must agree in, in the table's
    order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.state == KEPT:
            record, columns = row.record, sorted(row.clip.files.keys() - {"video", "audio"})
            key = (record["bucket"], record["has_video"], record["has_audio"], *columns)
            groups.setdefault((len(row.clip.captions), *key), []).append(row)
    parts = []
    for key in sorted(groups, key=str):
        for start in range(0, len(groups[key]), clips_per_part):
            part = groups[key][start : start + clips_per_part]
            for row in part:
                row.part = len(parts)
            parts.append(part)
    return parts


def _run(name: str, function: Function, tasks: Sequence[Task], run: RunOptions) -> None:
    if not tasks:
        return
    with run.progress.stage(name, len(tasks)) as advance:
        for _, is_done in run_tasks(function, tasks, run.workers):
            if not is_done:
                raise RuntimeError(f"{name}: a worker process was killed; see the system's log.")
            advance(1)


def _remove_stale(folder: Path, rows: Iterable[Row], parts: set[Path]) -> None:
    """Parts and thumbnails that an earlier, other table left."""
    for path in set(folder.glob("part-*.safetensors")) - parts:
        path.unlink()
        path.with_suffix(".jsonl").unlink(missing_ok=True)
    shown = {thumbnail_name(row.record) for row in rows if "content" in row.record}
    for path in (folder / "thumbnails").glob("*.jpg"):
        if path.name not in shown:
            path.unlink()


def _write_lists(folder: Path, rows: Sequence[Row]) -> None:
    for name, chosen in (
        ("clips.jsonl", rows),
        ("skipped.jsonl", [row for row in rows if row.state != KEPT]),
    ):
        lines = [json.dumps(row.as_json(), ensure_ascii=False) + "\n" for row in chosen]
        write_whole(folder / name, "".join(lines).encode())


def _with_trigger(captions: Sequence[str], trigger: str | None) -> list[str]:
    return [f"{trigger} {caption}" if trigger else caption for caption in captions]


def _absolute(name: str | None) -> str | None:
    """A path for every working directory; other names as they are."""
    if name is None or name in BUNDLED or not Path(name).exists():
        return name
    return str(Path(name).resolve())
