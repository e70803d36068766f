"""What no model is needed for: the most frequent label or token, the mean, the last value, the last season.

n examples, L length, C channels, V vocabulary
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from stu.task import Examples

STEPS = 2**20  # that the baselines of steps are fitted to, and tested on
PEAK = 0.3  # of the autocorrelation, from which a series is called seasonal

Reals = NDArray[np.float64]


def majority(train: NDArray[np.integer], test: NDArray[np.integer]) -> dict[str, float]:
    """Test accuracy of the most frequent class of the training split; classes (n,) each."""
    return {"majority": float((test == np.bincount(train).argmax()).mean())}


def mean(test: Examples) -> dict[str, float]:
    """Test error of the training mean, which is 0, in variances of the training split."""
    return {"mean": _mean_square([targets for _, targets in _some(test)])}


def forecasts(test: Examples, season: int | None, rollout: tuple[int, int] | None) -> dict[str, float]:
    """Test errors of the mean, the last value and the value a season ago, at the next step and in rollouts.

    season: in steps; None: there is none. rollout: context and horizon.
    """
    examples = _some(test)
    lags = {"last value": 1, **({} if season is None else {"seasonal": season})}
    errors = {"mean": _mean_square([targets for _, targets in examples])}
    for name, lag in lags.items():  # x_{t+1} from x_{t+1−lag}
        late = [
            targets[lag - 1 :] - inputs[: len(inputs) - lag + 1] for inputs, targets in examples if len(inputs) >= lag
        ]
        errors |= {name: _mean_square(late)} if late else {}
    if rollout is not None:
        context, horizon = rollout
        for name, lag in lags.items():
            if lag <= context:
                late = [
                    targets[context - 1 :][:horizon] - _repeated(inputs[context - lag : context], horizon)
                    for inputs, targets in examples
                ]
                errors[f"rollout: {name}"] = _mean_square(late)
    return errors


def tokens(train: Examples, test: Examples, vocab_size: int) -> dict[str, float]:
    """Test accuracies of the most frequent token, and of what most often follows the token before."""
    inputs, targets = map(np.concatenate, zip(*_some(train), strict=True))
    frequent = int(np.bincount(targets).argmax())
    pairs, counts = np.unique(inputs.astype(np.int64) * vocab_size + targets, return_counts=True)
    order = np.argsort(counts, kind="stable")
    follows = np.full(vocab_size, frequent)
    follows[pairs[order] // vocab_size] = pairs[order] % vocab_size  # the most frequent one is written last
    inputs, targets = map(np.concatenate, zip(*_some(test), strict=True))
    return {"most frequent": float((targets == frequent).mean()), "bigram": float((targets == follows[inputs]).mean())}


def season_of(series: Sequence[np.ndarray]) -> int | None:
    """The lag of the first peak of the autocorrelation that is above `PEAK` and nearly the highest; None without one.

    The mean is taken over channels and those series (L, C) that are at least half as long as the longest, of as many
    steps as all of them have, up to half of them as lags.
    """
    longest = max(map(len, series))
    chosen = [one for one in series if 2 * len(one) >= longest]
    length = min(map(len, chosen))
    values = np.stack([one[:length] for one in chosen[: 1 + STEPS // length]]).astype(np.float64)  # (n, L, C)
    values -= values.mean(1, keepdims=True)
    power = np.abs(np.fft.rfft(values, 2 * length, axis=1)) ** 2
    correlation = np.fft.irfft(power, axis=1)[:, : length // 2 + 1].mean((0, 2))  # by lag
    if len(correlation) < 4 or correlation[0] <= 0:
        return None
    correlation /= correlation[0] * (1 - np.arange(len(correlation)) / length)  # as many terms at every lag
    inner = correlation[1:-1]
    peaks = np.flatnonzero((inner > correlation[:-2]) & (inner >= correlation[2:]) & (inner > PEAK)) + 1
    peaks = peaks[peaks > 1]
    if not peaks.size:
        return None
    return int(peaks[correlation[peaks] >= 0.9 * correlation[peaks].max()][0])


def _some(examples: Examples) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first examples, of so many steps in sum, one of them at least."""
    return list(_first(examples))


def _first(examples: Examples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    steps = 0
    for index in range(len(examples)):
        if steps >= STEPS:
            return
        inputs, targets = examples[index]
        yield inputs, targets
        steps += len(inputs)


def _repeated(season: np.ndarray, horizon: int) -> np.ndarray:
    """(lag, C) → (H, C), again and again."""
    return np.resize(season, (horizon, season.shape[1]))


def _mean_square(parts: list[np.ndarray]) -> float:
    values = [np.square(part, dtype=np.float64) for part in parts]
    return float(sum(part.sum() for part in values) / sum(part.size for part in values))
