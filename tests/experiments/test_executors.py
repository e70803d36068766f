"""Where the jobs of a sweep run: what a job finds there, how it is stopped, what becomes of its processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.sweep.executors import Handle, Local, Work
from experiments.sweep.executors.local import listed_gpus, visible_gpus
from experiments.sweep.executors.process import unlaunched
from stu.errors import CommandError
from stu.resources import cores

ENVIRONMENT = "import json, os, sys; print(json.dumps(dict(os.environ) | {'input': sys.stdin.read()}))"
# Saves, which takes a moment, when it is asked to end.
SAVES = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    print(f"saved after {number}", flush=True)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, save)
print("runs", flush=True)
while True: time.sleep(0.01)
"""
STUBBORN = SAVES.replace("sys.exit(128 + number)", "return")
# Starts a process of its own, which outlives it, as loader processes do where it is killed.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print("runs", child.pid, flush=True)
{}
"""


def submitted(executor: Local, folder: Path, code: str, slot: int = 0, devices: int = 1, **environment: str) -> Handle:
    command = [sys.executable, "-S", "-c", code]
    log = folder / f"{slot}.log"
    return executor.submit(Work(command, log, environment, devices=devices, slot=slot, name=f"job{slot}"))


def until(value: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """The first value that is neither None nor False."""
    end = time.monotonic() + seconds
    while (found := value()) is None or found is False:
        assert time.monotonic() < end, f"{what}: not after {seconds} s"
        time.sleep(0.01)
    return found


def code_of(handle: Handle) -> int:
    return until(handle.poll, "the end of the job")


def runs(folder: Path, slot: int = 0) -> list[str]:
    """What a job has said when it runs."""
    log = folder / f"{slot}.log"
    return until(lambda: log.exists() and log.read_text().startswith("runs") and log.read_text().split(), "its start")


def environment_of(executor: Local, folder: Path, slot: int = 0, devices: int = 1, **given: str) -> dict[str, str]:
    assert code_of(submitted(executor, folder, ENVIRONMENT, slot, devices, **given)) == 0
    return json.loads((folder / f"{slot}.log").read_text().splitlines()[-1])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch):
    """No variables that say how many threads or which GPUs."""
    for variable in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


def test_cores_are_divided_among_jobs_and_their_devices(tmp_path: Path, alone: pytest.MonkeyPatch):
    alone.setattr("experiments.sweep.executors.local.cores", lambda: 12)
    found = [
        environment_of(Local(workers), tmp_path, devices=devices)["OMP_NUM_THREADS"]
        for workers, devices in ((1, 1), (2, 1), (2, 3), (5, 1), (20, 1))
    ]
    assert found == ["12", "6", "2", "2", "1"]


def test_who_says_how_many_threads(tmp_path: Path, alone: pytest.MonkeyPatch):
    alone.setattr("experiments.sweep.executors.local.cores", lambda: 8)
    for began, now in ((7, "7"), (9, "8")):  # a run that goes on, perhaps from a larger machine
        assert environment_of(Local(), tmp_path, OMP_NUM_THREADS=str(began))["OMP_NUM_THREADS"] == now
    alone.setenv("OMP_NUM_THREADS", "5")
    assert environment_of(Local(), tmp_path)["OMP_NUM_THREADS"] == "5"
    assert environment_of(Local(), tmp_path, OMP_NUM_THREADS="7")["OMP_NUM_THREADS"] == "7"


def test_a_job_is_no_part_of_what_started_the_sweep(tmp_path: Path, alone: pytest.MonkeyPatch):
    launched = {
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_NAME"),
        *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_ID"),
        *("SLURM_STEP_NUM_TASKS", "SUBMITIT_EXECUTOR", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"),
    }
    kept = {"SLURM_TMPDIR", "SLURM_CONF", "STU_RUNS", "MY_RANK"}
    for variable in launched | kept:
        alone.setenv(variable, "1")
    found = environment_of(Local(), tmp_path, STU_SWEEP="abc", MASTER_PORT="12345")
    assert launched & found.keys() == {"MASTER_PORT"}  # given by name
    assert kept <= found.keys()
    assert found["STU_SWEEP"] == "abc"
    assert found["input"] == ""  # nobody types there
    assert unlaunched({"RANKS": "1", "BRANK": "2"}) == {"RANKS": "1", "BRANK": "2"}


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_sweep_is_one_process(variable: str, alone: pytest.MonkeyPatch):
    alone.setenv(variable, "2")
    with pytest.raises(CommandError, match=f"{variable}=2: a sweep is one process"):
        Local()
    alone.setenv(variable, "1")
    assert Local().workers == 1


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": True}, {"gpus": [0, 0]}, {"gpus": 2}, {"grace": -1.0}])
def test_options_that_cannot_work(options: dict[str, object]):
    with pytest.raises(CommandError, match=rf"hydra\.launcher\.{next(iter(options))}=.*: must be "):
        Local(**options)  # type: ignore[arg-type]


def shares(executor: Local, folder: Path, devices: Sequence[int]) -> list[str]:
    """What jobs that run at once see."""
    jobs = [submitted(executor, folder, ENVIRONMENT, slot, count) for slot, count in enumerate(devices)]
    assert [code_of(job) for job in jobs] == [0] * len(jobs)
    logs = [folder / f"{slot}.log" for slot in range(len(jobs))]
    return [json.loads(log.read_text().splitlines()[-1]).get("CUDA_VISIBLE_DEVICES") for log in logs]


def test_gpus_are_divided_among_jobs(tmp_path: Path, alone: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    four = Local(2, gpus=[0, 1, 2, "GPU-x"])
    assert shares(four, tmp_path, [1, 1]) == ["0", "1"]
    assert shares(four, tmp_path, [2, 2]) == ["0,1", "2,GPU-x"]  # those of the jobs before are free again
    assert shares(four, tmp_path, [3, 1]) == ["0,1,2", "GPU-x"]
    assert shares(four, tmp_path, [1, 3]) == ["0", "1,2,GPU-x"]
    assert capfd.readouterr().err == ""
    assert shares(Local(4, gpus=[4, 5]), tmp_path, [1, 1, 1, 1]) == ["4", "5", "4", "5"]
    assert capfd.readouterr().err == "4 jobs at a time share 2 GPUs: 4, 5\n"  # once
    assert shares(Local(1, gpus=[4, 5]), tmp_path, [3]) == ["4,5"]  # the job says that they are too few
    assert shares(Local(1, gpus=[]), tmp_path, [1]) == [""]
    alone.setenv("CUDA_VISIBLE_DEVICES", "6,3,-1,2")
    assert shares(Local(2), tmp_path, [1, 1]) == ["6", "3"]


def test_which_gpus_there_are(alone: pytest.MonkeyPatch, tmp_path: Path):
    for listed, found in (("", []), ("-1", []), (" 1, 0", ["1", "0"]), ("MIG-a/1/0,GPU-b", ["MIG-a/1/0", "GPU-b"])):
        alone.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert visible_gpus() == found, listed
    alone.delenv("CUDA_VISIBLE_DEVICES")
    text = (
        "GPU 0: NVIDIA H100 (UUID: GPU-ba)\nGPU 1: NVIDIA A100 (UUID: GPU-dc)\n"
        "  MIG 1g.5gb      Device  0: (UUID: MIG-c9)\n  MIG 3g.20gb     Device  1: (UUID: MIG-fe)\n"
        "GPU 2: T4 (UUID: GPU-0)\n"
    )
    assert listed_gpus(text) == ["0", "MIG-c9", "MIG-fe", "2"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: T4 (UUID: GPU-0)'\n")
    tool.chmod(0o755)
    alone.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus() == ["0"]


def test_exit_codes_are_those_of_a_shell(tmp_path: Path):
    executor = Local(3)
    for slot, (code, shown) in enumerate(
        {"raise SystemExit": 0, "raise SystemExit(3)": 3, "import os; os.kill(os.getpid(), 9)": 137}.items()
    ):
        job = submitted(executor, tmp_path, code, slot)
        assert (code_of(job), job.poll(), job.queued) == (shown, shown, False)
    job.stop(), job.kill()  # an ended one: nothing
    assert job.poll() == 137


def test_output_is_appended(tmp_path: Path):
    for _ in range(2):
        assert code_of(submitted(Local(), tmp_path, "import sys; print('o'); print('e', file=sys.stderr)")) == 0
    assert sorted((tmp_path / "0.log").read_text().split()) == ["e", "e", "o", "o"]


def test_a_stopped_job_saves(tmp_path: Path):
    job = submitted(Local(), tmp_path, SAVES)
    runs(tmp_path)
    job.stop()
    job.stop()  # a second signal would have it end without
    assert code_of(job) == 128 + signal.SIGTERM
    assert (tmp_path / "0.log").read_text().split("\n")[1:] == ["saved after 15", ""]


def test_a_job_that_does_not_end_is_killed(tmp_path: Path):
    job = submitted(Local(grace=0.5), tmp_path, STUBBORN)
    runs(tmp_path)
    job.stop()
    assert code_of(job) == 137
    assert "saved after 15" in (tmp_path / "0.log").read_text()  # it had the time for it
    job = submitted(Local(grace=None), tmp_path, STUBBORN, 1)
    runs(tmp_path, 1)
    job.kill()
    assert code_of(job) == 137


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("end", "code"), [("os.kill(os.getpid(), 9)", 137), ("sys.exit(1)", 1), ("time.sleep(60)", 137)]
)
def test_a_failed_job_leaves_no_processes(end: str, code: int, tmp_path: Path):
    job = submitted(Local(), tmp_path, PARENT.format(end))
    child = int(runs(tmp_path)[1])
    if "sleep" in end:
        job.kill()
    assert code_of(job) == code
    until(lambda: gone(child), "the end of the child")


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell of it")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_jobs_of_a_sweep_that_is_gone_save(number: int, tmp_path: Path):
    sweep = (
        "import signal, sys, time\nfrom pathlib import Path\nfrom experiments.sweep.executors import Local, Work\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as under nohup
        f"command = [sys.executable, '-S', '-c', {SAVES!r}]\n"
        f"log = Path({str(tmp_path / '0.log')!r})\n"
        "job = Local().submit(Work(command, log))\nprint(job.pid, flush=True)\ntime.sleep(60)\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", sweep],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with started:
        assert started.stdout is not None
        pid = int(started.stdout.readline())
        runs(tmp_path)
        os.killpg(started.pid, number)  # as a terminal does it
    until(lambda: gone(pid), "the end of the job")
    assert (tmp_path / "0.log").read_text() == "runs\nsaved after 1\n"  # SIGHUP


def test_cores_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert 1 <= cores() <= (os.cpu_count() or 1)
    if not Path("/proc/self/cgroup").exists():
        return
    line = Path("/proc/self/cgroup").read_text().splitlines()[0].split(":", 2)[2].lstrip("/")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr("stu.resources.CGROUPS", tmp_path)
    for root in (tmp_path, tmp_path / "cpu"):
        (root / line).mkdir(parents=True, exist_ok=True)
        (root / line / "cpu.max").write_text("max 100000\n")
    assert cores() == 64
    for root in (tmp_path, tmp_path / "cpu"):
        (root / "cpu.max").write_text("350000 100000\n")  # of the group around it
    assert cores() == 4
    for root in (tmp_path, tmp_path / "cpu"):
        (root / "cpu.max").unlink()
        (root / "cpu.cfs_quota_us").write_text("50000\n")
        (root / "cpu.cfs_period_us").write_text("100000\n")
    assert cores() == 1
