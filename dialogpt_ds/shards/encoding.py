"""From records to a part: what runs in worker processes."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dialogpt_ds.conversations.conversation import Conversation, RejectedRecordError, text_of
from dialogpt_ds.conversations.filters import RULES, make_filter
from dialogpt_ds.conversations.inputs import Input
from dialogpt_ds.conversations.targets import Targets, reversed_direction, turn_weights
from dialogpt_ds.shards.blocks import Block, smallest_dtype
from dialogpt_ds.shards.examples import cut_conversation
from dialogpt_ds.shards.parts import COLUMNS, Part, PartTask, Reject
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


@lru_cache(maxsize=1)
def part_encoder(settings: EncodingSettings) -> "PartEncoder":
    """Return the encoder of this process: it takes a second to build, and forked processes inherit it."""
    return PartEncoder(settings)


class PartEncoder:
    """Reads, filters, encodes and cuts records; a pure function of them, whatever process it runs in."""

    def __init__(self, settings: EncodingSettings) -> None:
        tokenizer = find_tokenizer(settings.tokenizer)
        self.settings = settings
        self.encode: Encode = make_encoder(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self.token_dtype = smallest_dtype(len(tokenizer))
        self.rule_of: Callable[[Conversation], str | None] = make_filter(
            list(settings.filters), settings.min_turns, settings.max_turns
        )

    def __call__(self, task: PartTask) -> Part:
        """Return what a part's records became."""
        made = _Made(self.token_dtype, self.settings.max_seq_length)
        rejects, lines = [], 0
        for record in task.read():
            lines = record.line
            try:
                conversation = task.source.read(record)
            except RejectedRecordError as error:
                rejects.append(Reject(task.source.path, record.line, str(error), text_of(record)))
                continue
            self._take(task.source, conversation, made)
        return made.part(rejects, lines, task.content_sum())

    def _take(self, source: Input, conversation: Conversation, made: "_Made") -> None:
        """Enter a conversation's columns, and its examples where it is not filtered."""
        settings = self.settings
        digest = digest_of(conversation)
        row = dict.fromkeys(COLUMNS, 0)
        row["split"] = int(digest[0] < settings.validation_fraction * 2**64)
        row["turns"] = len(conversation.turns)
        row["rule"] = RULES.index(self.rule_of(conversation) or "")
        if not row["rule"]:
            self._cut(source, conversation, row, made)
        made.digests.append(digest)
        made.rows.append(tuple(row.values()))

    def _cut(self, source: Input, conversation: Conversation, row: dict[str, int], made: "_Made") -> None:
        settings = self.settings
        weights = turn_weights(conversation, settings.targets, source.default_targets, settings.persona)
        if settings.reverse:
            conversation, weights = reversed_direction(conversation, weights)
        turns = conversation.turns
        ids = [[*self.encode(turn.text), self.eos_id] for turn in turns]
        row["empty_turns"] = sum(not turn.text for turn in turns)
        row["text_bytes"] = sum(len(turn.text) if turn.text.isascii() else len(turn.text.encode("utf-8")) for turn in turns)
        lengths = [len(turn) for turn in ids]
        row["text_tokens"] = sum(lengths) - len(lengths)
        if settings.two_turn:
            for first in (n - 1 for n in range(1, len(turns)) if weights[n] > 0):
                self._add(ids[first : first + 2], lengths[first : first + 2], [0.0, weights[first + 1]], row, made)
        else:
            self._add(ids, lengths, weights, row, made)

    def _add(self, ids: list[list[int]], lengths: list[int], weights: list[float], row: dict[str, int], made: "_Made") -> None:
        """Cut a run of turns into examples, and count its targets."""
        row["targets_in"] += sum(length for length, weight in zip(lengths, weights, strict=True) if weight > 0)
        for example in cut_conversation(lengths, weights, self.settings.max_seq_length):
            row["examples"] += 1
            made.turns_per_example.append(len(example))
            for part in example:
                turn = ids[part.turn]
                size = part.stop - part.start
                made.tokens += turn if size == len(turn) else turn[part.start : part.stop]
                made.turn_lengths.append(size)
                made.turn_weights.append(part.weight)
                if part.weight > 0:
                    lost = lengths[part.turn] - part.stop
                    row["targets_written"] += size
                    row["targets_cut"] += lost
                    row["turns_cut"] += lost > 0


class _Made:
    """What grows while a part is made."""

    def __init__(self, token_dtype: np.dtype, max_seq_length: int) -> None:
        self.token_dtype = token_dtype
        self.count_dtype = smallest_dtype(max_seq_length + 1)
        self.digests: list[tuple[int, int]] = []
        self.rows: list[tuple[int, ...]] = []
        self.tokens: list[int] = []
        self.turn_lengths: list[int] = []
        self.turn_weights: list[float] = []
        self.turns_per_example: list[int] = []

    def part(self, rejects: list[Reject], num_lines: int, content_sum: str) -> Part:
        table = np.array(self.rows, np.int64).reshape(len(self.rows), len(COLUMNS))
        columns: dict[str, np.ndarray] = {
            name: table[:, place].astype(dtype) for place, (name, dtype) in enumerate(COLUMNS.items())
        }
        columns["digest"] = np.array(self.digests, np.uint64).reshape(len(self.digests), 2)
        block = Block(
            np.array(self.turn_lengths, self.count_dtype),
            np.array(self.turn_weights, np.float32),
            np.array(self.turns_per_example, self.count_dtype),
            np.array(self.tokens, self.token_dtype),
        )
        return Part(columns, block, rejects, num_lines, content_sum)


def digest_of(conversation: Conversation) -> tuple[int, int]:
    """Return a 128-bit hash of a conversation's texts: equal for equal conversations, wherever they come from."""
    digest = hashlib.blake2b(digest_size=16)
    for turn in conversation.turns:
        text = turn.text.encode("utf-8")
        digest.update(len(text).to_bytes(8, "little") + text)
    whole = digest.digest()
    return int.from_bytes(whole[:8], "little"), int.from_bytes(whole[8:], "little")


def encode_part(task: PartTask, settings: EncodingSettings) -> Part:
    """Make a part in this process."""
    return part_encoder(settings)(task)
