"""Our own clients and `aiprod remote generate`, against a server on a real socket."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from aiprod_core.errors import InputError
from aiprod_pipelines import media
from aiprod_serve.cli import remote_app
from aiprod_serve.client import AsyncClient, Client

PROMPT = "a red ball bounces"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((40, 64, 3), 90, np.uint8)).save(path)
    return path


def test_one_call_makes_a_clip_and_writes_it(server: str, tmp_path: Path, picture: Path):
    with Client(server) as client:
        video = client.generate(
            PROMPT, tmp_path / "a.mp4", files={"input_reference": picture}, seed=7, cfg_scale=1
        )
        assert video["status"] == "completed" and video["seed"] == 7
        assert media.probe(tmp_path / "a.mp4").num_frames == 9
        assert [found["id"] for found in client.list()] == [video["id"]]
        client.delete(video["id"])
        with pytest.raises(InputError, match="no such video"):
            client.get(video["id"])
        with pytest.raises(InputError, match="unknown field sede"):
            client.create(PROMPT, sede=7)


def test_the_asynchronous_client_makes_several_at_once(server: str, tmp_path: Path, picture: Path):
    async def run() -> list[str]:
        async with AsyncClient(server) as client:
            uploaded = await client.upload(picture)
            reference = {"file_id": uploaded["id"]}
            made = await asyncio.gather(
                *(
                    client.generate(
                        PROMPT, tmp_path / f"{seed}.mp4", seed=seed, input_reference=reference
                    )
                    for seed in (1, 2)
                )
            )
            await client.cancel((await client.create(PROMPT))["id"])
            return [video["status"] for video in made]

    assert asyncio.run(run()) == ["completed", "completed"]
    assert (tmp_path / "1.mp4").read_bytes() != (tmp_path / "2.mp4").read_bytes()


def test_remote_generate_writes_the_clip_and_one_json_line(server: str, tmp_path: Path):
    output = tmp_path / "clip.mp4"
    arguments = ["generate", PROMPT, "-o", str(output), "--url", server, "--size", "64x40"]
    # Typer makes a single command the app itself; `aiprod` adds it as a group.
    result = CliRunner().invoke(remote_app, [*arguments[1:], "--set", "cfg_scale=1", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["size"], report["output"]) == ("64x40", str(output))
    assert media.probe(output).width == 64
    refused = CliRunner().invoke(remote_app, [*arguments[1:], "--set", "num_frames=12"])
    assert refused.exit_code == 2 and "try 13" in refused.stderr
