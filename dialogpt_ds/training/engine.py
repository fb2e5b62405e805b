"""Building the DeepSpeed engine, and one optimizer step with it."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dialogpt_ds.config.schedule import rate
from dialogpt_ds.distributed.world import collective_limit, limit_groups
from dialogpt_ds.model.activation import recompute_activations
from dialogpt_ds.model.flops import DTYPES
from dialogpt_ds.model.head import compile_loss
from dialogpt_ds.model.loss import TargetLoss, to_tensors
from dialogpt_ds.order.batches import TURN_GROUPS, RankStep
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.step_clock import StepClock


def start_engine(settings: Settings, model: Any) -> Any:
    """Return the DeepSpeed engine around the model's loss. Collective: every rank must call."""
    import deepspeed

    loss = TargetLoss(model, settings.arguments.chunked_head)
    _compile_loss(settings, loss)
    if settings.arguments.activation_checkpointing:
        recompute_activations(model)
    if settings.arguments.torch_compile:
        loss.compile_body()
    loss.train()  # transformers loads models in evaluation mode, in which dropout does nothing
    schedule = settings.arguments.lr_schedule
    facts = settings.schedule_settings()

    def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        # LambdaLR counts from 0 and multiplies the base rate. DeepSpeed steps it for applied steps only.
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda applied: rate(schedule, applied + 1, **facts) / settings.learning_rate
        )

    engine, _, _, _ = deepspeed.initialize(
        model=loss,
        model_parameters=parameter_groups(loss, settings.deepspeed["optimizer"]["params"].get("weight_decay", 0.0)),
        config=settings.deepspeed,
        lr_scheduler=make_scheduler,
    )
    limit_groups(collective_limit(settings.arguments.hang_timeout))
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # the run ends with a message of its own, which names the rows
    if settings.zero_stage == 0 and settings.precision != "fp32":
        _undo_trial_step(engine.optimizer)
    elif settings.zero_stage == 0:
        _guard_update(engine)
    return engine


def _compile_loss(settings: Settings, loss: TargetLoss) -> None:
    """On a GPU, let what comes after the head's product be two kernels."""
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    if device.type != "cuda" or not loss.head_is_linear or settings.arguments.deterministic:
        return  # which of several equal kernels is the fastest is measured anew in each process
    vocabulary = loss.model.get_output_embeddings().weight.shape[0]
    problem = compile_loss(device, vocabulary, DTYPES[settings.precision])
    if problem and settings.world.is_first:
        print(
            f"warning: the loss can't be compiled ({problem}), and takes several times as long without: Triton and a C compiler "
            "are needed for it (on Debian, apt-get install gcc)",
            file=sys.stderr,
        )


def take_up_schedule(engine: Any, settings: Settings) -> None:
    """Let this run's schedule hold after a checkpoint was loaded, whose own rates DeepSpeed has put back.

    The same settings give the same rate to the bit, since it is computed as LambdaLR does: base rate times factor.
    """
    scheduler = engine.lr_scheduler
    scheduler.base_lrs = [settings.learning_rate for _ in scheduler.base_lrs]
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, value in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"], group["initial_lr"] = value, settings.learning_rate
    scheduler._last_lr = rates


def parameter_group_names(engine: Any) -> list[list[str]]:
    """Return the names of the optimizer's parameters by group, in its order, as `parameter_groups` makes them."""
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    groups = [[name for name, p in named if p.dim() >= 2], [name for name, p in named if p.dim() < 2]]
    return [group for group in groups if group]


def _undo_trial_step(optimizer: Any) -> None:
    """Take back the update with zero gradients that DeepSpeed's ZeRO-0 half-precision optimizers make to allocate their state.

    Without this, Adam's bias correction is one step ahead (the first real update has 0.74 of its size) and the weights have decayed
    once; measured with DeepSpeed 0.19.8.
    """
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0
    optimizer.refresh_fp32_params()


def _guard_update(engine: Any) -> None:
    """Let ZeRO-0 in fp32 leave out an update whose gradient is not finite, and tell its norm, as all other stages do.

    DeepSpeed applies it, which makes every weight NaN. Gradients are reduced by then, so all ranks see the same.
    """
    optimizer, update = engine.optimizer, engine.optimizer.step
    clipping = engine.gradient_clipping() or math.inf

    def clip() -> None:
        """Replaces DeepSpeed's, which is called only where clipping is on, and keeps the norm to itself."""

    def guarded(*positional: Any, **named: Any) -> Any:
        norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clipping))
        optimizer._global_grad_norm = norm
        optimizer.overflow = not math.isfinite(norm)  # DeepSpeed counts it as a skipped step
        return None if optimizer.overflow else update(*positional, **named)

    engine.clip_fp32_gradients = clip
    optimizer.step = guarded


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of parameters: matrices with weight decay; biases and norms, which are vectors, without."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass
class StepResult:
    """What one optimizer step gave, equal on all ranks."""

    loss: float
    """sum(weight * nll) / sum(weight) over the whole global batch, nats."""
    grad_norm: float | None
    """Global 2-norm of the gradients before clipping."""
    applied: bool
    """False where the loss scaler skipped the update."""
    seconds: dict[str, float]
    """forward, backward, optimizer: of this rank."""
    told: list[float]
    """Sums over all ranks of what each told."""
    turn_losses: dict[str, float] = field(default_factory=dict)
    """The loss over the targets of each of TURN_GROUPS that the step has."""


def train_step(
    engine: Any, step: RankStep, device: torch.device, turn_ids: bool, tell: Callable[[], list[float]] = list
) -> StepResult:
    """Run the micro-batches of one optimizer step and update. Collective: every rank must call.

    `tell` is asked after the update was given to the device, which is still at work then; what the ranks say is summed in the one reduction
    that the loss needs anyway. Nothing here waits for the device but the reading of the sums, once (DeepSpeed waits, too: for the norm).

    The loss of the step is sum(w * nll) / W over all ranks and micro-batches. DeepSpeed divides gradients by the number of
    micro-batches and averages them over ranks, so each micro-batch's sum is scaled by accumulation * ranks / W: that
    undoes both, and gives every target the weight it would have in one large batch.
    """
    clock, groups = StepClock(device), len(TURN_GROUPS)
    world_size = torch.distributed.get_world_size()
    scale = len(step.micro_batches) * world_size / step.weight_sum
    by_turn = torch.zeros(groups, dtype=torch.float32, device=device)
    total = torch.zeros((), dtype=torch.float32, device=device)
    weights = np.zeros(groups)
    missing = missing_loss_scale(engine)
    for micro_batch in step.micro_batches:
        weighted, sums = clock.timed("forward", engine, **to_tensors(micro_batch, device, turn_ids))
        total += weighted.detach()
        by_turn += sums[0]
        weights += np.bincount(micro_batch.turn_groups, micro_batch.weights, minlength=groups)
        clock.timed("backward", engine.backward, weighted * (scale * missing))
        clock.timed("optimizer", engine.step)
    mine = _on_device([*weights, *tell()], device)
    together = torch.cat([total.view(1), by_turn, mine])
    torch.distributed.all_reduce(together)
    norm = engine.get_global_grad_norm()
    if torch.is_tensor(norm):
        together = torch.cat([together, norm.to(together).view(1)])
    loss, *found = together.tolist()
    if torch.is_tensor(norm):
        norm = found.pop()
    turn_losses, turn_weights = found[:groups], found[groups : 2 * groups]
    return StepResult(
        loss=loss / step.weight_sum,
        grad_norm=_number(norm, missing if hasattr(engine.optimizer, "fp32_groups") else 1.0),
        applied=bool(engine.was_step_applied()),
        seconds=clock.seconds(),
        told=found[2 * groups :],
        turn_losses={n: s / w for n, s, w in zip(TURN_GROUPS, turn_losses, turn_weights, strict=True) if w > 0},
    )


def _on_device(numbers: list[float], device: torch.device) -> torch.Tensor:
    """Return numbers as fp32 on the device; from pageable memory the copy would wait for all that the device still has to do."""
    tensor = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def missing_loss_scale(engine: Any) -> float:
    """Return the loss scale that DeepSpeed's ZeRO-0 fp16 optimizers divide gradients by, but its backward() leaves out; else 1.

    Without this the gradients are smaller by the loss scale: what fp16 can't hold of them is lost, none is ever clipped, and Adam's
    epsilon is no longer small beside them. Measured with DeepSpeed 0.19.8.
    """
    scaling = getattr(engine.optimizer, "loss_scale_config", None)
    return float(scaling.cur_scale) if scaling is not None and scaling.use_grad_scaling else 1.0


def _number(value: float | None, scale: float = 1.0) -> float | None:
    """Return a norm as it is meant; DeepSpeed gives -1 for an overflow, or nothing.

    Its ZeRO-0 optimizer with one tensor per parameter gives the norm of scaled gradients.
    """
    if value is None:
        return None
    number = float(value) / scale
    return number if number >= 0 or math.isnan(number) else None


def learning_rate(engine: Any) -> float:
    """Return the rate of the next step."""
    return float(engine.get_lr()[0])


def loss_scale(engine: Any) -> float:
    """Return the current loss scale; 1 where there is none."""
    for name in ("cur_scale", "loss_scale"):
        scale = getattr(engine.optimizer, name, None)
        if scale is not None:
            return float(scale)
    return 1.0


def lowest_loss_scale(engine: Any) -> float | None:
    """Return what the loss scale can't go below; None where it does not adapt."""
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    scaling = getattr(engine.optimizer, "loss_scale_config", None)  # of ZeRO-0's fp16 optimizers
    if getattr(scaler, "dynamic", False):
        return float(scaler.min_scale)
    if scaling is not None and scaling.use_grad_scaling and scaling.dynamic_loss_scale:
        return float(scaling.min_loss_scale)
    return None
