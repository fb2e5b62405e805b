"""What ranks report in one reduction: the sum over all of them says what each said, and the largest of each gauge."""

import pytest
import torch

from dialogpt_ds.distributed.stop_requests import REASONS
from dialogpt_ds.training.rank_report import GAUGES, RankReport, gauges_of, unpack


def summed(*reports: RankReport) -> list[float]:
    """Return what a reduction over ranks gives."""
    packed = [report.pack(rank, len(reports)) for rank, report in enumerate(reports)]
    return [sum(column) for column in zip(*packed, strict=True)]


def test_the_largest_gauge_of_all_ranks_comes_out_of_a_sum() -> None:
    device = torch.device("cpu")
    found = unpack(
        summed(*(RankReport(gauges=gauges_of(device, seconds_data=float(rank + 1))) for rank in range(3)))
    ).gauges
    assert set(found) == set(GAUGES)
    assert found["seconds_data"] == 3.0
    assert found["gpu_memory_gib"] is None
    assert 0.01 < (found["host_memory_gib"] or 0) <= (found["peak_memory_gib"] or 0) + 0.1


def test_what_one_rank_says_holds_for_all() -> None:
    nothing = unpack(summed(RankReport(), RankReport()))
    assert nothing[:3] == (None, False, False)
    asked = [float(reason in ("SIGTERM", "SIGHUP")) for reason in REASONS]
    found = unpack(summed(RankReport(wants_checkpoint=True), RankReport(stop_requests=asked, rows_failed=True)))
    assert found[:3] == ("SIGTERM", True, True)
    assert unpack(summed(RankReport(rows_failed=True), RankReport()))[:3] == (None, False, True)


def test_a_gpus_memory_is_asked_for_once_and_reported_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.peak": 3 * 2**30, "allocated_bytes.all.current": 2**30,
             "reserved_bytes.all.current": 4 * 2**30, "num_alloc_retries": 2}  # fmt: skip
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: (asked.append(device), stats)[1])
    found = unpack(summed(RankReport(gauges=gauges_of(torch.device("cuda", 0), 0.5)))).gauges
    assert len(asked) == 1, "each look takes a tenth of a millisecond"
    assert (found["gpu_memory_gib"], found["gpu_reserved_gib"], found["gpu_alloc_retries"]) == (1.0, 4.0, 2.0)
    assert found["peak_memory_gib"] == 3.0
