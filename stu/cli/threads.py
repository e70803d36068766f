"""How PyTorch's threads wait for work; to be set before PyTorch is imported, which reads it then."""

import os
import sys


def wait_briefly() -> None:
    """Let idle threads spin for a few microseconds, then sleep, unless the environment decides otherwise.

    By default they spin for milliseconds, which on a machine with other work takes cores from the threads that still
    compute; sleeping at once (OMP_WAIT_POLICY=PASSIVE) costs a wake-up at every operation. The first variable is
    libgomp's (Linux). The second is that of LLVM's OpenMP (macOS), which counts in milliseconds: there they sleep at
    once.

    Nothing is set after PyTorch has been imported, when it would have no effect.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        os.environ.setdefault("KMP_BLOCKTIME", "0")
