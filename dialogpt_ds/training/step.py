"""One optimizer step with the engine."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from dialogpt_ds.model.loss import LossSums, to_tensors
from dialogpt_ds.order.batches import TURN_GROUPS, RankStep
from dialogpt_ds.training.engine import missing_loss_scale
from dialogpt_ds.training.rank_report import AllReports, RankReport, unpack

STEP_PARTS = ("forward", "backward", "optimizer")
_Result = TypeVar("_Result")


@dataclass
class StepResult:
    """What one optimizer step gave, equal on all ranks but for `seconds`."""

    loss: float
    """sum(weight * nll) / sum(weight) over the whole global batch, nats."""
    grad_norm: float | None
    """Global 2-norm of the gradients before clipping."""
    applied: bool
    """False where the update was skipped, since its gradients were not finite."""
    seconds: dict[str, float]
    """Of STEP_PARTS, on this rank."""
    turn_losses: dict[str, float]
    """The loss over the targets of each of TURN_GROUPS that the step has."""
    reports: AllReports


def train_step(
    engine: Any, step: RankStep, device: torch.device, turn_ids: bool, report: Callable[[], RankReport] = RankReport
) -> StepResult:
    """Run the micro-batches of one optimizer step and update. Collective: every rank must call.

    `report` is called after the update was given to the device, which is still at work then; what the ranks report is
    summed in the one reduction that the loss needs anyway. Nothing here waits for the device but the reading of the
    sums, once (DeepSpeed waits, too: for the norm).

    The loss of the step is sum(w * nll) / W over all ranks and micro-batches. DeepSpeed divides gradients by the number
    of micro-batches and averages them over ranks, so each micro-batch's sum is scaled by accumulation * ranks / W: that
    undoes both, and gives every target the weight it would have in one large batch.
    """
    clock, groups = StepClock(device), len(TURN_GROUPS)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    scale = len(step.micro_batches) * world_size / step.weight_sum
    by_turn = torch.zeros(groups, dtype=torch.float32, device=device)
    total = torch.zeros((), dtype=torch.float32, device=device)
    weights = np.zeros(groups)
    missing = missing_loss_scale(engine)
    for micro_batch in step.micro_batches:
        sums: LossSums = clock.timed("forward", engine, **to_tensors(micro_batch, device, turn_ids))
        total += sums.weighted.detach()
        by_turn += sums.weighted_by_turn
        weights += np.bincount(micro_batch.turn_groups, micro_batch.weights, minlength=groups)
        clock.timed("backward", engine.backward, sums.weighted * (scale * missing))
        clock.timed("optimizer", engine.step)
    mine = _on_device([*weights, *report().pack(rank, world_size)], device)
    together = torch.cat([total.view(1), by_turn, mine])
    torch.distributed.all_reduce(together)
    norm = engine.get_global_grad_norm()
    if torch.is_tensor(norm):
        together = torch.cat([together, norm.to(together).view(1)])
    loss, *found = together.tolist()
    if torch.is_tensor(norm):
        norm = found.pop()
    turn_losses, turn_weights, reports = found[:groups], found[groups : 2 * groups], found[2 * groups :]
    return StepResult(
        loss=loss / step.weight_sum,
        grad_norm=_norm(norm, missing if hasattr(engine.optimizer, "fp32_groups") else 1.0),
        applied=bool(engine.was_step_applied()),
        seconds=clock.seconds(),
        turn_losses={n: s / w for n, s, w in zip(TURN_GROUPS, turn_losses, turn_weights, strict=True) if w > 0},
        reports=unpack(reports),
    )


def _on_device(numbers: list[float], device: torch.device) -> torch.Tensor:
    """Return numbers as fp32 on the device; from pageable memory the copy would wait for all that the device still has
    to do."""
    tensor = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def _norm(value: float | None, scale: float = 1.0) -> float | None:
    """Return a norm as it is meant; DeepSpeed gives -1 for an overflow, or nothing.

    Its ZeRO-0 optimizer with one tensor per parameter gives the norm of scaled gradients.
    """
    if value is None:
        return None
    number = float(value) / scale
    return number if number >= 0 or math.isnan(number) else None


class StepClock:
    """Times the parts of one step. On a CPU by the wall clock; on a GPU by events in its queue, which are read after
    the step's end."""

    def __init__(self, device: torch.device, make_event: Callable[[], Any] | None = None) -> None:
        if make_event is None and device.type != "cpu":
            make_event = lambda: torch.Event(device, enable_timing=True)  # noqa: E731
        self._make_event = make_event
        self._seconds = dict.fromkeys(STEP_PARTS, 0.0)
        self._pairs: list[tuple[str, Any, Any]] = []

    def timed(self, part: str, work: Callable[..., _Result], *positional: Any, **named: Any) -> _Result:
        """Do some work that belongs to a part."""
        if self._make_event is None:
            started = time.perf_counter()
            result = work(*positional, **named)
            self._seconds[part] += time.perf_counter() - started
            return result
        before, after = self._make_event(), self._make_event()
        before.record()
        result = work(*positional, **named)
        after.record()
        self._pairs.append((part, before, after))
        return result

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part; on a GPU to be called when it has come to the end of the step."""
        for part, before, after in self._pairs:
            self._seconds[part] += before.elapsed_time(after) / 1e3  # milliseconds
        self._pairs = []
        return self._seconds
