"""A small trainer for small models, which measures an error at log-spaced steps."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Curve(NamedTuple):
    """Errors after so many sequences, at log-spaced counts; inf from where training diverged."""

    samples: list[int]
    errors: list[float]


def checkpoints(steps: int, per_decade: int = 10) -> list[int]:
    """Log-spaced counts 1 … steps, without repetitions, the last included."""
    count = round(per_decade * math.log10(steps)) + 1
    return sorted({round(float(step)) for step in np.geomspace(1, steps, count)})


def fit(
    module: nn.Module,
    sample: Callable[[int], tuple[Tensor, Tensor]],
    error: Callable[[nn.Module], float],
    *,
    lr: float,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    decay: float = 0.0,
    enough: float = -math.inf,
) -> Curve:
    """Train with AdamW, without weight decay; `sample(i)` is the batch of step i, inputs and targets, (B, …) each.

    lr: constant, except that over the last `decay` (a share) of the steps it falls linearly to zero. error: of the
    module in its present state, in eval mode and without gradients, at `checkpoints(steps)`. Training ends at an error
    of `enough` or less, and at a loss that is not finite, after which all errors are inf.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, fused=True)
    curve, done, finite = Curve([], []), 0, True
    for count in checkpoints(steps):
        module.train()
        while done < count and finite:
            inputs, targets = sample(done)
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps - done) / (decay * steps)) if decay else lr
            value = loss(module(inputs), targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            done, finite = done + 1, math.isfinite(value.item())
        if finite:
            module.eval()
            with torch.no_grad():
                measured = error(module)
            finite = math.isfinite(measured)
        curve.samples.append(count * len(inputs))
        curve.errors.append(measured if finite else math.inf)
        if curve.errors[-1] <= enough:
            break
    return curve
