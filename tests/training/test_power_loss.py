"""A loss of power spoils neither a run nor the data that it builds; `tests.training.power_loss` cuts it more often."""

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.power_loss import COMMANDS, Command, Disk, disk, lose_power, without_sync

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    try:
        with disk(tmp_path_factory.mktemp("place")) as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, mkfs.ext4 and loop devices: {error}")


@pytest.fixture(scope="module")
def command(place: Disk, tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command.measured([*COMMANDS[0], "task.data.train=800"], tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("building", [True, False], ids=["building", "training"])
def test_the_same_command_goes_on(place: Disk, command: Command, tmp_path: Path, building: bool):
    moment = command.moment(random.Random(0), building=building)
    assert lose_power(command, place, tmp_path, moment, busy=True) == ""


def test_what_nobody_made_durable_is_missed(place: Disk, command: Command, tmp_path: Path):
    found = lose_power(command, place, tmp_path, 100.0, busy=True, at=without_sync)
    assert found == "the summary of a finished run is gone"
