"""What all commands of the experiments have in common."""

from collections.abc import Callable, Sequence

import pytest


def assert_refused(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with code 2 and one line on the standard error, which starts with the message."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)
