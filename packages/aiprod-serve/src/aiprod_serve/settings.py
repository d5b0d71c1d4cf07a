"""How a server is run: one frozen value, made by `aiprod serve` and handed to every process."""

import dataclasses
import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiprod_serve.database import sqlite_url

VARIABLE = "AIPROD_SERVE_SETTINGS"  # how child processes get them


@dataclass(frozen=True)
class Settings:
    data_dir: Path
    models: Mapping[str, str]  # the name that clients use -> what `--model` takes; first = default
    pipeline: str = "one-stage"  # of requests that name none and do not need another
    devices: tuple[str, ...] = ("cpu",)  # one worker each
    dtype: str | None = None
    text_encoder: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    database: str | None = None  # SQLAlchemy URL; None = SQLite in data_dir
    allowed_hosts: tuple[str, ...] = ()  # names of this server besides its own address
    cors_origins: tuple[str, ...] = ()  # pages of other origins that may call
    max_queue: int = 256  # jobs that may wait
    keep_days: float = 7.0  # results
    keep_gb: float = 50.0
    keep_uploads_hours: float = 24.0
    max_upload_mb: float = 200.0
    max_body_mb: float = 32.0  # JSON, which may carry files as data: URIs
    max_prompt_chars: int = 10_000
    max_pixels: int = 4096 * 2304  # of a clip's or an input's frame
    max_clip_s: float = 60.0  # of a clip or an input
    max_steps: int = 200
    probe_timeout_s: float = 30.0
    probe_memory_mb: int = 2048
    sync_timeout_s: float = 600.0  # of /v1/text-to-video and its like
    lease_s: float = 30.0

    @property
    def database_url(self) -> str:
        return self.database or sqlite_url(self.data_dir)

    @property
    def is_public(self) -> bool:
        """Whether others than this machine can reach the server."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"data_dir": str(self.data_dir)})

    @classmethod
    def from_environment(cls) -> "Settings":
        values = json.loads(os.environ[VARIABLE])
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, "data_dir": Path(values["data_dir"])})
