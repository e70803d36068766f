"""Several processes: which a launcher has started, which a command starts itself; and what is refused before it hangs.

There is no SLURM here: what it would set is in the environment.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from stu.cli.composition import build
from stu.errors import CommandError, OptionError
from stu.task import Batch
from stu.training import Diverged, Stopped, cluster
from stu.training.cluster import RANKS, Launcher, Slurm, Started, Watch, environments
from stu.training.module import SequenceModule
from stu.training.plan import check_trainer
from tests import runs
from tests.models import composed
from tests.versions import newer_than_2_7

TASK = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "lds", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
ONE = {**TASK, "SLURM_NTASKS": "1"}
TWO = {**TASK, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
NODES = {**TASK, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
BY_HAND = {**TASK, "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "interactive"}  # as salloc calls it
ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
STEP = "stu.training.module:SequenceModule.training_step"
SMALL = runs.small("task=lds", "model=stu", "log_every=5")
BOTH = ("trainer.devices=2", "trainer.strategy=ddp")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an environment without launchers, and two cores."""
    for variable in os.environ:
        if variable in (*RANKS, "WORLD_SIZE", "MASTER_PORT") or variable.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(variable)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def checked(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], *overrides: str, sweeping: bool = False) -> int:
    """The rank of a process that is not refused."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = configured(*overrides)
    check_trainer(trainer, build(trainer, _partial_=True), sweeping=sweeping)
    return rank_zero_only.rank


@cache
def configured(*overrides: str) -> DictConfig:
    return composed("task=lds", "trainer=cpu", *overrides).trainer


@pytest.mark.parametrize(
    ("variables", "overrides", "rank"),
    [
        ({}, (), 0),
        ({}, BOTH, 0),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "elsewhere"}, BOTH, 0),  # left over from another launcher
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "MASTER_PORT": "12910", "WORLD_SIZE": "2"}, BOTH, 1),
        ({"LOCAL_RANK": "1", "MASTER_PORT": "12910", "RANK": "0"}, BOTH, 1),
        ({"MASTER_PORT": "12910", "NODE_RANK": "1"}, ("+trainer.num_nodes=2",), 1),
        (ONE, (), 0),
        (TWO, BOTH, 0),
        ({**TWO, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, BOTH, 1),
        ({**TASK, "SLURM_NTASKS": "2"}, BOTH, 0),  # srun --ntasks=2
        ({**NODES, "SLURM_PROCID": "1", "SLURM_NODEID": "1"}, ("+trainer.num_nodes=2",), 1),
        ({**ONE, "SLURM_NTASKS_PER_NODE": "4"}, (), 0),  # srun --ntasks=1 in a larger allocation
        (BY_HAND, BOTH, 0),
        ({**BY_HAND, "SLURM_STEP_NUM_TASKS": "1"}, BOTH, 0),  # srun --pty bash
        ({**TWO, "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "1"}, BOTH, 1),  # srun bash -c
        ({**BY_HAND, "SLURM_NTASKS": "4"}, (), 0),
        ({**ELASTIC, "WORLD_SIZE": "1"}, (), 0),
        ({**ELASTIC, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, BOTH, 1),
        ({**ONE, **ELASTIC, "WORLD_SIZE": "2", "MASTER_PORT": "12910"}, BOTH, 0),  # torchrun in an allocation
    ],
)
def test_processes_that_are_as_many_as_the_trainer_asks_for(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], overrides: tuple[str, ...], rank: int
):
    assert checked(monkeypatch, variables, *overrides) == rank


@pytest.mark.parametrize(
    ("variables", "overrides", "parts"),
    [
        ({"RANK": "1"}, (), ("RANK=1: ", "one of several", "unset it")),
        ({"SLURM_PROCID": "3"}, (), ("SLURM_PROCID=3: ", "one of several")),
        ({"LOCAL_RANK": "1"}, (), ("LOCAL_RANK=1: ",)),
        ({"RANK": "one"}, (), ("RANK='one': must be a number",)),
        (ONE, BOTH, ("SLURM_NTASKS=1: ", "trainer.devices=2 x num_nodes=1 is 2", "srun --ntasks=1")),
        (TWO, (), ("SLURM_NTASKS=2: ", "trainer.devices=1 x num_nodes=1 is 1", "srun --ntasks=1")),
        ({**TWO, "SLURM_PROCID": "1"}, (), ("SLURM_PROCID=1: ", "trainer.devices=1 x num_nodes=1", "srun --ntasks=1")),
        ({**TWO, "SLURM_NTASKS_PER_NODE": "1"}, BOTH, ("trainer.devices=2: ", "ntasks-per-node=1")),
        ({**TWO, "SLURM_NNODES": "2"}, BOTH, ("trainer.devices=2: ", "nodes=2")),
        ({**BY_HAND, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, (), ("SLURM_NTASKS=2: ",)),
        ({**BY_HAND, "SLURM_PROCID": "1"}, (), ("SLURM_PROCID=1: ",)),
        ({**ELASTIC, "WORLD_SIZE": "1"}, BOTH, ("WORLD_SIZE=1: ",)),
        ({**ELASTIC, "WORLD_SIZE": "2"}, (), ("WORLD_SIZE=2: ",)),
        ({"LOCAL_RANK": "0"}, BOTH, ("LOCAL_RANK=0: ", "MASTER_PORT")),  # nobody would start the other process
        ({"MASTER_PORT": "99999"}, BOTH, ("MASTER_PORT=99999: ",)),
        ({}, ("+trainer.num_nodes=2",), ("trainer.num_nodes=2: needs srun or torchrun", "NODE_RANK")),
    ],
)  # fmt: skip
def test_processes_that_would_hang_or_be_lost(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], overrides: tuple[str, ...], parts: tuple[str, ...]
):
    with pytest.raises(CommandError) as refused:
        checked(monkeypatch, variables, *overrides)
    assert str(refused.value).startswith(parts[0])
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("variables", [{}, TWO])
def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(CommandError, match=f"^MASTER_PORT={port}: this port is in use"):
            checked(monkeypatch, {**variables, "MASTER_PORT": port}, *BOTH)


def test_steps_of_one_job_meet_at_different_ports(monkeypatch: pytest.MonkeyPatch):
    ports = []
    for job, step in (("7", "0"), ("7", "1"), ("8", "0")):
        checked(monkeypatch, {**TWO, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}, *BOTH)
        ports.append(os.environ.pop("MASTER_PORT"))
    assert len(set(ports)) == 3


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("trainer.accelerator=tpu",), "trainer.accelerator=tpu: there is no TPU here; use trainer=cpu"),
        (("trainer.devices=0",), "trainer.devices=0: must be 1 … 2"),
        (("trainer.devices=-2",), "trainer.devices=-2: must be 1 … 2"),
        (("trainer.devices=-1",), "trainer.devices=-1: must be 1 … 2"),
        (("trainer.devices=x",), "trainer.devices=x: must be 1 … 2"),
        (("trainer.devices=[0,0]",), "trainer.devices=[0, 0]: must be 1 … 2"),
        (("trainer.devices=100",), "trainer.devices=100: must be 1 … 2"),
        (("+trainer.num_nodes=0",), "trainer.num_nodes=0: must be at least 1"),
        (("trainer.precision=16-mixed",), "trainer.precision=16-mixed: needs a GPU"),
        (("trainer.precision=16",), "trainer.precision=16: needs a GPU"),
        (
            ("trainer.strategy={_target_:stu.training.FullyShard}", "trainer.precision=64-true"),
            "trainer.precision=64-true: must be one of 32-true, bf16-mixed, bf16-true",
        ),
    ],
)
def test_what_this_machine_does_not_have(monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], line: str):
    with pytest.raises(OptionError) as refused:
        checked(monkeypatch, {}, *overrides)
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("end", "killed", "over"),
    [
        (SystemExit(143), [signal.SIGKILL], False),
        (Stopped(15, 3), [], True),
        (Diverged(), [], True),
        (RuntimeError(), [], False),
    ],
)
def test_the_end_of_the_processes_that_a_run_has_started(end: BaseException, killed: list[int], over: bool):
    signals: list[int] = []
    watch = Watch(lambda: False)
    launcher = SimpleNamespace(kill=signals.append)
    Started().on_exception(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)), None, end)
    assert (signals, watch.over.is_set()) == (killed, over)
    Started().on_exception(SimpleNamespace(strategy=SimpleNamespace(launcher=None)), None, end)


def test_the_processes_of_one_trainer_are_those_of_the_next(monkeypatch: pytest.MonkeyPatch):
    """A run that was pretrained is trained by a second Trainer, which ends them all the same."""
    signals: list[int] = []
    started = SimpleNamespace(pid=0, send_signal=signals.append)
    monkeypatch.setattr(Launcher, "started", [started])
    launcher = Launcher(SimpleNamespace(creates_processes_externally=True), 2, 1)
    assert launcher.launch(lambda: "done") == "done"
    Started().on_exception(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)), None, SystemExit(143))
    assert signals == [signal.SIGKILL]


@pytest.mark.parametrize("overrides", [BOTH, ("+trainer.num_nodes=2",)])
def test_a_sweep_has_one_process(monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]):
    with pytest.raises(CommandError, match=r"^trainer\.devices=.*one process runs all jobs"):
        checked(monkeypatch, {}, *overrides, sweeping=True)
    checked(monkeypatch, {}, "trainer.strategy=ddp", sweeping=True)


@pytest.mark.e2e
def test_devices_in_a_sweep_of_one_process_are_refused_in_one_line(tmp_path: Path):
    done = runs.train(tmp_path, "-m", *SMALL, "hydra/sweeper=basic", "seed=0,1", "trainer.devices=2")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith("error: trainer.devices=2: one process runs all jobs")
    assert not (tmp_path / "runs" / "lds").exists()


@pytest.mark.e2e
@pytest.mark.slow
def test_slurm_announces_its_time_limit(tmp_path: Path):
    """The run is saved and goes on, also where an earlier version has left a checkpoint of Lightning's own."""
    at = runs.signalled(signal.SIGUSR1, STEP, 7, group=True)
    stopped = runs.train(tmp_path, *SMALL, "loader.num_workers=1", "name=run", at=at, **ONE)
    run = runs.run_of(tmp_path, "lds", "stu", "run")
    assert (stopped.code, stopped.err, run.last_step) == (128 + signal.SIGUSR1, "", 7)
    assert "stopped by SIGUSR1 after step 7" in stopped.out
    assert not list(tmp_path.rglob("hpc_ckpt_*"))
    foreign = torch.load(run.last, weights_only=True)
    for weight in foreign["state_dict"].values():
        weight.zero_()
    torch.save(foreign, run.path / "hpc_ckpt_1.ckpt")
    (tmp_path / "srun").touch(0o755)  # Lightning has a remark where it is not used
    for name, variables in (("run", ONE), ("whole", {"PATH": f"{tmp_path}:{os.environ['PATH']}"})):
        done = runs.train(tmp_path, *SMALL, f"name={name}", **variables)
        assert (done.code, done.err) == (0, "")
    runs.assert_identical(runs.results(run), runs.results(runs.run_of(tmp_path, "lds", "stu", "whole")))


@pytest.mark.e2e
@pytest.mark.slow
def test_two_tasks_of_srun_are_one_run(tmp_path: Path):
    """Only the first one speaks; what it refuses ends both."""
    job = {**TWO, "SLURM_JOB_ID": str(os.getpid()), "MASTER_ADDR": "127.0.0.1"}
    ranks = [{**job, "SLURM_PROCID": i, "SLURM_LOCALID": i} for i in ("0", "1")]

    def both(*overrides: str) -> list[runs.Finished]:
        started = [runs.start(tmp_path, *SMALL, *BOTH, "name=both", *overrides, **rank) for rank in ranks]
        return [process.wait() for process in started]

    first, second = both()
    assert (first.code, first.err, second.code, second.err, second.out) == (0, "", 0, "", "")
    assert first.out.count("Result") == 1
    for override in ("model.depth=-1", "optimizer.lr=1"):  # no layers, other settings
        first, second = both(override)
        assert (first.code, first.out, second.code, second.out, second.err) == (2, "", 2, "", "")
        assert len(first.err.splitlines()) == 1


@pytest.mark.e2e
@pytest.mark.slow
def test_loader_workers_live_until_the_run_is_saved(tmp_path: Path):
    """SLURM ends all processes of a job at once."""
    at = runs.signalled(signal.SIGTERM, STEP, 5, group=True)
    done = runs.train(tmp_path, *SMALL, "loader.num_workers=2", "name=run", at=at)
    assert (done.code, done.err) == (128 + signal.SIGTERM, "")
    assert runs.run_of(tmp_path, "lds", "stu", "run").last_step == 5


def fails(step: int, end: BaseException) -> None:
    """An `at` of `runs.start`: the process raises `end` in a training step."""

    def training_step(module: SequenceModule, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == step:
            raise end
        return original(module, batch, batch_idx)

    original, SequenceModule.training_step = SequenceModule.training_step, training_step  # type: ignore[method-assign]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "rank", "at", "reason"),
    [
        pytest.param(
            *(
                "ddp",
                "1",
                runs.signalled(signal.SIGKILL, STEP, 5),
                "another process of this run has ended or cannot be",
            ),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            *(
                "fsdp",
                "0",
                runs.signalled(signal.SIGKILL, STEP, 5),
                "another process of this run has ended or cannot be",
            ),
            marks=newer_than_2_7,
        ),
        pytest.param(
            *("fsdp", "1", partial(fails, 5, ValueError("odd\nbatch")), "process 1: ValueError: odd batch"),
            marks=newer_than_2_7,
        ),
    ],
    ids=["killed", "first killed", "error"],
)
def test_a_process_that_is_gone_ends_the_others_in_one_line(
    tmp_path: Path, strategy: str, rank: str, at: Callable[[], None], reason: str
):
    """Which says why, as the manifest does; the same command goes on."""
    job = {**TWO, "SLURM_JOB_ID": str(os.getpid()), "MASTER_ADDR": "127.0.0.1"}
    started = {}
    for process in ("0", "1"):
        variables = job | {"SLURM_PROCID": process, "SLURM_LOCALID": process}
        command = [*(o for o in SMALL if o != "trainer=cpu"), "trainer.accelerator=cpu", f"trainer={strategy}"]
        command += ["trainer.devices=2", "name=run", "trainer.val_check_interval=2"]
        started[process] = runs.start(tmp_path, *command, at=at if process == rank else None, **variables)
    gone = started.pop(rank).wait()
    [left] = [process.wait(timeout=30) for process in started.values()]
    lines = (gone.err + left.err).splitlines()
    assert (left.code, len(lines)) == (1, 1)
    assert lines[0].startswith(f"error: {reason}")
    run = runs.run_of(tmp_path, "lds", "stu", "run")
    assert run.read_manifest()["starts"][-1]["failed"].startswith(reason)
    done = runs.train(tmp_path, *SMALL, "name=run", "trainer.val_check_interval=2")
    assert done.code == 0
    assert "resumedafterstep4" in "".join(done.out.split())  # the table folds long lines


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("exit 0", "process 1 has ended with exit code 0"),  # the others would wait for it all the same
        ("exit 3", "process 1 has ended with exit code 3"),
        ("kill -9 $$", "process 1 was killed by SIGKILL"),
        ("exec sleep 60", ""),
    ],
)
def test_how_a_process_that_was_started_has_ended(monkeypatch: pytest.MonkeyPatch, end: str, how: str):
    with subprocess.Popen(["sh", "-c", end]) as process:
        monkeypatch.setattr(cluster.Launcher, "started", [process])
        assert cluster.failed(seconds=5.0 if how else 0.0) == how
        process.kill()


@pytest.mark.parametrize(("parent", "rank", "watched"), [("1", "1", True), ("1", "0", False), ("0", "1", False)])
def test_a_process_whose_parent_is_gone_before_it_looks(
    monkeypatch: pytest.MonkeyPatch, parent: str, rank: str, watched: bool
):
    watches: list[Any] = []
    monkeypatch.setattr(cluster, "Watch", lambda gone: SimpleNamespace(start=lambda: watches.append(gone())))
    meeting = {"NODE_RANK": "0", "MASTER_PORT": "12910", "WORLD_SIZE": "2"}
    checked(monkeypatch, {**meeting, "LOCAL_RANK": rank, cluster.PARENT: parent}, *BOTH)
    assert watches == [True] * watched


@pytest.mark.parametrize(("pid", "gone"), [(1, True), (os.getppid(), False)])
def test_a_process_that_others_wait_for_in_vain(monkeypatch: pytest.MonkeyPatch, pid: int, gone: bool):
    """Where no error comes, as from NCCL, they end after a while; not where all is over."""
    monkeypatch.setattr(cluster, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(cluster, "GRACE", 0.01)
    ends: list[Any] = []
    monkeypatch.setattr(os, "_exit", lambda code: (ends.append(code), Watch.over.set()))
    monkeypatch.setattr(cluster, "ON_LOSS", [lambda: ends.append("reported")])
    watch = Watch(lambda: os.getppid() != pid)
    watch.start()
    watch.join(0.3)
    Watch.over.set()
    watch.join(5)
    assert ends == (["reported", 1] if gone else [])


@pytest.mark.parametrize(
    ("variables", "kinds"),
    [
        ({}, [LightningEnvironment]),  # not left to Lightning, which would start MPI wherever mpi4py is installed
        (BY_HAND, [LightningEnvironment]),
        (ONE, [Slurm]),
        ({**ELASTIC, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}, []),
        ({"OMPI_COMM_WORLD_RANK": "0"}, []),
        ({"PMI_RANK": "1"}, []),
    ],
    ids=["alone", "salloc", "srun", "torchrun", "Open MPI", "MPICH"],
)
def test_who_started_the_processes(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], kinds: list[type]):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [type(environment) for environment in environments()] == kinds
