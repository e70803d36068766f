"""The synthetic experiment of the STU paper: predict the outputs of a marginally stable linear dynamical system.

L length, N state size, C inputs, O outputs, S sequences

Source: Agarwal et al., "Spectral State Space Models" (2312.06837), section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import final, get_args

import numpy as np
from torch import nn
from torchmetrics import Metric

from data.store.cache import fingerprint
from data.store.synthetic import OnDemandData, Reals
from data.systems import system as linear
from data.systems.forecast import R2
from data.systems.identification import fit_arx, fit_fir, ho_kalman
from stu.encoders import LinearEncoder
from stu.errors import require
from stu.preprocessing import Numbers, Preprocessing
from stu.task import Regression

VERSION = 1  # increment when the same options produce different numbers
BASELINE_STEPS = 2**16  # read for the baselines, which takes a second at most, at any length
LOUDEST = 1e12  # standard deviation of noise whose sums and squares are finite in float32
LAGS = 32  # of inputs, for least squares


@final
@dataclass(frozen=True, kw_only=True)
class LDSData(OnDemandData):
    """Sequences of one random system, each computed on demand from (seed, split, index) alone.

    B, C and the diagonal D are unit Gaussian, and so are the inputs, white or coloured. conf/task/lds.yaml explains the
    options; the defaults are the paper's as far as its section 3 states them, except for `normalize`: the outputs grow
    like √t, so that raw targets need a different learning rate for every length, seed and spectrum. Divided by their
    RMS, they give a trivial error of 1 everywhere, and the paper's loss is `scale`² times ours. unit_len: the steps
    over which that RMS is taken; None: those of a sequence.
    """

    d_state: int = 4
    d_input: int = 3
    d_output: int = 3
    spectrum: linear.Spectrum = "signs"
    radius: float = 0.9999
    structure: linear.Structure = "diagonal"
    condition: float = 10.0
    correlation: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    normalize: bool = True
    unit_len: int | None = None
    train: int = 10_000
    val: int = 500
    test: int = 500

    def __post_init__(self) -> None:
        for name in ("seq_len", "d_state", "d_input", "d_output", "train", "val", "test"):
            self.require_least(name, 1)
        for name in ("process_noise", "observation_noise"):
            value = getattr(self, name)
            require(0 <= value <= LOUDEST, name, value, f"must be a standard deviation, 0 to {LOUDEST:g}")
        for name, kinds in (("spectrum", get_args(linear.Spectrum)), ("structure", get_args(linear.Structure))):
            require(getattr(self, name) in kinds, name, getattr(self, name), f"must be one of {', '.join(kinds)}")
        real = self.spectrum != "complex"
        require(real or self.d_state % 2 == 0, "d_state", self.d_state, "must be even where spectrum=complex")
        allowed = "must be diagonal or general where spectrum=complex: symmetric matrices have real eigenvalues"
        require(real or self.structure != "symmetric", "structure", self.structure, allowed)
        require(0 < self.radius <= 1, "radius", self.radius, "must be above 0 and at most 1")
        require(1 <= self.condition <= 1e6, "condition", self.condition, "must be 1 to 1e6")
        require(-1 < self.correlation < 1, "correlation", self.correlation, "must be above -1 and below 1")
        self.require_least("seed", 0)
        require(self.unit_len is None or self.unit_len >= 1, "unit_len", self.unit_len, "must be at least 1, or null")
        # modes and basis; one sequence, and the response to each input, or state where there is process noise
        driving = max(self.d_input, self.d_state if self.process_noise else 0)
        system = 3 * self.d_state**2 + self.d_state * (self.d_input + self.d_output)
        steps = 2 * (self.d_state + self.d_input + self.d_output) + 2 * self.normalize * self.d_output * driving
        self.require_room(8 * (system + self.seq_len * steps))

    def at_length(self, seq_len: int) -> "LDSData":
        """Sequences of the same system, in the same unit."""
        return replace(self, seq_len=seq_len, unit_len=self.unit_len or self.seq_len)

    def stream(self, *key: int) -> np.random.Generator:
        """An independent random stream: (0,) draws the system, (1 + split, index) a sequence."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    @cached_property
    def system(self) -> linear.System:
        """The system of this seed, in the paper's units: its outputs are `scale` times the targets."""
        random = self.stream(0)
        B = random.standard_normal((self.d_state, self.d_input))
        C = random.standard_normal((self.d_output, self.d_state))
        D = np.eye(self.d_output, self.d_input) * random.standard_normal(self.d_input)
        # The modes are drawn after them, and the basis last: another spectrum, radius or structure keeps B, C and D.
        modes = linear.draw_modes(self.spectrum, self.d_state, self.radius, random)
        basis = linear.draw_basis(self.structure, self.d_state, self.condition, random)
        return linear.System(modes, B, C, D, basis)

    @cached_property
    def scale(self) -> float:
        """What the outputs are divided by: their expected RMS over all outputs and `unit_len` steps, or 1."""
        if not self.normalize:
            return 1.0
        steps = self.unit_len or self.seq_len
        driven = self.process_noise**2 * self.system.driven_by_noise().power(steps)
        return math.sqrt(self.system.power(steps, self.correlation) + driven + self.observation_noise**2)

    def sequence(self, split: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (L, C) and targets (L, O), float32."""
        random = self.stream(1 + split, index)
        # Rounded before they are used, so that the targets belong to exactly the inputs that a model sees.
        inputs = random.standard_normal((self.seq_len, self.d_input), dtype=np.float32)
        if self.correlation:
            inputs = linear.coloured(inputs, self.correlation).astype(np.float32)
        process = linear.white((self.seq_len, self.d_state), self.process_noise, random)
        observation = linear.white((self.seq_len, self.d_output), self.observation_noise, random)
        outputs = self.system.respond(inputs, process, observation)
        return inputs, (outputs / self.scale).astype(np.float32)

    def sequences(self, split: int, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (S, L, C) and targets (S, L, O), float32."""
        inputs, targets = zip(*(self.sequence(split, index) for index in indices), strict=True)
        return np.stack(inputs), np.stack(targets)

    def fingerprint(self) -> str:
        """SHA-256 of the options and the version."""
        options = {name: value for name, value in asdict(self).items() if name != "unit_len" or value is not None}
        return fingerprint({"version": VERSION, **options}, digits=64)


@final
class LDS(Regression):
    """Predict every output of an unknown linear dynamical system from its inputs so far; mean squared error.

    `data.system` is the true system, `data.scale` its unit.
    """

    data: LDSData
    trivial = ("zero", "static", "fir")  # the others know what the system is like

    def __init__(self, *, seq_len: int, causal: bool, data: LDSData) -> None:
        super().__init__(seq_len=seq_len, causal=causal, data=data, d_output=data.d_output)

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]  # the scale takes a moment
        """Inputs as they are; outputs of the system in its own unit."""
        inputs, outputs = self.data.d_input, self.data.d_output
        scaled = Numbers((0,) * outputs, (self.data.scale,) * outputs)
        return Preprocessing(Numbers((0,) * inputs, (1,) * inputs), scaled)

    def baselines(self) -> dict[str, float]:
        """Test errors of predictors that need no training.

        zero; static, the best matrix from u_t to y_t; fir, least squares on the latest inputs; arx, on the latest
        outputs too, simulated from inputs alone; ho-kalman, the realisation of an impulse response; truth, the system
        itself, whose error is the noise. All but zero and truth are fitted to training sequences; those without a
        finite error are left out.
        """
        splits, count = self.data.splits(), max(1, BASELINE_STEPS // self.seq_len)
        train, (inputs, targets) = (linear.first_sequences(split, count) for split in (splits.train, splits.test))
        flat = [x.reshape(-1, x.shape[2]) for x in (*train, inputs)]
        start = min(self.seq_len, 2 * LAGS)
        predicted = {
            "zero": np.zeros_like(targets),
            "static": (flat[2] @ np.linalg.lstsq(flat[0], flat[1], rcond=None)[0]).reshape(targets.shape),
            "fir": linear.respond(fit_fir(*train, lags=min(self.seq_len, LAGS)), inputs),
            "arx": fit_arx(*train, output_lags=self.data.d_state, input_lags=self.data.d_state + 1).respond(inputs),
        }
        if start >= 3:
            beginning = fit_fir(*(x[:, :start] for x in train), lags=start)  # no memory is longer: exact
            predicted["ho-kalman"] = ho_kalman(beginning, self.data.d_state).respond(inputs)
        predicted["truth"] = linear.StateSpace.of(self.data.system).respond(inputs) / self.data.scale
        errors = {name: linear.mean_square(targets - prediction) for name, prediction in predicted.items()}
        return {name: error for name, error in errors.items() if math.isfinite(error)}

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, C) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=self.data.d_input)

    def impulse_response(self, length: int) -> Reals:
        """The first h_t of the system, (length, O, C), in the unit of the targets."""
        return self.data.system.impulse_response(length) / self.data.scale

    def metrics(self) -> dict[str, Metric]:
        """The mean squared error, and the explained share of the variance, r2 = 1 − mse / variance."""
        return {**super().metrics(), "r2": R2()}
