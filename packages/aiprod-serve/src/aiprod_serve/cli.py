"""`aiprod serve` and `aiprod remote`: thin, and quick to import.

aiprod serve                                 on this machine, http://127.0.0.1:8000
aiprod serve keys create NAME                before anyone else may come
aiprod remote generate "a red ball" -o clip.mp4
"""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aiprod_pipelines.terminal import JsonFlag, explains_errors

if TYPE_CHECKING:
    from aiprod_serve.database import Database

HELP = {"help_option_names": ["-h", "--help"]}
serve_app = typer.Typer(
    name="serve",
    help="Serve models over HTTP: the OpenAI and LTX video APIs, with a durable queue.",
    context_settings=HELP,
)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
webhooks_app = typer.Typer(help="Receivers of signed events.", no_args_is_help=True)
serve_app.add_typer(keys_app, name="keys")
serve_app.add_typer(webhooks_app, name="webhooks")
remote_app = typer.Typer(
    name="remote",
    help="Make clips on a server that `aiprod serve` runs.",
    no_args_is_help=True,
    context_settings=HELP,
)

DataDir = Annotated[
    Path,
    typer.Option("--data-dir", envvar="AIPROD_DATA_DIR", help="Where jobs and clips are kept."),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="AIPROD_DATABASE",
        help="SQLAlchemy URL, such as postgresql+psycopg://...; default: SQLite in --data-dir.",
    ),
]
DEFAULT_DATA_DIR = Path("aiprod-data")


@serve_app.callback(invoke_without_command=True)
@explains_errors
def serve(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]MODEL",
            help="What `generate --model` takes, and the name that clients use for it. Repeat for "
            "more; the first is the default.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 takes a free one.")] = 8000,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    database: DatabaseUrl = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="A worker for each; default: every GPU, or else the CPU. Repeat."),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Workers are replicas on a Ray cluster: the one that RAY_ADDRESS names, else one "
            "on this machine.",
        ),
    ] = False,
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="MIN[:MAX]", help="With --ray: how many, as the queue grows; default: 1."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="As for `generate`.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="As for `generate`.")] = None,
    pipeline: Annotated[str, typer.Option(help="Of requests that name none.")] = "one-stage",
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name of this server, as behind a proxy. Repeat.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose pages may call, such as https://example.org. Repeat."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Jobs that may wait.")] = 256,
    max_upload_mb: Annotated[float, typer.Option(help="Size of an upload.")] = 200.0,
    max_clip_seconds: Annotated[float, typer.Option(help="Length of a clip or an input.")] = 60.0,
    max_steps: Annotated[int, typer.Option(help="Steps of a clip.")] = 200,
    keep_days: Annotated[float, typer.Option(help="Age at which clips are removed.")] = 7.0,
    keep_gb: Annotated[
        float, typer.Option(help="Total size above which the oldest clips are removed.")
    ] = 50.0,
) -> None:
    """Serve models over HTTP until it is interrupted.

    [dim]aiprod serve[/dim]
    [dim]aiprod serve --model ltx-2.3-22b-dev.safetensors --model sora-2=nano[/dim]
    """
    if context.invoked_subcommand is not None:
        return
    from aiprod_core.errors import InputError
    from aiprod_serve.settings import Settings
    from aiprod_serve.supervisor import Supervisor

    if replicas is not None and not ray:
        raise InputError("--replicas goes with --ray; without it, repeat --device.")
    bounds = _parse_bounds(replicas or "1")
    devices = tuple(device or _all_devices())
    settings = Settings(
        data_dir=data_dir.resolve(),
        models=_check_models(model or ["nano"], text_encoder, pipeline),
        pipeline=pipeline,
        devices=() if ray else devices,
        dtype=dtype,
        text_encoder=_absolute(text_encoder) if text_encoder else None,
        host=host,
        port=port,
        database=database,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        max_queue=max_queue,
        max_upload_mb=max_upload_mb,
        max_clip_s=max_clip_seconds,
        max_steps=max_steps,
        keep_days=keep_days,
        keep_gb=keep_gb,
    )
    supervisor = Supervisor(settings)
    if ray:
        from aiprod_serve.ray_app import Replicas

        store, port = supervisor.store, supervisor.port
        supervisor.replicas = Replicas(settings, store, port, bounds, devices[0])
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(settings.models)
    where = f"{bounds[0]} to {bounds[1]} replicas" if ray else ", ".join(devices)
    typer.echo(f"http://{shown}:{supervisor.port}: {names} on {where}; Ctrl-C stops", err=True)
    supervisor.run()


@keys_app.command("create")
@explains_errors
def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is; for your own memory.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="generate, read, metrics; default: generate and read. Repeat."),
    ] = None,
    rate: Annotated[int, typer.Option(help="Requests a minute.")] = 600,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    database: DatabaseUrl = None,
) -> None:
    """Make an API key and print it, this once. From the first key on, every request needs one."""
    from aiprod_serve import security

    opened = _open(data_dir, database)
    key, text = security.create_key(
        opened, name, tuple(scope) if scope else security.DEFAULT_SCOPES, rate
    )
    typer.echo(f"{key.id}: {', '.join(sorted(key.scopes))}, {key.rate} requests a minute", err=True)
    typer.echo(text)


@keys_app.command("list")
@explains_errors
def list_keys(
    data_dir: DataDir = DEFAULT_DATA_DIR, database: DatabaseUrl = None, as_json: JsonFlag = False
) -> None:
    """List the keys; their secrets are not known here."""
    from aiprod_serve import security

    found = [
        {
            "id": key.id,
            "name": key.name,
            "scopes": sorted(key.scopes),
            "rate": key.rate,
            "created": time.strftime("%Y-%m-%d", time.gmtime(key.created_at)),
        }
        for key in security.list_keys(_open(data_dir, database))
    ]
    if as_json:
        typer.echo(json.dumps(found))
        return
    for key in found:
        scopes = ",".join(key["scopes"])
        typer.echo(f"{key['id']}  {key['created']}  {scopes}  {key['rate']}/min  {key['name']}")


@keys_app.command("revoke")
@explains_errors
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="As `keys list` shows it.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    database: DatabaseUrl = None,
) -> None:
    """Revoke a key; a running server refuses it within seconds."""
    from aiprod_serve import security

    security.revoke_key(_open(data_dir, database), key_id)
    typer.echo(f"{key_id}: revoked")


@webhooks_app.command("add")
@explains_errors
def add_webhook(
    url: Annotated[str, typer.Argument(help="Where events are sent.")],
    key: Annotated[
        str | None, typer.Option(help="Only jobs of the key with this id; default: all.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    database: DatabaseUrl = None,
) -> None:
    """Add a receiver and print the secret that its events are signed with (Standard Webhooks)."""
    from aiprod_serve import webhooks

    endpoint = webhooks.add_endpoint(_open(data_dir, database), url, key)
    typer.echo(f"{endpoint.id}: {endpoint.url}", err=True)
    typer.echo(endpoint.secret)


@webhooks_app.command("list")
@explains_errors
def list_webhooks(data_dir: DataDir = DEFAULT_DATA_DIR, database: DatabaseUrl = None) -> None:
    """List the receivers."""
    from aiprod_serve import webhooks

    for endpoint in webhooks.list_endpoints(_open(data_dir, database)):
        typer.echo(f"{endpoint.id}  {endpoint.owner or 'all keys'}  {endpoint.url}")


@webhooks_app.command("remove")
@explains_errors
def remove_webhook(
    endpoint_id: Annotated[str, typer.Argument(help="As `webhooks list` shows it.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    database: DatabaseUrl = None,
) -> None:
    """Remove a receiver and what was still to be sent to it."""
    from aiprod_serve import webhooks

    webhooks.remove_endpoint(_open(data_dir, database), endpoint_id)
    typer.echo(f"{endpoint_id}: removed")


@remote_app.command("generate")
@explains_errors
def remote_generate(
    prompt: Annotated[str, typer.Argument(help="What the clip shows and how it sounds.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The MP4 to write.")] = Path(
        "clip.mp4"
    ),
    url: Annotated[
        str, typer.Option(envvar="AIPROD_URL", help="The server.")
    ] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(envvar="AIPROD_KEY", help="The API key.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: the server's first.")
    ] = None,
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="As there.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same clip.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the clip.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels.")] = None,
    image: Annotated[Path | None, typer.Option(help="The clip's first image.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound that the picture follows.")] = None,
    source: Annotated[Path | None, typer.Option(help="A clip to retake or extend.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of POST /v1/videos, such as cfg_scale=5. Repeat.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a clip on a server and fetch it.

    [dim]aiprod remote generate "a red ball bounces" -o ball.mp4 --url http://gpu:8000[/dim]
    """
    from aiprod_pipelines import media
    from aiprod_pipelines.progress import RichProgress
    from aiprod_serve.client import Client

    media.check_output_path(output)
    fields: dict[str, Any] = {
        name: value
        for name, value in {
            "model": model,
            "pipeline": pipeline,
            "seed": seed,
            "seconds": seconds,
            "size": size,
        }.items()
        if value is not None
    }
    for text in option or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"give FIELD=VALUE; got {text}.")
        fields[name] = value
    files = {"input_reference": image, "audio": audio, "source": source}
    given = {name: path for name, path in files.items() if path is not None}
    with Client(url, key) as client, RichProgress().stage("remote", 100) as advance:
        created = video = client.create(prompt, files=given, **fields)
        shown = 0
        for video in client.watch(created["id"]):
            advance(video["progress"] - shown)
            shown = video["progress"]
        client.save(video, output)
    if as_json:
        typer.echo(json.dumps({"output": str(output), **video}))
    else:
        typer.echo(f"{output}: {video['size']}, {video['seconds']} s, seed {video['seed']}")


# Parts.


def _open(data_dir: Path, database: str | None) -> "Database":
    from aiprod_serve import jobs, security, webhooks  # noqa: F401  their tables
    from aiprod_serve.database import Database, sqlite_url

    data_dir.mkdir(parents=True, exist_ok=True)
    opened = Database(database or sqlite_url(data_dir.resolve()))
    opened.create_tables()
    return opened


def _check_models(given: list[str], text_encoder: str | None, pipeline: str) -> dict[str, str]:
    """Names to models, every one found and its headers read. Raises InputError."""
    from aiprod_core.errors import InputError
    from aiprod_pipelines.catalog import find_pipeline

    models: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals or Path(text).exists():
            model = text
            name = Path(text).stem if Path(text).suffix == ".safetensors" else text.rstrip("/")
            name = name.rpartition("/")[2] if Path(text).is_dir() else name
        if name in models:
            raise InputError(f"two models are named {name}; give NAME=MODEL.")
        models[name] = _absolute(model)
        find_pipeline(pipeline).from_model(models[name], text_encoder=text_encoder, device="cpu")
    return models


def _parse_bounds(text: str) -> tuple[int, int]:
    """MIN[:MAX] replicas. Raises InputError."""
    from aiprod_core.errors import InputError

    try:
        numbers = [int(number) for number in text.split(":")]
        low, high = numbers if len(numbers) == 2 else numbers * 2
    except ValueError:
        low = high = 0
    if not 1 <= low <= high:
        raise InputError(f"replicas must be MIN or MIN:MAX, at least 1; got {text}, try 1:4.")
    return low, high


def _absolute(model: str) -> str:
    """Workers run in another folder."""
    return os.path.abspath(model) if Path(model).expanduser().exists() else model


def _all_devices() -> list[str]:
    import torch

    from aiprod_pipelines.components import choose_device

    count = torch.cuda.device_count()
    return [f"cuda:{index}" for index in range(count)] or [str(choose_device())]
