"""One thin file per command: arguments, one call, an exit code."""
