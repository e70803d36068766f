"""Forecasts of a nonlinear dynamical system: the next observation at every step, and a free run at the end.

n trajectories, T samples, B batch, L length, H horizon, C observed channels, F channels of the force (0 or 1), P lags

    samples   x_0 x_1 x_2 … x_L      observations, normalised; behind them the force, where there is one
    inputs    x_0 x_1 … x_{L−1}
    targets   x_1 x_2 … x_L

In the free run a model is given the first `context` inputs of a test sequence and then, in place of observations, its
own predictions. The force is always given: it is known, not predicted.

Sources: Vlachas et al., "Backpropagation algorithms and reservoir computing in recurrent neural networks for the
forecasting of complex spatiotemporal dynamics" (1910.05266), section 3.3, for the metrics of a free run; Pathak et al.,
"Hybrid forecasting of chaotic processes" (1803.04779), for the threshold of 0.4.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, final

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, R2Score

from data.cache import cached, fingerprint, tracked
from data.dynamics import Dynamics, simulate
from data.synthetic import Reals, collate, uniforms
from data.tokens import arrow_file
from stu.encoders import LinearEncoder
from stu.errors import require
from stu.heads import StepHead
from stu.task import Batch, Examples, Splits, Task

VERSION = 1  # raise it when the same options come to mean other trajectories, or the same ones other files

BLOCK = 64  # trajectories that are integrated together; always as many, so that none depends on how many are asked for
BASELINE_STEPS = 2**15  # that the baselines are fitted to, and tested on
LAGS = (1, 8)  # of the linear baselines
LIMIT = 1e3  # deviations: a free run that is further away, or no number, counts as this far away

Samples = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TrajectoryData:
    """Trajectories of one system in the cache `dir`, cut into sequences, normalised by those of the training split.

    A trajectory depends on (seed, split, index) and the options of the simulation alone; no two splits share one. The
    options are explained in conf/task/lorenz63.yaml. Simulated once and stored, not only to save a quarter of a minute:
    chaos makes other numbers of the same equations where a library or a processor rounds in another way, and all runs
    of a comparison should see the same.
    """

    dir: str
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
        for name in ("seq_len", "hold", "windows", *Splits._fields):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(0 < self.dt < math.inf, "dt", self.dt, "must be above 0")
        for name in ("transient", "force"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must be at least 0")
        require(1e-12 <= self.tolerance <= 1e-3, "tolerance", self.tolerance, "must be 1e-12 to 1e-3")
        require(0 <= self.seed < 2**128, "seed", self.seed, "must be at least 0 and below 2^128")

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
    def spec(self) -> dict[str, object]:
        """Everything that determines the samples."""
        options = {name: value for name, value in asdict(self).items() if name != "dir"}
        return {"version": VERSION, "name": type(self.system).__name__, **options}

    def trajectories(self, split: str, first: int) -> Reals:
        """A block of trajectories, number `first` and those behind it, not normalised: (BLOCK, T, C + F)."""
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

    def prepare(self) -> Path:
        """The folder of train.arrow, val.arrow, test.arrow and units.json, built if need be."""
        return cached(self.dir, type(self.system).__name__.lower(), self.spec, self.build)

    def build(self, folder: Path) -> None:
        """Simulate into `folder`."""
        mean, deviation = np.zeros(self.inputs), np.ones(self.inputs)
        for split in Splits._fields:
            needed = math.ceil(getattr(self, split) / self.windows)
            with tracked(range(0, needed, BLOCK), f"{type(self.system).__name__} {split}, blocks") as starts:
                samples = np.concatenate([self.trajectories(split, first) for first in starts])[:needed]
            if split == "train":
                mean, deviation = samples.mean((0, 1)), samples.std((0, 1))
                deviation[deviation == 0] = 1
                units = {"mean": mean.tolist(), "deviation": deviation.tolist()}
                (folder / "units.json").write_text(json.dumps(units) + "\n")
            write(folder / f"{split}.arrow", ((samples - mean) / deviation).astype(np.float32))

    def units(self) -> tuple[Reals, Reals]:
        """Mean and deviation of every channel over the training split, (C + F,) each, in the units of the system."""
        units = json.loads((self.prepare() / "units.json").read_text())
        return np.array(units["mean"]), np.array(units["deviation"])

    def splits(self) -> Splits:
        """The three data sets, from the cache."""
        return Splits(*(Windows(self, split, getattr(self, split)) for split in Splits._fields))


def write(path: Path, samples: Samples) -> None:
    """One Arrow record batch with a row for each of the trajectories (n, T, C + F)."""
    rows = pa.FixedSizeListArray.from_arrays(pa.array(samples.ravel()), samples[0].size)
    schema = pa.schema({"samples": rows.type})
    with arrow_file(path, schema) as writer:
        writer.write_batch(pa.record_batch([rows], schema=schema))


@final
class Windows:
    """One split of `TrajectoryData`, as `stu.task.Examples`, in memory-mapped form; pickled as what made it.

    samples: (n, T, C + F).
    """

    lengths = None  # all sequences are equally long

    def __init__(self, data: TrajectoryData, split: str, size: int) -> None:
        self.data, self.split, self.size = data, split, size
        [rows] = Dataset.from_file(str(data.prepare() / f"{split}.arrow")).data.column("samples").chunks
        self.samples: Samples = rows.flatten().to_numpy().reshape(len(rows), data.length, data.inputs)

    def __reduce__(self) -> tuple[type["Windows"], tuple[TrajectoryData, str, int]]:
        return Windows, (self.data, self.split, self.size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[Samples, Samples]:
        """Inputs (L, C + F) and targets (L, C)."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0…{self.size - 1}")
        trajectory, window = divmod(index, self.data.windows)
        start = window * self.data.seq_len
        samples = self.samples[trajectory, start : start + self.data.seq_len + 1].copy()  # torch wants it writable
        return samples[:-1], samples[1:, : self.data.channels]


@dataclass(frozen=True)
class Autoregression:
    """x_{t+1} = Σ_p W_p (x_{t−p}, u_{t−p}) + b, the least squares over p < P. weights: (P (C + F) + 1, C)."""

    lags: int
    weights: Reals

    @classmethod
    def fit(cls, inputs: np.ndarray, targets: np.ndarray, lags: int) -> "Autoregression":
        """From inputs (n, L, C + F) and targets (n, L, C); the first P − 1 steps have too little behind them."""
        rows = lagged(inputs, lags)
        weights, *_ = np.linalg.lstsq(
            rows.reshape(-1, rows.shape[2]), targets[:, lags - 1 :].reshape(-1, targets.shape[2])
        )
        return cls(lags, weights)

    def __call__(self, inputs: np.ndarray) -> Reals:
        """Predictions from step P on, (n, L, C + F) → (n, L − P + 1, C)."""
        return lagged(inputs, self.lags) @ self.weights

    def run(self, context: np.ndarray, known: np.ndarray) -> Reals:
        """Free run from context (n, T, C + F) under a known force (n, H − 1, F) → (n, H, C), within `LIMIT`."""
        recent = context[:, -self.lags :].astype(np.float64)
        predictions = [self(recent)]  # (n, 1, C)
        for step in range(known.shape[1]):
            latest = np.concatenate((predictions[-1], known[:, step : step + 1]), axis=2)
            recent = np.concatenate((recent[:, 1:], latest), axis=1)
            predictions.append(self(recent).clip(-LIMIT, LIMIT))
        return np.concatenate(predictions, axis=1)


def lagged(inputs: np.ndarray, lags: int) -> Reals:
    """Every step from number P on with those before it, and 1: (n, L, C + F) → (n, L − P + 1, P (C + F) + 1)."""
    windows = sliding_window_view(inputs, lags, axis=1)  # (n, L − P + 1, C + F, P)
    rows = windows.reshape(*windows.shape[:2], -1).astype(np.float64)
    return np.concatenate((rows, np.ones((*rows.shape[:2], 1))), axis=2)


def bounded(prediction: Tensor) -> Tensor:
    """Within `LIMIT`, so that a free run which diverges has a finite error."""
    return prediction.nan_to_num(LIMIT, LIMIT, -LIMIT).clamp(-LIMIT, LIMIT)


def valid_steps(prediction: Tensor, target: Tensor, threshold: float) -> Tensor:
    """Steps before the normalised error first exceeds the threshold, H if it never does: (B, H, C) each → (B,).

    The normalised error is √(mean over channels of squared differences), in deviations of the training split.
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


def valid_time(prediction: Tensor, target: Tensor, threshold: float, step: float) -> Tensor:
    """`valid_steps` times the length of a step, (B,) float."""
    return valid_steps(prediction, target, threshold) * step


@final
class MeanOf(Metric):
    """Mean over sequences of `score` (predictions, targets) → (B,)."""

    total: Tensor
    count: Tensor

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add some sequences."""
        scores = self.score(prediction, target)
        self.total += scores.sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """The mean of all so far."""
        return self.total / self.count


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


@final
class RunR2(R2Score):
    """R² over all steps of free runs, (B, H, C) each."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add some sequences."""
        super().update(bounded(prediction).flatten(0, 1), target.flatten(0, 1))


@final
class Forecast(Task):
    """Predict the next observation at every step; mean squared error in variances of the training split.

    context, horizon: steps that are given before a free run, and its steps; None: half a sequence, and what remains of
    it. threshold: normalised error up to which the free run is called valid.
    """

    monitor = "mse"
    mode: Literal["min", "max"] = "min"

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
        require(seq_len == data.seq_len, "seq_len", seq_len, f"must be the data's, {data.seq_len}")
        require(causal, "causal", causal, "must be true: the target of a step is the next step's input")
        self.context = (seq_len + 1) // 2 if context is None else context
        require(1 <= self.context <= seq_len, "context", context, f"must be 1 to {seq_len}, the steps of a sequence")
        rest = seq_len + 1 - self.context
        self.horizon = rest if horizon is None else horizon
        require(1 <= self.horizon <= rest, "horizon", horizon, f"must be 1 to {rest}, what remains of a sequence")
        require(threshold > 0, "threshold", threshold, "must be above 0")
        self.seq_len, self.causal, self.threshold, self.data = seq_len, causal, threshold, data

    def prepare(self) -> None:
        """Fill the cache, unless it holds the data."""
        self.data.prepare()

    def datasets(self) -> Splits:
        """(L, C + F) float32 samples and (L, C) next observations, from the cache."""
        return self.data.splits()

    def fingerprint(self) -> str:
        """SHA-256, cut, of the options of the simulation."""
        return fingerprint(self.data.spec)

    def baselines(self) -> dict[str, float]:
        """Test errors of the mean, of persistence and of least squares on lags, at the next step and in free runs.

        Least squares are fitted to training sequences, and scored where all lags are there.
        """
        splits = self.datasets()
        count = max(1, BASELINE_STEPS // self.seq_len)
        train, (inputs, targets) = (stacked(split, count) for split in (splits.train, splits.test))
        models = [Autoregression.fit(*train, lags) for lags in LAGS if lags <= self.context]
        observed, stop = inputs[..., : self.data.channels], self.context + self.horizon - 1
        ahead, known = targets[:, self.context - 1 : stop], inputs[:, self.context : stop, self.data.channels :]
        return {
            "mean": mean_square(targets),
            "persistence": mean_square(targets - observed),
            **{lags_of(m): mean_square(targets[:, m.lags - 1 :] - m(inputs)) for m in models},
            "free run: persistence": mean_square(ahead - observed[:, self.context - 1, None]),
            **{f"free run: {lags_of(m)}": mean_square(ahead - m.run(inputs[:, : self.context], known)) for m in models},
        }

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, C + F) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=self.data.inputs)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, L, C)."""
        return StepHead(d_model, d_output=self.data.channels)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every step: (n, C) and (n, C)."""
        return prediction.flatten(0, 1), batch.targets.flatten(0, 1)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error over steps and channels."""
        return nn.functional.mse_loss(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The error, in variances of the training split and relative to the test targets' own, and R²."""
        return {"mse": MeanSquaredError(), "nmse": RelativeError(), "r2": R2Score(multioutput="variance_weighted")}

    def rollout_metrics(self) -> dict[str, Metric]:
        """Errors over the free run and at its end, R², and how long it is valid, in steps and Lyapunov times."""
        metrics: dict[str, Metric] = {
            "rollout_mse": MeanOf(squared_error),
            "rollout_mse_last": MeanOf(last_squared_error),
            "rollout_nmse": RelativeError(),
            "rollout_r2": RunR2(multioutput="variance_weighted"),
            "rollout_valid_steps": MeanOf(partial(valid_time, threshold=self.threshold, step=1.0)),
        }
        step = self.data.lyapunov_times
        if step is not None:
            metrics["rollout_valid_lyapunov"] = MeanOf(partial(valid_time, threshold=self.threshold, step=step))
        return metrics

    def collate(self, examples: Sequence[tuple[Samples, Samples]]) -> Batch:
        """No padding: all sequences are equally long."""
        return collate(examples)


def stacked(split: Examples, count: int) -> tuple[Samples, Samples]:
    """The first `count` sequences at most: inputs (n, L, C + F) and targets (n, L, C)."""
    inputs, targets = zip(*(split[i] for i in range(min(count, len(split)))), strict=True)
    return np.stack(inputs), np.stack(targets)


def lags_of(model: Autoregression) -> str:
    """What a linear baseline is called."""
    return f"linear, {model.lags} lag{'s' * (model.lags > 1)}"


def mean_square(x: np.ndarray) -> float:
    """Mean of x² in float64."""
    return float(np.square(x, dtype=np.float64).mean())
