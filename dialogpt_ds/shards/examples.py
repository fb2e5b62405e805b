"""Cutting a conversation into examples: runs of whole turns that fit, every target exactly once."""

from typing import NamedTuple


class TurnSlice(NamedTuple):
    """The tokens `start` to `stop` of turn number `turn`, with the weight the turn has in this example."""

    turn: int
    start: int
    stop: int
    weight: float


def cut_conversation(lengths: list[int], weights: list[float], max_seq_length: int) -> list[list[TurnSlice]]:
    """Cut a conversation into examples of at most `max_seq_length` tokens.

    New turns are taken greedily behind the turn before the first new one; then whole earlier turns go in front while they
    fit, with weight 0. Turns that lead to no target are left out. With lengths 5 6 7 4, all targets but the first turn,
    and a limit of 18:

        new 1 and 2 behind turn 0 (5+6+7 = 18); then new 3 behind turn 2 (7+4), and turn 1 in front of it (6+7+4 = 17).

    Args:
        lengths: tokens of each turn, its EOS included.
        weights: weight of each turn; the first is 0.
        max_seq_length: at least 2.

    Returns:
        The examples in order, each a list of turn slices; empty when there is no target.
    """
    assert max_seq_length >= 2 and (not weights or weights[0] == 0), (max_seq_length, weights[:1])
    targets = [turn for turn, weight in enumerate(weights) if weight > 0]
    examples = []
    done = 0
    while done < len(targets):
        first = targets[done]
        if lengths[first - 1] + lengths[first] > max_seq_length:
            examples.append(_trimmed(lengths, weights[first], first, max_seq_length))
            done += 1
            continue
        last = _last_new_turn(lengths, targets, done, max_seq_length)
        start = _first_context_turn(lengths, first, last, max_seq_length)
        slices = [TurnSlice(t, 0, lengths[t], weights[t] if t >= first else 0.0) for t in range(start, last + 1)]
        examples.append(slices)
        while done < len(targets) and targets[done] <= last:
            done += 1
    return examples


def _last_new_turn(lengths: list[int], targets: list[int], done: int, limit: int) -> int:
    """Return the last target that fits behind the turn before target number `done`, with all turns between."""
    first = last = targets[done]
    used = lengths[first - 1] + lengths[first]
    for target in targets[done + 1 :]:
        used += sum(lengths[last + 1 : target + 1])
        if used > limit:
            break
        last = target
    return last


def _first_context_turn(lengths: list[int], first: int, last: int, limit: int) -> int:
    """Return the earliest turn from which everything up to `last` fits whole."""
    start = first - 1
    room = limit - sum(lengths[start : last + 1])
    while start > 0 and lengths[start - 1] <= room:
        start -= 1
        room -= lengths[start]
    return start


def _trimmed(lengths: list[int], weight: float, target: int, limit: int) -> list[TurnSlice]:
    """Return a target behind what fits of the turn before it: at least that turn's EOS.

    A target as long as the limit or longer loses its end: it keeps `limit` - 1 tokens, so not its EOS.
    """
    kept = min(lengths[target], limit - 1)
    before = lengths[target - 1]
    return [TurnSlice(target - 1, before - (limit - kept), before, 0.0), TurnSlice(target, 0, kept, weight)]
