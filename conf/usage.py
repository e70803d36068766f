"""What `--help` says, made from the files in this folder; imports nothing slow, so the answer comes at once."""

import sys
from pathlib import Path

CONF = Path(__file__).parent

GROUPS = {
    "task": "what is learned",
    "model": "what learns it",
    "experiment": "presets: several choices at once",
    "optimizer": "how it learns",
    "trainer": "where and how long: arguments of lightning.Trainer",
    "logger": "who is told besides metrics.csv",
    "paths": "where runs and data lie",
}

EXAMPLES = """\
  python train.py model=stu task=lra_listops                       the full task
  python train.py experiment=quick                                 a few minutes on two CPU cores
  python train.py model=transformer task=lds optimizer.lr=3e-4     any key can be changed
  python train.py -m model=stu,transformer seed=0,1,2 task=lds     a sweep: every combination, one after another"""


def answer() -> None:
    """Print the help and end the program, if that is what was asked for."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(text())
        raise SystemExit(0)


def text() -> str:
    """The groups with a line each, and examples."""
    lines = [f"  {group:<12}{', '.join(options_of(group)):<43} {meaning}" for group, meaning in GROUPS.items()]
    return "\n".join(
        [
            "Train and compare sequence models.   python train.py [GROUP=OPTION ...] [KEY=VALUE ...]",
            "\nGroups:",
            *lines,
            "\nExamples:",
            EXAMPLES,
            "\nA whole configuration:                python train.py ... --cfg job --resolve",
            "Tracebacks instead of one-line errors: HYDRA_FULL_ERROR=1",
        ]
    )


def options_of(group: str) -> list[str]:
    """The options of a configuration group, nested ones as folder/name."""
    files = (CONF / group).rglob("*.yaml")
    return sorted(f.relative_to(CONF / group).with_suffix("").as_posix() for f in files if not f.name.startswith("_"))
