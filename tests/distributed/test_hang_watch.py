"""The report of a hang names the collectives that have not ended, where NCCL keeps a record of them."""

import pytest
from torch._C import _distributed_c10d

from dialogpt_ds.distributed.hang_watch import _collectives


def test_what_nccl_still_waits_for_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}

    def recorder(**what: bool) -> bytes:
        asked.update(what)
        return b'{"entries": [{"profiling_name": "nccl:all_reduce", "state": "started"}]}'

    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace_json", recorder, raising=False)
    assert _collectives().startswith(
        'collectives of NCCL that have not ended: {"entries": [{"profiling_name": "nccl:all_reduce"'
    )
    assert asked == {"includeCollectives": True, "onlyActive": True}


def test_a_build_without_nccl_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_distributed_c10d, "_dump_nccl_trace_json", raising=False)
    assert _collectives() == ""
