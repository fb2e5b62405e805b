"""The errors a person may see, and the exit codes that go with them."""

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


class UserError(Exception):
    """A mistake in the input or the configuration: exit code 2, the message alone, no traceback.

    The message names the value, the place it came from (file and line, or key), the rule, and the way out.
    """


class RunError(Exception):
    """A run that cannot go on: exit code 1, the message alone, no traceback."""


def in_a_line(error: Exception) -> str:
    """Return the type of another's error and the beginning of what it says, for a message of ours."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
