"""The command line: python -m experiments.complex_spectra. See --help."""

from experiments.complex_spectra import study
from experiments.shared.files import command
from experiments.shared.study import Study

command(Study(study).main)
