"""The leaderboard: filters, groups over seeds, the choice by validation, digits, published numbers and markup."""

import math
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from experiments.compare import markup
from experiments.compare.groups import chosen, described, grouped
from experiments.compare.leaderboard import Sheet, how_to_go_on, leaderboard, unfinished, written
from experiments.compare.published import CHANCE, published, published_of, reduced
from experiments.compare.rounding import beside, duration, mean_and_std
from experiments.compare.runs import Row
from experiments.compare.select import where
from experiments.compare.table import runs_table, sheet_parts, show
from stu.errors import OptionError
from tests.models import composed

ROOT = Path(__file__).resolve().parents[2]
NASTY = ("<script>alert(1)</script>", "=cmd|' /C calc'!A0", "a|b", r"50%_x \& #1 {~^} $x$ [h] *b* `c`", "--", '"x"')


def row(**given: Any) -> Row:
    """A finished run of a task whose metric is the accuracy, unless it is told otherwise."""
    facts: dict[str, Any] = {
        "task": "t", "model": "stu", "seed": 0, "metric": "accuracy", "mode": "max", "test": 0.5, "best_val": 0.5,
        "parameters": 1234, "sequences_per_second": None, "tokens_per_second": 1e5, "peak_memory": 2.0**30,
        "seconds": 61.0, "status": "finished", "step": 9, "total_steps": 9, "unreadable": (),
    }  # fmt: skip
    facts |= given
    name = facts.setdefault("name", f"{facts.get('config', '')}{facts['seed']}")
    return Row(**{"path": f"runs/{facts['task']}/{facts['model']}/{name}", **facts})


def lines(sheet: Sheet) -> list[dict[str, str]]:
    return [dict(zip(sheet.columns, line, strict=True)) for line in sheet.lines]


# --- what runs, and which belong together ---

VALUES = st.sampled_from([1, 1.0, 0.1, True, None, "a", "b", [1, 2], float("nan"), {}])
CONFIGS = st.fixed_dictionaries(
    {"optimizer": st.fixed_dictionaries({"lr": st.sampled_from([0.1, 0.01])})},
    optional={"model": st.dictionaries(st.sampled_from(["d", "k"]), VALUES), "seed": st.integers(0, 3), "name": VALUES},
)
ROWS = st.lists(
    st.builds(
        row,
        task=st.sampled_from(["t", "u"]),
        model=st.sampled_from(["stu", "s5"]),
        seed=st.integers(0, 3),
        test=st.one_of(st.none(), st.floats(0, 1)),
        best_val=st.one_of(st.none(), st.floats(0, 1)),
        config=CONFIGS,
    ),
    max_size=8,
).map(lambda rows: [Row(**{**vars(one), "path": f"{one.path}#{index}"}) for index, one in enumerate(rows)])


@given(ROWS, st.randoms(use_true_random=False))
def test_every_run_is_in_one_group_whatever_the_order(rows: list[Row], random: Any):
    groups = grouped(rows)
    members = [one.path for group in groups for one in group.rows]
    assert sorted(members) == sorted(one.path for one in rows)
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert repr(grouped(shuffled)) == repr(groups)
    told = [(group.title, group.model, *sorted(map(repr, group.settings.items()))) for group in groups]
    assert len(set(told)) == len(groups)
    best = chosen(groups)
    assert (
        len({(group.task, group.model) for group in best}) == len(best) == len({(one.task, one.model) for one in rows})
    )


@given(ROWS)
def test_means_are_those_of_numpy(rows: list[Row]):
    for group in grouped(rows):
        tests = [one.test for one in group.rows if one.test is not None]
        assert group.n == len(tests)
        assert group.mean == (pytest.approx(np.mean(tests)) if tests else None)
        assert group.std == (pytest.approx(np.std(tests, ddof=1), abs=1e-12) if len(tests) > 1 else None)
        assert group.best == max(tests, default=None)


@given(ROWS)
def test_filters_are_what_they_say(rows: list[Row]):
    def names(*words: str) -> list[str]:
        try:
            return [one.path for one in where(rows, words)]
        except OptionError:  # a key that no run has
            return []

    assert names("model=stu") == [one.path for one in rows if one.model == "stu"]
    assert names("model=s*,x", "task!=t") == [one.path for one in rows if one.task != "t"]
    assert names("optimizer.lr<=1e-2") == [one.path for one in rows if one.config["optimizer"]["lr"] <= 0.01]
    assert names("seed=0,2") == [one.path for one in rows if one.seed in (0, 2)]
    assert names("test>0.5") == [one.path for one in rows if one.test is not None and one.test > 0.5]


def test_filters_of_names_lists_and_groups():
    config = {"model": {"layers": [1, 2], "none": []}, "optimizer": {"lr": 0.1}}
    rows = [row(name="lr=0.1,seed=0", config=config, baselines={"zero": 1.0}), row(name="[a]", config={"model": {}})]
    words = (
        "name=lr=0.1,seed=0",
        "model.layers=[1,2]",
        "model.layers=2",
        "model.none=[]",
        "baselines.zero=1",
        "trivial=1",
    )
    assert [where(rows, [word]) for word in words] == [rows[:1]] * 6
    assert where(rows, ["name=[a]*"]) == where(rows, ["name=x,[a]"]) == rows[1:]
    assert where(rows, ["model.layers!=[1,2]"]) == []
    assert where(rows, ["experiment=none"]) == where(rows, ["experiment=null"]) == rows
    assert where(rows, ["experiment!=none"]) == []
    with pytest.raises(OptionError, match=r"--where=optimizer: is a group of options: optimizer\.lr"):
        where(rows, ["optimizer=adamw"])


def test_one_batch_is_not_all_of_them():
    rows = [row(name=str(n), config={"trainer": {key: n}}) for key in ("limit_val_batches", "lr") for n in (1, 1.0)]
    assert sorted(len(group.rows) for group in grouped(rows[:2])) == [1, 1]
    assert [len(group.rows) for group in grouped(rows[2:])] == [2]
    tests = [row(name=str(n), config={"trainer": {"limit_test_batches": n}}) for n in (1, 1.0)]
    assert {group.title for group in grouped(tests)} == {"t (limit_test_batches=1)", "t (limit_test_batches=1.0)"}


def test_options_that_cannot_be_read_are_not_of_full_size():
    [group] = grouped([row(task="lra_listops", model="s5", experiment="lra/listops/s5")])
    assert reduced(group) == "options that cannot be read"


def test_callbacks_tell_groups_by_their_names_and_options():
    ema = {"_target_": "stu.training.EMA", "decay": 0.999}
    configs: list[dict[str, Any]] = [
        {"callbacks": {}},
        {},  # of an earlier version
        {"callbacks": {"device_stats": {"_target_": "stu.training.DeviceStats"}}},  # which changes nothing
        {"callbacks": {"ema": ema}},
        {"callbacks": {"ema": {**ema, "decay": 0.9}}},
    ]
    rows = [row(name=str(k), config=config) for k, config in enumerate(configs)]
    found = {group.label: [one.name for one in group.rows] for group in grouped(rows)}
    assert found == {
        "callbacks=none": ["0", "1", "2"],
        "callbacks=ema, decay=0.999": ["3"],
        "callbacks=ema, decay=0.9": ["4"],
    }


def test_what_only_some_runs_have_tells_groups_where_the_others_have_nothing():
    given: list[tuple[str, dict[str, Any]]] = [
        ("train.py", {"pretrain": {"objective": "none"}, "optimizer": {"groups": None}}),
        ("train.py", {}),  # of an earlier version
        ("train.py pretrain=masked", {"pretrain": {"objective": "masked"}}),
        ("train.py +trainer.inference_mode=false", {"trainer": {"inference_mode": False}}),
        ("train.py optimizer.groups.a.lr=1", {"optimizer": {"groups": {"a": {"lr": 1}}}}),
        ("train.py", {"trainer": {"benchmark": None}}),  # a later version's
    ]
    rows = [row(name=str(k), command=command, config=config) for k, (command, config) in enumerate(given)]
    assert sorted([one.name for one in group.rows] for group in grouped(rows)) == [
        ["0"],
        ["1", "5"],
        ["2"],
        ["3"],
        ["4"],
    ]


def test_what_does_not_change_the_result_tells_no_groups():
    same = [{"seed": s, "log_every": s, "name": s, "logger": {"mode": s}, "task": {"_target_": s}} for s in range(3)]
    [group] = grouped(row(seed=one["seed"], config=one) for one in same)
    assert (group.n, group.label, group.settings) == (3, "", {})


def test_settings_are_chosen_by_validation_among_those_that_have_most_runs():
    rows = [
        *(row(seed=s, test=0.9, best_val=0.5, config={"lr": 0.1}) for s in (0, 1)),  # the better on the test set
        *(row(seed=s, test=0.6 + s / 100, best_val=0.7, config={"lr": 0.01}) for s in (0, 1)),
        row(seed=0, test=0.95, best_val=0.95, config={"lr": 1.0}),  # fewer runs
    ]
    [sheet] = leaderboard(grouped(rows))
    [line] = lines(sheet)
    assert (line["settings"], line["tried"], line["n"]) == ("lr=0.01", "3", "2")
    assert line["test accuracy, % ↑"] == "60.50 ± 0.71"
    [whole] = leaderboard(grouped(rows), whole=True)
    assert [(one["settings"], one["val"]) for one in lines(whole)] == [
        ("lr=1.0", "95.00"),
        ("lr=0.1", "50.00"),
        ("lr=0.01", "70.00"),
    ]


def test_results_of_different_data_are_not_compared():
    sizes = {"long": 64, "short": 8}
    rows = [
        row(model=model, name=name, best_val=1 / size, config={"task": {"seq_len": size, "data": {"seq_len": size}}})
        for name, size in sizes.items()
        for model in ("stu", "s5")
    ]
    sheets = leaderboard(grouped(rows))
    assert {sheet.title: len(sheet.lines) for sheet in sheets} == {"t (seq_len=64)": 2, "t (seq_len=8)": 2}
    views = [row(name=pool, config={"task": {"pool": pool, "seq_len": 8}}) for pool in ("mean", "last")]
    assert [group.title for group in grouped(views)] == ["t", "t"]  # the same data, seen in two ways


def test_a_line_has_all_that_is_known():
    rows = [
        row(seed=s, test=0.5 + s / 50, baselines={"majority": 0.6, "first": 0.2, "truth": 1.0},
            trivial_names=("majority", "first"), config={"lr": [1, None], "on": True})
        for s in (0, 1)
    ]  # fmt: skip
    [sheet] = leaderboard(grouped(rows), keys=["seed", "on", "lr", "nothing"])
    assert dict(zip(sheet.columns, sheet.lines[0], strict=True)) == {
        "model": "stu", "seed": "0, 1", "on": "true", "lr": "1, -", "nothing": "-", "test accuracy, % ↑": "51.0 ± 1.4",
        "n": "2", "best": "52.0", "parameters": "1,234", "tokens/s": "100,000", "GiB": "1.00", "time": "0:01:01",
    }  # fmt: skip
    baselines = [(line["model"], line["test accuracy, % ↑"]) for line in lines(sheet)[1:]]
    assert baselines == [("trivial: majority", "60.00"), ("trivial: first", "20.00"), ("reference: truth", "100.0")]
    assert sheet.notes == ["no better than the best trivial baseline: stu"]


def test_a_result_that_is_not_finite():
    [sheet] = leaderboard(grouped([row(seed=s, test=test) for s, test in enumerate((math.nan, 0.5, 0.25))]))
    [line] = lines(sheet)
    assert (line["test accuracy, % ↑"], line["n"], line["best"]) == ("nan", "3", "50.00")


def test_runs_that_are_not_in_the_mean_are_said():
    others = [row(seed=s, status=status, test=None) for s, status in enumerate(("failed", "running", "failed"), 2)]
    rows = [
        row(test=0.25),
        row(seed=1, test=0.75),
        *others,
        row(seed=5, test=None),
        row(model="s5", test=None, status="failed"),
    ]
    [sheet] = leaderboard(grouped(rows))
    assert [(line["model"], line["n"]) for line in lines(sheet)] == [("stu", "2 of 6"), ("s5", "0 of 1")]
    assert sheet.notes == ["stu: without the runs that have no result: 1 damaged, 2 failed, 1 running"]


@pytest.mark.parametrize(
    ("tests", "mean", "std"),
    [((1e308, 1.7e308), 1.35e308, 4.95e307), ((1.7e308, -1.7e308), 0.0, math.inf), ((math.inf, -math.inf), None, None)],
)
def test_of_numbers_that_are_too_large(tests: Sequence[float], mean: float | None, std: float | None):
    [group] = grouped([row(seed=s, test=test) for s, test in enumerate(tests)])
    assert group.mean == (pytest.approx(math.nan, nan_ok=True) if mean is None else pytest.approx(mean))
    assert group.std == (std and pytest.approx(std, rel=1e-2))
    assert leaderboard([group])


def test_one_seed_twice_is_said():
    [sheet] = leaderboard(grouped([row(name="a"), row(name="b"), row(name="c", seed=1)]))
    assert sheet.notes == ["stu: several runs of seed 0, which are no independent results"]


def test_what_has_not_finished():
    rows = [
        row(name="done"),
        row(name="off", status="failed", test=None, step=3, command="train.py a=1", reason="the loss is not finite"),
        row(name="on", status="running", test=None, step=2, command="train.py a=1"),
        row(name="cut", status="stopped", test=None, step=5, command="train.py 'a=[1, 2]'"),
        row(name="bad", unreadable=("summary.json is unreadable",)),
    ]
    assert unfinished(rows) == [
        "not finished, or damaged: 4 of 5 runs",
        "  t/stu/on: running at step 2 of 9",
        "  t/stu/off: failed at step 3 of 9: the loss is not finite",
        "    the same command would diverge again: another learning rate, or overwrite=true with other settings",
        "  t/stu/bad: finished; summary.json is unreadable",
        "  t/stu/cut: stopped at step 5 of 9",
        "    python train.py 'a=[1, 2]'",
    ]
    assert unfinished(rows[:1]) == []
    assert unfinished([row(name=str(i), status="stopped") for i in range(25)])[-1] == "  … and 5 more; --runs shows all"
    assert how_to_go_on(row(status="stopped", command=None)) is None


def test_no_number_is_cut_where_the_terminal_is_narrow():
    rows = [
        row(model=model, seed=s, test=s / 9, config={"lr": [s / 1e9] * 4}) for model in ("stu", "s5") for s in (0, 1)
    ]
    [sheet] = leaderboard(grouped(rows), whole=True, keys=["path", "seed"])
    console = Console(width=40, file=StringIO(), markup=False)
    show(console, [*sheet_parts(sheet), runs_table(rows)])
    printed: Any = console.file
    shown = printed.getvalue().split("\n")
    assert console.width == 40
    assert len([line for line in shown if "100,000" in line]) == 2 * len(rows)
    for line in sheet.lines:
        cells = [cell for name, cell in zip(sheet.columns, line, strict=True) if name != "settings"]
        assert any(re.split(r"  +", printed_line.strip()) == cells for printed_line in _without_folded(shown))


def _without_folded(shown: Sequence[str]) -> list[str]:
    return [re.sub(r"lr=\S* ?\S*", "", line) for line in shown]


# --- digits ---


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.53214, 0.01312, "0.532 ± 0.013"), (0.5, 0.0996, "0.50 ± 0.10"), (53.21, 0.4312, "53.21 ± 0.43"),
        (123456.0, 2345.0, "123,456 ± 2,345"), (0.0000123, 0.0000021, "(1.23 ± 0.21)e-05"), (0.5, None, "0.5000"),
        (1.5, 0.0, "1.500 ± 0.000"), (0.0, None, "0.000"), (None, None, "-"), (math.nan, None, "nan"),
        (math.inf, None, "inf"), (7.07e-16, None, "7.070e-16"), (0.5, 1e-12, "0.500000 ± 1e-12"),
        (1e300, None, "1.000e+300"), (5e-324, 1e-323, "(0.0 ± 1e-23)e-300"), (-0.25, 0.11, "-0.25 ± 0.11"),
        (-1e-3, 0.5, "0.00 ± 0.50"),
    ],
)  # fmt: skip
def test_the_standard_deviation_decides(mean: float | None, std: float | None, text: str):
    assert mean_and_std(mean, std) == text


@given(st.floats(-1e9, 1e9), st.just(0.0) | st.floats(1e-9, 1e6))
def test_digits_are_of_the_number(mean: float, std: float):
    text = mean_and_std(mean, std)
    first, _ = re.sub(r"[(),]|\)e.*", "", text).split(" ± ")
    power = text.partition(")")[2]
    scale = float(f"1{power}")
    least = float(re.sub(r"\d$", "1", re.sub(r"\d", "0", first.lstrip("-")))) * scale  # of the last digit
    assert abs(float(first) * scale - mean) <= 0.5001 * least
    assert beside(mean, mean, std).replace(",", "") == first + power


def test_other_numbers():
    assert [duration(x) for x in (None, math.nan, 3725.4)] == ["-", "-", "1:02:05"]
    assert [written(x) for x in (None, True, 1e-3, 0.1234567, [1, "a"], (), "\x1b[0m")] == [
        "-", "true", "0.001", "0.1235", "1, a", "-", r"\x1b[0m",
    ]  # fmt: skip
    assert described({"a.lr": 1, "b.lr": 1, "c.d": None, "e.d": (True, 2)}) == "lr=1, c.d=null, e.d=[true, 2]"


# --- published numbers ---


def test_published_numbers_are_those_of_the_presets():
    """The heads of conf/experiment/lra say the same."""
    heads = sorted((ROOT / "conf/experiment/lra").glob("*/*.yaml"))
    assert len(heads) == 42
    for file in heads:
        head = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
        says = head.partition("Published: ")[2].partition(" Command:")[0]
        task = f"lra_{file.parent.name}" if "on colour images" not in says else "cifar_color"
        one = published_of(task, file.stem)
        number = says.partition(" %")[0].partition(" ")[0]
        assert (one.written if one else "nothing") == {"no": CHANCE}.get(number, number), file
        assert (one is not None and one.second_hand) == ("second hand" in says or "recalled" in says), file


def test_published_numbers_are_those_of_the_collected_results():
    said = (ROOT / "experiments/lra/README.md").read_text()
    shown = re.findall(r"^\| `(lra_\w+)` \| `(\w+)`.* \| (\d+\.\d) % \|$", said, re.MULTILINE)
    assert shown
    for task, model, number in shown:
        one = published_of(task, model)
        assert one is not None
        assert f"{one.percent:.1f}" == number


def test_every_published_number_has_a_source():
    assert len(published()) == 59
    assert all(one.source and (one.percent is None or 30 < one.percent < 100) for one in published())
    assert {one.model for one in published()} == {
        "stu",
        "s4",
        "s4d",
        "s4d_dfout",
        "s5",
        "lru",
        "mega",
        "transformer",
        None,
    }
    assert published_of("lra_image", "lru") is None
    assert published_of("lra_listops", None) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "experiment", "why"),
    [
        ((), "lra/listops/s5", None),
        (("seed=3", "optimizer.lr=1e-3", "task.pool=first", "task.data.dir=/x"), "lra/listops/s5", None),
        (
            ("task.seq_len=256", "task.data.max_length=200"),
            "lra/listops/s5",
            "data with seq_len=256, max_length=200",
        ),
        (("task.data.test=100",), "lra/listops/s5", "data with test=100"),
        (("trainer.limit_test_batches=0.5",), "lra/listops/s5", "limit_test_batches=0.5"),
        (("trainer.limit_test_batches=1",), "lra/listops/s5", "limit_test_batches=1"),
        (("trainer.max_steps=500",), "lra/listops/s5", "max_steps=500"),
        (("model.depth=2",), "lra/listops/s5", "depth=2"),
        ((), None, "not by a preset experiment=lra/…"),
        ((), "quick", "not by a preset experiment=lra/…"),
        ((), "lra/../../../../x", "not by a preset experiment=lra/…"),
    ],
)
def test_published_numbers_are_of_full_size(overrides: Sequence[str], experiment: str | None, why: str | None):
    preset = composed("experiment=lra/listops/s5").copy()
    preset.merge_with_dotlist(list(overrides))
    config: Any = OmegaConf.to_container(preset, resolve=True)
    [group] = grouped([row(task="lra_listops", model="s5", experiment=experiment, config=config)])
    assert reduced(group) == why
    [sheet] = leaderboard([group])
    [line] = lines(sheet)
    assert line["published"] == ("62.15*" if why is None else "(62.15*)")
    assert any("second hand: S5 paper" in note for note in sheet.notes)
    assert any("Mega 63.14*" in note for note in sheet.notes) == (why is None)
    assert any(note.startswith("( )") and why in note for note in sheet.notes if why) == (why is not None)


# --- Markdown and LaTeX ---

CELLS = st.lists(st.text("aé€ \\|_<&{}$[*-^~\n\t", max_size=6) | st.sampled_from(NASTY), min_size=2, max_size=2)


def sheets_of(cells: Sequence[Sequence[str]]) -> list[Sheet]:
    return [Sheet(NASTY[0], ["model", "n"], cells, notes=[NASTY[3]])]


@given(st.lists(CELLS, min_size=1, max_size=3))
def test_markdown_has_the_same_cells(cells: list[list[str]]):
    """Unescaped as CommonMark does it, after splitting at bars without a backslash."""
    _, _, head, rule, *rest = markup.markdown(sheets_of(cells)).splitlines()
    found = [re.split(r" \| ", line[2:-2]) for line in (head, *rest[: len(cells)])]
    assert rule == "| --- | ---: |"
    for line, wanted in zip(found[1:], cells, strict=True):
        plain = [re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell) for cell in line]
        plain = [cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for cell in plain]
        assert plain == [" ".join(text.split()) for text in wanted]
        assert not any(re.search(r"(?<!\\)[|`*_<]", cell.replace(r"\\", "")) for cell in line)


class LaTeX:
    """Reads the little of LaTeX that is written, and raises for anything else."""

    NAMES: ClassVar = {
        "textbackslash": "\\", "textasciicircum": "^", "textasciitilde": "~", "textless": "<", "textgreater": ">",
        "textbar": "|", "textasciigrave": "`", "ldots": "…",
    }  # fmt: skip
    MATHS: ClassVar = {r"$\pm$": "±", r"$\uparrow$": "↑", r"$\downarrow$": "↓", r"$\times$": "×", "$-$": "−"}
    TOKEN = re.compile(
        r"\\(?P<name>[a-z]+)\{\}|\\(?P<sign>[#$%&_{}])|(?P<math>\$[^$]+\$)|\{(?P<kept>[\[*])\}|(?P<dash>-\{\})"
    )

    @classmethod
    def text(cls, source: str) -> str:
        found, at = "", 0
        while at < len(source):
            token = cls.TOKEN.match(source, at)
            if token is None:
                assert source[at] not in '\\{}$&#_%^~<>|"`[*', source[at:]
                found, at = found + source[at], at + 1
                continue
            named, math_, dash = cls.NAMES.get(token["name"] or ""), cls.MATHS.get(token["math"] or ""), token["dash"]
            found += named or token["sign"] or math_ or token["kept"] or "-" * bool(dash)
            at = token.end()
        return found

    @classmethod
    def tables(cls, source: str) -> list[list[list[str]]]:
        tables = re.findall(
            r"\\begin\{tabular\}\{([lr]+)\}\n\\toprule\n(.*?)\\bottomrule\n\\end\{tabular\}", source, re.DOTALL
        )
        found = []
        for form, body in tables:
            written = body.replace("\\midrule\n", "").splitlines()
            assert all(line.endswith(r" \\") for line in written)
            cells = [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in written]
            assert {len(line) for line in cells} == {len(form)}
            found.append([[cls.text(cell) for cell in line] for line in cells])
        return found


@given(st.lists(CELLS, min_size=1, max_size=3))
def test_latex_has_the_same_cells(cells: list[list[str]]):
    [[head, *found]] = LaTeX.tables(markup.latex(sheets_of(cells)))
    assert head == ["model", "n"]
    for line, wanted in zip(found, cells, strict=True):
        signs = (" ".join(text.split()).replace('"', "''") for text in wanted)
        assert line == [
            "".join(c if c in markup.LATEX or ord(c) < 256 else f"U+{ord(c):04X}" for c in text) for text in signs
        ]


def test_latex_of_names_that_are_commands():
    rows = [row(model=name, seed=s, test=0.5 + s / 10) for name in NASTY for s in (0, 1)]
    [[head, *found]] = LaTeX.tables(markup.latex(leaderboard(grouped(rows))))
    assert head[1] == "test accuracy, % ↑"
    assert {line[0] for line in found} == {name.replace('"', "''") for name in NASTY}
    assert {line[1] for line in found} == {"55.0 ± 7.1"}
    assert r"\&" in markup.latex(leaderboard(grouped(rows)))
    assert "% \\usepackage{booktabs}" in markup.latex([])
