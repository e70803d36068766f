"""Where numbers go: `metrics.csv`, always, and Weights & Biases, by default."""

import csv
import logging
import netrc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from stu.errors import require

log = logging.getLogger(__name__)
WandbMode = Literal["auto", "online", "offline", "disabled"]
SECONDS_TO_START = 30.0  # after which W&B is taken to be out of reach
COLUMNS = ("step", "epoch", "metric", "value")


class MetricsCSV(Logger):
    """`metrics.csv` of a run: one row per number (step, epoch, metric, value), only ever appended to.

    Values are written so that reading them gives back the same float. A resumed run first takes the rows behind its
    checkpoint, which it will produce again, out into `metrics.superseded.csv`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """The kind of logger."""
        return "csv"

    @property
    def version(self) -> str:
        """One file, one version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row per number; `epoch` is taken from the metrics themselves."""
        epoch = metrics.get("epoch", "")
        rows = [(step, epoch, name, repr(float(value))) for name, value in metrics.items() if name != "epoch"]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows(rows if file.tell() else [COLUMNS, *rows])

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Take out what was logged behind optimiser step `step`, and a row that was cut off in mid-write."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        kept = lines[:1] + [line for line in lines[1:] if _belongs(line, step)]
        gone = [line for line in lines[1:] if not _belongs(line, step)]
        if gone:
            with self.path.with_suffix(".superseded.csv").open("a", encoding="utf-8") as file:
                file.writelines(gone)
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(self.path)


def _belongs(line: str, step: int) -> bool:
    """Whether a row stands at or before a step; the final results are always behind it."""
    at, _, metric, _ = line.split(",")
    return int(at) <= step and not metric.startswith(("test/", "best/"))


def read_metrics(path: Path) -> list[tuple[int, float, str, float]]:
    """The rows of a `metrics.csv`: (step, epoch, metric, value)."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            (int(row["step"]), float(row["epoch"]), row["metric"], float(row["value"])) for row in csv.DictReader(file)
        ]


def wandb_logger(
    *,
    directory: Path,
    run_id: str,
    name: str,
    group: str,
    default_tags: Sequence[str] = (),
    tags: Sequence[str] = (),
    mode: WandbMode = "auto",
    project: str = "stu",
    entity: str | None = None,
) -> Logger | None:
    """A Weights & Biases logger, or None where it is disabled or cannot start.

    mode "auto": online where an API key is configured, else offline under `directory`; never a prompt. The same
    `run_id` goes on with the same W&B run.
    """
    require(
        mode in ("auto", "online", "offline", "disabled"), "mode", mode, "must be auto, online, offline or disabled"
    )
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled" or getattr(rank_zero_only, "rank", 0) != 0:
        return None
    import wandb  # it takes a second to import, and only here is it needed

    arguments: dict[str, Any] = {
        "dir": directory,
        "id": run_id,
        "name": name,
        "group": group,
        "tags": [*default_tags, *tags],
        "project": project,
        "entity": entity,
        "resume": "allow",
        "settings": wandb.Settings(silent=True, console="off", init_timeout=SECONDS_TO_START),
    }
    online = mode == "online" or (mode == "auto" and os.environ.get("WANDB_MODE") != "offline" and _has_key())
    for where in ("online", "offline") if online else ("offline",):
        try:
            experiment = wandb.init(mode=where, **arguments)
        except Exception as error:  # a run must not die of its diary
            log.warning("Weights & Biases did not start %s: %s", where, " ".join(str(error).split()))
            wandb.teardown()  # what began to start would hold the run's id
            continue
        experiment.define_metric("trainer/global_step")
        experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return WandbLogger(experiment=experiment, log_model=False)
    return None


def log_picture(logger: Logger, name: str, file: Path, step: int) -> None:
    """Show a PNG in W&B; other loggers have no place for it."""
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [str(file)], step=step)


def close_wandb() -> None:
    """End the W&B run of this process, if there is one, so that the next of a sweep begins its own."""
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
