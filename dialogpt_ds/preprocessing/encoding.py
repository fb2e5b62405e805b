"""From records to a part: what runs in worker processes."""

import hashlib
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from dialogpt_ds.conversations.conversation import Conversation, RejectedRecordError, text_of
from dialogpt_ds.conversations.filters import RULES, make_filter
from dialogpt_ds.conversations.inputs import Input
from dialogpt_ds.conversations.targets import Targets, reversed_direction, turn_weights
from dialogpt_ds.preprocessing.cutting import cut_conversation
from dialogpt_ds.preprocessing.parts import COLUMN_TYPES, ConversationRow, Part, PartTask, Reject
from dialogpt_ds.shards.blocks import Block, smallest_dtype
from dialogpt_ds.tokenization import Encode, find_tokenizer, make_encoder

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


@dataclass(frozen=True)
class EncodingSettings:
    """Everything that decides what a record becomes."""

    tokenizer: str
    max_seq_length: int
    targets: Targets
    persona: str
    reverse: bool
    two_turn: bool
    filters: tuple[str, ...]
    min_turns: int
    max_turns: int | None
    validation_fraction: float


tokenizer_of = lru_cache(maxsize=1)(find_tokenizer)
"""The tokenizer of that name; finding one takes a second."""


@lru_cache(maxsize=1)
def part_encoder(settings: EncodingSettings) -> "PartEncoder":
    """Return the encoder of this process: it takes a second to build, and forked processes inherit it."""
    return PartEncoder(settings)


class PartEncoder:
    """Reads, filters, encodes and cuts records; a pure function of them, whatever process it runs in."""

    def __init__(self, settings: EncodingSettings) -> None:
        tokenizer = tokenizer_of(settings.tokenizer)
        self.settings = settings
        self.encode: Encode = make_encoder(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self.token_dtype = smallest_dtype(len(tokenizer))
        self.rule_of: Callable[[Conversation], str | None] = make_filter(
            list(settings.filters), settings.min_turns, settings.max_turns
        )

    def __call__(self, task: PartTask) -> Part:
        """Return what a part's records became."""
        builder = PartBuilder(self.token_dtype, self.settings.max_seq_length)
        rejects, lines = [], 0
        for record in task.read():
            lines = record.line
            try:
                conversation = task.source.read(record)
            except RejectedRecordError as error:
                rejects.append(Reject(record.line, str(error), text_of(record)))
                continue
            self._take(task.source, conversation, builder)
        return builder.part(rejects, lines, task.content_sum)

    def _take(self, source: Input, conversation: Conversation, builder: "PartBuilder") -> None:
        """Enter a conversation's columns, and its examples where it is not filtered."""
        settings = self.settings
        digest, text_bytes = digest_of(conversation)
        rule = self.rule_of(conversation)
        row = ConversationRow(
            digest,
            split=int(digest[0] < settings.validation_fraction * 2**64),
            rule=RULES.index(rule) if rule else 0,
            turns=len(conversation.turns),
        )
        if not row.rule:
            weights = turn_weights(conversation, settings.targets, source.format.default_targets, settings.persona)
            if settings.reverse:
                conversation, weights = reversed_direction(conversation, weights)
            row.text_bytes = text_bytes
            self._encode(conversation, weights, row, builder)
        builder.rows.append(row)

    def _encode(
        self, conversation: Conversation, weights: list[float], row: ConversationRow, builder: "PartBuilder"
    ) -> None:
        """Encode a conversation's turns one behind the other, and cut them."""
        encode, eos = self.encode, self.eos_id
        ids: list[int] = []
        lengths: list[int] = []
        for turn in conversation.turns:
            tokens = encode(turn.text)
            ids += tokens
            ids.append(eos)
            lengths.append(len(tokens) + 1)
            row.empty_turns += not turn.text
        row.text_tokens = len(ids) - len(lengths)
        if not self.settings.two_turn:
            self._cut(ids, lengths, weights, row, builder)
            return
        ends = [0, *accumulate(lengths)]
        for new in (n for n, weight in enumerate(weights) if weight > 0):
            pair = slice(new - 1, new + 1)
            self._cut(ids[ends[new - 1] : ends[new + 1]], lengths[pair], [0.0, weights[new]], row, builder)

    def _cut(
        self, ids: list[int], lengths: list[int], weights: list[float], row: ConversationRow, builder: "PartBuilder"
    ) -> None:
        """Cut a run of turns into examples, and count its targets."""
        targets_in = sum([length for length, weight in zip(lengths, weights, strict=True) if weight > 0])
        lost = 0
        for first, new, last, begin, end in cut_conversation(lengths, weights, self.settings.max_seq_length):
            row.examples += 1
            builder.tokens += ids[begin:end]
            taken = lengths[first : last + 1]
            too_long = sum(taken) - (end - begin)
            if too_long:  # only an example of one new turn and the end of the one before it
                cut = max(taken[1] - (end - begin - 1), 0)
                taken = [taken[0] - (too_long - cut), taken[1] - cut]
                lost += cut
                row.turns_cut += cut > 0
            builder.turn_lengths += taken
            builder.turn_weights += [0.0] * (new - first)
            builder.turn_weights += weights[new : last + 1]
            builder.turns_per_example.append(last + 1 - first)
        row.targets_in += targets_in
        row.targets_cut += lost
        row.targets_written += targets_in - lost


class PartBuilder:
    """A part while it is made: rows and examples, conversation by conversation."""

    def __init__(self, token_dtype: np.dtype, max_seq_length: int) -> None:
        self.token_dtype = token_dtype
        self.count_dtype = smallest_dtype(max_seq_length + 1)
        self.rows: list[ConversationRow] = []
        self.tokens: list[int] = []
        self.turn_lengths: list[int] = []
        self.turn_weights: list[float] = []
        self.turns_per_example: list[int] = []

    def part(self, rejects: list[Reject], num_lines: int, content_sum: str) -> Part:
        """Return the part as arrays."""
        columns: dict[str, np.ndarray] = {
            name: np.array([getattr(row, name) for row in self.rows], dtype) for name, dtype in COLUMN_TYPES.items()
        }
        columns["digest"] = columns["digest"].reshape(len(self.rows), 2)  # of a part without conversations too
        block = Block(
            _to_numpy(self.turn_lengths, self.count_dtype),
            np.array(self.turn_weights, np.float32),
            _to_numpy(self.turns_per_example, self.count_dtype),
            _to_numpy(self.tokens, self.token_dtype),
        )
        return Part(columns, block, rejects, num_lines, content_sum)


def _to_numpy(numbers: list[int], dtype: np.dtype) -> np.ndarray:
    """Return numbers from 0 to 2**32 - 1 as an array; a third of the time that NumPy takes for a list."""
    return np.frombuffer(array("I", numbers), np.uintc).astype(dtype)


def digest_of(conversation: Conversation) -> tuple[tuple[int, int], int]:
    """Return a 128-bit hash of a conversation's texts, equal for equal conversations wherever they come from, and their
    UTF-8 bytes.

    What is hashed is the number of turns, the characters of each, and all texts one behind the other.
    """
    texts = [turn.text for turn in conversation.turns]
    whole = "".join(texts).encode("utf-8")
    lengths = ",".join([str(len(text)) for text in texts])
    digest = hashlib.blake2b(f"{lengths}:".encode(), digest_size=16)
    digest.update(whole)
    high, low = struct.unpack("<QQ", digest.digest())
    return (high, low), len(whole)
