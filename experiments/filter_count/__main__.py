"""The command line: python -m experiments.filter_count. See --help."""

from experiments.filter_count import study
from experiments.shared.files import command
from experiments.shared.study import Study

command(Study(study).main)
