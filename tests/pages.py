"""What docs/models.md and docs/tasks.md have from conf/: in every section, what stands between its two marks.

The rest of a section is prose, which nothing here changes. `make generate` writes the marked parts, and begins a
section for what has none yet, also in docs/api/data.md.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from stu.cli.usage import CONF, folded, options_of
from stu.task import Task
from tests.runs import ROOT

PAGES = {"model": ROOT / "docs" / "models.md", "task": ROOT / "docs" / "tasks.md"}
NEW = "<!-- new sections: make generate -->\n"
LINE = re.compile(r"( *)(?:- )?([A-Za-z]\w*):(?: +([^#\s].*?))?(?: +# (.*))?")
HIDDEN = {"defaults", "_target_", "_partial_", "groups"}  # no options, nor what is in them
REFERENCE = ROOT / "docs" / "api" / "data.md"
HEADLESS = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
CARDS = ROOT / "data" / "README.md"
PUBLISHED = ROOT / "experiments" / "compare" / "published.json"
ARENA = {
    "lra_listops": "ListOps", "lra_text": "Text", "lra_retrieval": "Retrieval", "lra_image": "Image",
    "cifar_color": "in colour", "lra_pathfinder": "Pathfinder", "lra_pathx": "Path-X",
}  # fmt: skip


class Option(NamedTuple):
    """One key of a configuration file: its full name, its value as written, and the comment beside it."""

    key: str
    value: str
    meaning: str


def updated(text: str, group: str, facts: Mapping[str, Sequence[str]]) -> str:
    """A page whose marked parts are those of conf/ now. facts: the cells of every model's row in README."""
    for name in [*options_of(group), *(["_backbone"] if group == "model" else [])]:
        start, end = marks(group, name)
        if start not in text:
            text = text.replace(NEW, f"## `{name}`\n\n{linked(heading(group, name))}.\n\n{start}{end}\n{NEW}")
        before, _, after = text.partition(start)
        text = before + start + block(group, name, facts.get(name, ())) + end + after.partition(end)[2]
    start, end = marks(group, "published")
    if start in text and PUBLISHED.exists():
        before, _, after = text.partition(start)
        text = before + start + published() + end + after.partition(end)[2]
    return text


def referenced(text: str) -> str:
    """The reference of data with all tasks and their data: those of a new module get a section at its end."""
    for name in options_of("task"):
        targets = re.findall(r"^ *_target_: (data\.\S+)\.(\w+)$", file("task", name).read_text(encoding="utf-8"), re.M)
        for module in dict.fromkeys(module for module, _ in targets):
            if f"::: {module}\n" not in text:
                members = "".join(f"        - {member}\n" for found, member in targets if found == module)
                text += f"\n## `{name}`\n\n::: {module}\n{HEADLESS}      members:\n{members}"
    return text


def marks(group: str, name: str) -> tuple[str, str]:
    """The lines between which a section's generated part stands."""
    return f"<!-- {group} {name}: make generate -->\n", f"<!-- end of {name} -->\n"


def sections(text: str) -> list[str]:
    """The names of a page's sections, and those of its marked parts."""
    return re.findall(r"^## `(\w+)`$", text, re.MULTILINE)


def block(group: str, name: str, facts: Sequence[str]) -> str:
    """The generated part of a section."""
    shown = {"model": model_facts, "task": task_facts}[group](name, facts) if name != "_backbone" else []
    cells = [[f"`{key}`", f"`{value}`" if value else "", meaning] for key, value, meaning in merged(group, name)]
    rows = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
    options = ["| option | default | meaning |", "| --- | --- | --- |", *rows] if rows else []
    return "\n" + "\n\n".join(["\n".join(part) for part in (*shown, options) if part]) + "\n\n"


def model_facts(name: str, facts: Sequence[str]) -> list[list[str]]:
    """Cost, command, presets, and the model whose other options it has."""
    _, _, parameters, work, state = facts
    base = next((base for base in bases("model", name) if not base.startswith("_")), "")
    return [
        [f"{parameters} parameters; work in L: {work}; state: {state}."],
        ["```bash", f"python train.py model={name} task=lds", "```"],
        [f"Presets: {presets('model', name)}."] if presets("model", name) else [],
        [f"Its other options are those of [`{base}`](#{base})."] if base else [],
    ]


def task_facts(name: str, _: Sequence[str]) -> list[list[str]]:
    """Sizes, metric, trivial baselines, commands, presets."""
    values = {option.key: option.value for option in options("task", name)}
    sizes = " / ".join(count(values.get(f"task.data.{split}", "all")) for split in ("train", "val", "test"))
    task, steps = task_class(name), count(values["task.seq_len"])
    scored = f"{task.monitor}, {'larger' if task.mode == 'max' else 'smaller'} is better"
    shown = baselines(name, task.trivial)
    return [
        [f"{sizes} training, validation and test sequences of up to {steps} steps; {scored}. {shown}"],
        ["```bash", f"python -m data.prepare task={name}", f"python train.py model=stu task={name}", "```"],
        [f"Presets: {presets('task', name)}."] if presets("task", name) else [],
    ]


def published() -> str:
    """The published results of the Long Range Arena, with their sources as letters below the table."""
    content = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    sources = {key: letter for letter, key in zip("abcdefghijklmnopqrstuvwxyz", content["sources"], strict=False)}
    rows = [
        [
            result["name"],
            *(result["accuracy"].get(task, "") for task in ARENA),
            sources[result["source"]] + ", second hand" * result["second_hand"],
        ]
        for result in content["results"]
    ]
    lines = [["model", *ARENA.values(), "source"], ["---", *["---:"] * len(ARENA), "---"], *rows]
    notes = [f"{letter}: {linked(content['sources'][key])}." for key, letter in sources.items()]
    remarks = {f"{r['name']}: {remark}." for r in content["results"] for remark in r["remark"].values()}
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"\n{table}\n{' '.join([*notes, *sorted(remarks)])}\n\n"


def count(value: str) -> str:
    """A number with its thousands apart, a share in percent, null for all others; another value as it is."""
    if re.fullmatch(r"0\.\d+", value):
        return f"{float(value):.0%}".replace("%", " %")
    return f"{int(value):,}" if value.isdecimal() else {"null": "all other"}.get(value, value)


def baselines(name: str, trivial: Sequence[str] | None) -> str:
    """The baselines of a task, from its card, and which are trivial; None: all are."""
    cards = CARDS.read_text(encoding="utf-8").partition("\n## Cards\n")[2].partition("\n## ")[0]
    found = re.search(rf"^\| `{name}` \|(?:[^|]*\|){{3}} (.*?) \|", cards, re.MULTILINE)
    if not found:
        return "`data.prepare` shows the trivial baselines."
    if trivial is None:
        return f"Trivial baselines: {found[1]}."
    return f"Baselines: {found[1]}; trivial are {', '.join(f'*{one}*' for one in trivial)}."


def task_class(name: str) -> type[Task]:
    """What a file of conf/task makes."""
    target = re.search(r"^_target_: (\S+)\.(\w+)$", file("task", name).read_text(encoding="utf-8"), re.MULTILINE)
    assert target is not None, name
    made: type[Task] = getattr(import_module(target[1]), target[2])
    return made


def presets(group: str, name: str) -> str:
    """The presets that choose an option, abbreviated as a shell does."""
    chosen = re.compile(rf"^  - override /{group}: {name}$", re.MULTILINE)
    files = {preset: file("experiment", preset).read_text(encoding="utf-8") for preset in options_of("experiment")}
    found = [preset for preset, text in files.items() if chosen.search(text)]
    return ", ".join(f"`experiment={each}`" for each in folded(found))


def merged(group: str, name: str) -> Iterator[Option]:
    """The options of a file, each with a meaning where there is one.

    Without a comment, one has that of the file it derives from, or is what its value refers to, or shares the comment
    of the one before.
    """
    inherited = {option.key: option.meaning for base in bases(group, name) for option in options(group, base)}
    last = Option("", "", "")
    for option in options(group, name):
        refers = re.fullmatch(r"\$\{([\w.]+)\}", option.value)
        meaning = option.meaning or inherited.get(option.key, "") or (f"that of `{refers[1]}`" if refers else "")
        if not meaning and parent(option.key) == parent(last.key):
            last = Option(f"{last.key}`<br>`{option.key}", f"{last.value}`<br>`{option.value}", last.meaning)
            continue
        if last.key:
            yield last
        last = option._replace(meaning=meaning)
    if last.key:
        yield last


def options(group: str, name: str) -> list[Option]:
    """All options of a file, with the comments beside them."""
    text = file(group, name).read_text(encoding="utf-8")
    above = [] if "# @package _global_" in text else [(-1, group)]  # the keys around a line, with their indents
    found = []
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            continue
        indent, key, value, meaning = len(match[1]), match[2], match[3] or "", match[4] or ""
        above = [outer for outer in above if outer[0] < indent]
        hidden = HIDDEN & {outer for _, outer in above}
        above.append((indent, key))
        if not hidden and key not in HIDDEN - {"groups"} and (value or meaning):
            found.append(Option(".".join(part for _, part in above), value, meaning))
    return found


def bases(group: str, name: str) -> list[str]:
    """The files that a file derives from."""
    text = file(group, name).read_text(encoding="utf-8")
    return re.findall(rf"^  - (?!_self_)(\w+)(?:@{group})?$", text, re.MULTILINE)


def parent(key: str) -> str:
    """The node that a key is in."""
    return key.rpartition(".")[0]


def file(group: str, name: str) -> Path:
    """The file of an option."""
    return CONF / group / f"{name}.yaml"


def heading(group: str, name: str) -> str:
    """What an option is: the comments at the head of its file, up to the work of a model."""
    return head(file(group, name)).partition(" Work: ")[0].removesuffix(".")


def head(file: Path) -> str:
    """The comments at the head of a file, as one line."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines if not line.startswith("# @package"))


def linked(text: str) -> str:
    """The text, with the numbers of arXiv as links."""
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", text)
