"""How many processes a command consists of, and who started them: itself, SLURM's srun, or torchrun."""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from subprocess import Popen
from typing import Any, ClassVar

import lightning as L
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from torch.distributed import DistError

from stu import errors
from stu.errors import CommandError

require = partial(errors.require, error=CommandError)
# Where launchers say which process this is; Lightning believes them, whatever the Trainer's devices are.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
MPI_RANKS = {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MPI_LOCALRANKID"}  # of mpirun's processes
PORTS = 15_000, 10_000  # of SLURM's jobs: from, how many
PARENT = "STU_PARENT"  # the process that has started this one
LOOK_EVERY, GRACE = 0.5, 3.0  # seconds between looks at other processes; that this one has to see for itself
ON_LOSS: list[Callable[[], None]] = []  # what is left to do when this process ends because another one is gone


class Slurm(SLURMEnvironment):
    """SLURM's processes, without checkpoints of Lightning's own, which it would load in place of what it is given.

    `check_processes` asks for more than the check that is left out, and accepts `srun --ntasks`, too.
    """

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_variables() -> None:
        pass

    @property
    def main_port(self) -> int:
        """Another one for each job and for each step of a job: they may share a node."""
        start, count = PORTS
        job, step = number("SLURM_JOB_ID", 0), number("SLURM_STEP_ID", 0)
        os.environ.setdefault("MASTER_PORT", str(start + (job + 1_009 * step) % count))
        return number("MASTER_PORT", 0)


class Lost(SystemExit):
    """The end of this process because another one is gone, which has been said and recorded."""


class Agreed(Exception):
    """An end that all processes of a run come to together."""


class Watch(threading.Thread):
    """Ends this process when another one is gone, which it may wait for without end; unless it sees so itself.

    gone: whether it is. Of several watches in a process the last one counts, until it is `over`.
    """

    over = threading.Event()

    def __init__(self, gone: Callable[[], bool]) -> None:
        super().__init__(daemon=True, name="watch over other processes")
        self.gone, Watch.over = gone, threading.Event()

    def run(self) -> None:
        """Look until then."""
        over = self.over
        while not over.wait(LOOK_EVERY):
            if self.gone() and not over.wait(GRACE):
                for act in ON_LOSS:
                    act()
                sys.stdout.flush()
                os._exit(1)  # the main thread waits in a library


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this node as Lightning does, which ends all by SIGKILL where one of them fails."""

    started: ClassVar[list[Popen[bytes]]] = []  # by the last one

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        """Start them and call the function here, too."""
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            Launcher.started = self.procs
            Watch(lambda: bool(failed(seconds=0))).start()
        self.procs = Launcher.started  # maybe by another Trainer of this command
        return function(*args, **kwargs)


def failed(*, seconds: float) -> str:
    """Which of the processes started here has ended and how, in words, looked for so long; empty where none has."""
    until = time.monotonic() + seconds
    while True:
        for index, process in enumerate(Launcher.started, 1):
            if (code := process.poll()) is not None:  # 0, too, is an end before the run's
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
                return f"process {index} {how}"
        if time.monotonic() >= until or not Launcher.started:
            return ""
        time.sleep(0.05)


class Started(Callback):
    """The end of those processes that this one has started."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave none behind that waits for this one; nor let this one, which still has to report, end with them."""
        launcher = trainer.strategy.launcher
        if isinstance(exception, SystemExit) and launcher is not None:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
        elif isinstance(exception, Agreed):
            Watch.over.set()  # they, too, do not end with 0


def environments() -> list[ClusterEnvironment]:
    """What a Trainer is given as plugins: SLURM, where it has started the processes and torchrun has not.

    Where nobody has, that is said, too: Lightning would start MPI to find out, wherever mpi4py is installed, which ends
    the process where MPI itself is not set up.
    """
    if TorchElasticEnvironment.detect():
        return []
    if by_slurm():
        return [Slurm()]
    by_others = LSFEnvironment.detect() or not MPI_RANKS.isdisjoint(os.environ)
    return [] if by_others else [LightningEnvironment()]


def by_slurm() -> bool:
    """Whether the processes are tasks of SLURM: not in a shell in an allocation, unless srun started several there."""
    return SLURMEnvironment.detect() or number("SLURM_STEP_NUM_TASKS", 1) > 1


def check_processes(trainer: L.Trainer, *, sweeping: bool) -> None:
    """Raise `CommandError` unless the processes are as many as the Trainer asks for, and can meet; note their rank.

    sweeping: this is one job of several of the same command. A second process repeats the whole command, so it would
    meet the first one in another job.
    """
    asked = trainer.num_devices * trainer.num_nodes
    words = f"trainer.devices={trainer.num_devices} x num_nodes={trainer.num_nodes}"
    for variable in RANKS if asked == 1 else ():
        rank = number(variable, 0)
        ways = "start one task for each run (srun --ntasks=1), let devices x num_nodes match, or unset it"
        require(rank == 0, variable, rank, f"this process is one of several, but {words} is one: {ways}")
    variable, started = launched()
    alone = "; a run on one device: srun --ntasks=1" if variable.startswith("SLURM") else ""
    allowed = f"processes were started, but {words} is {asked}: let them match{alone}"
    require(started in (None, asked), variable, started, allowed)
    require(trainer.world_size == asked, "trainer.devices", trainer.num_devices, f"{trainer.world_size} were started")
    allowed = "one process runs all jobs of this sweep, on one device: leave out hydra/sweeper=basic"
    require(not sweeping or asked == 1, "trainer.devices", trainer.num_devices, allowed)
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]
    if asked > 1:
        check_meeting(trainer)
        _set_num_threads_if_needed(num_processes=trainer.num_devices)  # Lightning would do so later
    if trainer.local_rank > 0 and (parent := number(PARENT, 0)):  # it may be gone by now
        Watch(lambda: os.getppid() != parent).start()


def check_meeting(trainer: L.Trainer) -> None:
    """Raise `CommandError` where the processes cannot find each other: by Lightning's rules, or in a port in use."""
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]  # of all with several processes
    try:
        environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    except ValueError as error:
        raise CommandError("trainer.devices", trainer.num_devices, str(error)) from error
    if TorchElasticEnvironment.detect():
        return  # torchrun has opened the port itself
    port, nodes = number("MASTER_PORT", 0), trainer.num_nodes
    if isinstance(environment, LightningEnvironment):
        started = environment.creates_processes_externally
        allowed = "says that a launcher has started this process, but not where they meet: set MASTER_PORT, or unset it"
        require(not started or port > 0, "LOCAL_RANK", os.environ.get("LOCAL_RANK"), allowed)
        allowed = "needs srun or torchrun, or MASTER_ADDR, MASTER_PORT and NODE_RANK for a command on each node"
        require(nodes == 1 or port > 0, "trainer.num_nodes", nodes, allowed)
        if nodes == 1 and not started:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # whatever another launcher has left there: all of them are here
    port = environment.main_port if isinstance(environment, Slurm) else port
    if port > 0 and trainer.is_global_zero:
        allowed = "this port is in use, or not allowed; choose another one, or unset it"
        require(is_free(port), "MASTER_PORT", port, allowed)


def launched() -> tuple[str, int | None]:
    """How many processes a launcher has started for this command, and the variable that says so."""
    if TorchElasticEnvironment.detect():
        return "WORLD_SIZE", number("WORLD_SIZE", 1)
    if by_slurm():
        return "SLURM_NTASKS", number("SLURM_NTASKS", 1)
    if LSFEnvironment.detect():
        return "JSM_NAMESPACE_SIZE", number("JSM_NAMESPACE_SIZE", 1)
    return "", None


def loss_behind(error: BaseException | None) -> RuntimeError | None:
    """The error, of this one and those that were handled when it came, that tells of a loss of another process.

    That process has ended, or cannot be reached. None where no error tells so, and where a signal ends this process,
    which then has ended the other one, too; but torchrun signals those that are left.
    """
    if not (isinstance(error, Exception) or TorchElasticEnvironment.detect()):
        return None
    while error is not None:
        if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
            return error
        error = error.__context__
    return None


def in_short(error: RuntimeError) -> str:
    """What such an error says, without the place in the library's source and its advice."""
    text = re.sub(r"^\[\S*gloo/transport\S*\] ", "", " ".join(str(error).split()))
    return text.partition(". This is typically")[0]


def part(trainer: L.Trainer) -> None:
    """Leave the other processes after they have come as far as this one, without taking them by surprise."""
    trainer.strategy.barrier()
    Watch.over.set()
    disconnect()


def disconnect() -> None:
    """End the threads that talk to other processes, which come here, too; they must not outlive the interpreter."""
    if distributed.is_available() and distributed.is_initialized():
        with suppress(RuntimeError):  # the others may be gone, but only after they have come here
            distributed.barrier()
        distributed.destroy_process_group()


def number(variable: str, default: int) -> int:
    """A number from the environment."""
    text = os.environ.get(variable, str(default))
    require(text.isdecimal(), variable, repr(text), "must be a number")
    return int(text)


def is_free(port: int) -> bool:
    """Whether a process could listen there."""
    try:
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("", port))
    except (OSError, OverflowError):
        return False
    return True
