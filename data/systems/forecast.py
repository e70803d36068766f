"""Forecasts of a nonlinear dynamical system: the next observation at every step, and a rollout at the end.

n trajectories, T samples, B batch, L length, H horizon, C observed channels, F channels of the force (0 or 1), P lags

    samples   x_0 x_1 x_2 … x_L      normalised observations, then the force, where there is one
    inputs    x_0 x_1 … x_{L−1}
    targets   x_1 x_2 … x_L

In a rollout a model is given the first `context` inputs of a test sequence and then its own predictions in place of
observations. The force is always given: it is known, not predicted.

Sources: Vlachas et al., "Backpropagation algorithms and reservoir computing in recurrent neural networks for the
forecasting of complex spatiotemporal dynamics" (1910.05266), section 3.3, for the metrics of a rollout; Pathak et al.,
"Hybrid forecasting of chaotic processes" (1803.04779), for the threshold of 0.4.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, R2Score

from data.store.arrow import read_arrays, write_arrays
from data.store.cache import tracked
from data.store.stored import StoredData
from data.store.synthetic import Reals, uniforms
from data.systems.dynamics import Dynamics, simulate
from data.systems.identification import lagged, least_squares
from data.systems.system import first_sequences, mean_square
from stu.encoders import LinearEncoder
from stu.errors import require
from stu.files import write_atomically
from stu.preprocessing import Numbers, Preprocessing
from stu.resources import require_memory
from stu.task import Regression, Rollout, Splits

VERSION = 1  # increment when the same options produce different trajectories, or the same ones different files

BLOCK = 64  # trajectories integrated together; always this many, so that none depends on how many are requested
STAGES = 16  # of the integration, each a state
BASELINE_STEPS = 2**15  # that the baselines are fitted to, and tested on
LAGS = {"linear, 1 lag": 1, "linear, 8 lags": 8}  # of the linear baselines, by their names
LIMIT = 1e3  # standard deviations: a rollout beyond this, or not a number, counts as this far away

Samples = NDArray[np.float32]


@final
@dataclass(frozen=True, kw_only=True)
class TrajectoryData(StoredData["Windows"]):
    """Trajectories of one system, cut into sequences, normalised by the statistics of the training split.

    A trajectory depends on (seed, split, index) and the options of the simulation alone; no two splits share one.
    conf/task/lorenz63.yaml explains the options. Trajectories are simulated once and stored, not only to save a quarter
    of a minute: where a library or a processor rounds differently, chaos turns the same equations into different
    numbers, and all runs of a comparison should see the same.
    """

    system: Dynamics
    seq_len: int
    dt: float
    transient: float = 0.0
    force: float = 0.0
    hold: int = 10
    windows: int = 8
    tolerance: float = 1e-9
    train: int = 1_000
    val: int = 200
    test: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        require(isinstance(self.system, Dynamics), "system", self.system, "must be a system of data.systems.dynamics")
        for name in ("seq_len", "hold", "windows", *Splits._fields):
            self.require_least(name, 1)
        require(0 < self.dt < math.inf, "dt", self.dt, "must be above 0")
        for name in ("transient", "force"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must be at least 0")
        require(1e-12 <= self.tolerance <= 1e-3, "tolerance", self.tolerance, "must be 1e-12 to 1e-3")
        require(0 <= self.seed < 2**128, "seed", self.seed, "must be at least 0 and below 2^128")
        self.require_room()

    def require_room(self) -> None:
        """Raise `OptionError` where the trajectories, or those that are simulated at once, do not fit in memory."""
        sample = 8 * 2 * self.inputs  # as it is simulated, and as it is normalised
        block = 8 * BLOCK * (self.system.states + self.inputs)
        sizes = {name: value for name, value in vars(self.system).items() if isinstance(value, int)}
        require_memory(STAGES * block, sizes)
        self.require_memory(block * (self.transient / self.dt), "transient", why=f" where dt={self.dt}")
        self.require_memory(8 * BLOCK * self.system.states * self.hold * (self.force > 0), "hold")
        require_memory(block * self.length, {"windows": self.windows, "seq_len": self.seq_len, **sizes})
        for split in Splits._fields:
            self.require_memory(sample * self.seq_len * getattr(self, split), split, "seq_len")

    def at_length(self, seq_len: int) -> "TrajectoryData":
        """Other sequences, cut from the same trajectories where they fit end to end, or else from as many new ones.

        So the units stay those of the training split, but for sampling errors where trajectories are new.
        """
        windows = max(1, self.windows * self.seq_len // seq_len)
        sizes = {split: math.ceil(getattr(self, split) / self.windows) * windows for split in Splits._fields}
        return replace(self, seq_len=seq_len, windows=windows, **sizes)

    @property
    def channels(self) -> int:
        """C."""
        return self.system.channels

    @property
    def inputs(self) -> int:
        """C + F."""
        return self.channels + (self.force > 0)

    @property
    def length(self) -> int:
        """T: the sequences of a trajectory, end to end, and the last target."""
        return self.windows * self.seq_len + 1

    @property
    def lyapunov_times(self) -> float | None:
        """One step in Lyapunov times, where the exponent is known."""
        exponent = None if self.force else self.system.lyapunov
        return None if exponent is None else exponent * self.dt

    @property
    def name(self) -> str:
        """The system's."""
        return type(self.system).__name__.lower()

    @property
    def spec(self) -> dict[str, object]:
        """The system and all options but the place of the cache."""
        options = {name: value for name, value in asdict(self).items() if name != "dir"}
        return {"version": VERSION, "name": type(self.system).__name__, **options}

    def trajectories(self, split: str, first: int) -> Reals:
        """Trajectories number `first` … first + BLOCK − 1, not normalised: (BLOCK, T, C + F)."""
        discarded = round(self.transient / self.dt)
        total = discarded + self.length
        hold = self.hold if self.force else total
        count = self.system.states + math.ceil(total / hold)
        numbers = uniforms(self.seed, Splits._fields.index(split), range(first, first + BLOCK), count).T
        start, levels = np.split(numbers, [self.system.states])  # (S, BLOCK) and (K, BLOCK)
        start, levels = self.system.start(start), self.force * (2 * levels - 1)
        states = simulate(self.system, start, levels, dt=self.dt, hold=hold, tolerance=self.tolerance)
        samples = self.system.observe(states[discarded:total].swapaxes(0, 1))  # (C, T, BLOCK)
        if self.force:
            forces = np.repeat(levels, hold, axis=0)[discarded:total]
            samples = np.concatenate((samples, forces[None]))
        return samples.T

    def build(self, folder: Path) -> None:
        """Simulate, and write train.arrow, val.arrow, test.arrow and units.json."""
        mean, std = np.zeros(self.inputs), np.ones(self.inputs)
        for split in Splits._fields:
            needed = math.ceil(getattr(self, split) / self.windows)
            with tracked(range(0, needed, BLOCK), f"{type(self.system).__name__} {split}, blocks") as starts:
                samples = np.concatenate([self.trajectories(split, first) for first in starts])[:needed]
            if split == "train":
                mean, std = samples.mean((0, 1)), samples.std((0, 1))
                std[std == 0] = 1
                require(bool(np.isfinite(std).all()), "dt", self.dt, f"{self.system} leaves the range of numbers")
                units = {"mean": mean.tolist(), "deviation": std.tolist()}
                write_atomically(folder / "units.json", json.dumps(units) + "\n")
            write_arrays(folder / f"{split}.arrow", {"samples": ((samples - mean) / std).astype(np.float32)})

    def units(self, folder: Path | None = None) -> tuple[Reals, Reals]:
        """Mean and standard deviation of the training split per channel, (C + F,) each, in the units of the system."""
        units = json.loads(((folder or self.prepare()) / "units.json").read_text())
        return np.array(units["mean"]), np.array(units["deviation"])

    def opened(self, folder: Path, split: str) -> "Windows":
        """The sequences of one split."""
        return Windows(self, folder, split)

    def probe(self, folder: Path) -> None:
        """Open all that is read of `folder`."""
        super().probe(folder)
        self.units(folder)


@final
class Windows:
    """One split of `TrajectoryData`, as `stu.task.Examples`, in memory-mapped form; pickled as its arguments.

    samples: (n, T, C + F).
    """

    lengths = None  # all sequences are equally long

    def __init__(self, data: TrajectoryData, folder: Path, split: str) -> None:
        self.data, self.folder, self.split = data, folder, split
        rows = read_arrays(folder / f"{split}.arrow")["samples"]  # (n, T (C + F))
        self.samples: Samples = rows.reshape(-1, data.length, data.inputs)

    def __reduce__(self) -> tuple[type["Windows"], tuple[TrajectoryData, Path, str]]:
        return Windows, (self.data, self.folder, self.split)

    def __len__(self) -> int:
        return int(getattr(self.data, self.split))

    def __getitem__(self, index: int, /) -> tuple[Samples, Samples]:
        """Inputs (L, C + F) and targets (L, C)."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in 0…{len(self) - 1}")
        trajectory, window = divmod(index, self.data.windows)
        start = window * self.data.seq_len
        samples = self.samples[trajectory, start : start + self.data.seq_len + 1].copy()  # torch wants it writable
        return samples[:-1], samples[1:, : self.data.channels]


@dataclass(frozen=True)
class Autoregression:
    """x_{t+1} = Σ_p W_p (x_{t−p}, u_{t−p}) + b over p < P, by least squares. weights: (P (C + F) + 1, C)."""

    lags: int
    weights: Reals

    @classmethod
    def fit(cls, inputs: np.ndarray, targets: np.ndarray, lags: int) -> "Autoregression":
        """From inputs (n, L, C + F) and targets (n, L, C), without the first P − 1 steps, which lack lags."""
        return cls(lags, least_squares(regressors(inputs, lags), targets[:, lags - 1 :]))

    def __call__(self, inputs: np.ndarray) -> Reals:
        """Predictions from step P on, (n, L, C + F) → (n, L − P + 1, C)."""
        return regressors(inputs, self.lags) @ self.weights

    def rollout(self, context: np.ndarray, known: np.ndarray) -> Reals:
        """From a context (n, T, C + F) under a known force (n, H − 1, F) → (n, H, C), within `LIMIT`."""
        recent = context[:, -self.lags :].astype(np.float64)
        predictions = [self(recent)]  # (n, 1, C)
        for step in range(known.shape[1]):
            latest = np.concatenate((predictions[-1], known[:, step : step + 1]), axis=2)
            recent = np.concatenate((recent[:, 1:], latest), axis=1)
            predictions.append(self(recent).clip(-LIMIT, LIMIT))
        return np.concatenate(predictions, axis=1)


def regressors(inputs: np.ndarray, lags: int) -> Reals:
    """Each step from P on with the P − 1 steps before it, and 1: (n, L, C + F) → (n, L − P + 1, P (C + F) + 1)."""
    complete = lagged(inputs, lags)[:, lags - 1 :, ::-1]  # (n, L − P + 1, P, C + F), the oldest step first
    rows = complete.swapaxes(2, 3).reshape(*complete.shape[:2], -1).astype(np.float64)
    return np.concatenate((rows, np.ones((*rows.shape[:2], 1))), axis=2)


def bounded(prediction: Tensor) -> Tensor:
    """Within `LIMIT`, so that a rollout that diverges has a finite error."""
    return prediction.nan_to_num(LIMIT, LIMIT, -LIMIT).clamp(-LIMIT, LIMIT)


def valid_steps(prediction: Tensor, target: Tensor, threshold: float) -> Tensor:
    """Steps before the normalised error first exceeds the threshold, H if it never does: (B, H, C) each → (B,).

    The normalised error is √(mean over channels of squared differences), in standard deviations of the training split.
    """
    error = (bounded(prediction) - target).square().mean(2).sqrt()  # (B, H)
    exceeded = error > threshold
    return torch.where(exceeded.any(1), exceeded.int().argmax(1), exceeded.shape[1])


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over steps and channels, (B, H, C) each → (B,)."""
    return (bounded(prediction) - target).square().mean((1, 2))


def last_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """At the horizon, mean over channels, (B, H, C) each → (B,)."""
    return squared_error(prediction[:, -1:], target[:, -1:])


@final
class MeanOf(MeanMetric):
    """Mean over sequences of `score` (predictions, targets) → (B,), times `unit`."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], unit: float = 1.0) -> None:
        super().__init__(nan_strategy="disable")  # no check, which would wait for a GPU: scores are `bounded`
        self.score, self.unit = score, unit

    def update(self, prediction: Tensor, target: Tensor) -> None:  # type: ignore[override]  # of pairs, not of values
        """Add some sequences."""
        super().update(self.score(prediction, target) * self.unit)


@final
class RelativeError(Metric):
    """Σ (prediction − target)² / Σ target², over all steps and channels of any shape.

    Targets have mean 0 over the training split, so 1 is the error of always predicting that mean.
    """

    error: Tensor
    power: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("error", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("power", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add predictions and targets of the same shape."""
        self.error += (bounded(prediction) - target).square().sum()
        self.power += target.square().sum()

    def compute(self) -> Tensor:
        """The ratio for all so far."""
        return self.error / self.power


class R2(R2Score):
    """The explained share of the variance, over all channels; NaN of fewer than two targets, which have none."""

    def __init__(self) -> None:
        super().__init__(multioutput="variance_weighted")

    def compute(self) -> Tensor:
        """The share for all so far."""
        return super().compute() if self.total >= 2 else torch.tensor(math.nan)


@final
class RolloutR2(R2):
    """R² over all steps of rollouts, (B, H, C) each."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add some sequences."""
        super().update(bounded(prediction).flatten(0, 1), target.flatten(0, 1))


@final
class Forecast(Regression):
    """Predict the next observation at every step; mean squared error in variances of the training split.

    context, horizon: steps that are given before a rollout, and steps of the rollout; None: half a sequence, and the
    rest of it. threshold: normalised error up to which a rollout is called valid.
    """

    data: TrajectoryData
    trivial = ("mean", "persistence", *LAGS)  # the others are rollouts
    forecasts = True
    rollout: Rollout

    def __init__(
        self,
        *,
        seq_len: int,
        causal: bool,
        context: int | None,
        horizon: int | None,
        threshold: float,
        data: TrajectoryData,
    ) -> None:
        super().__init__(seq_len=seq_len, causal=causal, data=data, d_output=data.channels)
        require(causal, "causal", causal, "must be true: the target of a step is the next step's input")
        given = (seq_len + 1) // 2 if context is None else context
        require(1 <= given <= seq_len, "context", context, f"must be 1 to {seq_len}, the steps of a sequence")
        rest = seq_len + 1 - given
        steps = rest if horizon is None else horizon
        require(1 <= steps <= rest, "horizon", horizon, f"must be 1 to {rest}, what remains of a sequence")
        require(0 < threshold < math.inf, "threshold", threshold, "must be above 0")
        self.threshold, self.rollout = threshold, Rollout(given, steps, self.rollout_metrics)

    def baselines(self) -> dict[str, float]:
        """Test errors of the mean, of persistence and of least squares on lags, at the next step and in rollouts.

        Least squares are fitted to training sequences, and scored at the steps that have all lags.
        """
        splits, count = self.datasets(), max(1, BASELINE_STEPS // self.seq_len)
        train, (inputs, targets) = first_sequences(splits.train, count), first_sequences(splits.test, count)
        context, stop = self.rollout.context, self.rollout.context + self.rollout.horizon - 1
        models = {name: Autoregression.fit(*train, lags) for name, lags in LAGS.items() if lags <= context}
        observed, known = inputs[..., : self.data.channels], inputs[:, context:stop, self.data.channels :]
        ahead = targets[:, context - 1 : stop]
        rollouts = {name: model.rollout(inputs[:, :context], known) for name, model in models.items()}
        return {
            "mean": mean_square(targets),
            "persistence": mean_square(targets - observed),
            **{name: mean_square(targets[:, model.lags - 1 :] - model(inputs)) for name, model in models.items()},
            "rollout: persistence": mean_square(ahead - observed[:, context - 1, None]),
            **{f"rollout: {name}": mean_square(ahead - predicted) for name, predicted in rollouts.items()},
        }

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]  # the units are in the data
        """Observations, and the force where there is one, in the units of the system; the next observation."""
        mean, std = (tuple(values.tolist()) for values in self.data.units())
        channels = self.data.channels
        return Preprocessing(Numbers(mean, std), Numbers(mean[:channels], std[:channels]))

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, C + F) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=self.data.inputs)

    def metrics(self) -> dict[str, Metric]:
        """The error, in variances of the training split and relative to the power of the targets, and R²."""
        return {**super().metrics(), "nmse": RelativeError(), "r2": R2()}

    def rollout_metrics(self) -> dict[str, Metric]:
        """Errors over the rollout and at its end, R², and how long it is valid, in steps and Lyapunov times."""
        valid = partial(valid_steps, threshold=self.threshold)
        metrics: dict[str, Metric] = {
            "rollout_mse": MeanOf(squared_error),
            "rollout_mse_last": MeanOf(last_squared_error),
            "rollout_nmse": RelativeError(),
            "rollout_r2": RolloutR2(),
            "rollout_valid_steps": MeanOf(valid),
        }
        if self.data.lyapunov_times is not None:
            metrics["rollout_valid_lyapunov"] = MeanOf(valid, unit=self.data.lyapunov_times)
        return metrics
