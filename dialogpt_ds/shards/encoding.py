"""From records to examples: the part of preprocessing that runs in worker processes."""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dialogpt_ds.conversations.conversation import Conversation, Record, RejectedRecordError, text_of
from dialogpt_ds.conversations.inputs import Input
from dialogpt_ds.conversations.targets import Targets, turn_weights
from dialogpt_ds.shards.blocks import Block, make_block
from dialogpt_ds.shards.examples import cut_conversation
from dialogpt_ds.shards.report import Balance
from dialogpt_ds.tokenization import Encode

TRAIN, VALIDATION = "train", "validation"


class Reject(NamedTuple):
    """One line of rejects.jsonl."""

    file: str
    line: int
    reason: str
    text: str


@dataclass
class Encoded:
    """What a chunk of records became, for one split."""

    block: Block
    balance: Balance
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True)
class RecordEncoder:
    """Reads, encodes and cuts records; a pure function of them, whatever process it runs in."""

    encode: Encode
    eos_id: int
    token_dtype: np.dtype
    max_seq_length: int
    targets: Targets
    validation_fraction: float

    def __call__(self, source: Input, records: list[Record]) -> dict[str, Encoded]:
        """Return what `records` became, by split. Rejects belong to no conversation; train's balance carries them."""
        balances = {split: Balance() for split in (TRAIN, VALIDATION)}
        examples: dict[str, list[list[tuple[list[int], float]]]] = {split: [] for split in balances}
        rejects = []
        for record in records:
            try:
                conversation = source.read(record)
            except RejectedRecordError as error:
                balances[TRAIN].rejects[str(error)] += 1
                rejects.append(Reject(str(source.path), record.line, str(error), text_of(record)))
                continue
            split = split_of(conversation, self.validation_fraction)
            weights = turn_weights(conversation, self.targets, source.default_targets)
            examples[split] += self._cut(conversation, weights, balances[split])
        return {
            split: Encoded(
                make_block(examples[split], self.token_dtype, self.max_seq_length),
                balance,
                rejects if split == TRAIN else [],
            )
            for split, balance in balances.items()
        }

    def _cut(self, conversation: Conversation, weights: list[float], balance: Balance) -> list[list[tuple[list[int], float]]]:
        """Encode and cut one conversation, and enter it in the balance."""
        ids = [[*self.encode(turn.text), self.eos_id] for turn in conversation.turns]
        lengths = [len(turn) for turn in ids]
        cut = cut_conversation(lengths, weights, self.max_seq_length)
        balance.conversations += 1
        balance.without_target += not cut
        balance.empty_turns += sum(not turn.text for turn in conversation.turns)
        balance.text_bytes += sum(len(turn.text.encode("utf-8")) for turn in conversation.turns)
        balance.text_tokens += sum(lengths) - len(lengths)
        balance.turns_histogram[len(ids)] += 1
        balance.targets_in += sum(length for length, weight in zip(lengths, weights, strict=True) if weight > 0)
        for example in cut:
            size = sum(part.stop - part.start for part in example)
            balance.examples += 1
            balance.tokens += size
            balance.lengths_histogram[size] += 1
            for part in example:
                if part.weight > 0:
                    balance.targets_written += part.stop - part.start
                    balance.targets_cut += lengths[part.turn] - part.stop
                    balance.turns_cut += part.stop < lengths[part.turn]
        return [[(ids[part.turn][part.start : part.stop], part.weight) for part in example] for example in cut]


def split_of(conversation: Conversation, validation_fraction: float) -> str:
    """Return the split a conversation belongs to: by a hash of its texts, so that adding data moves none of the old."""
    if validation_fraction <= 0:
        return TRAIN
    digest = hashlib.blake2b(digest_size=8)
    for turn in conversation.turns:
        text = turn.text.encode("utf-8")
        digest.update(len(text).to_bytes(8, "little") + text)
    return VALIDATION if int.from_bytes(digest.digest(), "little") < validation_fraction * 2**64 else TRAIN
