"""The command line of preprocess/make_shards.py."""

import os
import re
from dataclasses import dataclass

from dialogpt_ds.commandline import option
from dialogpt_ds.conversations.filters import PATTERNS
from dialogpt_ds.conversations.formats import FORMATS, FormatName
from dialogpt_ds.conversations.formats.base import TurnWeights
from dialogpt_ds.conversations.targets import Targets
from dialogpt_ds.errors import UserError
from dialogpt_ds.preprocessing.encoding import EncodingSettings
from dialogpt_ds.preprocessing.executors import check_executor


@dataclass
class ShardArguments:
    """Turn conversations into tokenised WebDataset shards."""

    # Input
    input: list[str] = option([])
    """Files with conversations, patterns like 'data/*.jsonl.gz', or - for standard input; plain, .gz, .bz2, .xz or
    .zst. Not needed for --format chitchat, which has its own."""
    format: FormatName = option(
        "auto", words={"formats": ", ".join(f"{name} ({kind.summary})" for name, kind in FORMATS.items())}
    )
    """{formats}, or auto: told from each file's head, and printed."""
    turn_weights: TurnWeights = "auto"
    """Whether the turns of a DialoGPT TSV begin with a weight; auto decides it from the head of each file and says
    so."""
    persona: str = option(
        "", words={"speaking": ", ".join(kind.speakers for kind in FORMATS.values() if kind.speakers)}
    )
    """Learn the turns of this speaker only ({speaking})."""
    history: int = 7
    """Lines of context before each line of --persona in a script."""

    # Output
    output: str = ""
    """Folder for the shards; with --validation_fraction it gets the folders train and validation."""
    tokenizer: str = "gpt2"
    """gpt2, a local folder with a tokenizer, or a hub id."""
    max_seq_length: int = 128
    """No example is longer than this many tokens."""
    validation_fraction: float = 0.0
    """Share of the conversations, chosen by a hash of their text, that goes to the folder validation."""
    shard_megabytes: int = 256
    """Size of a shard (1 MB = 2**20 bytes)."""

    # What is learned
    targets: Targets = "input"
    """Which turns are learned: as the input says (else its format's default), all but the first, the last, or the
    assistant's."""
    reverse: bool = False
    """Turn conversations round, for a model that predicts what was said from the reply (MMI); a turn is learned where
    its reply was."""
    two_turn: bool = False
    """Give each learned turn only the turn before it as context."""

    # What is left out, and counted
    dedupe: bool = False
    """Leave out conversations that are equal to an earlier one."""
    min_turns: int = 0
    """Leave out conversations of fewer turns."""
    max_turns: int | None = None
    """Leave out conversations of more turns."""
    filter: list[str] = option([])
    """Leave out conversations by rule: urls, repeated_words (one three times in a row), long_words, markup."""
    max_reject_fraction: float = 0.01
    """Above this share of rejected records the run fails and writes no manifest."""

    # How it is done; nothing here changes the output
    workers: int = os.cpu_count() or 1
    """Processes that encode."""
    executor: str = "local"
    """local, or dask://HOST:PORT of a Dask scheduler whose workers see the same files."""
    part: str = ""
    """i/n: only encode the i-th of n shares of the input, as in a SLURM array; --merge then makes the shards."""
    merge: bool = False
    """Make the shards of what runs with --part have encoded."""


@dataclass(frozen=True)
class PartShare:
    """Which parts a run encodes."""

    number: int = 1
    """From 1."""
    of: int = 1

    def has(self, part: int) -> bool:
        """Return whether a part belongs to this share."""
        return part % self.of == self.number - 1


def check_arguments(arguments: ShardArguments) -> PartShare:
    """Check everything that can be checked before any work; raises UserError with all problems at once."""
    problems = []
    if not arguments.output:
        problems.append("--output is missing: name a folder for the shards")
    if arguments.max_seq_length < 2:
        problems.append(
            f"--max_seq_length {arguments.max_seq_length} is too small: a target needs one token before it, so 2"
        )
    if not 0 <= arguments.validation_fraction < 1:
        problems.append(f"--validation_fraction {arguments.validation_fraction} is not a share: give 0 to below 1")
    if not 0 <= arguments.max_reject_fraction <= 1:
        problems.append(f"--max_reject_fraction {arguments.max_reject_fraction} is not a share: give 0 to 1")
    if arguments.workers < 1 or arguments.shard_megabytes < 1:
        problems.append(
            f"--workers {arguments.workers} and --shard_megabytes {arguments.shard_megabytes} must be 1 or more"
        )
    if arguments.history < 1:
        problems.append(
            f"--history {arguments.history} must be 1 or more: a line without one before it answers nothing"
        )
    unknown = [name for name in arguments.filter if name not in PATTERNS]
    if unknown:
        problems.append(f"--filter {' '.join(unknown)}: there is {', '.join(PATTERNS)}")
    if arguments.min_turns < 0 or (
        arguments.max_turns is not None and arguments.max_turns < max(arguments.min_turns, 1)
    ):
        problems.append(f"--min_turns {arguments.min_turns} --max_turns {arguments.max_turns} leave nothing over")
    if arguments.persona and arguments.targets != "input":
        problems.append(
            f"--persona {arguments.persona!r} and --targets {arguments.targets} both say what is learned: give one"
        )
    share = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
    if arguments.part and (share is None or not 1 <= int(share[1]) <= int(share[2])):
        problems.append(f"--part {arguments.part!r} is no i/n with i from 1 to n")
    if arguments.part and arguments.merge:
        problems.append(
            "--part encodes and --merge makes shards of it: give --merge in a run of its own, after all parts"
        )
    if problems:
        raise UserError("\n".join(problems))
    check_executor(arguments.executor)
    return PartShare(int(share[1]), int(share[2])) if share else PartShare()


def encoding_settings(arguments: ShardArguments) -> EncodingSettings:
    """Return what decides on the content of parts."""
    return EncodingSettings(
        tokenizer=arguments.tokenizer,
        max_seq_length=arguments.max_seq_length,
        targets=arguments.targets,
        persona=arguments.persona,
        reverse=arguments.reverse,
        two_turn=arguments.two_turn,
        filters=tuple(name for name in PATTERNS if name in arguments.filter),
        min_turns=arguments.min_turns,
        max_turns=arguments.max_turns,
        validation_fraction=arguments.validation_fraction,
    )
