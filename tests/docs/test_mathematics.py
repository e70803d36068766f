"""What docs/mathematics.md says in numbers is what docs/figures.py computes, and what the studies found."""

import re

import pytest

from docs import figures
from tests.runs import ROOT

TEXT = figures.TEXT.read_text(encoding="utf-8")
SLOW = {"least", "states"}
TABLES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in figures.TABLES]
# What the page says of a study, and what the study's README says.
QUOTED = {
    "To an error of 0.01 the STU takes 126 sequences": ("lds_sample_efficiency", "To 0.01 the STU takes 126 sequences"),
    "is not there after 1,000": ("lds_sample_efficiency", "the LRU is not there after 1,000"),
    "levels off at K ≥ 15": ("filter_count", "levels off at K ≥ 15"),
    "Random ones are of no use": ("random_filters", "Random filters are of no use"),
    "by a factor of 40 or more": ("spectral_gap", "by a factor of 40 or more"),
    "of copying it learns 16 steps, where LRU, S4D and attention learn 256": ("memory_horizon", "| `stu` | 16 |"),
    "1/7 of the time of its literal equations for one branch": ("speed", "0.230 s | 7.4 |"),
    "1/22 for two branches": ("speed", "0.592 s | 22.0 |"),
}


@pytest.mark.parametrize("name", TABLES)
def test_its_tables_are_computed(name: str):
    start, end = figures.marks(name)
    shown = TEXT.partition(start)[2].partition(end)[0].strip()
    rel = 0.6 if name == "states" else 0.1  # those of the states are rounding errors, which differ between machines
    assert numbers(shown) == pytest.approx(numbers(figures.TABLES[name]()), rel=rel, abs=5e-15), figures.__doc__


def numbers(table: str) -> list[float]:
    """All numbers of a table."""
    return [float(number) for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", table.replace(",", ""))]


@pytest.mark.parametrize("claim", QUOTED)
def test_it_quotes_the_studies(claim: str):
    study, found = QUOTED[claim]
    assert claim in re.sub(r"\s+", " ", TEXT)
    assert found in (ROOT / "experiments" / study / "README.md").read_text(encoding="utf-8")


def test_its_figures_are_there_and_small():
    shown = re.findall(r"!\[(.*?)\]\((figures/\w+\.svg)\)", TEXT)
    assert {path for _, path in shown} == {f"figures/{path.name}" for path in (figures.HERE / "figures").iterdir()}
    assert len(shown) == 14
    for description, path in shown:
        assert len(description.split()) > 5, path
        assert (figures.HERE / path).stat().st_size <= 60_000, path
        assert "<svg" in (figures.HERE / path).read_text(encoding="utf-8")


def test_every_file_it_names_exists():
    for path in re.findall(r"`((?:stu|tests|experiments|docs)/[\w/.-]+)`", TEXT):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"`experiments\.(\w+)`", TEXT):
        assert (ROOT / "experiments" / module).is_dir(), module
