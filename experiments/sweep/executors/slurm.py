"""Jobs on a SLURM cluster, through submitit."""

import getpass
import hashlib
import io
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

from experiments.sweep.executors import process
from experiments.sweep.executors.contract import Work, require_workers
from experiments.sweep.executors.local import THREADS
from stu.errors import CommandError, require

CLUSTERS = ("slurm", "local")
STOPPED = 128 + signal.SIGTERM
LOST = 128 + signal.SIGKILL  # the exit code of a job that has ended without leaving one
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
ENDED = {  # all others, but "" for no job, are of jobs that run, or that will
    "",
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
# What sbatch says where the same may work a little later: it cannot reach the controller, or too many jobs are queued.
FOR_NOW = re.compile(
    "timed out|contact|connect|unavailable|temporar|try again|job submit limit|job limit", re.IGNORECASE
)
ASK_EVERY, SUBMIT_EVERY = 5.0, 30.0  # seconds
PATIENCE = 20.0  # seconds in which a job that has left the queue may be queued again, or its result appear


class Slurm:
    """`workers` jobs at a time in the queue, each an sbatch of its own, with these resources.

    A job of several devices is as many tasks on each of its nodes. Before its time limit and where it is preempted, it
    saves and is queued again, `requeues` times at most for the time limit. Jobs whose sweep is killed go on; the same
    sweep, started again, finds them in the queue.

    cluster: slurm, or local: processes of this machine, without a queue and its limits, to try things out.
    cpus_per_task, gpus_per_task: of each device's process. timeout_min: minutes until a job saves and is queued again.
    signal_delay_s: seconds before the time limit. mem_gb: per node. setup: shell commands before each job.
    additional: further options of sbatch, by their names. folder: submitit's files; None: `slurm` beside the logs.
    grace: seconds after which a job that was asked to stop is cancelled; None: never.
    """

    def __init__(
        self,
        workers: int = 100,
        *,
        cluster: str = "slurm",
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        timeout_min: int = 1440,
        cpus_per_task: int = 4,
        gpus_per_task: int = 1,
        mem_gb: float | None = None,
        signal_delay_s: int = 120,
        requeues: int = 100,
        setup: Sequence[str] = (),
        additional: Mapping[str, Any] | None = None,
        folder: str | None = None,
        grace: float | None = 600.0,
    ) -> None:
        require_workers(workers)
        for name, value, least in (
            ("timeout_min", timeout_min, 1),
            ("cpus_per_task", cpus_per_task, 1),
            ("gpus_per_task", gpus_per_task, 0),
            ("signal_delay_s", signal_delay_s, 0),
            ("requeues", requeues, 0),
        ):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(whole, f"hydra.launcher.{name}", value, f"must be a whole number, {least} or more", CommandError)
        allowed = f"choose one of {', '.join(CLUSTERS)}"
        require(cluster in CLUSTERS, "hydra.launcher.cluster", cluster, allowed, CommandError)
        try:
            import cloudpickle
            import submitit
        except ImportError:
            allowed = 'needs submitit: pip install ".[slurm]"'
            raise CommandError("hydra/launcher", "slurm", allowed) from None
        missing = cluster == "slurm" and submitit.SlurmExecutor.affinity() <= 0
        allowed = "srun and sbatch are not on the PATH: start the sweep where SLURM's jobs are submitted"
        require(not missing, "hydra/launcher", "slurm", allowed, CommandError)
        self.workers, self.cluster, self.grace, self.folder = workers, cluster, grace, folder
        self._submitit = submitit
        cloudpickle.register_pickle_by_value(process)
        self._cpus, self._gpus, self._requeues = cpus_per_task, gpus_per_task, requeues
        self._resources: dict[str, Any] = {"timeout_min": timeout_min, "cpus_per_task": cpus_per_task, "mem_gb": mem_gb}
        if cluster == "local":
            self._resources["local_setup"] = list(setup)
        else:
            given: dict[str, Any] = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
            given |= {"signal_delay_s": signal_delay_s, "setup": list(setup)}
            given["srun_args"] = [f"--cpus-per-task={cpus_per_task}"]  # which srun no longer takes over from sbatch
            given["additional_parameters"] = {"requeue": True} | dict(additional or {})
            self._resources |= {f"slurm_{name}": value for name, value in given.items()}
        self._queue = Queue() if cluster == "slurm" else None

    def submit(self, work: Work) -> "Submitted":
        """Queue it (`Executor.submit`), unless it is queued, or runs, since an earlier start of this sweep.

        Raises `CommandError` for what sbatch refuses.
        """
        folder = Path(self.folder or work.log.parent.parent / "slurm").absolute()
        digest = hashlib.sha256(shlex.join([str(folder), *work.command]).encode()).hexdigest()[:10]
        called = f"{re.sub('[^A-Za-z0-9=,.+-]', '-', work.name)[:60]}-{digest}"
        if self._queue and (number := self._queue.find(called)):
            found: Any = self._submitit.SlurmJob(folder, number, range(work.devices * work.nodes))
            return Submitted(lambda: found, self._queue, work.log, self.grace)
        tasks = work.devices if self._queue else 1  # without SLURM, the command starts its own processes
        resources = self._resources | {"nodes": work.nodes, "tasks_per_node": tasks, "name": called}
        resources["gpus_per_node"] = self._gpus * work.devices or None
        threads = os.environ.get(THREADS, str(max(1, self._cpus * tasks // work.devices)))
        environment = {THREADS: threads} | dict(work.environment)
        job = process.Command(work.command, str(work.log.absolute()), environment, os.getcwd())

        def submitted() -> Any:
            limits = {f"{cluster}_max_num_timeout": self._requeues for cluster in CLUSTERS}
            with process.alone():
                executor = self._submitit.AutoExecutor(folder, self.cluster, **limits)
                executor.update_parameters(**resources)
                return executor.submit(job)

        return Submitted(submitted, self._queue, work.log, self.grace)

    def close(self) -> None:
        """Nothing is left open: what is queued or runs goes on."""


class Submitted:
    """A job of submitit's: in SLURM's queue, or a process of this machine where there is no queue."""

    def __init__(self, submit: Callable[[], Any], queue: "Queue | None", log: Path, grace: float | None) -> None:
        self._submit, self._queue, self._log, self._grace = submit, queue, log, grace
        self._job: Any = None
        self._code: int | None = None
        self._next_try = -math.inf
        self._gone_at = self._kill_at = math.inf
        self._stopped = False
        self._try()

    @property
    def queued(self) -> bool:
        """Whether it waits for its turn, or to be accepted by SLURM."""
        return self._code is None and (self._job is None or self._state in WAITING)

    def poll(self) -> int | None:
        """Its exit code; None while it is queued or runs."""
        if self._code is None:
            self._code = self._found_code()
        return self._code

    def stop(self) -> None:
        """Have it save and end, once; what waits in the queue is cancelled."""
        if self._stopped or self.poll() is not None:
            return
        self._stopped = True
        self._kill_at = math.inf if self._grace is None else time.monotonic() + self._grace
        if self._job is None:
            return
        if self._queue:
            scancel("--state=PENDING", self._job.job_id)
            scancel("--signal=TERM", self._job.job_id)
        else:
            os.kill(int(self._job.job_id), signal.SIGTERM)  # not ended, says `poll`

    def kill(self) -> None:
        """Cancel it."""
        self._stopped, self._kill_at = True, math.inf
        if self._job is not None and self.poll() is None:
            if self._queue:
                scancel(self._job.job_id)
            else:
                self._job.cancel(check=False)

    @property
    def _state(self) -> str:
        if self._queue:
            return self._queue.state(self._job.job_id)
        return "COMPLETED" if self._job.done() else "RUNNING"

    def _found_code(self) -> int | None:
        if self._job is None:
            if self._stopped:
                return STOPPED
            self._try()
            return None
        if time.monotonic() > self._kill_at:
            self.kill()
        state = self._state
        first = self._job.task(0)  # whose process writes the run, and ends with the others
        if first.paths.result_pickle.exists():
            if (error := first.exception()) is None:
                return int(first.result())
            self._say(f"job {self._job.job_id} has failed: {' '.join(str(error).split())}")
            return 1
        if state not in ENDED:
            self._gone_at = math.inf
            return None
        self._gone_at = min(self._gone_at, time.monotonic())
        if self._stopped:
            return STOPPED
        if time.monotonic() - self._gone_at < (PATIENCE if self._queue else 0.0):
            return None
        self._say(f"job {self._job.job_id} has ended without an exit code{f': {state}' if state else ''}")
        return LOST

    def _try(self) -> None:
        """Submit it; later, where SLURM says that it cannot now."""
        if time.monotonic() < self._next_try:
            return
        try:
            with redirect_stderr(io.StringIO()):  # on which submitit prints what it raises
                self._job = self._submit()
        except Exception as error:  # of submitit's, several; all say what sbatch said
            reason = " ".join(str(error).split())
            require(bool(FOR_NOW.search(reason)), "hydra/launcher", "slurm", reason, CommandError)
            if self._next_try < 0:
                self._say(f"not accepted yet, tried again every {SUBMIT_EVERY:.0f} s: {reason}")
            self._next_try = time.monotonic() + SUBMIT_EVERY
        else:
            if self._queue:
                self._queue.own.add(self._job.job_id)

    def _say(self, line: str) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"error: SLURM: {line}\n")


class Queue:
    """The jobs of this user, of which SLURM is asked once in a few seconds for all together; it needs no accounting."""

    def __init__(self) -> None:
        self.own: set[str] = set()  # numbers of jobs that this process has submitted or found
        self._jobs: dict[str, tuple[str, str]] | None = None  # number → state, name; None: no answer
        self._asked_at = -math.inf

    def state(self, number: str) -> str:
        """The state of a job: "" if it has left the queue, UNKNOWN if SLURM does not answer."""
        self._ask()
        return "UNKNOWN" if self._jobs is None else self._jobs.get(number, ("", ""))[0]

    def find(self, name: str) -> str | None:
        """The number of a job of that name that waits or runs, and that another process has submitted."""
        self._ask()
        over = {*ENDED, "COMPLETING"}
        found = [n for n, (state, of) in (self._jobs or {}).items() if of == name and state not in over]
        return max((number for number in found if number not in self.own), key=int, default=None)

    def _ask(self) -> None:
        if time.monotonic() - self._asked_at < ASK_EVERY:
            return
        what = ["--noheader", "--states=all", f"--user={getpass.getuser()}", "--format=%A|%T|%j"]
        try:
            answer = subprocess.run(["squeue", *what], capture_output=True, text=True, timeout=20, check=True).stdout
            lines = (line.strip().split("|", 2) for line in answer.splitlines())
            self._jobs = {number: (state, name) for number, state, name in lines}
        except (OSError, subprocess.SubprocessError, ValueError):
            self._jobs = None
        self._asked_at = time.monotonic()


def scancel(*arguments: str) -> None:
    """Send a signal, or cancel; where the job has ended meanwhile, nothing."""
    with suppress(OSError, subprocess.SubprocessError):  # SLURM does not answer: `poll` goes on asking
        subprocess.run(["scancel", *arguments], capture_output=True, timeout=20, check=False)
