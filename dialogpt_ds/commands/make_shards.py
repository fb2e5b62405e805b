"""The command that makes shards: preprocess/make_shards.py and dialogpt-shards."""

import os

from dialogpt_ds.commandline import parse, run_command
from dialogpt_ds.errors import RunError


def main(argv: list[str] | None = None) -> int:
    """Make shards; returns the exit code."""
    # Parallelism is over processes here; the tokenizer library would warn about forks and fight for cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from dialogpt_ds.preprocessing.arguments import ShardArguments
    from dialogpt_ds.preprocessing.make import make_shards

    def work() -> int:
        parsed = parse(ShardArguments, "Turn conversations into tokenised WebDataset shards.", argv)
        try:
            make_shards(parsed.arguments)
        except KeyboardInterrupt as error:
            raise RunError("interrupted. Finished parts are kept: run the same command again to go on.") from error
        return 0

    return run_command(work)
