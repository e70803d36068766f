"""The command line: python -m experiments.lds_sample_efficiency. See --help."""

from experiments.lds_sample_efficiency import study
from experiments.shared.files import command
from experiments.shared.study import Study

command(Study(study).main)
