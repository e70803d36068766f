"""The HTML report: its data anywhere, the page in headless Chromium where there is one."""

import base64
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from experiments.compare import report
from experiments.compare.groups import Group, chosen, grouped
from experiments.compare.history import Curve, History
from experiments.compare.report import content, curves, figures, static
from experiments.compare.runs import Row
from tests.experiments.rows import row as make_row
from tests.experiments.test_compare import make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = "<script>alert(1)</script><!--"
ODD = "quoted \"title\" & 'more'\nsecond\u2028line </title><b>"


STUB = """window.Plotly = { newPlot: async (place, traces, layout) => {
  place.drawn = { traces, layout };
  place.on = (name, listener) => { place.listener = listener; };
}, purge: (place) => { delete place.drawn; } };"""


def page_of(rows: list[Row], file: Path, library: str = STUB, **options: Any) -> Path:
    """The report, with a stub for plotly, which takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plotly", lambda: library)
        report.write(rows, grouped(rows), file, **options)
    return file


def data_in(file: Path) -> dict[str, Any]:
    [block] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    return json.loads(block)


def numbers(code: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(code), kind)


class TestCurves:
    def test_come_out_as_they_went_in(self):
        steps = np.array([10, 20, 30, 70_000, 2_000_000])
        some = {
            "val/mse": Curve(steps, np.array([1.0, math.nan, math.inf, 0.25, 1e-30])),
            "x": Curve(steps[:1], np.ones(1)),
        }
        [run, other], vectors = curves.coded([some, {"val/mse": Curve(steps, np.zeros(5))}])
        which, values = run["val/mse"]
        assert other["val/mse"][0] == which  # steps are written once
        assert len(vectors) == 2
        np.testing.assert_array_equal(numbers(values, "<f4"), np.float32([1, math.nan, math.inf, 0.25, 1e-30]))
        unit, width, code = vectors[which]
        assert (unit, width) == (10, 8)  # one difference has no place in two bytes
        np.testing.assert_array_equal(np.cumsum(numbers(code, "<f8") * unit), steps)
        unit, width, code = vectors[run["x"][0]]
        assert (unit, width, numbers(code, "<u2").tolist()) == (10, 2, [1])

    def test_of_steps_that_go_back_and_of_none(self):
        back = np.array([4, 2, 2])
        _, [[unit, _, code]] = curves.coded([{"a": Curve(back, np.zeros(3))}])
        assert np.cumsum(numbers(code, "<f8") * unit).tolist() == [4, 2, 2]
        _, [[_, _, code]] = curves.coded([{"a": Curve(np.zeros(1, int), np.ones(1))}])
        assert numbers(code, "<u2").tolist() == [0]
        assert curves.coded([]) == ([], [])

    def test_are_shorter_where_they_are_many(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(curves, "BUDGET", 1000)
        rng = np.random.default_rng(0)
        some = [{"a": Curve(np.arange(5000), rng.normal(size=5000))} for _ in range(10)]
        drawn, _ = curves.coded(some)
        sizes = [len(numbers(run["a"][1], "<f4")) for run in drawn]
        assert max(sizes) <= 100
        assert sum(sizes) > 800
        for run, given in zip(drawn, some, strict=True):  # the extremes are kept
            values = numbers(run["a"][1], "<f4")
            assert (values.min(), values.max()) == (
                np.float32(given["a"].values.min()),
                np.float32(given["a"].values.max()),
            )


@pytest.mark.parametrize("n", [251, 1000, 10_007])
def test_thinning_keeps_ends_extremes_and_gaps(n: int):
    values = np.random.default_rng(n).normal(size=n)
    values[n // 2 : n // 2 + n // 10] = math.nan
    values[[3, n - 4]] = 50, -50
    kept = Curve(np.arange(n), values).thinned()
    assert len(kept.steps) <= 250
    assert (np.diff(kept.steps) > 0).all()
    assert kept.steps[[0, -1]].tolist() == [0, n - 1]
    assert {3, n - 4} <= set(kept.steps)
    assert np.isnan(kept.values[(kept.steps > n // 2 + n // 50) & (kept.steps < n // 2 + n // 12)]).all()
    assert Curve(np.arange(n), np.full(n, math.nan)).thinned().steps[[0, -1]].tolist() == [0, n - 1]


def test_curves_of_a_history():
    history = History(("1", "1", "9" * 30), ("a", "b", "a"), ("0.5", "nan", "inf"), epochs=("0.1", "", "x"))
    drawn = history.curves()
    assert list(drawn) == ["a", "b"]
    assert drawn["a"].values.tolist() == [0.5, math.inf]
    assert drawn["a"].steps.tolist() == [1, 2**53]  # a damaged step
    assert np.isnan(drawn["b"].values).all()
    assert history.steps_per_epoch == 10
    assert History().curves() == {}
    assert History().steps_per_epoch is None


@pytest.mark.parametrize("theme", [0, 1])
def test_texts_can_be_read_on_their_grounds(theme: int):
    css = (report.PAGE / "page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", re.findall(r"{([^{}]*color-scheme: \w+;)", css)[theme]))

    def light(name: str) -> float:
        parts = [int(colours[name][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    grounds = {"ink": "paper ground hover accent-soft", "faint": "paper ground hover accent-soft",
               "accent": "paper ground", "bad": "paper ground"}  # fmt: skip
    for text, names in grounds.items():
        for ground in names.split():
            dark, bright = sorted((light(text), light(ground)))
            assert bright / dark >= 4.5, (text, ground)


class TestData:
    def test_is_inert_wherever_it_comes_from(self, tmp_path: Path):
        row = make_row(name=EVIL, reason=EVIL, config={EVIL: [EVIL, math.nan], "a": {"b": "\ud800"}}, tags=(EVIL,))
        file = page_of([row, replace(row, path=f"{row.path}2", seed=7)], tmp_path / "a.html", title=ODD)
        text = file.read_text()
        assert "alert(1)</script>" not in text
        assert text.count("</script>") == 3
        assert "<b>" not in text
        data = data_in(file)
        assert data["runs"][0]["name"] == EVIL
        assert data["keys"] == [EVIL, "a.b"]
        assert data["values"] == [[[EVIL, "nan"]], ["\ud800"]]
        assert [run["settings"] for run in data["runs"]] == [[0, 0], [0, 0]]
        assert data["runs"][0]["group"] == data["runs"][1]["group"] == 0

    def test_allows_no_script_but_its_own_and_no_network(self, tmp_path: Path):
        text = page_of([make_row()], tmp_path / "a.html").read_text()
        [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        assert "unsafe-inline" not in rules["script-src"]
        assert rules["script-src"].count("sha256-") == 2
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)

    def test_configurations_are_written_once(self):
        rows = [
            make_row(name=str(k), config={"seed": k % 2, "same": "x" * 5000, "lr": 1 if k else 1.0}) for k in range(50)
        ]
        keys, values, chosen = content._configurations([*rows, make_row(config={})])
        assert dict(zip(keys, values, strict=True)) == {"seed": [0, 1], "same": ["x" * 5000], "lr": [1.0, 1]}
        assert chosen[1] == [1, 0, 1]
        assert chosen[-1] == [-1, -1, -1]

    @pytest.mark.parametrize(
        ("status", "what", "end"),
        [("finished", ["test again"], " seed=0 mode=test"), ("stopped", ["resume"], " seed=0"), ("running", [], "")],
    )
    def test_commands_to_go_on(self, status: Any, what: list[str], end: str):
        row = make_row(status=status, command="train.py model=stu 'a=[1, 2]' seed=0 overwrite=true", seed=0)
        start = "python train.py model=stu 'a=[1, 2]'"
        expected = dict.fromkeys(what, f"{start}{end}") | {"another seed": f"{start} seed=5"}
        assert content.commands(row, [row, replace(row, seed=4)]) == expected
        assert content.commands(replace(row, command="'half"), [row]) == {}
        assert list(content.commands(replace(row, reason="loss is not finite"), [row])) == ["another seed"]
        assert content.commands(replace(row, command=None), [row]) == {}

    def test_figures_have_a_budget(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run = make_run(tmp_path / "runs", test=0.1)
        run.figures.mkdir()
        monkeypatch.setattr(figures, "LARGEST", 2000)
        noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(run.figures / "noise.png")  # too large in any form
        Image.new("RGB", (900, 600), "white").save(run.figures / "with space.png")
        (run.figures / "broken.png").write_bytes(b"no figure")
        for age, name in enumerate(("with space", "noise", "broken")):
            os.utime(run.figures / f"{name}.png", (1000 - age, 1000 - age))
        rows = [make_row(path=str(run.path))]
        shown = figures.embedded(rows, grouped(rows), tmp_path)[str(run.path)]
        assert [one["name"] for one in shown] == ["with space", "noise", "broken"]
        assert [bool(one["source"]) for one in shown] == [True, False, False]
        assert shown[0]["link"] == "runs/lds/stu/a/figures/with%20space.png"
        monkeypatch.setattr(figures, "BUDGET", 100)
        assert not any(one["source"] for one in figures.embedded(rows, [], tmp_path)[str(run.path)])

    def test_without_scripts_there_is_a_table(self):
        text = static.leaderboard(grouped([make_row(test=0.25), make_row(model=EVIL, test=math.nan, path="b/c/d")]))
        assert "<td>stu</td><td></td><td>0.25</td><td>–</td><td>1</td><td>0.25</td>" in text
        assert "<script>" not in text


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    places = (os.environ.get("STU_BROWSER"), *map(shutil.which, BROWSERS))
    path = next((place for place in places if place), None)
    if path is None:
        pytest.skip(f"no browser: $STU_BROWSER is not set, and {', '.join(BROWSERS)} are not on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(chromium: Browser) -> BrowserContext:
    """One for all pages, which costs less than one each."""
    return chromium.new_context()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Two models with two seeds each, of which one diverged, and a run of another task that has logged nothing."""
    home, rows = tmp_path_factory.mktemp("runs"), []
    for name, model, seed, lr, test in (
        ("a", "stu", 0, 0.001, 0.25),
        ("b", "stu", 1, 0.001, 0.35),
        (EVIL, "lru", 0, 0.01, 0.75),
        ("d", "lru", 1, 0.01, math.nan),
    ):
        place = home / "lds" / model / str(seed)
        place.mkdir(parents=True)
        lines = [
            f"{step},{step / 100},{metric},{math.nan if 200 <= step < 250 else 1 / step + seed}"
            for step in range(10, 400)
            for metric in ("val/mse", "train/mse")
        ]
        (place / "metrics.csv").write_text("\n".join(["step,epoch,metric,value", *lines, ""]))
        config = {"seed": seed, "optimizer": {"lr": lr, "name": ODD}, "model": {"d_model": 8}}
        rows.append(
            make_row(
                f"lds/{model}/{seed}", home=home, name=name, seed=seed, test=test, tags=("ladder",) if seed else (),
                command=f"train.py model={model} seed={seed}", config=config, parameters=5000 + 1000 * seed,
                baselines={"zero": 0.5, "oracle": 0.0}, trivial_names=("zero",),
            )
        )  # fmt: skip
    waiting = make_row(
        "copying/stu/0", home=home, test=None, status="failed", reason=ODD, metric=None, step=None, config={"a": None}
    )
    return [*rows, waiting]


@pytest.fixture(scope="module")
def file(board: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of(board, tmp_path_factory.mktemp("report") / "report.html", title=ODD, columns=["optimizer.lr"])


@pytest.fixture
def opened(context: BrowserContext, file: Path) -> Iterator[Any]:
    """A function that opens a report; whatever goes wrong in the page, or is asked from a network, fails the test."""
    wrong: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type == "error":
            wrong.append(message.text)

    def go(state: str = "", where: Path = file, width: int = 1366, *, stopped: bool = False) -> Page:
        page = context.new_page()
        pages.append(page)
        if stopped:  # the clock of the page, which then goes on by `page.clock.fast_forward` alone
            page.clock.install(time=0)
            page.clock.pause_at(1)
        page.set_default_timeout(60_000)
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
        )
        page.goto(f"{where.as_uri()}{state}")
        return page

    pages: list[Page] = []
    yield go
    for page in pages:
        page.close()
    assert wrong == []


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_inner_texts()


def column(page: Page, key: str) -> list[str]:
    at = page.locator("#runs th").evaluate_all("(all, key) => all.findIndex((one) => one.dataset.key === key)", key)
    return texts(page, f"#runs tbody td:nth-child({at + 1})")


def random_rows(rng: np.random.Generator) -> list[Row]:
    """Runs with ties, values that are missing or not finite, and two variants of one of the tasks."""
    rows = []
    for at in range(80):
        task, size = [("lds", 8), ("lds", 16), ("mqar", 8)][rng.integers(3)]
        tests = [*map(float, rng.normal(size=4)), 0.5, math.nan, math.inf]
        metric: dict[str, Any] = {"metric": "accuracy", "mode": "max"} if task == "mqar" else {}
        seed, model, lr = int(rng.integers(4)), ["s5", "stu"][rng.integers(2)], float(rng.integers(1, 4)) / 1000
        rows.append(
            make_row(
                f"{task}/{model}/{at}", seed=seed, status=["finished", "finished", "running"][rng.integers(3)],
                test=tests[rng.integers(7)], best_val=[0.25, 0.5, math.nan, None][rng.integers(4)],
                parameters=int(rng.integers(1, 9)), seconds=60.0 * at,
                config={"task": {"seq_len": size}, "optimizer": {"lr": lr}, "seed": seed}, **metric,
            )
        )  # fmt: skip
    return rows


def shown_groups(page: Page) -> list[list[str]]:
    """Title, model, settings, runs, mean and standard deviation, and best, as the leaderboard shows them."""
    return page.locator("#leaderboard tr[data-run]").evaluate_all(
        """all => all.map((row) => {
          const cells = [...row.cells], text = (at) => cells[at].textContent.replace(/ best of .* settings$/, "");
          const digits = cells[2].title.split(" ± "), number = (text) => text && Number(text).toPrecision(9);
          return [row.closest("table").querySelector("caption b").textContent, text(0), text(1), text(4),
                  number(digits[0]), number(digits[1] ?? ""), number(cells[5].title)];
        })"""
    )


def facts(group: Group) -> list[str]:
    def number(value: float | None) -> str:
        if value is None:
            return ""
        names = {math.inf: "Infinity", -math.inf: "-Infinity"}
        return "NaN" if math.isnan(value) else names.get(value, f"{value:#.9g}")

    n = f"{group.n}" if group.n == len(group.rows) else f"{group.n} of {len(group.rows)}"
    return [group.title, group.model, group.label, n, *map(number, (group.mean, group.std, group.best))]


class TestThePage:
    def test_shows_runs_and_groups_as_text(self, opened: Any):
        page = opened()
        assert page.locator("#runs tbody tr").count() == 5
        assert page.locator("#title").text_content() == ODD
        assert EVIL in column(page, "name")
        assert "</td>" not in page.locator("body").inner_text()  # of what is shown without scripts
        assert set(column(page, "test")) == {"0.2500", "0.3500", "0.7500", "nan", "–"}
        assert texts(page, "#leaderboard tbody tr td:first-child") == ["stu", "stu", "best trivial baseline", "lru"]
        assert "0.300 ± 0.071" in texts(page, "#leaderboard tbody .score")
        assert page.locator("#count").text_content() == "5 runs"
        assert "4 finished" in page.locator("#about").inner_text()
        assert not page.evaluate("document.scripts.length > 4")

    def test_has_the_numbers_of_the_leaderboard(self, opened: Any, tmp_path: Path):
        rows = random_rows(np.random.default_rng(0))
        groups = grouped(rows)
        page = opened("", page_of(rows, tmp_path / "a.html"))
        assert shown_groups(page) == list(map(facts, chosen(groups)))
        page.get_by_label("rows").select_option("1")
        assert shown_groups(page) == list(map(facts, groups))
        page.locator("#where").fill("seed<2")
        page.locator("#count", has_text=" of ").wait_for()
        left = [
            replace(group, rows=some) for group in groups if (some := tuple(r for r in group.rows if r.seed in (0, 1)))
        ]
        assert shown_groups(page) == list(map(facts, sorted(left, key=lambda group: (group.title, group.order))))
        page.get_by_label("rows").select_option("")
        assert shown_groups(page) == list(
            map(facts, chosen(sorted(left, key=lambda group: (group.title, group.order))))
        )

    def test_filters(self, opened: Any):
        page = opened()
        page.evaluate("document.querySelector('#runs tr[data-run*=lru]').mark = 1")
        page.locator(".chip[data-key=model][data-value=lru]").click()
        assert page.locator("#count").text_content() == "2 of 5 runs"
        assert set(column(page, "model")) == {"lru"}
        assert page.evaluate("document.activeElement.dataset.value") == "lru"  # the focus stays for the keyboard
        page.locator(".chip[data-key=tag][data-value=ladder]").click()
        assert column(page, "name") == ["d"]
        page.locator("#reset").click()
        assert page.locator("#count").text_content() == "5 runs"
        assert page.evaluate("[...document.querySelectorAll('#runs tr')].filter((row) => row.mark).length") == 1  # kept
        for text, n in {
            "task=lds model=stu": 2, "optimizer.lr>=1e-2": 2, "test<0.5": 2, "model=s*": 3, "model!=stu": 2,
            "tags=ladder": 2, "optimizer.lr=1e-3,0.01": 4, "a=null": 1, "LADDER seed=0,1": 2,
            '"<script>"': 1, "seed=": 5, "task=none": 0, "model=[!s]*": 2, "name=[": 0, "test=inf": 0,
        }.items():  # fmt: skip
            page.locator("#where").fill(text)
            page.wait_for_function("n => document.querySelectorAll('#runs tbody tr').length === n", arg=n)
            assert page.locator("#complaint").is_hidden()
        for text, complaint in {
            "lr=1": "did you mean optimizer.lr?",
            "nosuch=1": "No run has a key nosuch.",
            "test<x": "< compares with a number.",
        }.items():
            page.locator("#where").fill(text)
            page.locator("#complaint", has_text=complaint).wait_for()

    def test_sorts_by_value_and_keeps_the_unknown_last(self, opened: Any):
        page = opened()
        button = page.locator("#runs th[data-key=test] button")
        button.click()
        assert column(page, "test")[:3] == ["0.2500", "0.3500", "0.7500"]
        button = page.locator("#runs th[data-key=test] button")
        button.click()
        assert column(page, "test")[:3] == ["0.7500", "0.3500", "0.2500"]
        assert page.locator("#runs th[data-key=test]").get_attribute("aria-sort") == "descending"
        assert column(page, "optimizer.lr")[:2] == ["0.01000", "0.001000"]

    def test_opens_a_run(self, opened: Any):
        page = opened()
        row = page.locator("#runs tr", has_text=EVIL)
        page.locator("#curves .sketch").evaluate("(figure) => { figure.mark = 1; }")
        row.focus()
        page.keyboard.press("Enter")
        panel = page.locator("#panel")
        assert "lru on lds" in panel.inner_text()
        assert texts(page, "#panel .command code") == [
            "python train.py model=lru seed=0 mode=test",
            "python train.py model=lru seed=2",
        ]
        assert texts(page, "#panel .configuration .differs th") == ["seed"]
        assert "optimizer.lr" in panel.inner_text()
        assert "oracle (not trivial)" in panel.inner_text()
        page.locator("#panel input").fill("d_model")
        assert texts(page, "#panel .configuration tr:not([hidden]) th") == ["model.d_model"]
        page.keyboard.press("Escape")
        assert panel.is_hidden()
        assert page.evaluate("document.activeElement.dataset.run").endswith("lru/0")
        assert page.evaluate("document.querySelector('#curves .plot').firstChild.mark") == 1  # was not drawn again
        page.locator("#runs tr", has_text="failed").click()
        assert page.locator("#panel .reason").text_content() == ODD

    def test_the_address_keeps_what_is_shown(self, opened: Any):
        page = opened()
        page.locator(".chip[data-key=model][data-value=stu]").click()
        page.locator("#where").fill("seed=0")
        page.locator("#runs th[data-key=parameters] button").click()
        page.locator("#curves").get_by_label("lines").select_option("runs")
        page.wait_for_function("location.hash.includes('where=')")
        page.locator("#runs tbody tr").first.click()
        seen, address = texts(page, "#runs tbody tr"), page.evaluate("location.hash")
        page.reload()
        assert texts(page, "#runs tbody tr") == seen
        assert page.locator("#where").input_value() == "seed=0"
        assert page.locator("#panel").is_visible()
        assert page.locator("#runs th[data-key=parameters]").get_attribute("aria-sort") == "ascending"
        assert page.evaluate("location.hash") == address

    def test_draws_curves_with_bands_and_single_runs(self, opened: Any):
        page = opened("#f.task=lds")
        page.locator("#curves").scroll_into_view_if_needed()
        page.locator("#curves .sketch").wait_for()
        drawn = "document.querySelector('#curves .plot').figure.traces"
        assert page.evaluate(f"{drawn}.length") == 6  # two models: line, and least to largest
        assert page.evaluate(f"{drawn}.map((one) => one.y[0])") == pytest.approx([1.1, 0.1, 0.6] * 2)
        lines = page.locator("#curves .sketch path[stroke-width='1.8']")
        assert [line.get_attribute("d").count("M") for line in lines.all()] == [2, 2]  # with a gap where it was nan
        assert page.locator("#curves .sketch path[fill^=rgba]").count() == 2
        assert page.get_by_role("img", name="val/mse: stu, lru").count() == 1
        assert {"stu", "lru", "step", "val/mse", "best trivial baseline", "200"} <= set(
            page.locator("#curves text").all_text_contents()
        )
        page.locator("#curves").get_by_label("y").select_option("1")
        page.locator("#curves text", has_text="0.005").wait_for()
        page.locator("#curves").get_by_label("lines").select_option("runs")
        page.wait_for_function(f"{drawn}.length === 4")
        assert page.evaluate(f"{drawn}.some((one) => one.hovertemplate.includes('<script'))") is False
        path = page.locator("#runs tr[data-run]").first.get_attribute("data-run")
        assert page.evaluate("window.Plotly") is None  # until someone points at a figure
        page.locator("#curves .plot").hover()
        page.wait_for_function("document.querySelector('#curves .plot').drawn")
        assert page.locator("#curves .sketch").count() == 0
        page.locator("#where").hover()
        page.locator(".chip[data-key=model][data-value=stu]").click()
        page.locator("#curves .plot").hover()
        page.wait_for_function("document.querySelector('#curves .plot').drawn?.traces.length === 2")
        click = "path => document.querySelector('#curves .plot').listener({ points: [{ customdata: path }] })"
        page.evaluate(click, path)
        assert page.locator("#panel").is_visible()

    def test_is_dark_where_the_system_is_and_turns(self, opened: Any):
        page = opened()
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(ground)
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(ground) != light
        page.locator("#theme").click()
        assert page.evaluate(ground) == light

    def test_fits_a_phone_and_paper(self, opened: Any):
        page = opened(width=390)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.emulate_media(media="print")
        assert page.locator("#bar").is_hidden()
        assert page.locator("#runs tbody tr").first.is_visible()

    def test_without_scripts_has_the_leaderboard(self, chromium: Browser, file: Path):
        page = chromium.new_page(java_script_enabled=False)
        page.goto(file.as_uri())
        assert "best trivial baseline 0.5" in page.locator("body").inner_text()
        page.close()

    def test_loads_itself_again_as_it_was(self, opened: Any, tmp_path: Path, board: list[Row]):
        watched = page_of(board[:2], tmp_path / "a.html", refresh=2)
        page = opened("#where=seed%3D1", watched, stopped=True)
        page.evaluate("scrollTo(0, 50)")
        page_of(board[:4], watched, refresh=60)
        page.clock.fast_forward(2000)
        page.locator("#count", has_text="2 of 4 runs").wait_for()
        page.wait_for_function("scrollY === 50")

    @pytest.mark.parametrize("n", [0, 1])
    def test_of_no_runs_and_of_none_that_finished(self, opened: Any, tmp_path: Path, n: int, board: list[Row]):
        page = opened("#parallel.open=1", page_of(board[4:][:n], tmp_path / "a.html"))
        assert page.locator("#runs tbody tr").count() == n
        page.locator("#scatter .sketch").wait_for()

    def test_with_plotly_itself(self, opened: Any, board: list[Row], tmp_path: Path):
        page = opened("", page_of(board, tmp_path / "a.html", library=report.plotly()))
        page.locator("#curves").scroll_into_view_if_needed()
        page.locator("#curves .plot").hover()
        page.wait_for_function("document.querySelectorAll('#curves .scatterlayer path.js-line').length > 0")
        assert set(page.locator("#curves .legendtext").all_text_contents()) == {"stu", "lru"}
        page.locator("#runs tr", has_text=EVIL).click()
        page.locator("#panel .plot").hover()
        page.wait_for_function("document.querySelectorAll('#panel .scatterlayer .trace').length === 2")
