"""Jobs on a Ray cluster: Ray finds the place and the devices, the command does the rest."""

import math
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from experiments.sweep.executors import process
from experiments.sweep.executors.contract import Work, require_workers
from experiments.sweep.executors.local import THREADS
from stu.errors import CommandError, require

LOST = 128 + signal.SIGKILL  # the exit code of a job whose place on the cluster is gone


class Ray:
    """`workers` jobs at a time, waiting for a place on the cluster or running there; all nodes share the file system.

    address: of the cluster, such as auto or ray://host:10001; None: what RAY_ADDRESS says, or the cluster of this
    machine, or one that is started here for the time of the sweep. cpus: cores of each device's process, and its
    threads. gpus: of each device's process; None: 1 where the cluster has any. options: others of `ray.remote`, such as
    `resources`. grace: seconds after which a job that was asked to stop is killed; None: never.
    """

    def __init__(
        self,
        workers: int = 100,
        *,
        address: str | None = None,
        cpus: int = 1,
        gpus: int | None = None,
        options: Mapping[str, Any] | None = None,
        grace: float | None = 600.0,
    ) -> None:
        require_workers(workers)
        allowed = "must be a whole number, 1 or more"
        require(isinstance(cpus, int) and cpus >= 1, "hydra.launcher.cpus", cpus, allowed, CommandError)
        allowed = "must be a whole number, or null: 1 where the cluster has any"
        whole = gpus is None or (isinstance(gpus, int) and gpus >= 0)
        require(whole, "hydra.launcher.gpus", gpus, allowed, CommandError)
        try:
            import ray
        except ImportError:
            raise CommandError("hydra/launcher", "ray", 'needs ray: pip install ".[ray]"') from None
        self._ray, self.workers, self.grace = ray, workers, grace
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=None if address else False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CommandError("hydra.launcher.address", address, reason) from error
        ray.cloudpickle.register_pickle_by_value(process)
        self._cpus = cpus
        self._gpus = int("GPU" in ray.cluster_resources()) if gpus is None else gpus
        self._options = dict(options or {})

    def submit(self, work: Work) -> "Placed":
        """Queue it (`Executor.submit`); all its devices are on one node."""
        own = {n: text for n, text in process.unlaunched(os.environ).items() if not n.endswith("_VISIBLE_DEVICES")}
        given = {THREADS: str(self._cpus)} | own | dict(work.environment)
        resources = {"num_cpus": self._cpus * work.devices, "num_gpus": self._gpus * work.devices, "max_restarts": 0}
        place = self._ray.remote(**resources | self._options)(process.Place)
        placed = place.remote(list(work.command), str(work.log.absolute()), given, os.getcwd())
        return Placed(self._ray, placed, self.grace)

    def close(self) -> None:
        """Leave the cluster; jobs that still run save and end."""
        self._ray.shutdown()


class Placed:
    """A job on the cluster."""

    def __init__(self, ray: Any, place: Any, grace: float | None) -> None:
        self._ray, self._place, self._grace = ray, place, grace
        self._kill_at = math.inf
        self._stopped = False
        self._code: int | None = None
        self._answer: Any = None  # that is awaited: to poll
        self.queued = True

    def poll(self) -> int | None:
        """Its exit code; None while it waits for a place or runs."""
        if self._code is not None:
            return self._code
        if time.monotonic() > self._kill_at:
            self.kill()
        self._answer = self._answer or self._place.poll.remote()
        if not self._ray.wait([self._answer], timeout=0)[0]:
            return None
        try:
            self._code = self._ray.get(self._answer)
        except self._ray.exceptions.RayActorError:  # or its node
            self._code = 128 + signal.SIGTERM if self._stopped else LOST
        self._answer, self.queued = None, False
        if self._code is not None:
            self._ray.kill(self._place)  # frees its devices
        return self._code

    def stop(self) -> None:
        """Have it save and end, once; where it still waits for a place, it is taken back."""
        if not self._stopped and self.poll() is None:
            self._stopped = True
            self._kill_at = math.inf if self._grace is None else time.monotonic() + self._grace
            self._tell(self._place.stop)

    def kill(self) -> None:
        """End it at once."""
        self._stopped, self._kill_at = True, math.inf
        if self._code is None:
            self._tell(self._place.kill)

    def _tell(self, method: Any) -> None:
        """Call a method of the place, once there is one; before, there is nothing to end but the waiting."""
        if self.queued:
            self._ray.kill(self._place)
        else:
            method.remote()
