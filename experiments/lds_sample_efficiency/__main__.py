"""The command line: python -m experiments.lds_sample_efficiency. See --help."""

import sys

from experiments.lds_sample_efficiency.study import STUDY

if __name__ == "__main__":
    sys.exit(STUDY.main())
