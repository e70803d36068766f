"""The command line: python -m experiments.spectral_gap. See --help."""

from experiments.shared.study import Study
from experiments.spectral_gap import study

raise SystemExit(Study(study).main())
