"""The command line: python -m experiments.preconditioning. See --help."""

from experiments.preconditioning import study
from experiments.shared.files import command
from experiments.shared.study import Study

command(Study(study).main)
