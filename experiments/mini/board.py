"""The board `sweep=mini`: its results, its table, and whether it is what it promises to be."""

import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from experiments.compare.groups import Group, grouped
from experiments.compare.runs import Mode, Row
from stu.training.names import is_telling, key_of

PRESETS = "mini/"
MODELS, TASKS, SEEDS = 9, 6, 2  # at least
CHOSEN = ("experiment", "model", "seed")  # what the command of a run sets; with more it is no run of the board
ERRORS = 3  # standard errors by which the best model is above the best trivial baseline

Result = Mapping[str, Any]  # of one run, as results.json has it


class Entry(NamedTuple):
    """One model on one task: all its seeds. error: the standard error of the mean, of seeds and of the test set."""

    task: str
    model: str
    metric: str
    mode: Mode
    tests: tuple[float, ...]
    error: float
    trivial: float

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.tests)

    @property
    def ahead(self) -> float:
        """How many standard errors the mean is better than the best trivial baseline."""
        better = self.mean - self.trivial if self.mode == "max" else self.trivial - self.mean
        return better / self.error if self.error else math.copysign(math.inf, better)


def is_of_preset(row: Row) -> bool:
    """Whether a run is of one of the board's presets."""
    return (row.experiment or "").startswith(PRESETS)


def is_of_board(row: Row) -> bool:
    """Whether it has the settings of that preset, and none of its own."""
    keys = [key_of(word) for word in shlex.split(row.command or "") if "=" in word]
    return is_of_preset(row) and all(key in CHOSEN or not is_telling(key) for key in keys)


def results_of(rows: Iterable[Row]) -> list[Result]:
    """What results.json has of the runs of the board, sorted."""
    board = filter(is_of_board, rows)
    return [
        {
            "task": (row.experiment or "").removeprefix(PRESETS),
            "model": row.model,
            "seed": row.seed,
            "status": row.status,
            "metric": row.metric,
            "mode": row.mode,
            "test": row.test,
            "best_val": row.best_val,
            "trivial": row.trivial,
            "baselines": dict(row.baselines),
            "test_sequences": row.config["task"]["data"]["test"],
            "lr": row.config["optimizer"]["lr"],
            "parameters": row.parameters,
            "steps": row.total_steps,
            "seconds": row.seconds,
            "tokens_per_second": row.tokens_per_second,
            "peak_memory": row.peak_memory,
            "device": row.device,
        }
        for row in sorted(board, key=lambda row: (row.experiment or "", row.model, row.seed or 0))
    ]


def added(results: Sequence[Result], earlier: Iterable[Result]) -> list[Result]:
    """The results, and those of an earlier board that have another task or model."""
    renewed = {_place(result) for result in results}
    kept = [result for result in earlier if _place(result) not in renewed]
    return sorted([*kept, *results], key=lambda result: (*_place(result), result["seed"]))


def _place(result: Result) -> tuple[str, str]:
    return result["task"], result["model"]


def groups(results: Iterable[Result]) -> list[Group]:
    """What the figure is drawn of: a group for each task and model."""
    names = ("task", "model", "seed", "status", "metric", "mode", "test", "best_val", "parameters", "seconds")
    return grouped(
        Row(
            **{name: result[name] for name in (*names, "tokens_per_second", "peak_memory")},
            name="",
            path="",
            sequences_per_second=None,
            step=None,
            total_steps=result["steps"],
            unreadable=(),
            baselines={"trivial": result["trivial"]},
        )
        for result in results
    )


def entries(results: Iterable[Result]) -> list[Entry]:
    """The finished runs, by task and model."""
    finished = [result for result in results if result["status"] == "finished"]
    return [_entry(list(some)) for _, some in groupby(finished, key=lambda result: (result["task"], result["model"]))]


def _entry(results: Sequence[Result]) -> Entry:
    first, tests = results[0], tuple(result["test"] for result in results)
    mean, spread = statistics.fmean(tests), statistics.stdev(tests) if len(tests) > 1 else math.inf
    drawn = mean * (1 - mean) / first["test_sequences"] if first["metric"] == "accuracy" else 0.0  # the same, all seeds
    error = math.sqrt(spread**2 / len(tests) + drawn)
    return Entry(first["task"], first["model"], first["metric"], first["mode"], tests, error, first["trivial"])


def problems(results: Sequence[Result]) -> list[str]:
    """What the board lacks, a line each."""
    lacking = [
        f"{result['task']}, {result['model']}, seed {result['seed']}: {result['status']}"
        for result in results
        if result["status"] != "finished"
    ]
    by_task = {task: list(some) for task, some in groupby(entries(results), key=lambda entry: entry.task)}
    if len(by_task) < TASKS:
        lacking.append(f"{len(by_task)} tasks, must be at least {TASKS}")
    for task, some in by_task.items():
        whole = [entry for entry in some if len(entry.tests) >= SEEDS]
        if len(whole) < MODELS:
            lacking.append(f"{task}: {len(whole)} models with {SEEDS} seeds, must be at least {MODELS}")
        if max(entry.ahead for entry in some) <= ERRORS:
            lacking.append(f"{task}: no model is {ERRORS} standard errors better than the best trivial baseline")
    return lacking


def table(results: Sequence[Result]) -> str:
    """Models and tasks in Markdown, the models by their mean rank; the best of each task is bold."""
    board = entries(results)
    tasks = list(dict.fromkeys(entry.task for entry in board))
    found = {(entry.task, entry.model): entry for entry in board}
    ranks: dict[str, list[int]] = {entry.model: [] for entry in board}
    for task in tasks:
        for rank, entry in enumerate(_best_first(entry for entry in board if entry.task == task), 1):
            ranks[entry.model].append(rank)
    models = sorted(ranks, key=lambda model: (statistics.fmean(ranks[model]), model))
    best = {task: _best_first(entry for entry in board if entry.task == task)[0].model for task in tasks}
    lines = [_line("model", *(f"`{task}`" for task in tasks), "mean rank"), _line(*["---"] * (len(tasks) + 2))]
    for model in models:
        cells = [_cell(found.get((task, model)), bold=best[task] == model) for task in tasks]
        lines.append(_line(f"`{model}`", *cells, f"{statistics.fmean(ranks[model]):.1f}"))
    trivial = [next(entry for entry in board if entry.task == task) for task in tasks]
    lines.append(_line("*best trivial baseline*", *(_number(entry.trivial, entry.metric) for entry in trivial), ""))
    return "\n".join(lines)


def _best_first(some: Iterable[Entry]) -> list[Entry]:
    return sorted(some, key=lambda entry: -entry.mean if entry.mode == "max" else entry.mean)


def _cell(entry: Entry | None, *, bold: bool) -> str:
    if entry is None:
        return "–"
    spread = statistics.stdev(entry.tests) if len(entry.tests) > 1 else None
    text = _number(entry.mean, entry.metric) + ("" if spread is None else f" ± {_number(spread, entry.metric)}")
    return f"**{text}**" if bold else text


def _number(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.2g}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
