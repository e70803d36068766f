"""What `--help` prints, made from the files in conf/; imports nothing slow, so that it appears at once."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill

CONF = Path(__file__).resolve().parents[2] / "conf"

TEXTS = ("prompt",)  # keys whose value is a text as it stands, in quotes or without

GROUPS = {
    "task": "what is learned",
    "model": "what learns it",
    "experiment": "presets: several choices at once",
    "tuned": "what a preset sets for each model, chosen by both: <experiment>/<model>",
    "sweep": "what -m varies: spaces of jobs, to be listed or searched",
    "pretrain": "what it learns before, from the task's own inputs",
    "optimizer": "how it learns",
    "precondition": "a fixed combination of outputs to predict, for real targets at every step",
    "trainer": "where and how long: arguments of lightning.Trainer",
    "callbacks": "what a run may have besides; several: callbacks=[ema,early_stopping]",
    "logger": "where metrics are logged besides metrics.csv; several: logger=[wandb,tensorboard]",
    "paths": "where runs and data are stored",
}

PRESETS = {"experiment", "tuned", "sweep"}  # groups that set keys elsewhere, and have none of their own
WIDTH = 14  # of the column of their names in the help
BY_OTHERS = {"tuned"}  # groups whose option is chosen by those of others

EXAMPLES = """\
  python train.py model=stu task=lra_listops                       the full task
  python train.py experiment=quick                                 a few minutes on two CPU cores
  python train.py experiment=lra/listops/s5                        a model with the settings of its authors
  python train.py model=transformer task=lds optimizer.lr=3e-4     any key can be changed
  python train.py task=lds figures.when=validations                figures during training, not only at the end
  python train.py task=language mode=generate prompt="The "        a trained model continues a text
  python train.py -m model=stu,transformer seed=0,1,2 task=lds     a sweep: every combination
  python train.py -m sweep=stu task=lds                            a search of the best settings"""


def answer() -> None:
    """Print the help and exit, if that is what was asked for."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(text())
        raise SystemExit(0)


def at_home(argument: str) -> str:
    """`key=~/x` with the folder that is meant: shells leave a ~ after = as it is, and Hydra's grammar has none."""
    key, _, text = argument.partition("=")
    if key in TEXTS:
        quoted = re.fullmatch(r"""(['"])(?:(?!\1)[^\\]|\\.)*\1""", text, re.DOTALL)
        return argument if quoted else f"{key}={as_text(text)}"
    if {"'", '"'} & set(argument):
        return argument
    return re.sub(r"(?<=[=,])~[^,\s]*", lambda path: f"'{os.path.expanduser(path[0])}'", argument)


def as_text(value: str) -> str:
    """A text in quotes, so that Hydra's grammar and OmegaConf give it back as it is."""
    for special in (r"\$\{", "'"):
        value = re.sub(rf"(\\*)({special})", r"\1\1\\\2", value)  # with a backslash, and those before it twice
    value = re.sub(r"(\\+)\Z", r"\1\1", value)
    return f"'{value}'"


def text() -> str:
    """The groups, each with its meaning and its options, and examples."""
    shown = {name: meaning for name, meaning in GROUPS.items() if name not in BY_OTHERS}
    groups = [f"  {name:<{WIDTH}}{meaning}\n{_indented(folded(options_of(name)))}" for name, meaning in shown.items()]
    return "\n".join(
        [
            "Train and compare sequence models.   python train.py [GROUP=OPTION ...] [KEY=VALUE ...]",
            "\nGroups:",
            *groups,
            "\nExamples:",
            EXAMPLES,
            "\nA whole configuration:                python train.py ... --cfg job --resolve",
            "Tracebacks instead of one-line errors: HYDRA_FULL_ERROR=1",
        ]
    )


def _indented(names: Sequence[str]) -> str:
    margin = " " * (2 + WIDTH)
    return fill(", ".join(names), 118, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def folded(names: Iterable[str]) -> list[str]:
    """Names as a shell abbreviates them, where folders have the same files: a, b/{c,d}/{e,f}."""
    plain: list[str] = []
    inside: dict[str, list[str]] = {}  # folder → names in it
    for name in names:
        folder, slash, rest = name.partition("/")
        if slash:
            inside.setdefault(folder, []).append(rest)
        else:
            plain.append(name)
    sharing: dict[tuple[str, ...], list[str]] = {}  # names in them → folders
    for folder, rests in inside.items():
        sharing.setdefault(tuple(folded(rests)), []).append(folder)
    return [*plain, *(f"{_either(folders)}/{_either(rests)}" for rests, folders in sharing.items())]


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


def options_of(group: str) -> list[str]:
    """The options of a configuration group; those in folders as folder/name."""
    files = (CONF / group).rglob("*.yaml")
    return sorted(f.relative_to(CONF / group).with_suffix("").as_posix() for f in files if not f.name.startswith("_"))
