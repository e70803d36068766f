"""The command line: python -m experiments.memory_horizon. See --help."""

from experiments.memory_horizon import study
from experiments.shared.files import command
from experiments.shared.study import Study

command(Study(study).main)
