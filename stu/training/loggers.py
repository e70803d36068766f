"""Where metrics are logged: `metrics.csv` always, and Weights & Biases by default."""

import csv
import logging
import netrc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from stu.errors import OptionError, require
from stu.files import DAMAGED, agrees_with_checksum, is_written, note_checksum, sync, write_atomically
from stu.training.run import Run

log = logging.getLogger(__name__)
WandbMode = Literal["auto", "online", "offline", "disabled"]
SECONDS_TO_START = 30.0  # after which W&B counts as unreachable
COLUMNS = ("step", "epoch", "metric", "value")
Row = tuple[int, float, str, float]  # a value at an optimiser step: step, epoch, metric, value


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
            copy = self.path.with_name(f"{self.path.name}{DAMAGED}")
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


def parse_row(line: str) -> Row | None:
    """A line of a `metrics.csv`, as (step, epoch, metric, value); None where it is damaged."""
    try:
        [[step, epoch, metric, value]] = csv.reader([line])
        return (int(step), float(epoch or "nan"), metric, float(value)) if "\ufffd" not in line else None
    except (ValueError, csv.Error):
        return None


def _belongs(row: Row, step: int) -> bool:
    """Whether a row is of a step up to `step`; the final results always come after it."""
    return row[0] <= step and not row[2].startswith(("test/", "best/"))


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.csv`: (step, epoch, metric, value). Raises `OptionError` for a damaged one."""
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")[1:]
    rows = [row for line in lines if (row := parse_row(line))]
    require(len(rows) == len(lines), "metrics", path, f"{len(lines) - len(rows):,} rows are damaged")
    return rows


def wandb_logger(
    run: Run,
    names: tuple[str, str],
    *,
    tags: Sequence[str] = (),
    mode: WandbMode = "auto",
    project: str = "stu",
    entity: str | None = None,
) -> Logger | None:
    """A Weights & Biases logger, or None where it is disabled or cannot start.

    names: of task and model, the group and the tags of the W&B run; the same run directory continues the same W&B run.
    mode "auto": online where an API key is configured, else offline in the run directory; never a prompt.
    """
    require(mode in get_args(WandbMode), "mode", mode, f"must be one of {', '.join(get_args(WandbMode))}")
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled" or getattr(rank_zero_only, "rank", 0) != 0:
        return None
    import wandb  # takes a second to import

    arguments: dict[str, Any] = {
        "dir": run.path,
        "id": run.id,
        "name": f"{names[1]}/{run.path.name}",
        "group": names[0],
        "tags": [*names, *tags],
        "project": project,
        "entity": entity,
        "resume": "allow",
        "settings": wandb.Settings(silent=True, console="off", init_timeout=SECONDS_TO_START),
    }
    online = mode == "online" or (mode == "auto" and os.environ.get("WANDB_MODE") != "offline" and _has_key())
    for where in ("online", "offline") if online else ("offline",):
        try:
            experiment = wandb.init(mode=where, **arguments)
        except Exception as error:  # logging must never end a run
            log.warning("Weights & Biases did not start %s: %s", where, " ".join(str(error).split()))
            wandb.teardown()  # a half-started service would keep the run's id
            continue
        experiment.define_metric("trainer/global_step")
        experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return WandbLogger(experiment=experiment, log_model=False)
    return None


def log_figure(logger: Logger, name: str, file: Path, step: int) -> None:
    """Log a PNG to W&B; other loggers do not take images."""
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [str(file)], step=step)


def close_wandb() -> None:
    """Finish the W&B run of this process, if there is one, so that the next run of a sweep starts its own."""
    if "wandb" in sys.modules and (run := sys.modules["wandb"].run) is not None:
        run.finish()


def _has_key() -> bool:
    """Whether an API key is configured (environment or netrc), without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
