"""Which turns are learned: weights for turns whose input says nothing, and `--targets` over what it says."""

from typing import Literal

from dialogpt_ds.conversations.conversation import Conversation

Targets = Literal["input", "all", "last"]
"""input: as the input says, and where it says nothing as its format does; all: every turn but the first; last: the last."""


def turn_weights(conversation: Conversation, targets: Targets, format_default: Literal["all", "last"]) -> list[float]:
    """Return the weight of each turn in the loss; the first turn answers nothing, so it is context only."""
    count = len(conversation.turns)
    stated = [turn.weight for turn in conversation.turns]
    if targets == "input" and count and None not in stated:
        weights = [float(weight or 0.0) for weight in stated]
    elif (format_default if targets == "input" else targets) == "all":
        weights = [1.0] * count
    else:
        weights = [0.0] * (count - 1) + [1.0] * min(count, 1)
    return [0.0, *weights[1:]] if count else []
