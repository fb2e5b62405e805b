"""Tokens a second that one process delivers from disk, packed and laid out, beside the usual ways over the same
examples.

    python -m tests.benchmarks.loader [--blocks 640] [--runs 5]

The files are dropped from the page cache before each run where the kernel allows it. Peers: webdataset with one .npy
member per example, and lists of ids padded to the longest of a batch by torch's pad_sequence, as transformers'
collators do it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset

from dialogpt_ds.order.batches import RankSlice, RankStep
from dialogpt_ds.order.mixture import MixtureKey, MixturePosition
from dialogpt_ds.order.position import OrderKey
from dialogpt_ds.order.windows import BLOCKS_PER_WINDOW
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.data import step_batches
from tests.benchmarks.made_up import LIMIT, VOCABULARY, write_shards

ROWS = 64
"""Of a step."""


def drop_from_page_cache(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def ours(folder: Path, epochs_tokens: int, packed: bool = True, workers: int = 0) -> tuple[int, int]:
    """Deliver the steps of an epoch; returns real tokens and places."""
    directory = ShardDirectory.open(str(folder), "benchmark")
    key = MixtureKey((OrderKey(directory.manifest.fingerprint, 42, LIMIT, BLOCKS_PER_WINDOW, packed),), (1,))
    tokens = places = 0
    for step in step_batches(
        [directory], key, RankSlice(0, 1, ROWS, 1), MixturePosition.start(), VOCABULARY - 1, workers
    ):
        assert isinstance(step, RankStep)
        tokens += step.num_tokens
        places += step.num_rows * LIMIT
        if tokens >= epochs_tokens:
            return tokens, places
    raise AssertionError("the stream has no end")


def padded(arrays: Iterator[np.ndarray]) -> tuple[int, int]:
    """Batch examples of a stream, padded to the longest; returns real tokens and places."""
    tokens = places = 0
    while batch := [torch.from_numpy(array.astype(np.int64)) for array in islice(arrays, ROWS)]:
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=VOCABULARY - 1)
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        tokens += int((labels != -100).sum())
        places += ids.numel()
    return tokens, places


def one_member_per_example(folder: Path) -> tuple[int, int]:
    """What a WebDataset of examples gives: a tar member each, shuffled in a buffer."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(10_000).decode()
    return padded(sample["tokens.npy"] for sample in samples)


def lists_in_memory(examples: list[list[int]]) -> tuple[int, int]:
    """What transformers.Trainer is mostly given: lists of ids, tokenised beforehand."""
    order = np.random.default_rng(0).permutation(len(examples))
    return padded(np.array(examples[number]) for number in order)


def write_examples(folder: Path, directory: ShardDirectory, blocks: int) -> list[list[int]]:
    """Write a member per example, and return the examples as lists."""
    folder.mkdir()
    found: list[list[int]] = []
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxsize=256_000_000, verbose=0) as writer:
        for number in range(blocks):
            block = directory.block(number)
            ends = np.cumsum(block.example_lengths())
            for tokens in np.split(block.tokens, ends[:-1]):
                writer.write({"__key__": f"{len(found):08d}", "tokens.npy": tokens})
                found.append(tokens.tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=640)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        ours_folder, peer_folder = Path(name, "shards"), Path(name, "examples")
        directory = write_shards(ours_folder, arguments.blocks)
        lists = write_examples(peer_folder, directory, min(arguments.blocks, 64))
        total = directory.manifest.totals["tokens"]
        examples = directory.manifest.totals["examples"]
        print(f"{examples:,} examples, {total:,} tokens, {total * 2 / 1e6:,.0f} MB; rows of {LIMIT}, {ROWS} a step")
        ways: list[tuple[str, Callable[[], tuple[int, int]]]] = [
            ("packed rows, in the process itself", lambda: ours(ours_folder, total)),
            ("packed rows, one loader process", lambda: ours(ours_folder, total, workers=1)),
            ("packed rows, two loader processes", lambda: ours(ours_folder, total, workers=2)),
            ("one example per row (--packing False)", lambda: ours(ours_folder, total, packed=False)),
            ("webdataset, one member per example, padded", lambda: one_member_per_example(peer_folder)),
            ("lists of ids in memory, padded", lambda: lists_in_memory(lists)),
        ]
        speeds: dict[str, list[float]] = {label: [] for label, _ in ways}
        padding: dict[str, float] = {}
        for _ in range(arguments.runs):
            for label, way in ways:
                drop_from_page_cache(Path(name))
                begin = time.perf_counter()
                tokens, places = way()
                speeds[label].append(tokens / (time.perf_counter() - begin))
                padding[label] = 1 - tokens / places
    base = statistics.median(speeds[ways[0][0]])
    print(
        f"{'median of ' + str(arguments.runs) + ' runs':<44}{'million tokens/s':>18}{'of the first':>14}{'padding':>10}"
    )
    for label, values in speeds.items():
        median = statistics.median(values)
        print(f"{label:<44}{median / 1e6:>18.2f}{median / base:>13.0%}{padding[label]:>11.1%}")


if __name__ == "__main__":
    main()
