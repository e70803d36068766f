"""The board `sweep=mini`: its results, its table, and whether it is what it promises to be."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from experiments.compare.groups import Group, grouped, tells
from experiments.compare.runs import Mode, Row
from experiments.compare.select import ABSENT, value
from stu.training.names import key_of

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
    given = [word for word in row.words if "=" in word or word.startswith("~")]
    return is_of_preset(row) and all(key in CHOSEN or not tells(key) for key in map(key_of, given))


def results_of(rows: Iterable[Row]) -> list[Result]:
    """What results.json has of the runs of the board, sorted; of several of one seed, which are equal, it has one."""
    board = sorted(filter(is_of_board, rows), key=lambda row: (row.status == "finished", row.path))
    by_seed = {_order(result): result for result in map(_result, board)}  # of equal ones the last is kept
    return [by_seed[order] for order in sorted(by_seed)]


def _result(row: Row) -> Result:
    sequences = option(row, "task.data.test")
    numbers = (row.test, row.trivial, sequences)
    whole = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    return {
        "task": (row.experiment or "").removeprefix(PRESETS),
        "model": row.model,
        "seed": row.seed,
        "status": row.status if whole or row.status != "finished" else "damaged",
        "metric": row.metric,
        "mode": row.mode,
        "test": row.test if whole else None,
        "best_val": row.best_val,
        "trivial": row.trivial,
        "baselines": dict(row.baselines),
        "test_sequences": sequences,
        "lr": option(row, "optimizer.lr"),
        "parameters": row.parameters,
        "steps": row.total_steps,
        "seconds": row.seconds,
        "tokens_per_second": row.tokens_per_second,
        "peak_memory": row.peak_memory,
        "device": row.device,
    }


def option(row: Row, key: str) -> Any:
    """An option of a run; None where it has none."""
    content = value(row, key)
    return None if content is ABSENT else content


def added(results: Sequence[Result], earlier: Iterable[Result]) -> list[Result]:
    """The results, and those of an earlier board that have another task or model."""
    renewed = {_place(result) for result in results}
    kept = [result for result in earlier if _place(result) not in renewed]
    return sorted([*kept, *results], key=_order)


def _place(result: Result) -> tuple[str, str]:
    return result["task"], result["model"]


def _order(result: Result) -> tuple[str, str, int]:
    return *_place(result), result["seed"] or 0


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


def problems(results: Sequence[Result], earlier: Sequence[Result] = ()) -> list[str]:
    """What the board lacks, a line each; of what an earlier one had, too."""
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
    models = {entry.model for entry in entries(results)}
    absent = {task: sorted(models - {entry.model for entry in some}) for task, some in by_task.items()}
    lost = sorted({_place(one) for one in earlier} - {_place(one) for one in results})
    lacking += [f"{task}, {model}: in the board before, which --add keeps" for task, model in lost]
    return lacking + [f"{task}: no run of {', '.join(names)}" for task, names in absent.items() if names]


def table(results: Sequence[Result]) -> str:
    """Models and tasks in Markdown, the models that have all tasks by their mean rank; the best of a task are bold."""
    board = entries(results)
    tasks = list(dict.fromkeys(entry.task for entry in board))
    found = {(entry.task, entry.model): entry for entry in board}
    ranks: dict[str, list[int]] = {entry.model: [] for entry in board}
    for entry in board:
        ranks[entry.model].append(_rank(entry, board))
    means = {model: statistics.fmean(some) if len(some) == len(tasks) else math.inf for model, some in ranks.items()}
    models = sorted(means, key=lambda model: (means[model], model))
    lines = [_line("model", *(f"`{task}`" for task in tasks), "mean rank"), _line(*["---"] * (len(tasks) + 2))]
    for model in models:
        own = [found.get((task, model)) for task in tasks]
        cells = [_cell(entry, bold=entry is not None and _rank(entry, board) == 1) for entry in own]
        lines.append(_line(f"`{model}`", *cells, f"{means[model]:.1f}" if math.isfinite(means[model]) else "–"))
    trivial = [next(entry for entry in board if entry.task == task) for task in tasks]
    lines.append(_line("*best trivial baseline*", *(_number(entry.trivial, entry.metric) for entry in trivial), ""))
    return "\n".join(lines)


def _rank(entry: Entry, board: Iterable[Entry]) -> int:
    """Among the models of its task; equal ones share the better place."""
    same = [other for other in board if other.task == entry.task]
    better = (other.mean > entry.mean if entry.mode == "max" else other.mean < entry.mean for other in same)
    return 1 + sum(better)


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
