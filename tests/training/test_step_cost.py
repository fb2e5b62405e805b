"""What a step takes besides its micro-batches: the bytes of each ZeRO stage over a link, the optimizer's pass, the
host, the buffers."""

from dataclasses import replace

import pytest

from dialogpt_ds.model.gpu_specs import (
    BANDWIDTH_SHARE,
    COLLECTIVE_SECONDS,
    HOOK_SECONDS,
    LINK_SHARE,
    STEP_SECONDS,
    gpu_of,
)
from dialogpt_ds.model.memory import Layout, buffer_bytes
from dialogpt_ds.model.roofline import MicroBatchCost
from dialogpt_ds.training.step_cost import step_cost

A100 = gpu_of("A100-40")
WEIGHTS = 100_000_000
MICRO_BATCH = MicroBatchCost(
    {"body GEMM": 0.030}, forward_seconds=0.010, num_kernels=400, num_bytes=1, launch_seconds=0.004
)
LAYOUT = Layout(
    gpus=4, gpus_per_host=4, accumulation=1, stage=1, overlaps=False, optimizer_on_host=False, precision="bf16",
    num_parameters=WEIGHTS, num_tensors=100, ready_last=30_000_000, bucket=25_000_000, sums_in_fp32=False,
    sends_fp32=False,
)  # fmt: skip
GATHER = 2 * WEIGHTS * 3 / 4 / (300e9 * LINK_SHARE)
"""Seconds in which each of 4 GPUs gets the other 3's quarters of all weights, in half precision over NVLink."""
REDUCE = 2 * GATHER + 4 * COLLECTIVE_SECONDS


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stage": 0}, REDUCE),
        ({"stage": 1}, REDUCE + GATHER + COLLECTIVE_SECONDS),
        ({"stage": 1, "accumulation": 5}, REDUCE + GATHER + COLLECTIVE_SECONDS),
        ({"stage": 2, "accumulation": 5}, 5 * REDUCE + GATHER + COLLECTIVE_SECONDS),
        ({"stage": 3, "accumulation": 5}, 5 * (3 * GATHER + 100 * COLLECTIVE_SECONDS)),
        # Behind 20 ms of a backward pass all can hide but the embedding's part, which is ready last.
        ({"stage": 1, "overlaps": True}, 0.3 * REDUCE + GATHER + COLLECTIVE_SECONDS),
        ({"stage": 3, "overlaps": True}, 0.0),
        ({"stage": 1, "sends_fp32": True}, 4 * GATHER + 4 * COLLECTIVE_SECONDS + GATHER + COLLECTIVE_SECONDS),
        ({"gpus": 1}, 0.0),
    ],
)
def test_each_stage_sends_what_its_algorithm_must(changes: dict[str, int], expected: float) -> None:
    found = step_cost(replace(LAYOUT, **changes), A100, "nvlink", MICRO_BATCH)
    assert found.communication == pytest.approx(expected)


def test_a_slow_link_hides_no_more_than_the_backward_pass_lasts() -> None:
    overlapping = replace(LAYOUT, overlaps=True, gpus=16, gpus_per_host=8)
    whole = 2 * WEIGHTS * 15 / 16 / (12.5e9 * LINK_SHARE)
    found = step_cost(overlapping, A100, "100gbe", MICRO_BATCH).communication
    assert found == pytest.approx(2 * whole + 4 * COLLECTIVE_SECONDS - 0.020 + whole + COLLECTIVE_SECONDS)
    assert found > step_cost(overlapping, A100, "pcie", MICRO_BATCH).communication


def test_the_optimizer_goes_through_its_states_once() -> None:
    speed = A100.bandwidth * BANDWIDTH_SHARE
    assert step_cost(replace(LAYOUT, gpus=1), A100, "nvlink", MICRO_BATCH).optimizer == pytest.approx(
        WEIGHTS * 52 / speed
    )
    assert step_cost(LAYOUT, A100, "nvlink", MICRO_BATCH).optimizer == pytest.approx(WEIGHTS / 4 * 52 / speed)
    assert step_cost(replace(LAYOUT, stage=0), A100, "nvlink", MICRO_BATCH).optimizer == pytest.approx(
        WEIGHTS * 52 / speed
    )
    three = step_cost(replace(LAYOUT, accumulation=3), A100, "nvlink", MICRO_BATCH).optimizer
    assert three == pytest.approx(WEIGHTS / 4 * 52 / speed + 2 * WEIGHTS * 6 / speed), (
        "gradients are added up in half precision"
    )
    on_host = step_cost(replace(LAYOUT, optimizer_on_host=True), A100, "nvlink", MICRO_BATCH).optimizer
    assert on_host > 5 * step_cost(LAYOUT, A100, "nvlink", MICRO_BATCH).optimizer


def test_the_slower_one_of_gpu_and_host_sets_the_pace() -> None:
    fast = step_cost(LAYOUT, A100, "nvlink", MICRO_BATCH)
    assert fast.waiting_for_host == 0.0
    slow = step_cost(replace(LAYOUT, accumulation=2), A100, "nvlink", replace(MICRO_BATCH, launch_seconds=0.050))
    assert slow.waiting_for_host == pytest.approx(2 * (0.050 + 100 * HOOK_SECONDS - 0.030))
    assert slow.seconds == pytest.approx(
        2 * (0.050 + 100 * HOOK_SECONDS) + slow.communication + slow.optimizer + STEP_SECONDS
    )
    gathering = step_cost(replace(LAYOUT, stage=3), A100, "nvlink", replace(MICRO_BATCH, launch_seconds=0.050))
    assert gathering.waiting_for_host > slow.waiting_for_host / 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gpus": 1}, 50e6),
        ({}, 50e6 + 50e6),
        ({"overlaps": True}, 2 * 50e6 + 50e6),
        ({"precision": "fp32", "sends_fp32": True}, 2 * 100e6),
        ({"sums_in_fp32": True, "sends_fp32": True}, 2 * 100e6 + 4 * WEIGHTS),
        ({"stage": 3, "overlaps": True}, 3 * 50e6 + 2 * WEIGHTS),
    ],
)
def test_buffers_are_buckets_and_what_stage_3_has_gathered(changes: dict[str, object], expected: float) -> None:
    assert buffer_bytes(replace(LAYOUT, **changes)) == expected  # type: ignore[arg-type]
