"""What lies in deploy/ fits the server: its options, its metrics, its files."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from aiprod_serve.cli import serve_app

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
UNIT = DEPLOY / "aiprod.service"


def test_every_series_of_the_dashboard_is_one_that_the_server_gives(client: TestClient):
    client.get("/v1/models")  # series of requests begin with the first
    text = client.get("/metrics").text
    given = {
        sample.name for family in text_string_to_metric_families(text) for sample in family.samples
    }
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in shown for name in re.findall(r"\baiprod_\w+", expression)}
    assert len(names) > 10
    assert names <= given
    routes = {name for expression in shown for name in re.findall(r'route="([^"]+)"', expression)}
    assert routes and routes <= set(client.get("/openapi.json").json()["paths"])


def test_the_commands_of_the_container_and_the_unit_are_understood():
    start = next(line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart="))
    of_unit = shlex.split(start)[2:]
    of_compose = compose()["services"]["aiprod"]["command"]
    entry = re.search(r"^CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert entry is not None
    command = typer.main.get_command(serve_app)
    for arguments in (of_unit, of_compose, json.loads(entry[1])):
        parsed = command.make_context("serve", list(arguments))  # refuses an unknown option
        assert parsed.params["host"] in ("127.0.0.1", "0.0.0.0")


def test_files_that_the_compose_file_names_are_there():
    services = compose()["services"]
    build = services["aiprod"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    mounted = [
        Path(volume.split(":")[0])
        for service in services.values()
        for volume in service.get("volumes", ())
        if volume.startswith(".")
    ]
    made_by_the_user = {Path("metrics.key")}
    assert all((DEPLOY / path).is_file() for path in set(mounted) - made_by_the_user)
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]
    host, port = scraped["static_configs"][0]["targets"][0].split(":")
    assert host in services and host in services["aiprod"]["command"]
    assert services["aiprod"]["ports"][0].endswith(f":{port}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path):
    there = UNIT.read_text().replace("/opt/aiprod/.venv/bin/aiprod", sys.executable)
    (tmp_path / UNIT.name).write_text(there)
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())
