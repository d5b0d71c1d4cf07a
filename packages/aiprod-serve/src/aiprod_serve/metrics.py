"""What Prometheus reads: requests of this process, jobs as stored, runs as workers record them."""

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aiprod_pipelines.stats import RunCollector
from aiprod_serve.jobs import JobStore

WORKER_SILENCE_S = 15.0


class Metrics:
    """The registry of one web process."""

    def __init__(self, store: JobStore) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "aiprod_http_requests",
            "Requests by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "aiprod_http_seconds",
            "Time to the first byte of the answer.",
            ["method", "route"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 5),
            registry=self.registry,
        )
        self.registry.register(_Jobs(store))
        self.registry.register(RunCollector())  # pyright: ignore[reportArgumentType]

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def middleware(self, app: ASGIApp) -> ASGIApp:
        async def measured(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            started = time.perf_counter()

            async def send_and_count(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # The template, not the path: ids would make a series each.
                    route = getattr(scope.get("route"), "path", "none")
                    method = scope["method"] if route != "none" else "any"
                    self.requests.labels(method, route, message["status"]).inc()
                    self.latency.labels(method, route).observe(time.perf_counter() - started)
                await send(message)

            await app(scope, receive, send_and_count)

        return measured


class _Jobs(Collector):
    def __init__(self, store: JobStore) -> None:
        self.store = store

    def describe(self) -> Iterator[Metric]:
        return iter(())  # nothing is read before the first scrape

    def collect(self) -> Iterator[Metric]:
        numbers = self.store.statistics()
        jobs = GaugeMetricFamily(
            "aiprod_jobs", "Jobs that are stored, by status.", labels=["status"]
        )
        for status, count in numbers["jobs"].items():
            jobs.add_metric([status], count)
        yield jobs
        yield GaugeMetricFamily(
            "aiprod_queue_age_seconds",
            "How long the oldest queued job has waited.",
            value=numbers["oldest_queued_s"],
        )
        yield GaugeMetricFamily(
            "aiprod_results_bytes", "Size of all results.", value=numbers["stored_bytes"]
        )
        yield GaugeMetricFamily(
            "aiprod_workers",
            "Workers that were heard of lately.",
            value=len(self.store.live_workers(WORKER_SILENCE_S)),
        )
        for name, value in numbers["counters"].items():
            yield CounterMetricFamily(
                f"aiprod_{name}", f"Sum of {name.replace('_', ' ')}.", value=value
            )
