"""What the lowest release of PyTorch cannot do yet."""

import pytest
import torch

newer_than_2_7 = pytest.mark.skipif(
    torch.__version__ < "2.8", reason="PyTorch 2.7 has not all that this needs: make test has a newer one"
)
