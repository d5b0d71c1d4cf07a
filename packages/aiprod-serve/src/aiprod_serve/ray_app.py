"""`aiprod serve --ray`: the same worker as replicas of a Ray Serve deployment.

The store stays the queue, so nothing is lost with a cluster. For every job that waits or is being
made, one call to the deployment is kept open, in which a replica claims the oldest job and makes
it. By these calls Serve sees the load: it adds and removes replicas, and replaces those that die.
A call that ends with its replica gives back at once what that one held.

Replicas see the database, the models and the data folder at the same paths as this process.
"""

import asyncio
import logging
import os
import socket
import threading
from typing import Any

from sqlalchemy.exc import DBAPIError

from aiprod_core.errors import InputError
from aiprod_serve.jobs import JobStore
from aiprod_serve.settings import Settings
from aiprod_serve.worker import Worker

try:
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]
    from ray.exceptions import RayActorError, RayError  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    raise InputError('serving on a cluster needs Ray: pip install "aiprod-serve[ray]"') from None

logger = logging.getLogger(__name__)

UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 5.0, 60.0
DRAIN_S = 3600.0  # a replica that is no longer needed ends its job before
STOP_S = 30.0
OBJECT_STORE_BYTES = 100 * 2**20  # nothing but calls passes through Ray; results are files


class Replica:
    """One worker; it makes a job a call."""

    def __init__(self, settings: Settings, prefix: str, device: str) -> None:
        os.chdir(settings.data_dir)
        if device == "cpu":
            os.nice(5)  # as every worker
        actor = ray.get_runtime_context().get_actor_id()
        self.worker = Worker(settings, f"{prefix}{actor}", device)
        self.worker.register()

    async def make_next(self) -> None:
        await asyncio.to_thread(self.worker.make_next)


class Replicas:
    """The deployment, as the supervisor tends it. Takes the seconds that Ray needs to start."""

    def __init__(
        self, settings: Settings, store: JobStore, port: int, bounds: tuple[int, int], device: str
    ) -> None:
        """`bounds` are the fewest and the most replicas; each has a CPU core, or a GPU if `device`
        is cuda. The cluster is the one that RAY_ADDRESS names, else one made on this machine.
        """
        self.settings, self.store, self.most = settings, store, bounds[1]
        self.name = f"aiprod-{socket.gethostname()}-{port}"
        self.prefix = f"{socket.gethostname()}/{port}/"
        _join_cluster(self.most)
        scaling = {
            "min_replicas": bounds[0],
            "max_replicas": bounds[1],
            "target_ongoing_requests": 1,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
        }
        deployment = serve.deployment(
            Replica,
            name="worker",
            autoscaling_config=scaling,
            max_ongoing_requests=1,
            graceful_shutdown_timeout_s=DRAIN_S,
            ray_actor_options={"num_cpus": 1, "num_gpus": 1 if device.startswith("cuda") else 0},
        )
        serve.start(proxy_location="Disabled")  # HTTP is the web process's
        bound = deployment.bind(settings, self.prefix, device)
        self.handle = serve.run(bound, name=self.name, route_prefix=None)
        self.calls: list[Any] = []  # DeploymentResponse

    def tend(self) -> None:
        """Takes back what dead replicas held, and opens the calls that are missing."""
        try:
            self.calls = [call for call in self.calls if not self._has_ended(call)]
            wanted = self.store.num_open(list(self.settings.models), self.prefix)
            # One more for each replica, so that none waits for the next look.
            for _ in range(min(wanted, 2 * self.most) - len(self.calls)):
                self.calls.append(self.handle.make_next.remote())
        except (RayError, DBAPIError) as error:
            logger.warning("the replicas cannot be tended: %s", error)

    def stop(self) -> None:
        """Puts running jobs back into the queue; their replicas stop after the step."""
        for call in self.calls:
            call.cancel()
        self.store.release_workers(self.prefix)
        deleting = threading.Thread(target=serve.delete, args=(self.name,), daemon=True)
        deleting.start()
        deleting.join(STOP_S)
        ray.shutdown()

    def _has_ended(self, call: Any) -> bool:
        try:
            call.result(timeout_s=0)
        except TimeoutError:
            return False
        except RayActorError as error:
            logger.warning("a replica died: %s", error)
            if error.actor_id is not None:  # else its lease runs out
                self.store.release_worker(f"{self.prefix}{error.actor_id}")
            self.store.count(worker_restarts=1)
        return True


def _join_cluster(num_cpus: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        ray.init(address, log_to_driver=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to Ray's makers
    ray.init(
        "local",
        num_cpus=max(num_cpus, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
