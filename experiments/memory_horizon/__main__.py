"""The command line: python -m experiments.memory_horizon. See --help."""

import sys

from experiments.memory_horizon.study import STUDY

if __name__ == "__main__":
    sys.exit(STUDY.main())
