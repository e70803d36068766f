"""The command line: python -m experiments.length_generalization. See --help."""

from experiments.length_generalization import study
from experiments.shared.files import command
from experiments.shared.study import Study

command(Study(study).main)
