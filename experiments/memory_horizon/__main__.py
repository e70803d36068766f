"""The command line: python -m experiments.memory_horizon. See --help."""

from experiments.memory_horizon import study
from experiments.shared.study import Study

raise SystemExit(Study(study).main())
