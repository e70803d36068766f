"""The command line: python -m experiments.spectral_gap. See --help."""

import sys

from experiments.spectral_gap.study import STUDY

if __name__ == "__main__":
    sys.exit(STUDY.main())
