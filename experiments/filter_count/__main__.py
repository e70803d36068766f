"""The command line: python -m experiments.filter_count. See --help."""

from experiments.filter_count import study
from experiments.shared.study import Study

raise SystemExit(Study(study).main())
