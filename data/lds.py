"""The synthetic experiment of the STU paper: predict the outputs of a marginally stable linear dynamical system.

L length, N state size, C inputs, O outputs

Source: Agarwal et al., "Spectral State Space Models" (2312.06837), section 3.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal, final, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, R2Score

from data.identification import StateSpace, fit_arx, fit_fir, ho_kalman, respond
from stu.encoders import LinearEncoder
from stu.errors import require
from stu.heads import StepHead
from stu.task import Batch, Examples, Splits, Task

VERSION = 1  # raise it when the same options come to mean other numbers
BASELINE_STEPS = 2**16  # a second at most, at any length
LAGS = 32  # of inputs, for least squares

Reals = NDArray[np.float64]
Modes = Reals | NDArray[np.complex128]
Spectrum = Literal["signs", "uniform", "complex"]
Structure = Literal["diagonal", "symmetric", "general"]
SYSTEM, TRAIN, VAL, TEST = range(4)  # the independent random streams of one seed


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random stream number `key` of `seed`."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True, eq=False)
class System:
    """x_t = A x_{t−1} + B u_t + w_t and y_t = C x_t + D u_t + v_t, at rest before t = 0.

    The input reaches the output in the same step: h_0 = CB + D and h_t = C Aᵗ B. This is the convention that
    makes the paper's STU exact but for its filters, with M^u = (CB + D, CAB, −D); it is the one of Hazan et al.,
    "Spectral filtering for general linear dynamical systems" (1802.03981).

    modes: (N,) real, a diagonal; or (N/2,) complex, each standing for a 2×2 rotation block on the diagonal.
    B: (N, C), C: (O, N), D: (O, C).
    basis: (N, N) invertible T; A is T times that diagonal times T⁻¹. None: the identity.
    """

    modes: Modes
    B: Reals
    C: Reals
    D: Reals
    basis: Reals | None = None

    @property
    def A(self) -> Reals:  # noqa: N802 (the paper's name)
        """(N, N) transition matrix."""
        # A row of (p, q) pairs viewed as complex p + iq is rotated by one product; reals are viewed as they are.
        modal = (np.eye(self.B.shape[0]).view(self.modes.dtype) * self.modes).view(np.float64).T
        return modal if self.basis is None else self.basis @ np.linalg.solve(self.basis.T, modal.T).T

    def states(self, drive: Reals) -> Reals:
        """x_t = A x_{t−1} + drive_t from rest, (L, N) → (L, N) float64."""
        if self.basis is not None:
            drive = np.ascontiguousarray(np.linalg.solve(self.basis, drive.T).T)
        modal = drive.view(self.modes.dtype)  # (L, N) or (L, N/2)
        filtered = [lfilter([1], [1, -mode], one) for mode, one in zip(self.modes, modal.T, strict=True)]
        states = np.stack(filtered, axis=1).view(np.float64)
        return states if self.basis is None else states @ self.basis.T

    def respond(
        self,
        inputs: np.ndarray,
        process_noise: Reals | float = 0.0,
        observation_noise: Reals | float = 0.0,
    ) -> Reals:
        """Outputs (L, O) for inputs u (L, C), process noise w (L, N) and observation noise v (L, O)."""
        states = self.states(inputs @ self.B.T + process_noise)
        return states @ self.C.T + inputs @ self.D.T + observation_noise

    def impulse_response(self, length: int) -> Reals:
        """The first h_t of y = h * u, (length, O, C)."""
        start = np.eye(length, 1)  # (L, 1)
        return np.stack([self.respond(start * unit) for unit in np.eye(self.B.shape[1])], axis=-1)

    def power(self, length: int, correlation: float = 0.0) -> float:
        """E y² for the inputs of `coloured`, averaged over `length` steps from rest and over the outputs."""
        # u_0, and each later e_s times √(1 − ρ²), reaches the output by the impulse response after the colouring.
        response = lfilter([1], [1, -correlation], self.impulse_response(length), axis=0)
        energy = np.square(response).sum((1, 2))  # (L,)
        return float(((1 - correlation**2) * energy.cumsum() + correlation**2 * energy).mean() / self.C.shape[0])

    def driven_by_noise(self) -> "System":
        """The system from w to y."""
        d_output, d_state = self.C.shape
        return replace(self, B=np.eye(d_state), D=np.zeros((d_output, d_state)))


def draw_modes(spectrum: Spectrum, d_state: int, radius: float, random: np.random.Generator) -> Modes:
    """The `modes` of a `System` with `d_state` states and no eigenvalue beyond `radius`."""
    if spectrum == "signs":
        return radius * random.choice((-1.0, 1.0), d_state)
    if spectrum == "uniform":
        return random.uniform(-radius, radius, d_state)
    return radius * np.exp(2j * np.pi * random.random(d_state // 2))


def draw_basis(structure: Structure, d_state: int, condition: float, random: np.random.Generator) -> Reals | None:
    """The `basis` of a `System`: none, orthogonal, or U Σ Vᵀ with U and V orthogonal and Σ from 1 to `condition`."""
    if structure == "diagonal":
        return None
    left = draw_orthogonal(d_state, random)
    if structure == "symmetric":
        return left
    return (left * np.geomspace(1, condition, d_state)) @ draw_orthogonal(d_state, random)


def draw_orthogonal(size: int, random: np.random.Generator) -> Reals:
    """An orthogonal matrix, all equally likely. Source: Mezzadri (math-ph/0609050), section 5."""
    Q, R = np.linalg.qr(random.standard_normal((size, size)))
    return Q * np.sign(np.diag(R))


def coloured(white: np.ndarray, correlation: float) -> Reals:
    """u_t = ρ u_{t−1} + √(1 − ρ²) e_t from noise e (L, C), u_0 = e_0: stationary, of the variance of the noise."""
    drive = math.sqrt(1 - correlation**2) * white.astype(np.float64)
    drive[0] = white[0]
    return lfilter([1], [1, -correlation], drive, axis=0)


@dataclass(frozen=True, kw_only=True)
class LDSData:
    """Sequences of one random system, each computed when asked for from (seed, split, index) alone.

    B, C and the diagonal D are unit Gaussian, and so are the inputs, white or coloured. The options are explained in
    conf/task/lds.yaml; the defaults are the paper's as far as its section 3 states them. One default departs from it:
    `normalize`. The outputs grow like √t, so that raw targets ask every length, seed and spectrum for its own
    learning rate; divided by their RMS, the trivial error is 1 everywhere, and the paper's loss is `scale`² times
    ours.
    """

    seq_len: int
    d_state: int = 4
    d_input: int = 3
    d_output: int = 3
    spectrum: Spectrum = "signs"
    radius: float = 0.9999
    structure: Structure = "diagonal"
    condition: float = 10.0
    correlation: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    normalize: bool = True
    train: int = 10_000
    val: int = 500
    test: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "d_state", "d_input", "d_output", "train", "val", "test"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("process_noise", "observation_noise"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "must be a standard deviation, at least 0")
        for name, kinds in (("spectrum", get_args(Spectrum)), ("structure", get_args(Structure))):
            require(getattr(self, name) in kinds, name, getattr(self, name), f"must be one of {', '.join(kinds)}")
        real = self.spectrum != "complex"
        require(real or self.d_state % 2 == 0, "d_state", self.d_state, "must be even where spectrum=complex")
        allowed = "must be diagonal or general where spectrum=complex: symmetric matrices have real eigenvalues"
        require(real or self.structure != "symmetric", "structure", self.structure, allowed)
        require(0 < self.radius <= 1, "radius", self.radius, "must be above 0 and at most 1")
        require(1 <= self.condition <= 1e6, "condition", self.condition, "must be 1 to 1e6")
        require(-1 < self.correlation < 1, "correlation", self.correlation, "must be above -1 and below 1")
        require(self.seed >= 0, "seed", self.seed, "must be at least 0")

    @cached_property
    def system(self) -> System:
        """The system of this seed, in the paper's units: its outputs are `scale` times the targets."""
        random = generator(self.seed, SYSTEM)
        B = random.standard_normal((self.d_state, self.d_input))
        C = random.standard_normal((self.d_output, self.d_state))
        D = np.eye(self.d_output, self.d_input) * random.standard_normal(self.d_input)
        # The modes come after them, and the basis last: another spectrum, radius or structure keeps B, C and D.
        modes = draw_modes(self.spectrum, self.d_state, self.radius, random)
        return System(modes, B, C, D, draw_basis(self.structure, self.d_state, self.condition, random))

    @cached_property
    def scale(self) -> float:
        """What the outputs are divided by: their expected RMS over all steps and outputs, or 1."""
        if not self.normalize:
            return 1.0
        driven = self.process_noise**2 * self.system.driven_by_noise().power(self.seq_len)
        return math.sqrt(self.system.power(self.seq_len, self.correlation) + driven + self.observation_noise**2)

    def sequence(self, split: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (L, C) and targets (L, O), float32."""
        random = generator(self.seed, split, index)
        # Rounded before they are used: the targets belong to exactly the inputs a model sees.
        inputs = random.standard_normal((self.seq_len, self.d_input), dtype=np.float32)
        if self.correlation:
            inputs = coloured(inputs, self.correlation).astype(np.float32)
        process = white((self.seq_len, self.d_state), self.process_noise, random)
        observation = white((self.seq_len, self.d_output), self.observation_noise, random)
        outputs = self.system.respond(inputs, process, observation)
        return inputs, (outputs / self.scale).astype(np.float32)

    def splits(self) -> Splits:
        """The three data sets."""
        return Splits(
            train=Sequences(self, TRAIN, self.train),
            val=Sequences(self, VAL, self.val),
            test=Sequences(self, TEST, self.test),
        )


def white(shape: tuple[int, int], deviation: float, random: np.random.Generator) -> Reals | float:
    """Gaussian noise; nothing is drawn where there is none."""
    return random.normal(0.0, deviation, shape) if deviation else 0.0


@dataclass(frozen=True)
class Sequences:
    """One split of `LDSData`, as `stu.task.Examples`."""

    data: LDSData
    split: int
    size: int

    lengths = None  # all sequences are equally long

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0…{self.size - 1}")
        return self.data.sequence(self.split, index)


@final
class LDS(Task):
    """Predict every output of an unknown linear dynamical system from its inputs so far; mean squared error.

    `data.system` is the truth, `data.scale` its unit.
    """

    monitor = "mse"
    mode: Literal["min", "max"] = "min"

    def __init__(self, *, seq_len: int, causal: bool, data: LDSData) -> None:
        require(seq_len == data.seq_len, "seq_len", seq_len, f"must be the data's, {data.seq_len}")
        self.seq_len, self.causal, self.data = seq_len, causal, data

    def prepare(self) -> None:
        """Nothing is stored, and `LDSData` has checked its options."""

    def datasets(self) -> Splits:
        """Sequences computed on demand."""
        return self.data.splits()

    def fingerprint(self) -> str:
        """SHA-256 of the options and the version of the generator."""
        facts = json.dumps({"version": VERSION, **asdict(self.data)}, sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def baselines(self) -> dict[str, float]:
        """Errors on the test split of what needs no training.

        zero; static, the best matrix from u_t to y_t; fir, least squares on the latest inputs; arx, on outputs as well,
        run by itself; ho-kalman, the realisation of an impulse response; truth, the system itself, which leaves the
        noise. All but zero and truth are fitted to training sequences, and left out where they come to no number.
        """
        train, test = (self._first(split) for split in (self.data.splits().train, self.data.splits().test))
        inputs, targets = test
        flat = [x.reshape(-1, x.shape[2]) for x in (*train, inputs)]
        start = min(self.seq_len, 2 * LAGS)
        predicted = {
            "zero": np.zeros_like(targets),
            "static": (flat[2] @ np.linalg.lstsq(flat[0], flat[1])[0]).reshape(targets.shape),
            "fir": respond(fit_fir(*train, lags=min(self.seq_len, LAGS)), inputs),
            "arx": fit_arx(*train, output_lags=self.data.d_state, input_lags=self.data.d_state + 1).respond(inputs),
        }
        if start >= 3:
            beginning = fit_fir(*(x[:, :start] for x in train), lags=start)  # no memory is longer: exact
            predicted["ho-kalman"] = ho_kalman(beginning, self.data.d_state).respond(inputs)
        predicted["truth"] = StateSpace.of(self.data.system).respond(inputs) / self.data.scale
        errors = {name: mean_square(targets - prediction) for name, prediction in predicted.items()}
        return {name: error for name, error in errors.items() if math.isfinite(error)}

    def _first(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the first sequences, (S, L, C) and (S, L, O), of `BASELINE_STEPS` steps at most."""
        count = min(len(examples), max(1, BASELINE_STEPS // self.seq_len))
        inputs, targets = zip(*(examples[index] for index in range(count)), strict=True)
        return np.stack(inputs), np.stack(targets)

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L, C) → (B, L, d_model)."""
        return LinearEncoder(d_model, d_input=self.data.d_input)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, L, O)."""
        return StepHead(d_model, d_output=self.data.d_output)

    def impulse_response(self, length: int) -> Reals:
        """The first h_t of the system, (length, O, C), in the unit of the targets."""
        return self.data.system.impulse_response(length) / self.data.scale

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every real step: (n, O) and (n, O)."""
        if batch.mask is None:
            return prediction.flatten(0, 1), batch.targets.flatten(0, 1)
        return prediction[batch.mask], batch.targets[batch.mask]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error over steps and outputs."""
        return nn.functional.mse_loss(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The error, and the share of the variance that is explained, r2 = 1 − mse / variance."""
        return {"mse": MeanSquaredError(), "r2": R2Score(multioutput="variance_weighted")}


def mean_square(x: np.ndarray) -> float:
    """Mean of x² in float64."""
    return float(np.square(x, dtype=np.float64).mean())
