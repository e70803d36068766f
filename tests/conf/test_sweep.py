"""Each job of a sweep is announced, with the number of all where that is known."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf

from stu.cli.composition import VERSION
from stu.cli.sweep import Jobs
from stu.cli.usage import CONF, options_of

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def announced(capsys: Any, *overrides: str, mode: RunMode = RunMode.MULTIRUN, **sweeper: object):
    """What is printed before the second job."""
    sweeper = {"_target_": BASIC, "max_batch_size": None, "params": None} | sweeper
    hydra = {"sweeper": sweeper, "overrides": {"task": list(overrides)}, "mode": mode, "job": {"num": 1}}
    config = OmegaConf.create({"hydra": hydra})
    jobs = Jobs()
    with initialize_config_dir(str(CONF), **VERSION):
        jobs.on_multirun_start(config)
    config.hydra.overrides.task = ["seed=1", "task=lds"]
    jobs.on_job_start(config)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "sweeper", "count"),
    [
        (("seed=0,1", "task=lds"), {}, " of 2"),
        (("seed=range(3)", "task=lds", "optimizer.lr=choice(1,2)"), {}, " of 6"),
        (("seed=range(3)", "seed=0,1"), {}, " of 2"),  # the last one counts
        (("seed=range(3)",), {"max_batch_size": 2}, " of 3"),
        (("seed=0,1",), {"params": {"optimizer.lr": "1,2,3"}}, " of 6"),
        (("optimizer=glob(*)",), {}, f" of {len(options_of('optimizer'))}"),
        (("seed=interval(0,1)",), {}, ""),  # refused by this sweeper
        (("seed=interval(0,1)",), {"_target_": "hydra_plugins.another.Sweeper"}, ""),
    ],
)
def test_the_number_of_all_jobs(
    capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], sweeper: dict, count: str
):
    assert announced(capsys, *overrides, **sweeper) == f"job 2{count}: seed=1 task=lds\n"


def test_a_single_run_is_not_announced(capsys: Any):
    assert announced(capsys, "seed=1", mode=RunMode.RUN) == ""


def test_it_is_configured():
    with initialize_config_dir(str(CONF), **VERSION):
        config = compose("config", return_hydra_config=True)
    assert config.hydra.callbacks.jobs._target_ == f"{Jobs.__module__}.{Jobs.__qualname__}"
