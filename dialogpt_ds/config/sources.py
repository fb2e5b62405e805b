"""What --train_input_file names: one shard directory, or several with their weights."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path

from dialogpt_ds.errors import UserError

MAX_PERIOD = 1_000_000
"""Weights in lowest terms may add up to this much; the pattern of a mixture repeats after as many rows."""
_WEIGHTED = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+):(.+?)\s*", re.DOTALL)


@dataclass(frozen=True)
class NamedSource:
    """A shard directory of the command line."""

    path: str
    weight: int
    """Rows of it out of the sum of all weights, in lowest terms."""


def parse_sources(given: str | list[str], what: str) -> list[NamedSource]:
    """Read `DIR`, `3:DIR_A,1:DIR_B` or a list of such entries; weights may be decimals.

    A text that is the path of something that exists is one directory, whatever characters it has.

    Raises:
        UserError: a weight is missing, 0 or too fine, or a directory stands there twice.
    """
    if isinstance(given, str):
        if Path(given).expanduser().exists() or given.startswith("pipe:"):
            return [NamedSource(given, 1)]
        given = given.split(",")
    entries = [entry for entry in given if entry.strip()]
    if not entries:
        raise UserError(f"{what} {given!r} names no shard directory (preprocess/make_shards.py makes one)")
    found = [_entry(entry, len(entries), what) for entry in entries]
    paths = [path for _, path in found]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{what}: {path!r} is named twice; name it once, with the sum of the weights")
    denominator = lcm(*(weight.denominator for weight, _ in found))
    weights = lowest_terms([int(weight * denominator) for weight, _ in found])
    if sum(weights) > MAX_PERIOD:
        raise UserError(
            f"{what}: the weights {', '.join(str(float(weight)) for weight, _ in found)} come to "
            f"{':'.join(map(str, weights))} in whole rows, which repeats only after {sum(weights):,}; round them so "
            f"that it is at most {MAX_PERIOD:,}"
        )
    return [NamedSource(path, weight) for weight, path in zip(weights, paths, strict=True)]


def _entry(entry: str, count: int, what: str) -> tuple[Fraction, str]:
    match = _WEIGHTED.fullmatch(entry)
    if match is None or Path(entry).expanduser().exists():
        if count > 1:
            raise UserError(
                f"{what}: {entry.strip()!r} has no weight; of several directories each needs one in front, as in "
                "3:DIR_A,1:DIR_B (three rows of DIR_A for one of DIR_B). Weights in proportion to their tokens show "
                "all of them equally often."
            )
        return Fraction(1), entry.strip()
    weight, path = Fraction(match[1]), match[2]
    if not weight:
        raise UserError(f"{what}: {entry.strip()!r} has the weight 0; leave it out, or give a weight above 0")
    return weight, path


def lowest_terms(weights: Sequence[int]) -> tuple[int, ...]:
    """Return weights divided by their greatest common divisor."""
    divisor = gcd(*weights)
    return tuple(weight // divisor for weight in weights)
