"""A block: about a thousand examples as four arrays, and their form as members of a tar. Writer and reader share this
module."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXAMPLES_PER_BLOCK = 1_024
MEMBERS = ("tokens.npy", "turn_lengths.npy", "turn_weights.npy", "turns_per_example.npy")
"""Members of a block, in the order in which they lie in the tar."""
SMALL_MEMBERS = MEMBERS[1:]
"""What a plan needs; the tokens are read only for the rows that a rank trains on."""


_USUAL_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype><[uf][248])', 'fortran_order': False, 'shape': \((?P<count>\d+),\), "
    rb"\} *\n",
    re.DOTALL,
)
"""How `_to_npy` begins; NumPy's own reader of headers, which evaluates Python, takes a third of the time of a plan."""


@dataclass(frozen=True, eq=False)
class Shape:
    """How the examples of a block are divided, without their tokens."""

    turn_lengths: np.ndarray
    """[turns] tokens of each turn."""
    turn_weights: np.ndarray
    """[turns] float32 weight of each turn in the loss; 0 is context."""
    turns_per_example: np.ndarray
    """[examples] turns of each example."""

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.turns_per_example)

    def per_example(self, per_turn: np.ndarray) -> np.ndarray:
        """Return the sum of a [turns] array over each example, [examples]; every example has at least one turn."""
        if not len(self.turns_per_example):
            return np.zeros(0, per_turn.dtype)
        starts = np.cumsum(self.turns_per_example, dtype=np.int64) - self.turns_per_example
        return np.add.reduceat(per_turn, starts)

    def example_lengths(self) -> np.ndarray:
        """Return the tokens of each example, [examples] int64."""
        return self.per_example(self.turn_lengths.astype(np.int64))

    def example_targets(self) -> np.ndarray:
        """Return the target tokens of each example, [examples] int64."""
        return self.per_example(np.where(self.turn_weights > 0, self.turn_lengths.astype(np.int64), 0))

    def example_weight_sums(self) -> np.ndarray:
        """Return the sum of the target tokens' weights of each example, [examples] float64."""
        return self.per_example(self.turn_weights.astype(np.float64) * self.turn_lengths)


@dataclass(frozen=True, eq=False)
class Block(Shape):
    """Examples one behind the other."""

    tokens: np.ndarray
    """[tokens] uint16, or uint32 for vocabularies above 65,535 ids; all examples of the block."""

    def examples(self, start: int, stop: int) -> "Block":
        """Return the examples `start` to `stop`."""
        turns = np.concatenate([[0], np.cumsum(self.turns_per_example, dtype=np.int64)])
        tokens = np.concatenate([[0], np.cumsum(self.turn_lengths, dtype=np.int64)])
        first, last = turns[start], turns[stop]
        return Block(
            self.turn_lengths[first:last],
            self.turn_weights[first:last],
            self.turns_per_example[start:stop],
            self.tokens[tokens[first] : tokens[last]],
        )

    def select(self, wanted: np.ndarray) -> "Block":
        """Return the examples that are `wanted`, [examples] bool."""
        if wanted.all():
            return self
        turns = np.repeat(wanted, self.turns_per_example)
        return Block(
            self.turn_lengths[turns],
            self.turn_weights[turns],
            self.turns_per_example[wanted],
            self.tokens[np.repeat(turns, self.turn_lengths)],
        )

    def to_members(self) -> dict[str, bytes]:
        """Return the members of the block as files in NumPy's .npy format."""
        arrays = (self.tokens, self.turn_lengths, self.turn_weights, self.turns_per_example)
        return {name: _to_npy(array) for name, array in zip(MEMBERS, arrays, strict=True)}


def join_blocks(blocks: Sequence[Block]) -> Block:
    """Return one block with the examples of all, in order."""
    return Block(
        np.concatenate([block.turn_lengths for block in blocks]),
        np.concatenate([block.turn_weights for block in blocks]),
        np.concatenate([block.turns_per_example for block in blocks]),
        np.concatenate([block.tokens for block in blocks]),
    )


def make_block(turns: list[list[tuple[list[int], float]]], token_dtype: np.dtype, max_seq_length: int) -> Block:
    """Build a block from examples, each a list of (token ids, weight) per turn."""
    count_dtype = smallest_dtype(max_seq_length + 1)
    flat = [turn for example in turns for turn in example]
    return Block(
        np.array([len(ids) for ids, _ in flat], count_dtype),
        np.array([weight for _, weight in flat], np.float32),
        np.array([len(example) for example in turns], count_dtype),
        np.array([token for ids, _ in flat for token in ids], token_dtype),
    )


def smallest_dtype(num_values: int) -> np.dtype:
    """Return uint16 where it holds the numbers 0 to `num_values` - 1, else uint32."""
    return np.dtype(np.uint16 if num_values <= 1 << 16 else np.uint32)


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def array_from_npy(content: memoryview | bytes) -> np.ndarray:
    """Return the array of an .npy file that lies in memory, without a copy.

    Raises:
        ValueError: the content is no .npy file, or cut short.
    """
    usual = _USUAL_NPY.match(content)
    if usual is not None:
        dtype, count, start = np.dtype(usual["dtype"].decode()), int(usual["count"]), usual.end()
        if len(content) == start + count * dtype.itemsize:
            return np.frombuffer(content, dtype, count=count, offset=start)
    header = io.BytesIO(bytes(content[:1024]))
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError("not .npy version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype.hasobject or len(shape) != 1 or len(content) != header.tell() + shape[0] * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes do not hold an array {shape} of {dtype}")
    return np.frombuffer(content, dtype, count=shape[0], offset=header.tell())
