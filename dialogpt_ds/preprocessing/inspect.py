"""The command that looks into a shard directory: preprocess/inspect_shards.py and dialogpt-inspect."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dialogpt_ds.commandline import option, parse, run_command
from dialogpt_ds.errors import EXIT_DONE, RunError, UserError
from dialogpt_ds.shards.manifest import TOKENIZER, read_index, read_manifest
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.shards.verify import all_problems, missing_or_cut
from dialogpt_ds.tokenization import find_tokenizer

SHOWN_PROBLEMS = 20
_DIM, _GREEN, _END = "\033[2m", "\033[1;32m", "\033[0m"


@dataclass
class InspectArguments:
    """Look into shard directories."""

    folders: list[str] = option([], positional=True)
    """Shard directories."""
    verify: bool = False
    """Read everything and compare every checksum and count."""
    show: int = 0
    """Print so many examples, spread over the directory, turn by turn."""
    at: list[str] = option([])
    """Print these examples, named BLOCK:EXAMPLE as messages of the trainer name them."""
    plot: str = ""
    """Picture (.png or .svg) with histograms of the examples' lengths and turns."""


def main(argv: list[str] | None = None) -> int:
    """Inspect; returns the exit code: 1 where something is damaged."""
    return run_command(lambda: _inspect(argv))


def _inspect(argv: list[str] | None) -> int:
    arguments = parse(InspectArguments, "Look into shard directories.", argv).arguments
    if arguments.show < 0:
        raise UserError(f"--show {arguments.show} must be 0 or more")
    if arguments.plot and Path(arguments.plot).suffix not in (".png", ".svg"):
        raise UserError(f"--plot {arguments.plot!r}: the name must end in .png or .svg")
    if arguments.at and len(arguments.folders) != 1:
        raise UserError(f"--at names examples of one shard directory; {len(arguments.folders)} are given")
    directories = [_open(folder) for folder in arguments.folders]
    named = [_named(place, directories[0]) for place in arguments.at]
    problems: list[str] = []
    for directory in directories:
        print_totals(directory)
        found = list(all_problems(directory) if arguments.verify else missing_or_cut(directory))
        if arguments.verify and not found:
            num_shards = len(directory.manifest.shardlist)
            print(
                f"verified       every checksum and count of {directory.num_blocks:,} blocks in {num_shards:,} shards"
            )
        problems += found
    if problems:
        more = [f"... and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise RunError("\n".join([*problems[:SHOWN_PROBLEMS], *more]))
    for directory in directories:
        for text in examples_as_text(directory, [*named, *spread(directory, arguments.show)], in_colour()):
            print(text)
    if arguments.plot:
        draw_histograms(directories, Path(arguments.plot).expanduser())
        print(f"\nHistograms: {arguments.plot}")
    return EXIT_DONE


def _open(folder: str) -> ShardDirectory:
    """Open a directory without a look at its shards, which is what this command is for."""
    manifest = read_manifest(folder, "folder")
    path = Path(folder).expanduser()
    return ShardDirectory(folder, path, manifest, read_index(path, manifest))


def print_totals(directory: ShardDirectory) -> None:
    """Print what the manifest says."""
    manifest = directory.manifest
    totals, size = manifest.totals, sum(shard.filesize for shard in manifest.shardlist)
    options = ", ".join(f"{name} {value}" for name, value in manifest.options.items())
    rows = [
        ("folder", f"{directory.name}, fingerprint {manifest.fingerprint[:12]}"),
        ("tokenizer", f"{manifest.tokenizer['name']}, {manifest.vocab_size:,} ids, EOS {manifest.eos_id}"),
        ("options", f"max_seq_length {manifest.max_seq_length}, {options}"),
        ("shards", f"{totals['shards']:,} with {totals['blocks']:,} blocks, {size:,} bytes"),
        ("examples", f"{totals['examples']:,}, {totals['tokens'] / max(totals['examples'], 1):.1f} tokens each"),
        ("tokens", f"{totals['tokens']:,}, of them {totals['target_tokens']:,} targets "
                   f"({totals['target_tokens'] / max(totals['tokens'], 1):.0%})"),
    ]  # fmt: skip
    for name, value in rows:
        print(f"{name:<14} {value}")


def in_colour() -> bool:
    """Return whether colours are wanted: on a terminal, unless NO_COLOR says no (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _named(text: str, directory: ShardDirectory) -> int:
    """Return the number of the example BLOCK:EXAMPLE in the directory; raises UserError."""
    block, _, within = text.partition(":")
    sizes = directory.index.examples
    if not (block.isdecimal() and within.isdecimal()):
        raise UserError(f"--at {text!r} is no BLOCK:EXAMPLE, as in 12:345")
    if int(block) >= len(sizes) or int(within) >= int(sizes[int(block)]):
        has = (
            f"block {block} has {sizes[int(block)]:,} examples"
            if int(block) < len(sizes)
            else f"there are {len(sizes):,} blocks"
        )
        raise UserError(f"--at {text!r}: {directory.name} has no such example; {has}, counted from 0")
    return int(sizes[: int(block)].sum()) + int(within)


def spread(directory: ShardDirectory, count: int) -> list[int]:
    """Return the numbers of `count` examples, spread evenly over the directory."""
    total = directory.manifest.totals["examples"]
    return sorted({total * place // count for place in range(min(count, total))}) if count else []


def examples_as_text(directory: ShardDirectory, numbers: Sequence[int], colour: bool) -> Iterator[str]:
    """Yield examples, each turn on a line with its weight and tokens."""
    if not numbers:
        return
    folder = directory.folder / TOKENIZER
    tokenizer = find_tokenizer(str(folder) if folder.is_dir() else directory.manifest.tokenizer["name"])
    ends = np.cumsum(directory.index.examples)
    for number in numbers:
        block = int(np.searchsorted(ends, number, side="right"))
        within = number - (int(ends[block - 1]) if block else 0)
        yield f"\nexample {number:,} (block {block:,}, {within:,} in it)"
        yield from _turns_as_text(directory, block, within, tokenizer, colour)


def _turns_as_text(directory: ShardDirectory, block: int, within: int, tokenizer: Any, colour: bool) -> Iterator[str]:
    example = directory.block(block).examples(within, within + 1)
    start = 0
    for length, weight in zip(example.turn_lengths.tolist(), example.turn_weights.tolist(), strict=True):
        ids = example.tokens[start : start + length].tolist()
        start += length
        whole = bool(ids) and ids[-1] == directory.manifest.eos_id
        text = tokenizer.decode(ids[:-1] if whole else ids).replace("\n", "\\n")
        kind = f"target {weight:g}" if weight > 0 else "context"
        line = f"  {kind:<12} {length:>4} tokens  {text}{'' if whole else ' (its end is cut)'}"
        yield f"{_GREEN if weight > 0 else _DIM}{line}{_END}" if colour else line


def draw_histograms(directories: list[ShardDirectory], path: Path) -> None:
    """Draw the examples' lengths and turns of several directories into one picture.

    Raises:
        UserError: matplotlib is missing, or the picture can't be written.
    """
    from dialogpt_ds.plots.curves import require_matplotlib

    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for directory, style in zip(directories, ("-", "--", ":", "-.") * len(directories), strict=False):
        lengths: Counter[int] = Counter()
        turns: Counter[int] = Counter()
        for block in range(directory.num_blocks):
            shape = directory.shape(block)
            lengths.update(shape.example_lengths().tolist())
            turns.update(shape.turns_per_example.tolist())
        for axes, counts in ((left, lengths), (right, turns)):
            places = np.arange(0, max(counts, default=0) + 2)
            axes.stairs(
                [counts[int(place)] for place in places[:-1]], places - 0.5, label=directory.name, linestyle=style
            )
    left.set(title="Tokens of an example", xlabel="tokens", ylabel="examples")
    right.set(title="Turns of an example", xlabel="turns", yscale="log")
    right.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--plot {path} can't be written: {error.strerror}; choose another place") from error
