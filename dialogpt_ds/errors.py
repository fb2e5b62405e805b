"""The errors a person may see, and the exit codes that go with them."""

from collections.abc import Callable
from typing import Any, TypeVar

EXIT_DONE = 0
"""The work is done, or a stop that was asked for (STOP file, SIGINT) was carried out."""
EXIT_RUN_FAILED = 1
"""The run could not go on; the last complete checkpoint is kept."""
EXIT_USER_ERROR = 2
"""The input or the configuration is wrong; nothing was started."""
EXIT_INTERRUPTED = 130
"""SIGINT where nothing can be saved: 128 + 2, as a shell says it."""
EXIT_PREEMPTED = 75
"""SIGTERM or SIGUSR1 was carried out; the run wants to be started again (EX_TEMPFAIL of sysexits.h)."""
Value = TypeVar("Value")


class UserError(Exception):
    """A mistake in the input or the configuration: exit code 2, the message alone, no traceback.

    The message names the value, the place it came from (file and line, or key), the rule, and the way out.
    """


class Problems:
    """Collects what is wrong, so that a person hears of all of it at once."""

    def __init__(self, found: list[str]) -> None:
        self.found = found

    def of(self, check: Callable[..., Value], *arguments: Any) -> Value | None:
        """Return what a function returns; None where it raises UserError, whose message is kept."""
        try:
            return check(*arguments)
        except UserError as error:
            self.found.append(str(error))
            return None

    def raise_all(self) -> None:
        """Raise UserError with every problem, a line or more each, if there is one."""
        if self.found:
            raise UserError("\n".join(self.found))


class RunError(Exception):
    """A run that cannot go on: exit code 1, the message alone, no traceback."""


def first_line(error: BaseException) -> str:
    """Return the first line of what another's error says, for a message of ours."""
    return (str(error).splitlines() or [repr(error)])[0]


def in_a_line(error: Exception) -> str:
    """Return the type of another's error and the beginning of what it says, for a message of ours."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
