"""Numbers with as many digits as they deserve: a standard deviation has two, and its mean ends where it does."""

import math
from typing import NamedTuple

UNKNOWN = "-"
LEAST = -300  # power of ten that is told
PLAIN = 6  # digits after the point, beyond which a power of ten is written


class Digits(NamedTuple):
    """How a mean, its standard deviation and numbers beside them are written: in units of 10^exponent."""

    exponent: int
    decimals: int

    def text(self, value: float) -> str:
        """The number, without its power of ten."""
        return f"{value / 10.0**self.exponent:z,.{self.decimals}f}" if math.isfinite(value) else str(value)

    @property
    def power(self) -> str:
        """The power of ten as it stands after a number."""
        return f"e{self.exponent:+03}" if self.exponent else ""


def digits(mean: float, std: float | None) -> Digits:
    """Two digits of the standard deviation decide; without one the mean has four, and it never has more than six."""
    size = _exponent(mean, 4)
    last = size - 3 if not std or not math.isfinite(std) else max(_exponent(std, 2) - 1, size - 5)
    if -last > PLAIN or size > PLAIN:
        return Digits(size, max(size - last, 0))
    return Digits(0, max(-last, 0))


def mean_and_std(mean: float | None, std: float | None = None) -> str:
    """A mean and its standard deviation as `0.532 ± 0.013` or `(5.32 ± 0.13)e-05`, without one `0.5321`."""
    if mean is None:
        return UNKNOWN
    form = digits(mean, std)
    if std is None:
        return form.text(mean) + form.power
    tiny = 0 < std / 10.0**form.exponent < 0.5 * 10.0**-form.decimals  # not shown as none
    both = f"{form.text(mean)} ± {f'{std / 10.0**form.exponent:.0e}' if tiny else form.text(std)}"
    return f"({both}){form.power}" if form.power else both


def beside(value: float | None, mean: float | None, std: float | None) -> str:
    """A number with the digits of a mean and its standard deviation."""
    if value is None or mean is None:
        return UNKNOWN
    form = digits(mean, std) if math.isfinite(mean) else digits(value, None)
    return form.text(value) + form.power


def number(value: float | None, form: str = ".4g") -> str:
    """A number in a format of Python, or a dash."""
    return UNKNOWN if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _exponent(value: float, places: int) -> int:
    """The power of ten of the first of so many digits."""
    power = int(f"{value:.{places - 1}e}".partition("e")[2]) if value and math.isfinite(value) else 0
    return max(power, LEAST)
