"""The command line: python -m experiments.random_filters. See --help."""

from experiments.random_filters import study
from experiments.shared.files import command
from experiments.shared.study import Study

command(Study(study).main)
