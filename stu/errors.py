"""The one error that a user's setting raises: which option, which value, what is allowed."""


class OptionError(ValueError):
    """An option has a value that cannot work.

    `name` is the keyword of the constructor that refused it; the command line shows the full configuration key of that
    keyword instead.
    """

    exit_code = 2  # of the command that it ends

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name}={value}: {allowed}")
        self.name, self.value, self.allowed = name, value, allowed

    def __reduce__(self) -> tuple[type["OptionError"], tuple[str, object, str]]:
        return type(self), (self.name, self.value, self.allowed)  # pickled whole, for other processes


class Busy(OptionError):
    """Another process works in the run directory; the same command can be repeated when it has ended."""

    exit_code = 75  # EX_TEMPFAIL, which schedulers and scripts know


DIVERGED = 3  # the exit code of a run whose loss is not finite: the same command would diverge again


class CommandError(OptionError):
    """An option that no job of a command can have, so that a sweep ends with it."""


def require_length(length: int, longest: float) -> None:
    """Raise `OptionError` where an input has more steps than `seq_len`; formats nothing else, for `torch.compile`."""
    if length > longest:
        raise OptionError("seq_len", longest, f"is below the input's {length} steps")


def require(condition: bool, name: str, value: object, allowed: str, error: type[OptionError] = OptionError) -> None:
    """Raise `error(name, value, allowed)` unless `condition` holds."""
    if not condition:
        raise error(name, value, allowed)


def brief(value: object) -> str:
    """A value in at most 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
