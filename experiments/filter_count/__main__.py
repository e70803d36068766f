"""The command line: python -m experiments.filter_count. See --help."""

import sys

from experiments.filter_count.study import STUDY

if __name__ == "__main__":
    sys.exit(STUDY.main())
