"""Where and how commands write results and errors; imports nothing slow, so that they can show their help at once."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from stu.cli import output


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line and exit with its code; what it prints may get lost, but does not end it."""
    output.guard()
    raise SystemExit(main())


def runs_folder() -> Path:
    """Where runs are written, as in conf/paths: $STU_RUNS, or runs/."""
    return Path(os.environ.get("STU_RUNS", "runs"))


def refuse(message: object) -> int:
    """Print an error in one line; return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2
