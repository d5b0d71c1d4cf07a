"""What is recorded of a run: all of its time, none of its words, and nothing where it is off."""

import http.server
import json
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aiprod_pipelines import analytics, stats
from aiprod_pipelines.cli import app
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline

PROMPT = "a red ball bounces on the grey floor"
WORDS = ("ball", "bounces", "grey", "floor")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "records"
    monkeypatch.setenv("AIPROD_ANALYTICS", str(place))
    return place


def aiprod(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_a_generated_clip_is_covered_by_named_stages_and_its_words_are_not_kept(
    folder: Path, tiny_model: Path, tmp_path: Path
):
    output = tmp_path / "secret-name.mp4"
    for _ in range(2):
        arguments = ("generate", PROMPT, "-o", output, "-m", tiny_model, "--device", "cpu")
        assert aiprod(*arguments).exit_code == 0
    # Both began with this process.
    first, second = sorted(stats.read_runs(folder), key=lambda run: run.seconds)
    assert first.status == second.status == "done"
    assert {"start", "open model", "encode prompt", "denoise", "decode video", "decode audio",
            "recipe", "write"} <= set(second.stages)  # fmt: skip
    assert second.covered_share > 0.98
    assert sum(second.stages.values()) == pytest.approx(second.covered_share * second.seconds)
    assert first.counts == {"cache_misses": 2, "model_calls": 4}
    assert second.counts == {"cache_hits": 2, "model_calls": 4}
    assert second.facts["model"] == "tiny-dev.safetensors"
    assert len([part for part in second.spans if part.name == "step"]) == 4
    kept = text_of(folder)
    assert not any(word in kept for word in (*WORDS, "secret-name", str(tmp_path)))


def test_off_records_nothing_by_variable_and_by_flag(folder, tiny_model, tmp_path, monkeypatch):
    arguments = ("generate", PROMPT, "-o", tmp_path / "clip.mp4", "-m", tiny_model)
    assert aiprod("--no-analytics", *arguments).exit_code == 0
    assert not folder.exists()
    monkeypatch.setenv("AIPROD_ANALYTICS", "off")
    assert aiprod(*arguments).exit_code == 0
    assert stats.read_runs() == [] and not folder.exists()


def test_a_call_and_a_save_from_python_are_recorded(folder: Path, tiny_model: Path, tmp_path: Path):
    clip = TI2VidOneStagePipeline.from_model(str(tiny_model), device="cpu")(PROMPT)
    clip.save(tmp_path / "clip.mp4")
    call, write = stats.read_runs(folder)
    assert (call.command, write.command) == ("call", "write")
    assert "denoise" in call.stages and "decode video" in write.stages


def test_a_replay_is_recorded(folder: Path, tiny_model: Path, tmp_path: Path):
    output = tmp_path / "clip.mp4"
    assert aiprod("generate", PROMPT, "-o", output, "-m", tiny_model).exit_code == 0
    assert aiprod("replay", output, "--check").exit_code == 0
    (run,) = [run for run in stats.read_runs(folder) if run.command == "replay"]
    assert {"open model", "denoise"} <= set(run.stages)


def test_a_run_that_fails_names_the_error_without_its_words(folder: Path):
    with pytest.raises(RuntimeError), analytics.run("generate"), analytics.span("denoise"):
        raise RuntimeError("the words of a prompt")
    (run,) = stats.read_runs(folder)
    assert run.status == "RuntimeError" and list(run.stages) == ["denoise"]
    assert "words" not in text_of(folder)


def test_a_line_cut_by_a_crash_costs_itself_alone(folder: Path):
    with analytics.run("generate"), analytics.span("denoise"):
        pass
    (path,) = analytics.record_files(folder)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:25])  # the end of the run is torn
    with analytics.run("generate"):
        pass
    crashed, whole = stats.read_runs(folder)
    assert (crashed.status, whole.status) == ("unfinished", "done")
    assert list(crashed.stages) == ["denoise"] and crashed.seconds > 0


def test_the_records_stay_within_their_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(analytics, "FILE_BYTES", 400)
    monkeypatch.setattr(analytics, "FILES_KEPT", 3)
    for _ in range(12):
        with analytics.run("generate"), analytics.span("denoise"):
            time.sleep(0.002)  # files are named by the millisecond
    assert len(analytics.record_files(folder)) <= 4
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 1000
    assert 0 < len(stats.read_runs(folder)) < 12


def test_time_within_a_stage_is_counted_once(folder: Path):
    with analytics.run("generate"), analytics.span("write"):
        time.sleep(0.02)
        with analytics.span("decode video"), analytics.span("load"):
            time.sleep(0.03)
    (run,) = stats.read_runs(folder)
    assert run.stages["write"] == pytest.approx(0.02, abs=0.015)
    assert run.stages["decode video"] == pytest.approx(0.03, abs=0.015)
    assert 0 < run.covered_share <= 1


def test_a_generator_that_is_dropped_leaves_the_enclosing_span(folder: Path):
    def frames():
        with analytics.span("decode video"):
            yield 1
            yield 2

    with analytics.run("generate"):
        made = frames()
        with analytics.span("write"):
            next(made)
        made.close()
        with analytics.span("after"):
            pass
    (run,) = stats.read_runs(folder)
    after = next(part for part in run.spans if part.name == "after")
    assert after.parent is None


def test_an_unknown_run_is_refused_with_the_last_one(folder: Path):
    result = aiprod("stats")
    assert result.exit_code == 2 and "no run is recorded yet" in result.stderr
    with analytics.run("generate"):
        pass
    (run,) = stats.read_runs(folder)
    result = aiprod("stats", "zz")
    assert result.exit_code == 2 and run.id in result.stderr


def test_stats_as_tables_json_and_a_page_that_fetches_nothing(folder: Path, tmp_path: Path):
    for _ in range(3):
        with analytics.run("generate"):
            analytics.note(pipeline="one-stage", model="tiny", width=48, height=32, num_frames=9)
            with analytics.span("denoise"):
                end = analytics.laps("step")
                analytics.count("model_calls")
                end()
    runs = stats.read_runs(folder)
    assert "48x32x9" in aiprod("stats").stdout and "denoise" in aiprod("stats", runs[0].id).stdout
    report = json.loads(aiprod("stats", "--json", "--last", 2).stdout.splitlines()[-1])
    assert (report["num_runs"], len(report["runs"])) == (3, 2)
    assert report["runs"][0]["model_calls"] == 1
    page = tmp_path / "runs.html"
    assert aiprod("stats", "--html", page).exit_code == 0
    text = page.read_text()
    assert text.count("<rect") == 3 * 1 + 2  # a stage of each run, and the stage and step of one
    assert "http" not in text and "<script" not in text


def test_prometheus_counts_the_runs_that_end_while_it_watches(folder: Path, tmp_path: Path):
    from prometheus_client import CollectorRegistry

    def run() -> None:
        with analytics.run("generate"), analytics.span("denoise"):
            analytics.note(pipeline="one-stage")
            analytics.count("model_calls", 5)

    run()
    registry = CollectorRegistry()
    registry.register(stats.RunCollector())
    labels = {"command": "generate", "pipeline": "one-stage", "status": "done"}
    assert registry.get_sample_value("aiprod_runs_total", labels) is None
    run()
    run()
    assert registry.get_sample_value("aiprod_runs_total", labels) == 2
    assert registry.get_sample_value("aiprod_model_calls_total") == 10
    assert registry.get_sample_value("aiprod_runs_total", labels) == 2  # nothing is read twice
    assert aiprod("stats", "--prometheus", tmp_path / "runs.prom").exit_code == 0
    assert "aiprod_model_calls_total 15.0" in (tmp_path / "runs.prom").read_text()


def test_spans_go_where_opentelemetry_is_told_to_send_them(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    stats.tracer_provider.cache_clear()
    try:
        TI2VidOneStagePipeline.from_model(str(tiny_model), device="cpu")(PROMPT)
        stats.tracer_provider().shutdown()  # sends what is left
    finally:
        stats.tracer_provider.cache_clear()
        server.shutdown()
    sent = [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (run,) = stats.read_runs(folder)
    root = next(span for span in sent if span.name == "aiprod call")
    denoise = next(span for span in sent if span.name == "denoise")
    assert len(sent) == len(run.spans) + 1 and denoise.parent_span_id == root.span_id
    seconds = (denoise.end_time_unix_nano - denoise.start_time_unix_nano) / 1e9
    assert seconds == pytest.approx(
        next(p.seconds for p in run.spans if p.name == "denoise"), abs=1e-3
    )
    assert all(word.encode() not in body for body in bodies for word in WORDS)
