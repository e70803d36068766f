"""How fast the report opens in a browser: python -m experiments.compare.report.bench [FILE].

Without a file it makes runs and their report in a folder that it deletes. Milliseconds in headless Chromium, from the
start of the navigation, and from a click on a chip until everything in sight is drawn again: least and median.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.compare.bench import make_runs
from experiments.compare.groups import grouped
from experiments.compare.report import write
from experiments.compare.runs import best_first, find, read
from experiments.shared.arguments import count
from experiments.shared.files import command, refuse

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Milliseconds until nothing waits to be drawn and the next frame has been shown.
FILTER = """async () => {
  const start = performance.now(), before = performance.getEntriesByName("drawn curves").length;
  document.querySelector(".chip").click();
  const frame = () => new Promise(requestAnimationFrame);
  while (performance.getEntriesByName("drawn curves").length === before) await frame();
  await frame();
  return performance.now() - start;
}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Open a report some times and print what it takes."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.report.bench", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a report (default: one of runs that are made)")
    parser.add_argument("--runs", type=count, default=200, help="how many (default: 200)")
    parser.add_argument("--numbers", type=count, default=10_000, help="logged numbers per run (default: 10000)")
    parser.add_argument("--repeats", type=count, default=5)
    options = parser.parse_args(arguments)
    path = browser()
    if path is None:
        return refuse(f"no browser: $STU_BROWSER is not set, and {', '.join(BROWSERS)} are not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or made(Path(folder), options.runs, options.numbers)
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB; niceness {os.nice(0)}, load {os.getloadavg()[0]:.1f}")
        taken = [measured(path, file.absolute()) for _ in range(options.repeats)]
    for what in taken[0]:
        values = [one[what] for one in taken]
        print(f"{what}: least {min(values):.0f} ms, median {statistics.median(values):.0f} ms")
    return 0


def browser() -> str | None:
    """$STU_BROWSER, or a Chromium on PATH."""
    places = (os.environ.get("STU_BROWSER"), *map(shutil.which, BROWSERS))
    return next((place for place in places if place), None)


def made(home: Path, runs: int, numbers: int) -> Path:
    """The report of runs that are made."""
    make_runs(home / "runs", runs, numbers)
    rows = best_first(map(read, find([home / "runs"])))
    write(rows, grouped(rows), home / "report.html")
    return home / "report.html"


def measured(path: str, file: Path) -> dict[str, float]:
    """Milliseconds until the tables and the first figure are there, until a filter has taken effect, and until Plotly
    has taken over a figure; "work": of these the CPU time of the page's main thread, which other processes leave alone.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page: Any = chromium.new_page(viewport={"width": 1366, "height": 900})
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def work() -> float:
            values = session.send("Performance.getMetrics")["metrics"]
            return 1000 * next(float(one["value"]) for one in values if one["name"] == "TaskDuration")

        page.goto(file.as_uri())
        page.wait_for_function("performance.getEntriesByName('ready').length")
        paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        tables = page.wait_for_function(paint).json_value()
        page.locator("#curves").scroll_into_view_if_needed()
        page.wait_for_function("performance.getEntriesByName('drawn curves').length")
        figure = page.evaluate("performance.getEntriesByName('drawn curves')[0].startTime")
        taken = {"tables": tables, "first figure": figure, "work until then": work()}
        before = work()
        taken |= {"a filter": page.evaluate(FILTER), "work of a filter": work() - before}
        page.evaluate("scrollTo(0, 0)")
        page.locator("#curves").scroll_into_view_if_needed()
        page.evaluate("performance.mark('pointed')")
        page.locator("#curves .plot").hover()
        page.wait_for_function("performance.getEntriesByName('alive curves').length")
        mark = "performance.getEntriesByName('{}')[0].startTime"
        taken["Plotly"] = page.evaluate(f"{mark.format('alive curves')} - {mark.format('pointed')}")
        chromium.close()
    return taken


if __name__ == "__main__":
    command(main)
