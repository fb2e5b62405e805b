"""Cutting conversations: golden values, and the law that every target is learned exactly once."""

from typing import NamedTuple

import hypothesis.strategies as st
from hypothesis import given, settings

from dialogpt_ds.preprocessing import cutting


class TurnSlice(NamedTuple):
    """The tokens `start` to `stop` of turn number `turn`, with the weight the turn has in an example."""

    turn: int
    start: int
    stop: int
    weight: float


def cut_conversation(lengths: list[int], weights: list[float], limit: int) -> list[list[TurnSlice]]:
    """Return each example turn by turn."""
    found = []
    for example in cutting.cut_conversation(lengths, weights, limit):
        slices = []
        for turn in range(example.first, example.last + 1):
            start = sum(lengths[:turn])
            slices.append(
                TurnSlice(
                    turn,
                    max(example.begin - start, 0),
                    min(example.end - start, lengths[turn]),
                    weights[turn] if turn >= example.new else 0,
                )
            )
        found.append(slices)
    return found


def test_a_conversation_that_fits_is_one_example() -> None:
    assert cut_conversation([3, 4, 5], [0, 0, 1], 12) == [
        [TurnSlice(0, 0, 3, 0), TurnSlice(1, 0, 4, 0), TurnSlice(2, 0, 5, 1)]
    ]


def test_new_turns_first_then_earlier_ones_as_context() -> None:
    assert cut_conversation([5, 6, 7, 4], [0, 1, 1, 1], 18) == [
        [TurnSlice(0, 0, 5, 0), TurnSlice(1, 0, 6, 1), TurnSlice(2, 0, 7, 1)],
        [TurnSlice(1, 0, 6, 0), TurnSlice(2, 0, 7, 0), TurnSlice(3, 0, 4, 1)],
    ]


def test_turns_after_the_last_target_are_dropped() -> None:
    assert cut_conversation([3, 4, 5], [0, 1, 0], 100) == [[TurnSlice(0, 0, 3, 0), TurnSlice(1, 0, 4, 1)]]


def test_context_that_does_not_fit_whole_is_trimmed_on_its_left() -> None:
    assert cut_conversation([20, 6], [0, 1], 10) == [[TurnSlice(0, 16, 20, 0), TurnSlice(1, 0, 6, 1)]]


def test_a_target_longer_than_the_limit_keeps_its_beginning_behind_one_eos() -> None:
    assert cut_conversation([20, 30], [0, 1], 10) == [[TurnSlice(0, 19, 20, 0), TurnSlice(1, 0, 9, 1)]]
    assert cut_conversation([20, 10], [0, 1], 10) == [[TurnSlice(0, 19, 20, 0), TurnSlice(1, 0, 9, 1)]]


def test_no_target_gives_no_example() -> None:
    assert cut_conversation([3, 4], [0, 0], 10) == []
    assert cut_conversation([3], [0], 10) == []
    assert cut_conversation([], [], 10) == []


conversations = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.0, 0.5, 1.0])), min_size=1, max_size=20)


@settings(max_examples=500, deadline=None)
@given(conversations, st.integers(2, 64))
def test_every_target_is_learned_once_and_its_cut_is_known(turns: list[tuple[int, float]], limit: int) -> None:
    lengths = [length for length, _ in turns]
    weights = [0.0, *[weight for _, weight in turns[1:]]]
    learned: dict[int, TurnSlice] = {}
    for example in cut_conversation(lengths, weights, limit):
        assert sum(part.stop - part.start for part in example) <= limit
        assert example[0].weight == 0, "the first turn of an example is context only"
        assert example[-1].weight > 0, "an example ends with a target"
        assert [part.turn for part in example] == list(range(example[0].turn, example[-1].turn + 1)), (
            "no turn is left out"
        )
        assert all(part.stop == lengths[part.turn] for part in example[:-1]), "only the last turn may lose its end"
        assert all(part.start == 0 for part in example[1:]), "only the first turn may lose its beginning"
        for part in example:
            if part.weight:
                assert part.turn not in learned
                assert part.weight == weights[part.turn]
                learned[part.turn] = part
    assert set(learned) == {turn for turn, weight in enumerate(weights) if weight > 0}
    for turn, part in learned.items():
        assert (part.start, part.stop) == (
            0,
            min(lengths[turn], limit - 1 if lengths[turn] >= limit else lengths[turn]),
        )
