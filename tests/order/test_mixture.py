"""Mixtures: rows of several sources in a fixed proportion, each source as exact and resumable as alone."""

from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from dialogpt_ds.config.sources import NamedSource, parse_sources
from dialogpt_ds.errors import UserError
from dialogpt_ds.order.mixture import MixturePosition, interleave, order_state, position_from_state
from dialogpt_ds.shards.reader import ShardDirectory
from tests.helpers.streams import EOS, Row, contents, directory_of, first_rows, key_of, mixture_of

FIRST_OF_B = 1_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ShardDirectory]:
    """A of 120 examples, and B of 40 whose ids start at FIRST_OF_B."""
    return [
        directory_of(tmp_path_factory.mktemp("a"), 120, 10, 20_000),
        directory_of(tmp_path_factory.mktemp("b"), 40, 10, 20_000, seed=1, first_id=FIRST_OF_B),
    ]


def source_of(row: Row) -> int:
    found = {int(token >= FIRST_OF_B) for token in row if token != EOS}
    assert len(found) == 1, "no row holds examples of two sources"
    return found.pop()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 500))
def test_any_run_of_rows_holds_each_sources_share(weights: list[int], length: int) -> None:
    period = interleave(weights)
    assert Counter(period.tolist()) == dict(enumerate(weights))
    rows = np.concatenate([period] * (length // len(period) + 2))[:length]
    for source, weight in enumerate(weights):
        share = length * weight / sum(weights)
        assert abs((rows == source).sum() - share) <= len(weights)


def test_the_worked_example() -> None:
    assert interleave([3, 1]).tolist() == [0, 0, 1, 0]


def test_each_source_of_a_mixture_is_the_stream_it_is_alone(sources: list[ShardDirectory]) -> None:
    rows = first_rows(mixture_of(sources, key_of(sources, (3, 1))), 200)
    assert [source_of(row) for row in rows[:8]] == [0, 0, 1, 0] * 2
    for number, directory in enumerate(sources):
        mine = [row for row in rows if source_of(row) == number]
        assert len(mine) == (150, 50)[number]
        assert mine == first_rows(mixture_of([directory]), len(mine)), "over several epochs"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_a_mixture_is_resumed_anywhere(
    sources: list[ShardDirectory], weights: tuple[int, int], sizes: list[int]
) -> None:
    key = key_of(sources, weights)
    position, rows = MixturePosition.start(2), []
    for size in sizes:
        batch = mixture_of(sources, key).batch(position_from_state(order_state(key, position), key), size)
        rows += contents(batch)
        position = batch.position_after
    assert rows == first_rows(mixture_of(sources, key), len(rows))


def test_the_epoch_of_a_mixture_counts_the_examples_of_all_sources(sources: list[ShardDirectory]) -> None:
    stream = mixture_of(sources, key_of(sources, (1, 1)))
    position, seen = MixturePosition.start(2), 0
    while seen <= 160:
        batch = stream.batch(position, 4)
        seen += batch.rows.num_examples
        assert batch.examples_seen == seen
        assert batch.epoch == (seen - 1) // 160
        position = batch.position_after
    a, b = batch.source_epochs
    assert b > 1 > a, "B is three times shorter and has begun anew"


def test_other_weights_or_sources_are_another_order(sources: list[ShardDirectory]) -> None:
    state = order_state(key_of(sources, (3, 1)), MixturePosition.start(2))
    with pytest.raises(UserError, match=r"data as weight:fingerprint: checkpoint 3:\w+, 1:\w+, now 1:\w+, 1:\w+"):
        position_from_state(state, key_of(sources, (1, 1)))
    with pytest.raises(UserError, match=r"checkpoint 3:\w+, 1:\w+, now 1:\w+"):
        position_from_state(state, key_of(sources[:1]))


def test_a_source_with_fewer_rows_than_its_share_of_a_batch_is_refused(sources: list[ShardDirectory]) -> None:
    stream = mixture_of(sources, key_of(sources, (1, 1)))
    stream.check_size(20, "--train_input_file")
    with pytest.raises(UserError, match=r"fewer than the 40 rows that one optimizer step over all ranks takes from it"):
        stream.check_size(80, "--train_input_file")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", [("a", 1)]),
        ("5:a", [("a", 1)]),
        ("3:a,1:b", [("a", 3), ("b", 1)]),
        (["3:a", "1:b"], [("a", 3), ("b", 1)]),
        ("0.75:a, .25:b", [("a", 3), ("b", 1)]),
        ("2:https://host/a,4:s3://b/c", [("https://host/a", 1), ("s3://b/c", 2)]),
        ("pipe:cat x,y/{}", [("pipe:cat x,y/{}", 1)]),
        (["1:pipe:cat x,y/{}", "1:b"], [("pipe:cat x,y/{}", 1), ("b", 1)]),
    ],
)
def test_ways_to_name_sources(given: str | list[str], expected: list[tuple[str, int]]) -> None:
    assert parse_sources(given, "--train_input_file") == [NamedSource(path, weight) for path, weight in expected]


def test_a_path_that_exists_is_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "3:a,1:b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_sources("3:a,1:b", "--train_input_file") == [NamedSource("3:a,1:b", 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a,b", "'a' has no weight; of several directories each needs one in front, as in 3:DIR_A,1:DIR_B"),
        ("0:a,1:b", "'0:a' has the weight 0"),
        ("1:a,2:a", "'a' is named twice"),
        ("0.123456789:a,1:b", "the weights 0.123456789, 1.0 come to 123456789:1000000000"),
        (" , ", "names no shard directory"),
    ],
)
def test_mistakes_in_sources(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sources(given, "--train_input_file")
