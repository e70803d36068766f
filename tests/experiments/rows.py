"""Rows of a comparison, without run directories."""

from pathlib import Path
from typing import Any

from experiments.compare.runs import Row


def row(where: str = "lds/stu/a", *, home: Path | str = "/runs", test: float | None = 0.5, **other: Any) -> Row:
    """A finished run, or with test=None a stopped one; whatever else is given replaces its fields."""
    task, model, name = where.split("/")
    fields: dict[str, Any] = {
        "task": task, "model": model, "name": name, "seed": 0, "metric": "mse", "mode": "min", "test": test,
        "best_val": test, "parameters": 1000, "sequences_per_second": None, "tokens_per_second": None,
        "peak_memory": None, "seconds": 60.0, "status": "stopped" if test is None else "finished", "step": 100,
        "total_steps": 100, "unreadable": (), "path": str(Path(home) / where),
    }  # fmt: skip
    return Row(**(fields | other))
