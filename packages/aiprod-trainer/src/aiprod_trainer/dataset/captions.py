"""Captions of clips, picture and sound, by a language model that sees and hears.

The model is a server with OpenAI's chat protocol (a URL), or one of transformers (a folder or hub
id). It gets some frames a second and the sound. Every caption is kept as soon as it is there, so a
run that was killed asks for no caption twice.
"""

import base64
import concurrent.futures
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_pipelines.progress import Progress
from aiprod_trainer.dataset.clips import jpeg
from aiprod_trainer.dataset.journal import Journal, sole_run
from aiprod_trainer.dataset.tables import VIDEO_SUFFIXES, media_files, read_table, write_table

INSTRUCTION = """\
Describe this clip as one paragraph of plain English in the present tense, in the order in which \
things happen, in at most 150 words. Say what is seen: the people and things, what they look like, \
where they are, how they move, the light, and how the camera moves. Say what is heard and when: \
speech in quotation marks with the voice described, sounds, music. Quote text that can be read. \
Start with the content itself; do not write "the video shows".\
"""

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_SIDE = 512  # of the frames that are sent, in pixels
SOUND_RATE = 16000
TRIES, WAIT_S = 5, 2.0  # a busy server is asked again, each time twice as late
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class CaptionSettings:
    """What the model is given and asked."""

    instruction: str = INSTRUCTION
    fps: float = 2.0
    max_frames: int = 32
    with_audio: bool = True
    max_tokens: int = 400


class Shown(NamedTuple):
    """A clip as the model gets it: frames (F, height, width, 3), and mono sound at 16 kHz."""

    frames: media.Frames
    audio: media.Audio | None
    fps: float  # of `frames`


Captioner = Callable[[Shown, CaptionSettings], str]


def caption_videos(
    source: Path,
    output: Path,
    captioner: Captioner,
    settings: CaptionSettings,
    *,
    extensions: Sequence[str] = VIDEO_SUFFIXES,
    recursive: bool = True,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Captions a video, or those of a folder or table, into a table. Returns its rows and those
    clips that got none, with the reason.

    Captions that `output` already has are kept, unless `overwrite`. `workers` clips are asked for
    at a time. Raises InputError when no clip could be captioned.
    """
    progress = progress or Progress()
    videos = _videos(source, extensions, recursive)
    folder = output.parent.resolve()
    names = {path: os.path.relpath(path.resolve(), folder) for path in videos}
    with sole_run(folder):
        journal = Journal(folder / f".{output.name}.journal")
        if overwrite:
            journal.remove()
            journal.records.clear()
        elif output.is_file():
            before = {row["video"]: row["caption"] for row in read_table(output)}
            journal.records = before | journal.records
        waiting = [path for path in videos if names[path] not in journal.records]
        failed: list[dict[str, str]] = []

        def ask(path: Path) -> str:
            return _clean(captioner(show(path, settings), settings))

        with (
            progress.stage("caption videos", len(videos)) as advance,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
        ):
            advance(len(videos) - len(waiting))
            futures = {pool.submit(ask, path): path for path in waiting}
            try:
                for future in concurrent.futures.as_completed(futures):
                    name = names[futures[future]]
                    try:
                        journal.add(name, future.result())
                    except ServerError:
                        raise
                    except InputError as error:
                        failed.append({"video": name, "reason": str(error)})
                    advance(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        captioned = [name for path in videos if (name := names[path]) in journal.records]
        # Rows of other clips, which an earlier run wrote, stay.
        others = [name for name in journal.records if name not in set(captioned)]
        order = sorted([*others, *captioned])
        if not order:
            raise InputError(f"{source}: no clip got a caption; the first: {failed[0]['reason']}")
        rows = [{"video": name, "caption": journal.records[name]} for name in order]
        write_table(output, rows)
        journal.remove()
    return rows, sorted(failed, key=lambda row: row["video"])


class ServerError(InputError):
    """The server refuses every clip alike: there is no use in going on."""


def show(path: Path, settings: CaptionSettings) -> Shown:
    """What the model is to see and hear of a clip: frames evenly over its length, and its sound."""
    info = media.probe(path)
    if info.width is None or info.height is None:
        raise InputError(f"{path}: no video track in this file.")
    count = max(1, min(settings.max_frames, round(info.duration_s * settings.fps)))
    fps = count / info.duration_s if info.duration_s else settings.fps
    frames = [_shrunk(frame) for frame in media.read_frames_at(path, fps, count)]
    audio = None
    if settings.with_audio and info.audio_codec is not None:
        audio = media.read_audio(path, sample_rate=SOUND_RATE, channels=1)
    return Shown(np.stack(frames), audio, fps)


def by_server(url: str, model: str = "default") -> Captioner:
    """Asks a server: frames as JPEG images and the sound as WAV, by OpenAI's chat protocol.

    `url` may end in /v1 or /chat/completions; the key is in OPENAI_API_KEY. A busy server is asked
    again. Raises ServerError for one that cannot be reached or refuses the key or the model.
    """
    if not url.rstrip("/").endswith("/chat/completions"):
        url = url.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"

    def ask(shown: Shown, settings: CaptionSettings) -> str:
        content: list[dict[str, Any]] = [
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/jpeg;base64,{_base64(jpeg(frame))}"},
            }
            for frame in shown.frames
        ]
        if shown.audio is not None:
            sound = {"data": _base64(_wav(shown.audio)), "format": "wav"}
            content.append({"type": "input_audio", "input_audio": sound})
        about = f"The images are the frames of one clip, {shown.fps:.3g} a second. "
        content.append({"type": "text", "text": about + settings.instruction})
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": settings.max_tokens,
            "temperature": 0,
        }
        answer = _post(url, json.dumps(body).encode(), headers)
        try:
            return answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{url}: its answer is not in OpenAI's chat format.") from None

    return ask


def by_transformers(model: str, device: str | None = None) -> Captioner:
    """Asks a chat model of transformers: one for video (a Qwen-Omni), or for several images (Gemma
    3n). It hears the sound where its processor takes sound.

    `model` is a folder or hub id. Raises InputError when it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    from aiprod_pipelines.components import choose_device, choose_dtype

    place = choose_device(device)
    try:
        processor: Any = AutoProcessor.from_pretrained(model)
        network: Any = AutoModelForMultimodalLM.from_pretrained(
            model, dtype=choose_dtype(None, place), use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{model}: no captioning model can be loaded ({reason}).") from error
    network = getattr(network, "thinker", network)  # an Omni's other half only speaks
    network = network.eval().to(place)
    sees_video = getattr(processor, "video_processor", None) is not None
    hears = getattr(processor, "feature_extractor", None) is not None

    def ask(shown: Shown, settings: CaptionSettings) -> str:
        content: list[dict[str, Any]] = [{"type": "video", "video": shown.frames}]
        if not sees_video:
            content = [{"type": "image", "image": Image.fromarray(f)} for f in shown.frames]
        if shown.audio is not None and hears:
            content.append({"type": "audio", "audio": shown.audio.samples[0]})
        about = f"These are the frames of one clip, {shown.fps:.3g} a second. "
        content.append({"type": "text", "text": about + settings.instruction})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(place, network.dtype)
        with torch.inference_mode():
            written = network.generate(
                **inputs, do_sample=False, max_new_tokens=settings.max_tokens
            )
        new = written[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=True)[0]

    return ask


def choose_captioner(name: str, model: str, device: str | None) -> Captioner:
    """A server for a URL, else a model of transformers."""
    is_url = re.match(r"https?://", name)
    return by_server(name, model) if is_url else by_transformers(name, device)


def _videos(source: Path, extensions: Sequence[str], recursive: bool) -> list[Path]:
    suffixes = tuple(f".{extension.lower().lstrip('.')}" for extension in extensions)
    if source.is_dir():
        return media_files(source, suffixes, recursive=recursive)
    if not source.is_file():
        raise InputError(f"{source}: no such file or folder.")
    if source.suffix.lower() in suffixes:
        return [source]
    return [source.parent / row["video"] for row in read_table(source) if row.get("video")]


def _post(url: str, body: bytes, headers: dict[str, str]) -> Any:
    for attempt in range(TRIES):
        is_last = attempt == TRIES - 1
        try:
            request = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            detail = f"the server answered {error.code} {error.reason}"
            if error.code in (401, 403, 404):
                raise ServerError(f"{url}: {detail}; check the URL, model and key.") from error
            if is_last or (error.code < 500 and error.code != 429):
                raise InputError(f"{url}: {detail}.") from error
            wait_s = float(error.headers.get("Retry-After") or WAIT_S * 2**attempt)
        except (urllib.error.URLError, OSError) as error:
            if is_last:
                raise ServerError(f"{url}: the server cannot be reached ({error}).") from error
            wait_s = WAIT_S * 2**attempt
        except ValueError as error:
            raise ServerError(f"{url}: its answer is not JSON.") from error
        time.sleep(min(wait_s, 60.0))
    raise AssertionError("the last try returns or raises")


def _clean(text: str) -> str:
    """One paragraph, without the opening that models cannot help; InputError when that is all."""
    text = re.sub(r"<think>.*?</think>", "", text or "", flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text).strip().strip('"')
    opening = r"^(the|this) (video|clip)( clip)? (shows|depicts|features) "
    text = re.sub(opening, "", text, flags=re.IGNORECASE)
    if not text:
        raise InputError("the model wrote nothing.")
    return text[0].upper() + text[1:]


def _shrunk(frame: media.Frame) -> media.Frame:
    scale = LONGEST_SIDE / max(frame.shape[:2])
    if scale >= 1:
        return frame
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return np.asarray(Image.fromarray(frame).resize(size))


def _wav(audio: media.Audio) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.sample_rate)
        file.writeframes((np.clip(audio.samples[0], -1, 1) * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
