"""Packing: every example once, no row too long, little padding, the same on every machine."""

import hashlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dialogpt_ds.order.packing import count_rows, one_per_row, pack
from dialogpt_ds.order.permutation import permutation


def rows_of(lengths: list[int], row_length: int) -> list[list[int]]:
    packing = pack(np.array(lengths, np.int64), row_length)
    return [packing.examples[packing.starts[r] : packing.starts[r + 1]].tolist() for r in range(packing.num_rows)]


def first_fit_decreasing(lengths: list[int], row_length: int) -> list[list[int]]:
    """The textbook algorithm: the longest example first, each into the first row with room."""
    rows: list[list[int]] = []
    for example in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        for row in rows:
            if sum(lengths[e] for e in row) + lengths[example] <= row_length:
                row.append(example)
                break
        else:
            rows.append([example])
    return rows


def test_a_worked_example() -> None:
    assert rows_of([60, 60, 60, 30, 30, 30, 10], 100) == [[0, 3, 6], [1, 4], [2, 5]]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(40, 100))
def test_packing_is_first_fit_decreasing(lengths: list[int], row_length: int) -> None:
    rows = rows_of(lengths, row_length)
    assert sorted(e for row in rows for e in row) == list(range(len(lengths)))
    expected = first_fit_decreasing(lengths, row_length)
    assert sorted(sorted(lengths[e] for e in row) for row in rows) == sorted(
        sorted(lengths[e] for e in row) for row in expected
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(40, 100))
def test_rows_are_counted_as_they_are_packed(lengths: list[int], row_length: int) -> None:
    array = np.array(lengths, np.int64)
    assert count_rows(array, row_length) == pack(array, row_length).num_rows


def test_sums_per_row_and_reordering() -> None:
    lengths = np.array([60, 60, 60, 30, 30, 30, 10])
    packing = pack(lengths, 100)
    assert packing.per_row(lengths).tolist() == [100, 90, 90]
    turned = packing.reordered(np.array([2, 0, 1]))
    assert turned.per_row(lengths).tolist() == [90, 100, 90]
    assert turned.examples.tolist() == [2, 5, 0, 3, 6, 1, 4]


def test_without_packing_each_example_has_its_row() -> None:
    assert np.diff(one_per_row(5).starts).tolist() == [1] * 5


@pytest.mark.parametrize("row_length", [128, 256, 1024])
def test_padding_on_real_lengths_is_below_one_percent(reddit, row_length: int) -> None:
    from dialogpt_ds.tokenization import find_tokenizer, make_encoder

    encode = make_encoder(find_tokenizer("gpt2"))
    lines = reddit.read_text(encoding="utf-8").splitlines()
    lengths = np.array([min(len(encode(line.replace("\t", " EOS "))), 128) for line in lines])
    window = lengths[permutation(65_536, "resample") % len(lengths)]
    packing = pack(window, row_length)
    assert 1 - window.sum() / (packing.num_rows * row_length) <= 0.01


def test_the_permutation_never_changes() -> None:
    """Golden values: another order for the same seed would break every resume, and needs another ORDER_VERSION."""
    assert permutation(8, "fingerprint", 42, 0, "rows").tolist() == [2, 6, 1, 3, 4, 0, 5, 7]
    digest = hashlib.sha256(permutation(10_000, "fingerprint", 42, 1, "blocks", 3).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "06eec4607efde54b"


def test_the_permutation_depends_on_every_part_of_its_key() -> None:
    orders = {tuple(permutation(50, f, s, e, n)) for f in "ab" for s in (1, 2) for e in (0, 1) for n in ("x", "y")}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)
