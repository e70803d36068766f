"""Jobs of a sweep on Ray, on one that is started here."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.sweep.executors import Ray, Work
from stu.errors import CommandError
from tests import runs
from tests.experiments.test_executors import SAVES, code_of, until


@pytest.fixture(scope="module")
def executor() -> Iterator[Ray]:
    pytest.importorskip("ray", reason='needs ray: pip install ".[ray]"')
    executor = Ray()
    yield executor
    executor.close()


def submitted(executor: Ray, log: Path, code: str, devices: int = 1):
    command = [sys.executable, "-S", "-c", code]
    return executor.submit(Work(command, log, {"GIVEN": log.name}, devices=devices))


def test_exit_codes_and_surroundings(executor: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.chdir(tmp_path)
    facts = "import os; print(os.getcwd(), *map(os.environ.get, ('OMP_NUM_THREADS', 'GIVEN', 'RANK')), flush=True)\n"
    for name, code, shown in (("0", "", 0), ("3", "raise SystemExit(3)", 3), ("9", "os.kill(os.getpid(), 9)", 137)):
        assert code_of(submitted(executor, tmp_path / name, facts + code)) == shown
        assert (tmp_path / name).read_text().splitlines()[0] == f"{tmp_path} 1 {name} None"


def test_a_job_waits_for_its_place_saves_and_is_killed(executor: Ray, tmp_path: Path):
    cores = int(executor._ray.cluster_resources()["CPU"])
    job = submitted(executor, tmp_path / "job", SAVES, devices=cores)
    until(lambda: job.poll() is None and not job.queued and (tmp_path / "job").read_text() == "runs\n", "its start")
    waits = submitted(executor, tmp_path / "waits", SAVES)
    taken_back = submitted(executor, tmp_path / "taken", SAVES)
    assert (waits.poll(), waits.queued, taken_back.poll()) == (None, True, None)
    taken_back.stop()
    killed = submitted(executor, tmp_path / "killed", SAVES)
    killed.kill()
    assert code_of(killed) == 143
    job.stop(), job.stop()
    assert code_of(job) == 129
    assert (tmp_path / "job").read_text() == "runs\nsaved after 1\n"
    assert code_of(taken_back) == 143
    assert not (tmp_path / "taken").exists()
    until(lambda: waits.poll() is None and not waits.queued and (tmp_path / "waits").exists(), "the next start")
    waits.kill()
    assert code_of(waits) == 137


def test_jobs_of_a_sweep_that_is_gone_save(executor: Ray, tmp_path: Path):
    log = tmp_path / "log"
    sweep = (
        "import os, sys, time\nfrom pathlib import Path\nfrom experiments.sweep.executors import Ray, Work\n"
        f"log = Path({str(log)!r})\n"
        f"job = Ray(address={executor._ray.get_runtime_context().gcs_address!r})"
        f".submit(Work([sys.executable, '-S', '-c', {SAVES!r}], log))\n"
        "while not log.exists() or not log.read_text(): time.sleep(0.05)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(runs.ROOT), *sys.path])}
    subprocess.run([sys.executable, "-c", sweep], env=environment, capture_output=True, timeout=120, check=False)
    until(lambda: log.read_text() == "runs\nsaved after 1\n", "what it saves")


def test_no_cluster_where_one_is_named(monkeypatch: pytest.MonkeyPatch):
    ray = pytest.importorskip("ray", reason='needs ray: pip install ".[ray]"')

    def init(address: str, **options: object) -> None:
        raise ConnectionError(f"Could not find any running Ray instance\nat {address}")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(CommandError, match=r"^hydra\.launcher\.address=auto: Could not .* instance at auto$"):
        Ray(address="auto")


def test_without_ray(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CommandError, match=r'hydra/launcher=ray: needs ray: pip install "\.\[ray\]"'):
        Ray()


@pytest.mark.parametrize(("option", "value"), [("cpus", 0), ("gpus", "many"), ("workers", None)])
def test_options_that_cannot_work(option: str, value: object):
    with pytest.raises(CommandError, match=rf"hydra\.launcher\.{option}={value}: must be a whole number"):
        Ray(**{option: value})  # type: ignore[arg-type]
