"""The command line: python -m experiments.random_filters. See --help."""

import sys

from experiments.random_filters.study import STUDY

if __name__ == "__main__":
    sys.exit(STUDY.main())
