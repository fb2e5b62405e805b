"""Cutting a conversation into examples: runs of whole turns that fit, every target exactly once."""

from itertools import accumulate
from typing import NamedTuple


class Example(NamedTuple):
    """Turns `first` to `last` of a conversation: its tokens `begin` to `end`, counted through the conversation.

    Turns before `new` are context, whatever their weight: they were learned in an earlier example. Where `begin` lies
    inside of turn `first` or `end` inside of turn `last`, the rest of that turn is left out.
    """

    first: int
    new: int
    last: int
    begin: int
    end: int


def cut_conversation(lengths: list[int], weights: list[float], max_seq_length: int) -> list[Example]:
    """Cut a conversation into examples of at most `max_seq_length` tokens.

    New turns are taken greedily behind the turn before the first new one; then whole earlier turns go in front while
    they fit, with weight 0. Turns that lead to no target are left out. With lengths 5 6 7 4, all targets but the first
    turn,
    and a limit of 18:

        new 1 and 2 behind turn 0 (5+6+7 = 18); then new 3 behind turn 2 (7+4), and turn 1 in front of it (6+7+4 = 17).

    A target that does not fit behind the turn before it gets what fits of that turn's end, at least its EOS; one as
    long as the limit or
    longer loses its own end: it keeps `max_seq_length` - 1 tokens, so not its EOS.

    Args:
        lengths: tokens of each turn, its EOS included.
        weights: weight of each turn; the first is 0.
        max_seq_length: at least 2.

    Returns:
        The examples in order; none when there is no target.
    """
    assert max_seq_length >= 2 and (not weights or weights[0] == 0), (max_seq_length, weights[:1])
    targets = [turn for turn, weight in enumerate(weights) if weight > 0]
    starts = [0, *accumulate(lengths)]
    examples = []
    done, count = 0, len(targets)
    while done < count:
        new = last = targets[done]
        first = new - 1
        limit = starts[first] + max_seq_length
        done += 1
        if starts[new + 1] > limit:
            kept = min(lengths[new], max_seq_length - 1)
            end = starts[new] + kept
            examples.append(Example(first, new, new, end - max_seq_length, end))
            continue
        while done < count and starts[targets[done] + 1] <= limit:
            last = targets[done]
            done += 1
        end = starts[last + 1]
        while first > 0 and end - starts[first - 1] <= max_seq_length:
            first -= 1
        examples.append(Example(first, new, last, starts[first], end))
    return examples
