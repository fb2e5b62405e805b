"""The order of 147 million examples on 512 ranks: time to the first batch, to a resume in mid-training, memory, and
planning per step.

    python -m tests.benchmarks.order [--examples 147000000] [--ranks 512] [--rows_per_rank 64]

The index, manifest and plan are those of a corpus of that size; its blocks are 64 real ones, read from a real tar, over
and over. Start and resume are timed in a fresh process each, as one of the ranks does it.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dialogpt_ds.order.batches import RankSlice, rank_step
from dialogpt_ds.order.mixture import Mixture, MixtureKey, MixturePosition, order_state, position_from_state
from dialogpt_ds.order.packing import pack
from dialogpt_ds.order.position import OrderKey, Position
from dialogpt_ds.order.windows import BLOCKS_PER_WINDOW
from dialogpt_ds.shards.blocks import Block, Shape
from dialogpt_ds.shards.reader import ShardDirectory
from tests.benchmarks.made_up import LIMIT, VOCABULARY, lengths_like_real_ones, write_huge_index, write_shards
from tests.conftest import REDDIT

TOKENS_PER_SECOND = {"117M": 218_000, "345M": 80_000, "762M": 38_000}
"""Of one A100-80 at sequences of 1,024 (llm.c's published figures): how fast a GPU wants rows."""


class Repeated(ShardDirectory):
    """The huge directory; what is asked of a block is read from a real one."""

    real: ShardDirectory

    def shape(self, block: int) -> Shape:
        return self.real.shape(block % self.real.num_blocks)

    def block(self, block: int) -> Block:
        return self.real.block(block % self.real.num_blocks)


def padding_table(tsv: Path) -> None:
    """Print the padding of packed windows: made-up lengths, and those of a TSV's examples drawn again and again."""
    from dialogpt_ds.tokenization import find_tokenizer, make_encoder

    sources = {"made-up lengths": lengths_like_real_ones(65_536, 0).sum(axis=1)}
    if tsv.is_file():
        encode = make_encoder(find_tokenizer("gpt2"))
        turns = [re.split(r" EOS |\t", line) for line in tsv.read_text(encoding="utf-8").splitlines()]
        real = [sum(len(encode(re.sub(r"^[\d.]+ ", "", turn))) + 1 for turn in line) for line in turns]
        fitting = np.array([length for length in real if length <= LIMIT])
        sources[tsv.name] = fitting[np.random.default_rng(0).integers(0, len(fitting), 65_536)]
    else:
        print(f"(no {tsv}: made-up lengths only)")
    print(f"\n{'padding, 65,536 examples a window':<42}{'rows of':>10}{'padding':>12}{'unpacked':>12}{'time':>12}")
    for name, lengths in sources.items():
        for row_length in (128, 256, 1_024):
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                packing = pack(lengths, row_length)
                times.append(time.perf_counter() - begin)
            padding, alone = (1 - lengths.sum() / (rows * row_length) for rows in (packing.num_rows, len(lengths)))
            print(f"{name:<42}{row_length:>10}{padding:>12.2%}{alone:>12.1%}{statistics.median(times) * 1e3:>9.1f} ms")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path, ranks: int, rows_per_rank: int, position: list[int]) -> dict[str, float]:
    """Do what a rank does from opening the directory to its first batch at a position, then plan some windows."""
    before = peak_megabytes()
    started = time.perf_counter()
    directory = Repeated.open(str(folder / "huge"), "benchmark")
    assert isinstance(directory, Repeated)
    directory.real = ShardDirectory.open(str(folder / "real"), "benchmark")
    key = MixtureKey((OrderKey(directory.manifest.fingerprint, 42, LIMIT, BLOCKS_PER_WINDOW, True),), (1,))
    opened = time.perf_counter()
    share = RankSlice(ranks - 1, ranks, rows_per_rank, 1)
    place = position_from_state(order_state(key, MixturePosition(0, (Position(*position),), ((),))), key)
    stream = Mixture([directory], key, [()])
    stream.check_size(share.global_rows, "benchmark")
    rank_step(stream.batch(place, share.global_rows), share, LIMIT, VOCABULARY - 1)
    first = time.perf_counter()
    plan = stream.streams[0]._epoch(position[0])
    times, rows = [], []
    for number in range(position[1], position[1] + 20):
        begin = time.perf_counter()
        rows.append(plan.window(number).num_rows)
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    steps, at = 20, place
    for _ in range(steps):
        batch = stream.batch(at, share.global_rows)
        rank_step(batch, share, LIMIT, VOCABULARY - 1)
        at = batch.position_after
    taken = time.perf_counter()
    for _ in range(steps):
        at = stream.skip(at, share.global_rows)
    return {
        "skip": (time.perf_counter() - taken) / steps,
        "open": opened - started,
        "first batch": first - started,
        "window": statistics.median(times),
        "rows": statistics.median(rows),
        "step": (taken - begin) / steps,
        "windows": plan.num_windows,
        "peak": peak_megabytes(),
        "imports": before,
    }


def in_fresh_process(arguments: argparse.Namespace, folder: Path, position: list[int]) -> dict[str, float]:
    command = [
        sys.executable, "-m", "tests.benchmarks.order", "--ranks", str(arguments.ranks),
        "--rows_per_rank", str(arguments.rows_per_rank), "--measure", str(folder), *map(str, position),
    ]  # fmt: skip
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=147_000_000)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--rows_per_rank", type=int, default=64)
    parser.add_argument(
        "--tsv", type=Path, default=REDDIT, help="real conversations in DialoGPT's format, for the padding"
    )
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, *position = arguments.measure
        print(json.dumps(measure(Path(folder), arguments.ranks, arguments.rows_per_rank, [int(n) for n in position])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = write_shards(folder / "real", BLOCKS_PER_WINDOW)
        write_huge_index(folder / "huge", real, arguments.examples, blocks_per_shard=2_600)
        start = in_fresh_process(arguments, folder, [0, 0, 0])
        middle = [2, int(start["windows"]) // 2, 37]
        resumed = in_fresh_process(arguments, folder, middle)
    print(
        f"{arguments.examples:,} examples, {arguments.ranks} ranks of {arguments.rows_per_rank} rows of {LIMIT} a step"
    )
    print(
        f"{'':<42}{'start':>10}{'resume':>10}   (resume: epoch 3, window {middle[1]:,} of {int(start['windows']):,}, "
        "row 37)"
    )
    for label, key, unit, factor in (
        ("open manifest and index", "open", "s", 1),
        ("from nothing to the first batch", "first batch", "s", 1),
        ("plan of a window (median of 20)", "window", "ms", 1e3),
        ("a step of one rank: plan and arrays", "step", "ms", 1e3),
        ("a step that another loader process makes", "skip", "ms", 1e3),
        ("peak memory", "peak", "MB", 1),
        ("of it after imports", "imports", "MB", 1),
    ):
        print(f"{label:<42}{start[key] * factor:>8.2f} {unit:<2}{resumed[key] * factor:>7.2f} {unit}")
    windows_per_step = arguments.ranks * arguments.rows_per_rank / start["rows"]
    print(f"a window has {start['rows']:,.0f} rows; a step takes {windows_per_step:.2f} windows")
    print(
        "\nplanning as a share of a step of one A100, and how busy each loader process of a rank is where a rank has "
        "1, 2 or 4"
    )
    print(f"{'':<10}{'step':>10}{'plans':>8}{'1':>8}{'2':>8}{'4':>8}")
    for model, speed in TOKENS_PER_SECOND.items():
        step = arguments.rows_per_rank * LIMIT / speed
        busy = [(start["step"] + (processes - 1) * start["skip"]) / processes / step for processes in (1, 2, 4)]
        shares = [windows_per_step * start["window"] / step, *busy]
        print(f"{model:<10}{step * 1e3:>7.1f} ms" + "".join(f"{share:>8.0%}" for share in shares))
    padding_table(arguments.tsv)


if __name__ == "__main__":
    main()
