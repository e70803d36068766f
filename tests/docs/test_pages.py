"""Every model and every task has its section, and what it has from conf/ is what stands there."""

import pytest
import yaml

from stu.cli.usage import options_of
from tests import pages
from tests.generate import END, README, START, cells

FACTS = cells(README.read_text(encoding="utf-8").partition(START)[2].partition(END)[0])
GROUPS = pytest.mark.parametrize("group", sorted(pages.PAGES))


@GROUPS
def test_every_option_has_its_section_and_no_other(group: str):
    page = pages.PAGES[group]
    found = pages.sections(page.read_text(encoding="utf-8"))
    missing, unknown = sorted(set(options_of(group)) - set(found)), sorted(set(found) - set(options_of(group)))
    assert not missing, f"docs/{page.name} lacks {missing}: make generate begins their sections"
    assert not unknown, f"docs/{page.name} has sections on {unknown}, of which conf/{group} has no file: remove them"
    assert len(found) == len(set(found))


@GROUPS
def test_what_is_generated_is_up_to_date(group: str):
    text = pages.PAGES[group].read_text(encoding="utf-8")
    assert pages.updated(text, group, FACTS) == text, f"make generate writes docs/{pages.PAGES[group].name}"


@GROUPS
def test_every_section_has_prose_of_its_own(group: str):
    for section in pages.PAGES[group].read_text(encoding="utf-8").split("\n## `")[1:]:
        name, _, rest = section.partition("`\n")
        assert len(rest.partition("<!--")[0].split()) >= 6, name


def test_a_new_option_gets_a_section():
    text = pages.PAGES["model"].read_text(encoding="utf-8")
    without = text[: text.index("## `lru`")] + text[text.index("## `mamba2`") :]
    assert pages.sections(without) == [name for name in pages.sections(text) if name != "lru"]
    renewed = pages.updated(without, "model", FACTS)
    assert set(pages.sections(renewed)) == set(pages.sections(text))
    assert "\n## `lru`\n\nLRU: a diagonal complex recurrence" in renewed
    assert "[2303.06349](https://arxiv.org/abs/2303.06349)" in renewed
    assert pages.updated(renewed, "model", FACTS) == renewed


def test_options_with_their_comments():
    options = {option.key: option for option in pages.options("model", "lru")}
    assert options["model.mixer.r_min"] == (
        "model.mixer.r_min",
        "0.9",
        "radii of the ring, nearer to 1 for longer memory",
    )
    assert options["model.mixer.r_max"].meaning == ""
    assert "model.mixer.r_min`<br>`model.mixer.r_max" in {option.key for option in pages.merged("model", "lru")}
    assert not [key for key in options if "_target_" in key or "groups." in key or "match" in key]
    inherited = {option.key: option.meaning for option in pages.merged("model", "stu_ar")}
    assert inherited["model.mixer.k_y"] == "output lags; recurrence says how they enter"
    attention = {option.key: option.meaning for option in pages.merged("model", "transformer")}
    assert attention["model.mixer.dropout"] == "of attention weights"
    assert attention["model.mixer.positions"] == "that of `model.positions`"
    system = {option.key for option in pages.options("task", "pendulum")}
    assert {"task.data.system.gravity", "task.data.dt", "task.threshold"} <= system


@GROUPS
def test_every_option_has_a_meaning(group: str):
    for name in [*options_of(group), *(["_backbone"] if group == "model" else [])]:
        assert not [option.key for option in pages.merged(group, name) if not option.meaning], name


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        ("lra_listops", "Trivial baselines: majority 17.4 %, first token 35.2 % (accuracy)."),
        ("lra_pathx256", "`data.prepare` shows the trivial baselines."),  # data/README.md has another table of it
        ("lds", "truth 5.87e-16 (mse); trivial are *zero*, *static*, *fir*."),
    ],
)
def test_baselines_are_those_of_the_cards(task: str, shown: str):
    assert pages.baselines(task, getattr(pages.task_class(task), "trivial", None)).endswith(shown)


@GROUPS
def test_no_option_is_left_out(group: str):
    """Every key of the files that is no constructor call is in the table."""

    def leaves(node: object, prefix: str):
        if not isinstance(node, dict):
            yield prefix
            return
        for key, value in node.items():
            if key not in pages.HIDDEN:
                yield from leaves(value, f"{prefix}.{key}" if prefix else key)

    for name in options_of(group):
        text = pages.file(group, name).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        whole = "# @package _global_" in text
        found = set(leaves(content, "" if whole else group)) - {""}
        assert found <= {option.key for option in pages.options(group, name)}, name


def test_a_task_of_a_new_module_is_added_to_the_reference():
    text = pages.REFERENCE.read_text(encoding="utf-8")
    assert pages.referenced(text) == text, "make generate adds to docs/api/data.md"
    start = text.index("## MQAR")
    without = text[:start] + text[text.index("\n## ", start) + 1 :]
    assert pages.referenced(without).endswith(
        f"## `mqar`\n\n::: data.memory.mqar\n{pages.HEADLESS}      members:\n        - MQARData\n"
    )
