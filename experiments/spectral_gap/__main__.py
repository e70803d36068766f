"""The command line: python -m experiments.spectral_gap. See --help."""

from experiments.shared.files import command
from experiments.shared.study import Study
from experiments.spectral_gap import study

command(Study(study).main)
