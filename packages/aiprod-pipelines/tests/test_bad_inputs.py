"""What a user may give by mistake: one sentence and exit code 2, or a clip; never half a file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from aiprod_pipelines import media
from aiprod_pipelines.cli import app

PROMPT = "a red ball bounces"


@pytest.fixture
def generate(tiny_family: Path, tmp_path: Path):
    """Runs `aiprod generate` in a folder of its own: (exit code, what it said, files it left)."""
    folder = tmp_path / "out"
    folder.mkdir()

    def run(*arguments: object, name: str = "clip.mp4") -> tuple[int, str, list[str]]:
        model = ["-m", tiny_family / "tiny-dev.safetensors", "--device", "cpu"]
        command = ["generate", PROMPT, *model, "-o", folder / name, *arguments]
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stderr, sorted(p.name for p in folder.iterdir())

    return run


@pytest.fixture
def files(tmp_path, picture, source_clip, tiny_model, make_tone, save_lora) -> dict[str, Path]:
    whole = source_clip.read_bytes()
    made = {name: tmp_path / name for name in (
        "empty.mp4", "noise.mp4", "header.mp4", "tail.mp4", "text.png", "empty.wav",
        "foreign.safetensors", "wide.safetensors", "half.safetensors", "long.wav", "short.wav",
    )}  # fmt: skip
    made["empty.mp4"].touch()
    made["empty.wav"].touch()
    made["noise.mp4"].write_bytes(np.random.default_rng(0).bytes(5000))
    made["header.mp4"].write_bytes(whole[:600])
    start = whole.index(b"mdat") + 4  # every frame and sound spoilt, the index whole
    made["tail.mp4"].write_bytes(whole[:start] + bytes(len(whole) - start))
    made["text.png"].write_text("not a picture")
    save_lora(made["foreign.safetensors"], layer="transformer_blocks.9.attn1.to_q")
    save_lora(made["wide.safetensors"], width=40)
    made["half.safetensors"].write_bytes(tiny_model.read_bytes()[:5000])
    media.write_audio(made["long.wav"], make_tone(4.0))
    media.write_audio(made["short.wav"], make_tone(0.1))
    return made | {"source": source_clip, "picture": picture}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "keyframes", "--keyframe", "{picture}:9"], "frame 9 is outside the clip of 9"),
        (["-p", "keyframes", "--keyframe", "{picture}:-1"], "frame must be at least 0; got -1"),
        (["--image", "{text.png}"], "text.png: not an image that can be read"),
        (["-p", "retake", "--source", "{empty.mp4}"], "empty.mp4: the file is empty"),
        (["-p", "retake", "--source", "{noise.mp4}"], "noise.mp4: not media that can be read"),
        (["-p", "extend", "--source", "{header.mp4}"], "header.mp4: not media that can be read"),
        (["-p", "retake", "--source", "{tail.mp4}"], "tail.mp4: not media that can be"),
        (["-p", "ic-lora", "--control", "canny={tail.mp4}"], "tail.mp4: not media that can be"),
        (["-p", "ic-lora", "--control", "canny={empty.mp4}"], "empty.mp4: the file is empty"),
        (["-p", "ic-lora", "--control", "canny={long.wav}"], "long.wav: no picture in this file"),
        (["--audio", "{empty.wav}"], "empty.wav: the file is empty"),
        (["--audio", "{noise.mp4}"], "noise.mp4: not media that can be read"),
        (["--audio", "{tail.mp4}"], "tail.mp4: not media that can be"),
        (["--image", "{empty.mp4}"], "empty.mp4: the file is empty"),
        (["--stream", "-p", "retake", "--source", "{empty.mp4}"], "the file is empty"),
        (["--stream", "-p", "text-to-audio"], "a sound alone cannot be streamed; save it"),
        (["--lora", "{empty.mp4}"], "empty.mp4: not a safetensors file, or cut short"),
        (["--lora", "{foreign.safetensors}"], "it is for another model"),
        (["--lora", "{wide.safetensors}"], "do not fit transformer_blocks.0.attn1.to_q"),
        (["--lora", "{half.safetensors}"], "cut short"),
        (["--camera", "dolly"], "camera must be one of"),
        (["--camera", "static"], "tiny-lora-camera-control-static.safetensors is not in"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_exit_code_2_and_no_file(arguments, message, generate, files):
    filled = " ".join(arguments)
    for name, path in files.items():
        filled = filled.replace(f"{{{name}}}", str(path))
    code, said, left = generate(*filled.split())
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], said
    assert "Traceback" not in said
    assert left == []


@pytest.mark.parametrize("flag", [["--stream"], []])
def test_what_fails_late_leaves_no_file_either(flag, generate, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr("aiprod_pipelines.decoding.decode_chunks", fail)
    code, said, left = generate(*flag)
    assert code == 1 and "try fewer frames" in said
    assert left == []


def test_a_reference_of_another_length_and_size_is_fitted(generate, files, tmp_path):
    """Longer than the clip is cut; shorter steers the beginning; any size is scaled and cropped."""
    short = tmp_path / "short.mp4"
    pixels = np.random.default_rng(0).integers(0, 255, (3, 90, 40, 3), np.uint8)
    media.write_video(short, [pixels], 12)
    still = tmp_path / "still.png"
    Image.fromarray(pixels[0]).save(still)
    for path, note in ((files["source"], ""), (short, "the first 1 of 9 frames"), (still, "")):
        code, said, left = generate("-p", "ic-lora", "--skip-stage-2", "--control", f"canny={path}")
        assert code == 0, said
        assert left == ["clip.mp4"]
        assert note in said and ("steers" in said) == bool(note)


@pytest.mark.parametrize("name", ["long.wav", "short.wav"])
def test_a_sound_of_another_length_is_cut_or_followed_by_silence(name, generate, files, tmp_path):
    code, said, left = generate("--audio", files[name])
    assert code == 0, said
    info = media.probe(tmp_path / "out" / "clip.mp4")
    assert info.num_frames == 9
    sound = media.read_audio(tmp_path / "out" / "clip.mp4")
    assert sound.duration_s == pytest.approx(9 / 12, abs=0.1)
    end = np.abs(sound.samples[:, round(0.3 * sound.sample_rate) : round(0.7 * 16000)]).max()
    assert (end > 0.1) == (name == "long.wav")
    assert left == ["clip.mp4"]
