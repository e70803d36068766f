"""The command line: python -m experiments.random_filters. See --help."""

from experiments.random_filters import study
from experiments.shared.study import Study

raise SystemExit(Study(study).main())
