"""Which clips there are: a folder, or a table in CSV, JSON, JSONL, Parquet or text.

A row names files (video, audio, reference_video, ...) and captions. Paths in a table are relative
to its folder. Columns are found by their usual names, LTX-2's among them; others are left alone.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiprod_core.errors import InputError
from aiprod_trainer.dataset.journal import write_whole

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".ogg")
TABLE_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".txt")

# The columns that name a file, with the names they also go by.
FILE_COLUMNS = {
    "video": ("video", "media_path", "video_path", "path", "file_name"),
    "audio": ("audio", "audio_path"),
    "reference_video": ("reference_video", "ref_media_path", "reference_path"),
    "reference_audio": ("reference_audio",),
    "video_mask": ("video_mask",),
    "audio_mask": ("audio_mask",),
}
CAPTION_COLUMNS = ("caption", "captions", "prompt", "text")


@dataclass(frozen=True)
class Clip:
    """One row: its name (the video's path as the table has it, or the sound's), files, captions."""

    name: str
    files: Mapping[str, Path] = field(default_factory=dict)  # by the keys of FILE_COLUMNS
    captions: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        files = {column: str(path) for column, path in self.files.items()}
        return {"name": self.name, "files": files, "captions": list(self.captions)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Clip":
        files = {column: Path(path) for column, path in values["files"].items()}
        return cls(values["name"], files, tuple(values["captions"]))


def read_clips(source: Path, columns: Mapping[str, str] | None = None) -> list[Clip]:
    """The clips of a folder or a table, in order.

    In a folder, at any depth, every video, image or sound is a clip, and its caption is in the
    .txt of the same name, if there is one. `columns` names columns of a table that are called
    otherwise, by "caption" or a key of FILE_COLUMNS. Raises InputError when nothing is found.
    """
    if source.is_dir():
        return [
            Clip(
                str(path.relative_to(source)),
                {"audio" if path.suffix.lower() in SOUND_SUFFIXES else "video": path},
                _sidecar(path),
            )
            for path in media_files(source, (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *SOUND_SUFFIXES))
        ]
    rows = read_table(source)
    if not rows:
        raise InputError(f"{source}: no rows in it.")
    found = _columns(source, rows, columns or {})
    clips = []
    for number, row in enumerate(rows, 1):
        given = {key: str(row[name]).strip() for key, name in found.items() if row.get(name)}
        given.pop("caption", None)
        name = given.get("video") or given.get("audio")
        if not name:
            raise InputError(f"{source}, row {number}: names neither a video nor a sound.")
        captions = row.get(found.get("caption", "")) or ()
        captions = [captions] if isinstance(captions, str) else captions
        clips.append(
            Clip(
                name,
                {key: source.parent / Path(path).expanduser() for key, path in given.items()},
                tuple(text.strip() for text in captions if text and text.strip()),
            )
        )
    return clips


def media_files(folder: Path, suffixes: Iterable[str], *, recursive: bool = True) -> list[Path]:
    """Files of a folder by their suffixes, sorted; hidden ones and what is in hidden folders not.

    Raises InputError when there is none.
    """
    wanted = {suffix.lower() for suffix in suffixes}
    found = [
        path
        for path in sorted(folder.rglob("*") if recursive else folder.glob("*"))
        if path.suffix.lower() in wanted
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(f"{folder}: no {', '.join(sorted(wanted))} file in this folder.")
    return found


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table. JSON is a list of objects, or one object from path to caption; a text
    file has a path, a tab and a caption a line. Raises InputError for one that cannot be read."""
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder.")
    check_table_suffix(path)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})."
        ) from None
    match path.suffix.lower():
        case ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        case ".txt":
            pairs = [line.partition("\t") for line in text.splitlines() if line.strip()]
            return [{"video": video, "caption": caption} for video, _, caption in pairs]
        case ".jsonl":
            lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
            rows = [_parse(f"{path}, line {i}", line) for i, line in lines]
        case _:
            rows = _parse(str(path), text)
            if isinstance(rows, dict):
                rows = [{"video": video, "caption": caption} for video, caption in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: must hold objects, such as {{'video': ..., 'caption': ...}}.")
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows in the format of the suffix; the file appears when it is whole."""
    check_table_suffix(path)
    match path.suffix.lower():
        case ".parquet":
            pyarrow = _pyarrow()
            sink = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
            write_whole(path, sink.getvalue())
            return
        case ".csv":
            stream = io.StringIO()
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(stream, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            text = stream.getvalue()
        case ".txt":
            lines = (f"{row['video']}\t{' '.join(row['caption'].split())}\n" for row in rows)
            text = "".join(lines)
        case ".jsonl":
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        case _:
            text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    write_whole(path, text.encode())


def check_table_suffix(path: Path) -> None:
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise InputError(
            f"{path}: a table must end in {', '.join(TABLE_SUFFIXES)}; or give a folder of clips."
        )


def _columns(path: Path, rows: list[dict[str, Any]], named: Mapping[str, str]) -> dict[str, str]:
    """From our name of a column to the table's. Raises InputError when a named one is not there."""
    present = list(dict.fromkeys(name for row in rows for name in row))
    for name in named.values():
        if name not in present:
            near = difflib.get_close_matches(name, present, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(present)}."
            raise InputError(f"{path}: no column {name}; {hint}")
    known = {**FILE_COLUMNS, "caption": CAPTION_COLUMNS}
    found = {
        key: next(name for name in aliases if name in present)
        for key, aliases in known.items()
        if any(name in present for name in aliases)
    } | dict(named)
    if "video" not in found and "audio" not in found:
        raise InputError(
            f"{path}: no column video or audio (it has {', '.join(present)}); name it with "
            "--video-column."
        )
    return found


def _sidecar(path: Path) -> tuple[str, ...]:
    caption = path.with_suffix(".txt")
    text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
    return (text,) if text else ()


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: not valid JSON ({error}).") from None


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}).") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "Parquet needs pyarrow: pip install 'aiprod-trainer[parquet]', or give CSV or JSONL."
        ) from None
    return pyarrow
