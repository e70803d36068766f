"""Jobs of a sweep on SLURM: through submitit without a queue, and against the answers of a SLURM that is not there."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.sweep.executors import Slurm, Work
from experiments.sweep.executors import slurm as module
from stu.errors import CommandError
from tests import runs
from tests.experiments.test_executors import SAVES, alone, code_of, until

submitit = pytest.importorskip("submitit", reason='needs submitit: pip install ".[slurm]"')
__all__ = ["alone"]  # a fixture

FACTS = "import os, sys; print('runs', os.getcwd(), os.environ['OMP_NUM_THREADS'], os.environ['GIVEN'])\n"


def submitted(executor: Slurm, home: Path, code: str, name: str = "job", **options: Any) -> module.Submitted:
    (home / "logs").mkdir(exist_ok=True)
    command = [sys.executable, "-S", "-c", code]
    return executor.submit(Work(command, home / "logs" / name, {"GIVEN": name}, name=name, **options))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory from which the repository is not found."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return folder


def test_jobs_of_submitit(nowhere: Path, tmp_path: Path, alone: pytest.MonkeyPatch):
    executor = Slurm(cluster="local", cpus_per_task=6)
    exits = submitted(executor, tmp_path, FACTS + "raise SystemExit(3)", "exits", devices=2)
    killed = submitted(executor, tmp_path, "import os; os.kill(os.getpid(), 9)", "killed")
    saves = submitted(executor, tmp_path, SAVES, "saves")
    alone.setenv("OMP_NUM_THREADS", "5")
    lost = submitted(
        executor, tmp_path, FACTS + "import os, signal; os.kill(os.getppid(), 9)\nwhile True: pass", "lost"
    )
    log = tmp_path / "logs" / "saves"
    until(lambda: log.exists() and log.read_text() == "runs\n", "its start")
    assert saves.poll() is None
    saves.stop(), saves.stop()
    assert [code_of(job) for job in (exits, killed, saves, lost)] == [3, 137, 143, 137]
    assert log.read_text() == "runs\nsaved after 1\n"
    assert (tmp_path / "logs" / "exits").read_text() == f"runs {nowhere} 3 exits\n"
    first, last = (tmp_path / "logs" / "lost").read_text().splitlines()
    assert first == f"runs {nowhere} 5 lost"
    assert re.fullmatch(r"error: SLURM: job \d+ has ended without an exit code: COMPLETED", last)
    assert not any(job.queued for job in (exits, killed, saves, lost))


@pytest.mark.thorough
@pytest.mark.e2e
def test_a_preempted_job_goes_on_in_the_same_run(tmp_path: Path, alone: pytest.MonkeyPatch):
    words = runs.small("task=lds", "model=lru", "trainer.max_epochs=null", "trainer.max_steps=300", "log_every=5")
    words += ["trainer.val_check_interval=150", "name=run"]
    undisturbed = runs.train(tmp_path / "undisturbed", *words)
    assert undisturbed.code == 0, undisturbed.err
    home = tmp_path / "preempted"
    home.mkdir()
    alone.chdir(home)
    (home / "logs").mkdir()
    environment = {
        "STU_RUNS": str(home / "runs"),
        "STU_DATA": str(tmp_path / "undisturbed" / "data"),
        **runs.ENVIRONMENT,
    }
    command = [sys.executable, str(runs.SCRIPT), *words]
    job = Slurm(cluster="local").submit(Work(command, home / "logs" / "log", environment))
    run = runs.run_of(home, "lds", "lru", "run")
    until(lambda: run.metrics.exists() and run.metrics.read_text().count("train/loss") > 1, "the first steps", 120)
    controller = int(job._job.job_id)
    [task] = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # as SLURM does it
    assert until(job.poll, "the end", 120) == 0, (home / "logs" / "log").read_text()
    assert [start["resumed"] for start in run.read_manifest()["starts"]] == [False, True]
    expected = runs.run_of(tmp_path / "undisturbed", "lds", "lru", "run")
    runs.assert_identical(runs.results(run), runs.results(expected))


class Cluster:
    """Commands of SLURM that note how they were called and answer what is written into files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, code in {"sbatch": 'cp "$1" "$H/batch"', "squeue": "", "scancel": "", "srun": ""}.items():
            answer = f'cat "$H/{name}.error" >&2 2>/dev/null && exit 1; cat "$H/{name}.answer" 2>/dev/null; true'
            (folder / name).write_text(f'#!/bin/sh\nH={folder}\necho "$@" >> $H/{name}.calls\n{code}\n{answer}\n')
            (folder / name).chmod(0o755)
        self.accepts(7)

    def accepts(self, number: int) -> None:
        self.answers("sbatch", f"Submitted batch job {number}")

    def answers(self, command: str, text: str, *, error: bool = False) -> None:
        (self.folder / f"{command}.error").unlink(missing_ok=True)
        (self.folder / f"{command}.{'error' if error else 'answer'}").write_text(f"{text}\n" if text else "")

    def calls(self, command: str) -> list[str]:
        path = self.folder / f"{command}.calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def options(self) -> dict[str, str]:
        """Those of the last sbatch."""
        lines = re.findall(r"^#SBATCH --(\S+?)(?:=(.*))?$", (self.folder / "batch").read_text(), re.MULTILINE)
        return {name: value.strip("'") for name, value in lines}


@pytest.fixture
def cluster(tmp_path: Path, alone: pytest.MonkeyPatch) -> Cluster:
    folder = tmp_path / "bin"
    folder.mkdir()
    alone.setenv("PATH", str(folder), prepend=os.pathsep)
    alone.setattr(module, "ASK_EVERY", 0.0)
    alone.setattr(module, "PATIENCE", 0.3)
    return Cluster(folder)


def test_what_sbatch_is_asked_for(cluster: Cluster, tmp_path: Path, alone: pytest.MonkeyPatch):
    executor = Slurm(
        partition="gpu", account="me", timeout_min=90, cpus_per_task=3, mem_gb=20, setup=["module load cuda"],
        additional={"mail-type": "FAIL"}, requeues=5,
    )  # fmt: skip
    for variable in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "RANK"):  # of the job that the sweep itself is
        alone.setenv(variable, "9")
    (cluster.folder / "sbatch").write_text((cluster.folder / "sbatch").read_text() + "env > $H/environment\n")
    job = submitted(executor, tmp_path, "", "model=stu,seed=0", devices=2, nodes=3)
    expected = {
        **{"partition": "gpu", "account": "me", "time": "90", "cpus-per-task": "3", "mem": "20GB", "requeue": ""},
        **{"nodes": "3", "ntasks-per-node": "2", "gpus-per-node": "2", "mail-type": "FAIL", "signal": "USR2@120"},
    }
    assert expected.items() <= cluster.options.items()
    assert not {"qos", "constraint"} & cluster.options.keys()
    assert re.fullmatch(r"model=stu,seed=0-[0-9a-f]{10}", cluster.options["job-name"])
    script = (cluster.folder / "batch").read_text()
    assert "\nmodule load cuda\n" in script
    assert " --cpus-per-task=3 " in script
    seen = dict(line.split("=", 1) for line in (cluster.folder / "environment").read_text().splitlines() if "=" in line)
    assert not {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "RANK"} & seen.keys()
    submission = job._job.submission()
    assert submission._timeout_countdown == 5
    assert submission.function.environment == {"OMP_NUM_THREADS": "3", "GIVEN": "model=stu,seed=0"}
    alone.setattr(module, "ASK_EVERY", 5.0)
    submitted(Slurm(gpus_per_task=0), tmp_path, "", "cpu")
    assert "gpus-per-node" not in cluster.options
    assert cluster.options["ntasks-per-node"] == "1"


def test_a_job_in_the_queue(cluster: Cluster, tmp_path: Path):
    job = submitted(Slurm(), tmp_path, "")
    results = tmp_path / "slurm" / "7_0_result.pkl"
    for state, queued in (("PENDING", True), ("RUNNING", False), ("REQUEUED", True), ("COMPLETING", False)):
        cluster.answers("squeue", f"7|{state}|job")
        assert (job.poll(), job.queued) == (None, queued)
    cluster.answers("squeue", "slurm_load_jobs error: Unable to contact slurm controller", error=True)
    time.sleep(0.4)
    assert (job.poll(), job.queued) == (None, False)  # nothing is known
    for answer in ("7|PREEMPTED|job", "", "6|RUNNING|job"):
        cluster.answers("squeue", answer)
        assert job.poll() is None  # for how long?
        cluster.answers("squeue", "7|PENDING|job")
        time.sleep(0.4)
        assert job.poll() is None  # queued again
    cluster.answers("squeue", "7|COMPLETED|job")
    assert job.poll() is None  # its result has not appeared yet
    submitit.core.utils.cloudpickle_dump(("success", 75), results)
    assert (job.poll(), job.poll(), job.queued) == (75, 75, False)
    assert not cluster.calls("scancel")


@pytest.mark.parametrize("state", ["NODE_FAIL", "CANCELLED", "OUT_OF_MEMORY", ""])
def test_a_lost_job(state: str, cluster: Cluster, tmp_path: Path):
    job = submitted(Slurm(), tmp_path, "")
    cluster.answers("squeue", f"7|{state}|job" if state else "")
    assert code_of(job) == 137  # as where a process is killed: it may be tried again
    reason = f"error: SLURM: job 7 has ended without an exit code{f': {state}' if state else ''}\n"
    assert (tmp_path / "logs" / "job").read_text() == reason


def test_a_job_that_failed_before_its_command(cluster: Cluster, tmp_path: Path):
    job = submitted(Slurm(), tmp_path, "")
    submitit.core.utils.cloudpickle_dump(
        ("error", "NotADirectoryError: /shared"), tmp_path / "slurm" / "7_0_result.pkl"
    )
    assert job.poll() == 1
    assert "NotADirectoryError: /shared" in (tmp_path / "logs" / "job").read_text()


def test_stopping_and_cancelling(cluster: Cluster, tmp_path: Path):
    executor = Slurm(grace=0.5)
    job = submitted(executor, tmp_path, "")
    cluster.answers("squeue", "7|RUNNING|job")
    job.stop(), job.stop()
    assert cluster.calls("scancel") == ["--state=PENDING 7", "--signal=TERM 7"]
    assert job.poll() is None  # it saves
    until(lambda: job.poll() is None and "7" in cluster.calls("scancel"), "the end of its grace")
    cluster.answers("squeue", "7|CANCELLED|job")
    assert job.poll() == 143
    assert cluster.calls("scancel")[2:] == ["7"]
    again = submitted(executor, tmp_path, "")
    cluster.answers("squeue", "7|RUNNING|job")
    again.kill()
    assert cluster.calls("scancel")[3:] == ["7"]


def test_a_repeated_sweep_finds_its_jobs(cluster: Cluster, tmp_path: Path):
    executor = Slurm()
    submitted(executor, tmp_path, "", "a")
    called = cluster.options["job-name"]
    cluster.answers("squeue", f"7|PENDING|{called}\n3|COMPLETED|{called}\n4|RUNNING|other")
    cluster.accepts(8)
    assert submitted(executor, tmp_path, "", "a")._job.job_id == "8"  # to this sweep, job 7 is no stranger's
    found = submitted(Slurm(), tmp_path, "", "a")
    assert (found._job.job_id, found.queued) == ("7", True)
    assert len(cluster.calls("sbatch")) == 2
    found.stop()
    assert cluster.calls("scancel") == ["--state=PENDING 7", "--signal=TERM 7"]
    for folder, code in ((tmp_path, "pass"), (tmp_path / "other", "")):  # another command, another sweep
        folder.mkdir(exist_ok=True)
        assert submitted(Slurm(), folder, code, "a")._job.job_id == "8"
    cluster.answers("squeue", f"7|COMPLETING|{called}")
    assert submitted(Slurm(), tmp_path, "", "a")._job.job_id == "8"


def test_what_sbatch_refuses(cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    cluster.answers("sbatch", "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job", error=True)
    with pytest.raises(CommandError) as refused:
        submitted(Slurm(partition="nope"), tmp_path, "")
    line = "hydra/launcher=slurm: sbatch: error: invalid partition specified: nope sbatch: error: Batch job"
    assert str(refused.value) == line
    assert capfd.readouterr().err == ""


def test_what_sbatch_cannot_do_now(cluster: Cluster, tmp_path: Path, alone: pytest.MonkeyPatch):
    alone.setattr(module, "SUBMIT_EVERY", 0.2)
    cluster.answers("sbatch", "sbatch: error: Batch job submission failed: Socket timed out on send/recv", error=True)
    job, *others = (submitted(Slurm(), tmp_path, "", name) for name in ("job", "stopped", "killed"))
    assert (job.poll(), job.queued) == (None, True)
    others[0].stop(), others[1].kill()
    assert [other.poll() for other in others] == [143, 143]
    assert (tmp_path / "logs" / "job").read_text().count("Socket timed out") == 1
    cluster.answers("squeue", "7|RUNNING|job")
    cluster.accepts(7)
    until(lambda: job.poll() is None and not job.queued, "the next try")


def test_where_there_is_no_slurm(alone: pytest.MonkeyPatch, tmp_path: Path):
    alone.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match=r"hydra/launcher=slurm: srun and sbatch are not on the PATH"):
        Slurm()
    alone.setitem(sys.modules, "submitit", None)
    with pytest.raises(CommandError, match=r'hydra/launcher=slurm: needs submitit: pip install "\.\[slurm\]"'):
        Slurm(cluster="local")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("cpus_per_task", 0, "1 or more"), ("gpus_per_task", "1", "0 or more"), ("cluster", "debug", "slurm, local")],
)
def test_options_that_cannot_work(option: str, value: Any, allowed: str):
    options: dict[str, Any] = {"cluster": "local", option: value}
    with pytest.raises(CommandError, match=rf"hydra\.launcher\.{option}={value}: .*{allowed}"):
        Slurm(**options)
