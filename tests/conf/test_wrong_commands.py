"""Wrong commands end in one line: some of those that `python -m tests.conf.wrong_commands` tries."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conf.wrong_commands import AT_ONCE, NEVER, OTHERS, VALUES, Outcome, attempt, commands, generated


def test_there_are_commands_about_every_key():
    every = list(generated())
    assert len(set(every)) == len(every) > 10_000
    keys = {words[-1].partition("=")[0] for words in every}
    assert {"optimizer.betas", "~model.mixer", "task.data.system", "+logger.unknown", "paths.runs"} <= keys
    assert all(any(f"={value}".startswith(end) for value in VALUES) for end in NEVER[:-1])
    assert commands(700) == commands(700)
    assert len(commands(700)) == 700


def test_the_judge_knows_a_fault():
    def fault(code: int | None = 2, err: str = "error: a=1: must be 2\n", left: tuple[str, ...] = ()) -> str:
        return Outcome(("task=lds", "a=1"), code, "", err, left, 1.0).fault

    assert fault() == ""
    assert fault(None) == "still running after 1 s"
    assert fault(1) == "exit code 1"
    assert fault(err="Traceback (most recent call last):\n") == "traceback"
    assert fault(err="error: a\nerror: b\n") == "2 lines"
    assert fault(err="error: \n") == fault(err="a=1\n") == "1 lines"
    assert fault(left=("config.yaml",)) == "left files"
    assert fault(0) == ""
    assert Outcome(("task=lds", "seed=${nope}"), 0, "", "", (), 1.0).fault == "accepted"


@pytest.mark.slow
@pytest.mark.e2e
def test_wrong_commands_end_in_one_line(tmp_path: Path):
    few = [*commands(len(OTHERS))[3::180], *commands()[len(OTHERS) :: 9601]]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        homes = [tmp_path / str(number) for number in range(len(few))]
        done = list(pool.map(lambda home, words: attempt(home, words, tmp_path, seconds=90), homes, few))
    assert {" ".join(one.command): (one.fault, one.err) for one in done if one.fault} == {}
    assert Counter(one.worked for one in done)[False] > 0.7 * len(few)
