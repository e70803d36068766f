"""Where and how commands write results and errors; imports nothing slow, so that they can show their help at once."""

import os
import sys
from pathlib import Path


def runs_folder() -> Path:
    """Where runs are written, as in conf/paths: $STU_RUNS, or runs/."""
    return Path(os.environ.get("STU_RUNS", "runs"))


def refuse(message: object) -> int:
    """Print an error in one line; return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2
