"""Which turns are learned: weights for turns whose input says nothing, and `--targets` and `--persona` over what it
says."""

from typing import Literal

from dialogpt_ds.conversations.conversation import Conversation

Targets = Literal["input", "all", "last", "assistant"]
"""input: as the input says, and where it says nothing as its format does; all: every turn but the first; last: the
last; assistant: the turns whose role is the assistant's."""
ASSISTANTS = ("assistant", "gpt", "bot", "chatgpt", "model")
"""What files call the side that is learned."""


def turn_weights(
    conversation: Conversation, targets: Targets, format_default: Targets, persona: str = ""
) -> list[float]:
    """Return the weight of each turn in the loss; the first turn answers nothing, so it is context only.

    Args:
        conversation: its turns may carry weights and roles.
        targets: the option.
        format_default: what holds where the input says nothing; `assistant` means the last turn where no turn has a
            role.
        persona: the role whose turns are learned, before all else.
    """
    turns = conversation.turns
    if not turns:
        return []
    kind = format_default if targets == "input" else targets
    if persona:
        weights = [float(turn.role == persona) for turn in turns]
    elif kind == "all":
        weights = [1.0] * len(turns)
    elif kind == "assistant" and not (targets == "input" and all(turn.role is None for turn in turns)):
        weights = [float((turn.role or "").lower() in ASSISTANTS) for turn in turns]
    else:
        weights = [0.0] * (len(turns) - 1) + [1.0]
    if targets == "input" and not persona:
        weights = [weight if turn.weight is None else turn.weight for turn, weight in zip(turns, weights, strict=True)]
    return [0.0, *weights[1:]]


def reversed_direction(conversation: Conversation, weights: list[float]) -> tuple[Conversation, list[float]]:
    """Turn a conversation round, for a model that predicts what was said from the reply (Li et al. 2016, section 4.5).

    A turn is learned where its reply was, with the reply's weight. With turns a b c and weights 0 1 0.5: c b a and 0
    0.5 1.
    """
    return Conversation(conversation.turns[::-1]), [0.0, *weights[:0:-1]] if weights else []
