"""The process of a job, on whichever machine it runs.

It has a session of its own, so that a Ctrl-C meant for the sweep leaves it alone, and it is told to save when the
process that started it ends, however that ends.

Imports the standard library alone: clusters get this module by value, where the repository is not installed.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# train.py saves and ends, and never takes it for a second signal after which it should end without having saved.
SAVE = signal.SIGHUP
# Ask the kernel for that signal at the death of the parent, then become the command. The parent may have died before.
GUARD = """
import ctypes, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a sweep under nohup ignores
ctypes.CDLL(None).prctl(1, signal.SIGHUP)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
# Between Ray's worker, which kills its children when it ends, and the command, which so can save.
KEEPER = """
trap 'kill -HUP $job' HUP
python=$1 guard=$2
shift 2
"$python" -I -S -c "$guard" $$ "$@" &
job=$!
wait $job
code=$?
while kill -0 $job 2> /dev/null; do
    wait $job
    code=$?
done
exit $code
"""
# How launchers tell a process which of several it is, or where the others are. A job starts its own.
OF_LAUNCHERS = re.compile(
    r"((GROUP|LOCAL|NODE|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|MPI_LOCALRANKID"
    r"|(TORCHELASTIC|SLURMD?|SRUN|SUBMITIT|PMIX?|OMPI|JSM)_.*"
)
OF_PLACES = {"SLURM_CONF", "SLURM_TMPDIR"}  # true for whatever runs on the machine


def unlaunched(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what torchrun, srun or mpirun told the process that has it."""
    return {name: text for name, text in environment.items() if name in OF_PLACES or not OF_LAUNCHERS.fullmatch(name)}


@contextmanager
def alone() -> Iterator[None]:
    """Meanwhile, the environment of this process is that of one that nobody launched."""
    before = dict(os.environ)
    try:
        for name in before.keys() - unlaunched(before).keys():
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)


def start(
    command: Sequence[str], *, log: str | Path, environment: Mapping[str, str], folder: str | Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a command whose output is appended to the file `log`.

    On Linux it gets `SAVE` when the *thread* that calls this ends: call it from one that lives as long as the job.
    """
    if sys.platform == "linux":
        # not by preexec_fn, in which Python may wait for ever for a lock that another thread held
        command = [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), *command]
    with open(log, "ab") as out:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code as a shell shows it, 128 + signal for a killed one; None while it runs.

    What a failed one has left behind, loader processes or those of other devices, is killed, so that a repetition finds
    the run free.
    """
    if process.returncode is None and hasattr(os, "waitid"):
        try:
            end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            end = None
        if end is not None and end.si_status != 0:
            kill(process)  # before `poll`: until then, the number of the process stands for this one alone
    code = process.poll()
    return code if code is None or code >= 0 else 128 - code


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill it with all that it has started in its session, unless it has been waited for."""
    if process.returncode is None:
        with suppress(PermissionError):  # how macOS answers where all have ended
            os.killpg(process.pid, signal.SIGKILL)


class Command:
    """A command as what submitit calls on a cluster; preempted, or near its time limit, it saves and is queued again.

    environment: variables beside those of the cluster's job. folder: where it is started.
    """

    def __init__(self, command: Sequence[str], log: str, environment: Mapping[str, str], folder: str) -> None:
        self.command, self.log, self.environment, self.folder = list(command), log, dict(environment), folder
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __call__(self) -> int:
        """The exit code, unless the job is stopped from outside: then it ends without a result."""
        signal.signal(signal.SIGTERM, self._on_stop)  # in place of submitit's, which does nothing
        given = {**os.environ, **self.environment}
        self._process = start(self.command, log=self.log, environment=given, folder=self.folder)
        code = self._wait(self._process)
        if self._stopped:  # whoever did it says what becomes of the job: it is cancelled, or will start again
            raise SystemExit(code)
        return code

    def checkpoint(self) -> Any:
        """Save, and return what submitit queues in place of this."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and ended(self._process) is None:
            self._process.send_signal(SAVE)
            self._wait(self._process)
        return DelayedSubmission(Command(self.command, self.log, self.environment, self.folder))

    def _on_stop(self, number: int, frame: Any) -> None:
        self._stopped = True
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(SAVE)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes]) -> int:
        """By polling: `checkpoint` interrupts `__call__` in the same thread, and would wait for its lock for ever."""
        while (code := ended(process)) is None:
            time.sleep(0.2)
        return code


class Place:
    """A command that holds its devices on a cluster for as long as this lives: what Ray makes an actor of."""

    def __init__(self, command: Sequence[str], log: str, environment: Mapping[str, str], folder: str) -> None:
        own = {name: text for name, text in os.environ.items() if name.endswith("_VISIBLE_DEVICES")}
        if sys.platform == "linux":
            command = ["/bin/sh", "-c", KEEPER, "keeper", sys.executable, GUARD, *command]
        self._process = start(command, log=log, environment={**own, **environment}, folder=folder)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return ended(self._process)

    def stop(self) -> None:
        """Have it save and end."""
        if self._process.returncode is None:
            self._process.send_signal(SAVE)

    def kill(self) -> None:
        """End it at once, with all its processes."""
        kill(self._process)
