"""Where metrics are always logged: `metrics.csv`."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from stu.errors import OptionError, require
from stu.files import agrees_with_checksum, is_written, kept_name, note_checksum, sync, write_atomically
from stu.training.records import Row, parse_row

COLUMNS = ("step", "epoch", "metric", "value")


class MetricsCSV(Logger):
    """`metrics.csv` of a run: one row per value (step, epoch, metric, value), only ever appended to.

    Values are written so that reading them gives back the same float. Rows are on the disk, and a checksum of them in a
    hidden file, before a checkpoint is written. A resumed run first moves the rows after its checkpoint, which it will
    produce again, to `metrics.superseded.csv`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """Lightning's name for this logger."""
        return "csv"

    @property
    def version(self) -> str:
        """One file, one version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the configuration is a file of the run."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row per metric; `epoch` is taken from the metrics themselves."""
        epoch = metrics.get("epoch", "")
        rows = [(step, epoch, name, repr(float(value))) for name, value in metrics.items() if name != "epoch"]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows(rows if file.tell() else [COLUMNS, *rows])

    @rank_zero_only
    def save(self) -> None:
        """Send all rows to the disk, as before a checkpoint: a resumed run does not write them again."""
        if self.path.exists():
            note_checksum(self.path)

    def rewind(self, step: int) -> list[str]:
        """Move out the rows after optimiser step `step`, and drop one that was cut off while it was written.

        Returns remarks on damage to the rows up to there; the damaged file is then kept beside it.
        """
        if getattr(rank_zero_only, "rank", 0) != 0:
            return []
        if not is_written(self.path):
            none_lost = not step or (not self.path.exists() and agrees_with_checksum(self.path))
            return [] if none_lost else [f"{self.path} was empty or missing: the rows up to step {step} are lost"]
        try:
            content = self.path.read_bytes()
        except OSError as error:
            allowed = f"cannot be read: {error.strerror}; move it away to go on without its rows"
            raise OptionError("name", self.path, allowed) from error
        lines = content.decode(errors="replace").split("\n")[1:-1]
        rows = [(f"{line}\n", row) for line in lines if (row := parse_row(line))]
        gone = [line for line, row in rows if not _belongs(row, step)]
        remarks = []
        if len(rows) < len(lines) or not agrees_with_checksum(self.path):
            copy = kept_name(self.path)
            write_atomically(copy, content)
            lost = f"{len(lines) - len(rows):,} rows cannot be read, others may differ"
            remarks.append(f"{self.path} was damaged, and is now {copy.name}: {lost}")
        if gone:
            superseded = self.path.with_suffix(".superseded.csv")
            with superseded.open("a", encoding="utf-8") as file:
                file.writelines(gone)
            sync(superseded)
        kept = [line for line, row in rows if _belongs(row, step)]
        write_atomically(self.path, "".join([",".join(COLUMNS) + "\n", *kept]))
        note_checksum(self.path)
        return remarks


def _belongs(row: Row, step: int) -> bool:
    """Whether a row is of a step up to `step`; the final results always come after it."""
    return row[0] <= step and not row[2].startswith(("test/", "best/"))


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.csv`: (step, epoch, metric, value). Raises `OptionError` for a damaged one."""
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")[1:]
    rows = [row for line in lines if (row := parse_row(line))]
    require(len(rows) == len(lines), "metrics", path, f"{len(lines) - len(rows):,} rows are damaged")
    return rows
