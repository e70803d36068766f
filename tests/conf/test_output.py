"""What a command prints can get lost, but does not end it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import runs

COMMANDS = {
    "train.py": ("train.py", "--help"),
    "data.prepare": ("-m", "data.prepare", "--help"),
    "experiments": ("-m", "experiments.compare", "--help"),
}


def printing(code: str, *options: str, **arguments: Any) -> "subprocess.CompletedProcess[bytes]":
    """Run code after `guard` in an interpreter of its own."""
    program = f"import os, sys\nfrom stu.cli import output\noutput.guard()\n{code}"
    return command(*options, "-c", program, **arguments)


def command(*arguments: str, encoding: str = "utf-8", **options: Any) -> "subprocess.CompletedProcess[bytes]":
    environment = {"PATH": os.environ["PATH"], "PYTHONIOENCODING": encoding}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, *arguments], cwd=runs.ROOT, env=environment, timeout=60, **options)


@pytest.mark.parametrize("buffering", [(), ("-u",)])
@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "é … ² → 🙂 名".encode() + b" \xff"),
        ("latin-1", b"\xe9 ... \xb2 -> ? ? \xff"),
        ("cp1252", b"\xe9 \x85 \xb2 -> ? ? \xff"),
        ("ascii:strict", b"e ... 2 -> ? ? \xff"),
    ],
)
def test_characters_that_the_encoding_lacks_are_spelt_by_others(
    encoding: str, expected: bytes, buffering: tuple[str, ...]
):
    code = "for file in (sys.stdout, sys.stderr): print('é … ² → 🙂 名 \\udcff', file=file)"  # a name with byte 255
    done = printing(code, *buffering, encoding=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + b"\n", expected + b"\n")


def test_all_arrives_in_order_where_the_reader_is_slow():
    """A pipe that does not wait for its reader says that it is full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    read: list[bytes] = []

    def slowly() -> None:
        time.sleep(0.3)
        while part := os.read(reading, 1 << 16):
            read.append(part)

    reader = threading.Thread(target=slowly)
    reader.start()
    done = printing("for number in range(60000): print(number)", stdout=writing)
    os.close(writing)
    reader.join()
    os.close(reading)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"".join(read).split() == [b"%d" % number for number in range(60000)]


def nobody_reads() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def terminal_vanished() -> int:
    controlling, terminal = os.openpty()
    os.close(controlling)
    return terminal


LOST: dict[str, Callable[[], int]] = {
    "broken-pipe": nobody_reads,
    "full-disk": partial(os.open, "/dev/full", os.O_WRONLY),
    "terminal": terminal_vanished,
    "read-only": partial(os.open, os.devnull, os.O_RDONLY),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("lost", [*LOST.values(), None], ids=[*LOST, "closed"])
def test_nothing_is_said_of_output_that_is_lost(lost: Callable[[], int] | None, name: str):
    if lost is None:
        done = command(*COMMANDS[name], preexec_fn=partial(os.close, 1))
    else:
        done = command(*COMMANDS[name], stdout=(file := lost()))
        os.close(file)
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_file_takes_the_number_of_a_stream_that_is_closed(tmp_path: Path):
    code = f"""
file = open({str(tmp_path / "file")!r}, "w")
print("lost"), print("lost", file=sys.stderr)
os.write(1, b"by a library"), os.system("echo by a child; echo by a child >&2")
assert not sys.stdout.isatty()
file.write("kept")"""
    done = printing(code, preexec_fn=partial(os.closerange, 0, 3))
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


def test_a_stream_stays_what_it_was():
    code = """
print(sys.stdout.fileno(), sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.name, sys.stderr.line_buffering)
sys.stdout.flush(), sys.stdout.buffer.write(b"bytes"), sys.exit(3)"""
    done = printing(code)
    assert (done.returncode, done.stdout) == (3, b"1 False utf-8 <stdout> True\nbytes")


def losing(kind: str) -> None:
    """In a run: its streams are a pipe or a terminal, which is closed on the other side during the fifth step."""
    from stu.training import SequenceModule

    reading, writing = os.pipe() if kind == "pipe" else os.openpty()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii")  # type: ignore[union-attr]
        os.dup2(writing, stream.fileno())
    os.close(writing)
    plain, steps = SequenceModule.training_step, 0

    def step(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            os.close(reading)
        return plain(*arguments)

    SequenceModule.training_step = step  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_goes_on_to_its_end_when_nobody_reads_what_it_prints(tmp_path: Path):
    results = []
    for kind, at in (("file", None), ("pipe", partial(losing, "pipe")), ("terminal", partial(losing, "terminal"))):
        assert runs.train(tmp_path, *runs.small("task=lds", "model=stu", f"name={kind}"), at=at).code == 0
        results.append(runs.results(runs.run_of(tmp_path, "lds", "stu", kind)))
    runs.assert_identical(results[1], results[0])
    runs.assert_identical(results[2], results[0])


def test_a_stream_ends_where_nobody_reads_it():
    reading, writing = os.pipe()
    os.close(reading)
    code = "import itertools; print(output.stream(itertools.repeat('a')), file=sys.stderr)"
    done = printing(code, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"False\n")
    done = printing("print(output.stream(['a', '', '\u00e9']), file=sys.stderr)")
    assert (done.stdout, done.stderr) == ("a\u00e9".encode(), b"True\n")
