"""Workspaces of Weights & Biases with the views of the report: python -m experiments.compare.wandb. See --help.

What they name is what `stu.training.WandbLog` logs: `task` and `model` in the config, all options below `settings`, the
metrics of metrics.csv, and summary.json as the summary. wandb and PyTorch are imported where they are used.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.compare.groups import hashable
from experiments.compare.runs import Mode, find, read
from experiments.compare.sweeps import is_finite, is_logarithmic
from experiments.shared.files import command, refuse
from stu.cli.usage import options_of
from stu.errors import OptionError, require
from stu.training.names import is_free
from stu.training.records import flatten

EXAMPLES = """\
examples:
  python -m experiments.compare.wandb --project stu                 of the tasks that the project has runs of
  python -m experiments.compare.wandb runs/lds runs/mqar            of these runs' tasks, and of what they vary
  python -m experiments.compare.wandb --tasks lds --json lds.json   a file, without a login
"""
STEP = "trainer/global_step"  # as WandbLog has it; importing that would import PyTorch
MOST = 8  # axes of varied options that parallel coordinates can be read with
SHOWN = 100  # runs, or groups of them, in one chart
UNTOLD = ("seed", "log_every")  # options that differ between runs and are no part of what is compared


class Described(NamedTuple):
    """What a run says of itself."""

    task: str
    model: str
    metric: str  # the monitored one, as in val/<metric>
    mode: Mode
    settings: Mapping[str, Any]  # all options, nested


@dataclass(frozen=True)
class Subject:
    """A task, how its results are measured, and which options its runs vary."""

    task: str
    metric: str
    mode: Mode
    varied: Mapping[str, bool]  # keys of options, and whether their axes are logarithmic

    @property
    def test(self) -> str:
        """The name of the result."""
        return f"test/{self.metric}"


def subjects(runs: Iterable[Described]) -> list[Subject]:
    """Of each task one, sorted; an option counts as varied where runs of one model differ in it."""
    by_task: dict[str, list[Described]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    return [Subject(task, of[-1].metric, of[-1].mode, varied(of)) for task, of in sorted(by_task.items())]


def varied(runs: Sequence[Described]) -> dict[str, bool]:
    """The options in which runs of one model differ, those of most values first."""
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_model[run.model].append(flatten(run.settings))
    values: dict[str, set[Any]] = defaultdict(set)
    for same in by_model.values():
        for key in {key for one in same for key in one if _is_compared(key)}:
            found = {hashable(one.get(key)) for one in same}
            if len(found) > 1:
                values[key] |= found
    most = sorted(values, key=lambda key: (-len(values[key]), key))[:MOST]
    return {key: all(map(is_finite, values[key])) and is_logarithmic(values[key]) for key in most}


def workspace(subjects: Sequence[Subject], *, entity: str, project: str, name: str, sweep: str | None = None) -> Any:
    """A section per task; runs of several tasks are grouped by task and model, those of one by model.

    sweep: only its runs. Returns a `wandb_workspaces.workspaces.Workspace`, which is not saved yet.
    """
    from wandb_workspaces import expr, workspaces

    alone = len(subjects) == 1
    filters = [expr.Config("task").isin([subject.task for subject in subjects])]
    if sweep:  # not by the config's `sweep`, which the library takes for W&B's own sweeps
        filters.append(expr.Metric("Group") == sweep)
    results = [f"summary:{name}" for subject in subjects for name in (subject.test, f"best/val/{subject.metric}")]
    measured = ["parameters", "seconds", "tokens_per_second", "peak_memory"]
    columns = [*dict.fromkeys(results), *(f"summary:{name}" for name in measured), "config:seed.value"]
    first = expr.Ordering(expr.Summary(subjects[0].test), ascending=subjects[0].mode == "min")
    groups: list[Any] = [expr.Config(key) for key in (["model"] if alone else ["task", "model"])]
    runs = workspaces.RunsetSettings(filters=filters, groupby=groups, pinned_columns=["run:displayName", *columns])
    if alone:
        runs.order = [first]
    sections = [
        workspaces.Section(name=subject.task, panels=list(panels(subject, alone=alone)), is_open=True)
        for subject in subjects
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=SHOWN),
        runset_settings=runs,
        auto_generate_panels=False,
    )


def panels(subject: Subject, *, alone: bool) -> Iterator[Any]:
    """The views of one task. alone: of a workspace that has this task alone, so that a panel may group by model."""
    from wandb_workspaces.reports.v2 import interface as wr

    metric, test = subject.metric, subject.test
    over_seeds: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "max_runs_to_show": SHOWN}
    if alone:  # else the panels follow the groups of the workspace
        over_seeds["groupby"] = wr.Config("model")
    result = wr.SummaryMetric(test)
    yield wr.BarPlot(title=f"{test}, mean and std", metrics=[test], **over_seeds)
    for part in ("val", "train"):
        curve: list[Any] = [f"{part}/{metric}"]
        yield wr.LinePlot(title=f"{part}/{metric}, mean and std", x=STEP, y=curve, **over_seeds)
    yield wr.ScatterPlot(title=f"{test} by parameters", x=wr.SummaryMetric("parameters"), y=result, log_x=True)
    yield wr.ScatterPlot(title=f"{test} by seconds of training", x=wr.SummaryMetric("seconds"), y=result, log_x=True)
    options: list[tuple[Any, str, bool]] = [
        (wr.Config(f"settings.{key}"), key, log) for key, log in subject.varied.items()
    ]
    axes = [(wr.Config("model"), "model", False), *options, (result, test, False)]
    yield wr.ParallelCoordinatesPlot(
        title=f"{test} by what was varied",
        columns=[wr.ParallelCoordinatesPlotColumn(metric=m, display_name=name, log=log) for m, name, log in axes],
    )
    yield wr.ParameterImportancePlot(with_respect_to=test)
    yield wr.BarPlot(title="tokens per second", metrics=["tokens_per_second"], **over_seeds)
    yield wr.BarPlot(title="peak memory, bytes", metrics=["peak_memory"], **over_seeds)


def of_folders(folders: Sequence[Path]) -> Iterator[Described]:
    """The runs below these folders that say what they monitor."""
    for path in find(folders):
        row = read(path)
        if row.metric:
            yield Described(row.task, row.model, row.metric, row.mode, row.config)


def of_options(tasks: Sequence[str]) -> Iterator[Described]:
    """As the configuration has these tasks. Raises `OptionError` for one that it does not have."""
    from stu.cli.composition import build, composed

    for name in tasks:
        known = options_of("task")
        require(name in known, "--tasks", name, f"no such task; choose of {', '.join(known)}")
        try:
            task = build(composed([f"task={name}"]).task)
        except Exception as error:
            cause = error.__cause__
            if not isinstance(cause, OptionError):
                raise
            raise OptionError(f"--tasks {name}: {cause.name}", cause.value, cause.allowed) from error
        yield Described(name, "", task.monitor, task.mode, {})


def of_project(entity: str, project: str) -> Iterator[Described]:
    """The runs that a project of W&B has."""
    import wandb

    for run in wandb.Api().runs(f"{entity}/{project}", lazy=False):
        task, model, metric, mode = (run.config.get(key) for key in ("task", "model", "monitor", "mode"))
        if isinstance(task, str) and isinstance(metric, str):
            settings = run.config.get("settings")
            named = Described(task, str(model), metric, "max" if mode == "max" else "min", {})
            yield named._replace(settings=settings if isinstance(settings, dict) else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the workspaces, or write them to a file; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        import wandb_workspaces.workspaces  # noqa: F401

        return _main(options)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("wandb", "wandb_workspaces"):
            raise
        return refuse(f'{package} is not installed: pip install -e ".[workspace]"')
    except OptionError as error:
        return refuse(error)


def _main(options: argparse.Namespace) -> int:
    import wandb

    for folder in options.folders:
        require(folder.is_dir(), "folder", folder, "is not a folder" if folder.exists() else "no such folder")
    offline = options.json and (options.folders or options.tasks)
    try:
        entity = options.entity or "" if offline else _log_in(options.entity)
        made = [
            workspace(part, entity=entity, project=options.project, name=name, sweep=options.sweep)
            for name, part in _views(_found(options, entity), options.name or options.project)
        ]
        urls = [] if options.json else [one.save().url for one in made]
    except OptionError:
        raise
    except (wandb.errors.Error, ValueError) as error:
        return refuse(f"W&B: {' '.join(str(error).split())}")
    if options.json:
        return _write(options.json, made)
    print(*urls, sep="\n")
    return 0


def _write(file: Path, made: Sequence[Any]) -> int:
    """What `save` would send, as a list; returns the exit code."""
    specs = [json.loads(one._to_model().model_dump_json(by_alias=True, exclude_none=True)) for one in made]
    try:
        file.write_text(json.dumps(specs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        return refuse(f"{file}: {error.strerror}")
    return 0


def _views(found: Sequence[Subject], name: str) -> list[tuple[str, Sequence[Subject]]]:
    """All tasks; where there are several, each by itself too: W&B filters workspaces, and no sections of them."""
    each: list[tuple[str, Sequence[Subject]]] = [(f"{name}: {one.task}", [one]) for one in found]
    return [(name, found), *each] if len(found) > 1 else [(name, found)]


def _found(options: argparse.Namespace, entity: str) -> list[Subject]:
    """The subjects that the command asks for. Raises `OptionError` where there are none."""
    if options.folders:
        where, runs = ", ".join(map(str, options.folders)), of_folders(options.folders)
    elif options.tasks:
        where, runs = "", of_options(options.tasks)
    else:
        where, runs = f"{entity}/{options.project}", of_project(entity, options.project)
    found = subjects(runs)
    require(bool(found), "project" if not options.folders else "folder", where, "has no runs that say their task")
    names = [one.task for one in found]
    for task in options.tasks:
        require(task in names, "--tasks", task, f"{where} has no runs of it; choose of {', '.join(names)}")
    return [one for one in found if not options.tasks or one.task in options.tasks]


def _log_in(entity: str | None) -> str:
    """The entity, None: that of the account. Raises `OptionError` without credentials; nobody is asked for them."""
    import wandb

    silent = wandb.Settings(silent=True)
    wandb.setup(silent)
    wandb.termsetup(silent, None)
    allowed = "no login at W&B: `wandb login`, or --json FILE with folders of runs or --tasks, which needs none"
    require(wandb.login(verify=False, prompt=False), "--entity", entity, allowed)
    entity = entity or wandb.Api().default_entity
    require(bool(entity), "--entity", entity, "the account has no default: name a user or a team")
    return str(entity)


def _is_compared(key: str) -> bool:
    return not (is_free(key) or key in UNTOLD or key.endswith("_target_"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare.wandb",
        description="Make workspaces in Weights & Biases: of all tasks, a section each, and of each task by itself.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_folders = "folders of runs, whose tasks and varied options are shown (default: those in the project)"
    parser.add_argument("folders", nargs="*", type=Path, help=help_folders)
    parser.add_argument("--entity", metavar="NAME", help="user or team (default: that of the account)")
    parser.add_argument("--project", metavar="NAME", default="stu", help="project (default: stu)")
    parser.add_argument("--name", metavar="NAME", help="of the workspace (default: that of the project)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", default=[], help="only these")
    parser.add_argument("--sweep", metavar="NAME", help="only runs of this sweep, which is their group")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what would be saved, and save nothing")
    return parser


if __name__ == "__main__":
    command(main)
