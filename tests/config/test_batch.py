"""Batch arithmetic: DialoGPT's rows per GPU, DeepSpeed's three keys, and every way to contradict oneself."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dialogpt_ds.config.batch import BatchSizes, resolve_batch
from dialogpt_ds.errors import UserError

NOTHING: frozenset[str] = frozenset()
T, M, A = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("rows", "accumulation", "explicit", "json", "world", "micro", "expected_accumulation"),
    [
        (4, 2, NOTHING, {}, 1, 2, 2),  # DialoGPT's defaults
        (4, 2, NOTHING, {}, 8, 2, 2),  # rows are per GPU: the global batch grows with the GPUs
        (8, 2, frozenset({T}), {}, 2, 4, 2),
        (4, 2, NOTHING, {M: 8}, 2, 8, 1),  # DeepSpeed's rule, not the command line's default accumulation
        (4, 2, NOTHING, {T: 32}, 2, 16, 1),
        (4, 2, NOTHING, {T: 32, A: 4}, 2, 4, 4),
        (4, 2, NOTHING, {T: 32, M: 2}, 2, 2, 8),
        (4, 2, NOTHING, {A: 4}, 2, 1, 4),  # only accumulation: the command line's rows
        (4, 1, frozenset({T}), {T: 8}, 2, 4, 1),  # 4 on each of 2 agrees with 8 in all
        (16, 2, frozenset({T}), {M: 4}, 2, 4, 4),
        (4, 4, frozenset({A}), {M: 2}, 2, 2, 4),
    ],
)
def test_sizes_that_can_be_met(
    rows: int,
    accumulation: int,
    explicit: frozenset[str],
    json: dict[str, Any],
    world: int,
    micro: int,
    expected_accumulation: int,
) -> None:
    assert resolve_batch(rows, accumulation, explicit, json, world) == BatchSizes(micro, expected_accumulation, world)


@pytest.mark.parametrize(
    ("rows", "accumulation", "explicit", "json", "world", "message"),
    [
        (
            3,
            2,
            frozenset({T}),
            {},
            1,
            r"3 rows per optimizer step can't be divided over 1 GPUs with .*_steps 2.*A solution: 4 rows in all",
        ),
        (
            4,
            2,
            frozenset({T}),
            {T: 4},
            2,
            r"so 8 rows on 2 GPUs; the DeepSpeed JSON says \"train_batch_size\": 4 in all. Write --train_batch_size 2",
        ),
        (
            4,
            2,
            frozenset({A}),
            {A: 4},
            2,
            r"--gradient_accumulation_steps 2 on the command line, 4 in the DeepSpeed JSON",
        ),
        (
            4,
            2,
            NOTHING,
            {T: 10, M: 4},
            1,
            r"10 rows per optimizer step can't be divided over 1 GPUs with .*per_gpu 4.*: 8 rows in all",
        ),
        (4, 2, NOTHING, {T: 16, M: 2, A: 2}, 2, r"A solution: 8 rows in all"),
        (4, 2, NOTHING, {T: 3}, 2, r"3 rows per optimizer step can't be divided over 2 GPUs"),
        (0, 2, frozenset({T}), {}, 1, r"--train_batch_size must be 1 or more"),
    ],
)
def test_contradictions_show_the_numbers_and_a_solution(
    rows: int, accumulation: int, explicit: frozenset[str], json: dict[str, Any], world: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_batch(rows, accumulation, explicit, json, world)


sizes = st.integers(1, 64)


@given(
    sizes,
    sizes,
    st.sets(st.sampled_from([T, A])),
    st.dictionaries(st.sampled_from([T, M, A]), sizes),
    st.integers(1, 16),
)
def test_whatever_comes_out_satisfies_deepspeed_and_everything_stated(
    rows: int, accumulation: int, explicit: set[str], json: dict[str, int], world: int
) -> None:
    try:
        batch = resolve_batch(rows, accumulation, frozenset(explicit), json, world)
    except UserError:
        return  # what its message must hold is stated above
    assert batch.train == batch.micro * batch.accumulation * world
    assert all(batch.keys()[key] == value for key, value in json.items())
    assert T not in explicit or batch.train == rows * world
    assert A not in explicit or batch.accumulation == accumulation
