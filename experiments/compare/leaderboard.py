"""The leaderboard: for each task the models, best first, beside trivial baselines and published numbers."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from experiments.compare.groups import Group, chosen, mean_of, std_of
from experiments.compare.published import SECOND_HAND, Published, published, published_of, reduced
from experiments.compare.rounding import UNKNOWN, beside, duration, mean_and_std, number
from experiments.compare.runs import Row, is_share, printable, rank
from experiments.compare.select import ABSENT, TEST, value
from stu.training.records import AT

LISTED = 20  # runs that have not finished
TEXTS = ("model", "settings")  # columns of texts, which are on the left; all others hold numbers


@dataclass(frozen=True)
class Sheet:
    """A table and what is to be said below it, all of it plain text."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    texts: Sequence[str] = TEXTS  # columns of texts


def leaderboard(groups: Sequence[Group], *, whole: bool = False, keys: Sequence[str] = ()) -> list[Sheet]:
    """A sheet per task and variant: each model by the settings that validation chooses, or, whole, by all of them."""
    shown = groups if whole else chosen(groups)
    return [
        _sheet([group for group in groups if group.title == title], list(some), whole, keys)
        for title, some in groupby(shown, key=lambda group: group.title)
    ]


def _sheet(groups: Sequence[Group], shown: Sequence[Group], whole: bool, keys: Sequence[str]) -> Sheet:
    """The sheet of the groups shown, of all those of its task and variant."""
    tried = Counter(group.model for group in groups)
    several_tried, any_published = max(tried.values()) > 1, any(map(_of, shown))
    named = next((group for group in shown if group.metric), shown[0])
    percent = is_share(named.metric)
    result = f"test {named.metric or 'metric'}{', %' * percent} {'↑' if named.mode == 'max' else '↓'}"
    columns: list[tuple[str, bool, Callable[[Group], str]]] = [  # name, whether it is shown, content
        ("model", True, lambda group: group.model),
        ("settings", several_tried, lambda group: group.label),
        ("tried", several_tried and not whole, lambda group: str(tried[group.model])),
        *((key, True, partial(several, key=key)) for key in keys),
        (result, True, lambda group: mean_and_std(*scaled(percent, group.mean, group.std))),
        ("n", True, lambda group: f"{group.n}{f' of {len(group.rows)}' * bool(group.missing)}"),
        ("best", True, lambda group: beside(*scaled(percent, group.best, group.mean, group.std))),
        ("val", whole, lambda group: mean_and_std(*scaled(percent, group.best_val))),
        ("parameters", True, lambda group: number(group.median(lambda row: row.parameters), ",.0f")),
        ("tokens/s", True, lambda group: number(group.median(lambda row: row.tokens_per_second), ",.0f")),
        ("GiB", True, lambda group: number(group.median(gibibytes), ".2f")),
        ("time", True, lambda group: duration(group.median(lambda row: row.seconds))),
        ("published", any_published, _published),
    ]
    columns = [column for column in columns if column[1]]
    names = [name for name, _, _ in columns]
    lines = [[content(group) for _, _, content in columns] for group in shown]
    for name, mean in _baselines(groups, named.mode):
        cells = dict.fromkeys(names, "") | {"model": name, result: mean_and_std(*scaled(percent, mean))}
        lines.append([cells[name] for name in names])
    notes = _notes(shown, choice=several_tried and not whole)
    return Sheet(shown[0].title, names, lines, list(notes), texts=("model", "settings", *keys))


def gibibytes(row: Row) -> float | None:
    """The memory that training took at most."""
    return row.peak_memory and row.peak_memory / 2**30


def scaled(percent: bool, *values: float | None) -> list[float | None]:
    """The values in percent, if they are shares."""
    return [value if value is None or not percent else 100.0 * value for value in values]


def several(group: Group, key: str) -> str:
    """What the runs of a group have under a key: a value, or several; of a metric, the mean and standard deviation."""
    found = [content for row in group.rows if (content := value(row, key)) is not ABSENT]
    if found and key.startswith(TEST):
        return mean_and_std(*scaled(is_share(key.partition(AT)[0]), mean_of(found), std_of(found)))
    return ", ".join(dict.fromkeys(written(content) for content in found)) or UNKNOWN


def written(content: Any) -> str:
    """The value of a key in a cell."""
    if content is None or content is ABSENT or content == ():
        return UNKNOWN
    if isinstance(content, float):
        return f"{content:g}" if float(f"{content:g}") == content else f"{content:.4g}"
    if isinstance(content, list | tuple):
        return ", ".join(map(written, content))
    return printable(str(content).lower() if isinstance(content, bool) else str(content))


def _baselines(groups: Iterable[Group], mode: Any) -> list[tuple[str, float]]:
    """The baselines of a task with their means over all runs, the trivial ones first."""
    found: dict[tuple[bool, str], list[float]] = defaultdict(list)
    for row in (row for group in groups for row in group.rows):
        for name, content in row.baselines.items():
            found[row.trivial_names is not None and name not in row.trivial_names, name].append(content)
    means = [(knows, rank(mean := mean_of(some), mode), name, mean) for (knows, name), some in found.items()]
    return [(f"{'reference' if knows else 'trivial'}: {name}", mean) for knows, _, name, mean in sorted(means)]


def _of(group: Group) -> Published | None:
    return published_of(group.task, group.model)


def _published(group: Group) -> str:
    result = _of(group)
    return UNKNOWN if result is None else f"({result.text})" if reduced(group) else result.text


def _notes(shown: Sequence[Group], *, choice: bool) -> Iterator[str]:
    """What must be said of the numbers of a sheet."""
    if choice:
        yield "tried: settings, of which the one shown is best on the validation set; --all shows them all"
    better = [group for group in shown if group.mean is not None and group.trivial is not None]
    if none := [name_of(group) for group in better if rank(group.mean, group.mode) >= rank(group.trivial, group.mode)]:
        yield f"no better than the best trivial baseline: {'; '.join(none)}"
    yield from doubts(shown)
    if known := {group.model: one for group in shown if (one := _of(group))}:
        yield from _sources(shown, known)


def doubts(groups: Sequence[Group]) -> Iterator[str]:
    """What the means of these groups leave out, or have twice."""
    for group in groups:
        if group.n and group.missing:
            others = ", ".join(f"{count} {status}" for status, count in sorted(group.missing.items()))
            yield f"{name_of(group)}: without the runs that have no result: {others}"
        if group.repeated:
            seeds = ", ".join(map(str, group.repeated))
            yield f"{name_of(group)}: several runs of seed {seeds}, which are no independent results"


def _sources(shown: Sequence[Group], known: Mapping[str, Published]) -> Iterator[str]:
    """What is said of published numbers: which are of more than was run here, where they are from."""
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for group in shown:
        if group.model in known and (why := reduced(group)):
            reasons[why][group.model] = None
    for why, models in reasons.items():
        yield f"( ) published at full size; here {', '.join(models)} ran reduced: {why}"
    others: list[Published] = []
    if any(group.model in known and not reduced(group) for group in shown):
        others = [one for one in published() if one.task == shown[0].task and one.model not in known]
    if others:
        yield "also published: " + ", ".join(f"{one.name} {one.text}" for one in others)
    by_source: dict[str, list[str]] = defaultdict(list)
    for one in (*known.values(), *others):
        mark = f"{SECOND_HAND} published, second hand" if one.second_hand else "published"
        by_source[f"{mark}: {one.source}"].append(one.name + f" ({one.remark})" * bool(one.remark))
    for source, names in by_source.items():
        yield f"{source}: {', '.join(names)}"


def name_of(group: Group) -> str:
    """A group in words, as its line in a table."""
    return f"{group.model} {group.label}".strip()


def unfinished(rows: Sequence[Row]) -> list[str]:
    """The runs that have not finished, and the damaged: where, why, and how to go on; the running first."""
    waiting = [row for row in rows if row.status != "finished" or row.unreadable]
    waiting.sort(key=lambda row: (row.status != "running", row.status, row.path))
    lines = [f"not finished, or damaged: {len(waiting)} of {len(rows)} runs"] if waiting else []
    for row in waiting[:LISTED]:
        reason = f": {row.reason}" if row.reason else ""
        lines.append(f"  {row.task}/{row.model}/{row.name}: {row.state}{reason}")
        if (how := how_to_go_on(row)) is not None:
            lines.append(f"    {how}")
    if len(waiting) > LISTED:
        lines.append(f"  … and {len(waiting) - LISTED} more; --runs shows all")
    return lines


def diverged(row: Row) -> bool:
    """Whether a run ended because its numbers were not finite: the same command would again."""
    return "not finite" in row.reason


def how_to_go_on(row: Row) -> str | None:
    """How to go on with a run; None where it is running or has finished, or where its command is unknown."""
    if row.status in ("running", "finished") or not row.command:
        return None
    if diverged(row):
        return "the same command would diverge again: another learning rate, or overwrite=true with other settings"
    return f"python {row.command}"


def group_facts(group: Group, *, is_chosen: bool) -> dict[str, Any]:
    """A group as an object of JSON."""
    result = _of(group)
    names = ("metric", "mode", "n", "mean", "std", "best", "best_val", "trivial", "tests")
    medians = ("parameters", "tokens_per_second", "peak_memory", "seconds")
    return {
        "task": group.task,
        "variant": dict(group.variant),
        "model": group.model,
        "settings": dict(group.settings),
        "label": group.label,
        "chosen": is_chosen,
        **{name: getattr(group, name) for name in names},
        "seeds": [row.seed for row in group.finished],
        "missing": dict(group.missing),
        **{name: group.median(lambda row, name=name: getattr(row, name)) for name in medians},  # type: ignore[misc]
        "published": result and {**vars(result), "percent": result.percent, "reduced": reduced(group)},
        "runs": [row.path for row in group.rows],
    }
