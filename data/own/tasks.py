"""The task of a table: a class or numbers of a sequence, numbers at every step, the next step, or the next token.

B batch, L length, C channels, O outputs, V vocabulary
"""

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from data.own import baselines
from data.own.columns import Names
from data.own.table import EVERY_STEP, TableData
from data.systems.forecast import R2, MeanOf, RelativeError, RolloutR2, last_squared_error, squared_error
from stu.encoders import LinearEncoder, TokenEncoder
from stu.errors import require
from stu.heads import Pool, StepHead
from stu.preprocessing import Classes, Numbers, Preprocessing
from stu.task import Batch, Classification, NextToken, Regression, Rollout, Task, scored_steps


def own(
    *,
    seq_len: int,
    causal: bool,
    inputs: Names | None,
    target: Names | None,
    pool: Pool,
    context: int | None,
    horizon: int | None,
    season: int | None,
    data: Callable[..., TableData],
) -> Task:
    """The task that a table and its target make, with the data prepared: its kind is known from them.

    conf/task/own.yaml explains the options. Raises `OptionError` for what is wrong with them, or with the table.
    """
    require(season is None or season >= 1, "season", season, "must be at least 1, or null")
    require(pool in ("mean", "first", "last"), "pool", pool, "must be mean, first or last")
    table = data(seq_len=seq_len, inputs=inputs, target=target)
    kind, preprocessing = table.facts()
    for name, value in {"context": context, "horizon": horizon, "season": season}.items():
        require(value is None or kind == "forecast", name, value, "is of forecasts of numbers, target=next, alone")
    common: dict[str, Any] = {"seq_len": seq_len, "causal": causal, "data": table, "preprocessing": preprocessing}
    match kind:
        case "class":
            return TableClassification(**common, pool=pool)
        case "number":
            return TableRegression(**common, pool=pool)
        case "steps":
            return TableRegression(**common, pool=None)
        case "forecast":
            return TableForecast(**common, context=context, horizon=horizon, season=season)
        case "token":
            return TableTokens(**common)


class TableTask(Task):
    """What is the same for all: the encoder, which the inputs determine, and what columns they are of."""

    data: TableData
    preprocessing: Preprocessing

    def encoder(self, d_model: int) -> nn.Module:
        """(B, L) tokens or (B, L, C) reals → (B, L, d_model)."""
        inputs = self.preprocessing.inputs
        if isinstance(inputs, Numbers):
            return LinearEncoder(d_model, d_input=inputs.channels)
        return TokenEncoder(d_model, vocab_size=inputs.vocab_size)

    def facts(self) -> dict[str, Any]:
        """Also the columns that inputs are read from: those that patterns have found."""
        return super().facts() | self.data.columns()

    def at_length(self, seq_len: int) -> Task:
        """Windows of another length. Raises `OptionError` where sequences are whole, or none is so long."""
        windows = self.data.facts()[0] in EVERY_STEP
        require(windows, "seq_len", seq_len, "the sequences of this task have a length of their own")
        other = super().at_length(seq_len)
        assert isinstance(other, TableTask)
        longest = int(other.data.examples("test").sizes.max())
        require(longest == seq_len, "seq_len", seq_len, f"the longest test sequence has {longest:,} steps")
        same = self.rollout is None or other.rollout is not None
        require(same, "seq_len", seq_len, "is more than some sequences of val and test have, so there are no rollouts")
        return other


@final
class TableClassification(TableTask, Classification):
    """Which class is a sequence of? Cross-entropy, accuracy."""

    def __init__(
        self, *, seq_len: int, causal: bool, data: TableData, preprocessing: Preprocessing, pool: Pool
    ) -> None:
        self.preprocessing = preprocessing
        assert isinstance(preprocessing.targets, Classes)
        classes = len(preprocessing.targets.labels)
        super().__init__(seq_len=seq_len, causal=causal, data=data, num_classes=classes, pool=pool)

    def baselines(self) -> dict[str, float]:
        """Test accuracy of the most frequent class."""
        train, test = self.data.examples("train").targets, self.data.examples("test").targets
        assert train is not None
        assert test is not None
        return baselines.majority(train, test)


@final
class TableRegression(TableTask, Regression):
    """Numbers of a sequence or, without `pool`, at every step; mean squared error in variances of the training data."""

    def __init__(
        self, *, seq_len: int, causal: bool, data: TableData, preprocessing: Preprocessing, pool: Pool | None
    ) -> None:
        self.preprocessing = preprocessing
        assert isinstance(preprocessing.targets, Numbers)
        outputs = preprocessing.targets.channels
        super().__init__(seq_len=seq_len, causal=causal, data=data, d_output=outputs, pool=pool)

    def baselines(self) -> dict[str, float]:
        """Test error of the training mean."""
        return baselines.mean(self.data.examples("test"))


@final
class TableForecast(TableTask, Regression):
    """The next step at every step; mean squared error in variances of the training split.

    Where all validation and test sequences are equally long, models then continue them on their own predictions.
    context, horizon: steps that are given before, and steps that are predicted; None: half, and the rest. season: in
    steps, of a baseline; None: found in the training split.
    """

    trivial = ("mean", "last value", "seasonal")  # the others are rollouts
    forecasts = True

    def __init__(
        self,
        *,
        seq_len: int,
        causal: bool,
        data: TableData,
        preprocessing: Preprocessing,
        context: int | None,
        horizon: int | None,
        season: int | None,
    ) -> None:
        self.preprocessing, self.season = preprocessing, season
        assert isinstance(preprocessing.inputs, Numbers)
        super().__init__(seq_len=seq_len, causal=causal, data=data, d_output=preprocessing.inputs.channels)
        require_causal(causal)
        self.rollout = self._rollout(context, horizon)

    def _rollout(self, context: int | None, horizon: int | None) -> Rollout | None:
        lengths = {size for split in ("val", "test") for size in self.data.examples(split).sizes.tolist()}
        if len(lengths) > 1:
            for name, value in {"context": context, "horizon": horizon}.items():
                require(value is None, name, value, "must be null: sequences of val and test differ in length")
            return None
        [steps] = lengths
        given = (steps + 1) // 2 if context is None else context
        require(1 <= given <= steps, "context", context, f"must be 1 to {steps}, the steps of a test sequence")
        rest = steps + 1 - given
        ahead = rest if horizon is None else horizon
        require(1 <= ahead <= rest, "horizon", horizon, f"must be 1 to {rest}, what follows the context of {given}")
        return Rollout(given, ahead, rollout_metrics)

    def baselines(self) -> dict[str, float]:
        """Test errors of the mean, the last value and the value a season ago, at the next step and in rollouts."""
        season = self.data.season() if self.season is None else self.season
        return baselines.forecasts(self.data.examples("test"), season, self.rollout and self.rollout[:2])

    def metrics(self) -> dict[str, Metric]:
        """The error, in variances of the training split and relative to the power of the targets, and R²."""
        return {**super().metrics(), "nmse": RelativeError(), "r2": R2()}


@final
class TableTokens(TableTask):
    """The next token at every step; cross-entropy, accuracy."""

    monitor = "accuracy"
    mode = "max"
    next_token = NextToken(start=None)

    def __init__(self, *, seq_len: int, causal: bool, data: TableData, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        assert not isinstance(preprocessing.inputs, Numbers)
        self.vocab_size = preprocessing.inputs.vocab_size
        super().__init__(seq_len=seq_len, causal=causal, data=data)
        require_causal(causal)

    def baselines(self) -> dict[str, float]:
        """Test accuracies of the most frequent token, and of what most often follows the token before."""
        return baselines.tokens(self.data.examples("train"), self.data.examples("test"), self.vocab_size)

    def head(self, d_model: int) -> nn.Module:
        """(B, L, d_model) → (B, L, V)."""
        return StepHead(d_model, d_output=self.vocab_size)

    def scored(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every real step: (n, V) and (n,)."""
        return scored_steps(prediction, batch), scored_steps(batch.targets, batch)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(prediction, target)

    def metrics(self) -> dict[str, Metric]:
        """The share of correct tokens."""
        return {"accuracy": MulticlassAccuracy(self.vocab_size, average="micro", validate_args=False)}


def require_causal(causal: bool) -> None:
    """Raise `OptionError` where models may look at what they predict."""
    require(causal, "causal", causal, "must be true: the target of a step is the next step's input")


def rollout_metrics() -> dict[str, Metric]:
    """Errors over the rollout and at its end, and R²."""
    return {
        "rollout_mse": MeanOf(squared_error),
        "rollout_mse_last": MeanOf(last_squared_error),
        "rollout_nmse": RelativeError(),
        "rollout_r2": RolloutR2(),
    }
