"""What one rank has met, told to all before any of them enters a step that the others would wait in for ever."""

from typing import Any

import torch


def gather_reports(report: Any | None, device: torch.device) -> list[Any]:
    """Return the reports of all ranks that have one, in order of rank. Collective: every rank must call.

    Where nobody has one, as nearly always, it costs the reduction of a single number.

    Args:
        report: what this rank has to say, picklable; None for nothing.
        device: of this rank's tensors.
    """
    if _alone():
        return [] if report is None else [report]
    any_report = torch.tensor([0 if report is None else 1], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(any_report, op=torch.distributed.ReduceOp.MAX)
    if not any_report.item():
        return []
    return [found for found in all_gather(report) if found is not None]


def differs_from_rank0(facts: dict[str, str]) -> dict[str, list[int]]:
    """Return the ranks whose facts differ from rank 0's, by name of the fact. Collective: every rank must call."""
    everybody = all_gather(facts)
    different = {
        name: [rank for rank, theirs in enumerate(everybody) if theirs[name] != everybody[0][name]] for name in facts
    }
    return {name: ranks for name, ranks in different.items() if ranks}


def _alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def all_gather(mine: Any) -> list[Any]:
    """Return what each rank has, by rank. Collective: every rank must call."""
    if _alone():
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's value on every rank. Collective: every rank must call."""
    if _alone():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
