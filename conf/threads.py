"""How threads wait for each other. To be settled before PyTorch is imported, which reads it then."""

import os
import sys


def wait_briefly() -> None:
    """Let a thread without work look for some for a few microseconds, then sleep, unless the environment decides.

    PyTorch's threads spin for milliseconds by themselves, which on a machine with other work takes the core from whom
    they wait for; to sleep at once (OMP_WAIT_POLICY=PASSIVE) costs a wake-up at each operation. The first variable is
    libgomp's (Linux). The second is of LLVM's OpenMP (macOS), which counts in milliseconds: there they sleep at once.

    Nothing is set behind an import of PyTorch, where it would have no effect.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        os.environ.setdefault("KMP_BLOCKTIME", "0")
