"""Finding equal conversations among any number, in bounded memory."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

BUCKETS = 64
"""Hashes are divided by their first bits; one bucket at a time is sorted in memory."""
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u8")])


def duplicates(digests: Iterable[np.ndarray], folder: Path) -> Iterator[np.ndarray]:
    """Yield for each array of digests which of its conversations are equal to an earlier one, [conversations] bool.

    Of the n conversations of all arrays, memory holds a bit each and n / BUCKETS hashes; the others lie in files.

    Args:
        digests: [conversations, 2] uint64 each; two texts have one 128-bit hash by accident with a chance of n**2 /
            2**129.
        folder: where the files may lie.
    """
    sizes = []
    with tempfile.TemporaryDirectory(prefix="dedupe-", dir=folder) as name:
        files = [open(Path(name, str(bucket)), "wb") for bucket in range(BUCKETS)]  # noqa: SIM115 (closed below)
        try:
            place = 0
            for array in digests:
                records = np.empty(len(array), _RECORD)
                records["high"], records["low"] = array[:, 0], array[:, 1]
                records["place"] = np.arange(place, place + len(array))
                place += len(array)
                sizes.append(len(array))
                bucket = (array[:, 0] % np.uint64(BUCKETS)).astype(np.int64)
                for number in np.unique(bucket):
                    files[number].write(records[bucket == number].tobytes())
        finally:
            for file in files:
                file.close()
        twice = np.zeros(-(-place // 8), np.uint8)
        for number in range(BUCKETS):
            found = _later_ones(np.fromfile(Path(name, str(number)), _RECORD))
            np.bitwise_or.at(twice, found // 8, np.left_shift(1, found % 8).astype(np.uint8))
    place = 0
    for size in sizes:
        first = place // 8
        bits = np.unpackbits(twice[first : (place + size + 7) // 8], bitorder="little")
        yield bits[place - first * 8 :][:size].astype(bool)
        place += size


def _later_ones(records: np.ndarray) -> np.ndarray:
    """Return the places of records whose hash an earlier record has, [n] int64."""
    order = np.lexsort((records["place"], records["low"], records["high"]))
    sorted_ = records[order]
    same = (sorted_["high"][1:] == sorted_["high"][:-1]) & (sorted_["low"][1:] == sorted_["low"][:-1])
    return sorted_["place"][1:][same].astype(np.int64)
