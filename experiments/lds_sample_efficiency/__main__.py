"""The command line: python -m experiments.lds_sample_efficiency. See --help."""

from experiments.lds_sample_efficiency import study
from experiments.shared.study import Study

raise SystemExit(Study(study).main())
