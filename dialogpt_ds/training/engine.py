"""The DeepSpeed engine: how it is made, what of it is used, and what of DeepSpeed 0.19.8 is repaired."""

import math
import sys
from typing import Any, Protocol

import torch

from dialogpt_ds.distributed.world import collective_limit, limit_groups
from dialogpt_ds.model.activation import recompute_activations
from dialogpt_ds.model.attention import set_attention
from dialogpt_ds.model.flops import DTYPES
from dialogpt_ds.model.head import compile_loss
from dialogpt_ds.model.load import build_model
from dialogpt_ds.model.loss import LossSums, TargetLoss
from dialogpt_ds.model.probe import Wants, check_model
from dialogpt_ds.training.settings import Settings


class Engine(Protocol):
    """What training uses of a DeepSpeed engine around a TargetLoss."""

    module: Any
    optimizer: Any
    lr_scheduler: Any
    device: torch.device
    training: bool
    global_steps: int
    skipped_steps: int
    """Updates that were skipped so far, since their gradients were not finite."""

    def __call__(self, **inputs: Any) -> LossSums:
        """Compute the sums of a micro-batch. Under ZeRO-3 collective, as backward, and step at the end of an
        accumulation, always are."""

    def backward(self, loss: torch.Tensor) -> Any:
        """Add up gradients."""

    def step(self) -> Any:
        """Update, where it was the last micro-batch of a step."""

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on or off."""

    def eval(self) -> Any:
        """Switch dropout off."""

    def get_lr(self) -> list[float]:
        """Return the learning rate of each group of parameters."""

    def get_global_grad_norm(self) -> Any:
        """Return the norm of the last update's gradients before clipping, a number or a tensor."""

    def was_step_applied(self) -> bool:
        """Return whether the last update was made."""

    def destroy(self) -> Any:
        """Give back what it holds."""


def model_of(settings: Settings) -> Any:
    """Build the model with its first weights, and check that it can be trained as the run wants it; raises
    UserError."""
    arguments = settings.arguments
    model = build_model(settings.model, arguments.init_checkpoint or None)
    wants = Wants(
        arguments.packing, not arguments.no_token_id, arguments.activation_checkpointing, arguments.chunked_head
    )
    check_model(model, settings.model.name, wants)
    set_attention(model, arguments.attention, settings.precision, arguments.dropout)
    return model


def start_engine(settings: Settings, model: Any) -> Engine:
    """Return the DeepSpeed engine around the model's loss. Collective: every rank must call."""
    import deepspeed

    loss = TargetLoss(model, settings.arguments.chunked_head)
    _compile_loss(settings, loss)
    if settings.arguments.activation_checkpointing:
        recompute_activations(model)
    if settings.arguments.torch_compile:
        loss.compile_body()
    loss.train()  # transformers loads models in evaluation mode, in which dropout does nothing
    schedule = settings.schedule

    def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        # LambdaLR counts from 0 and multiplies the base rate. DeepSpeed steps it for applied steps only.
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda applied: schedule.rate(applied + 1) / schedule.learning_rate
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
            f"warning: the loss can't be compiled ({problem}), and takes several times as long without: Triton and a C "
            "compiler are needed for it (on Debian, apt-get install gcc)",
            file=sys.stderr,
        )


def restore_schedule(engine: Engine, learning_rate: float) -> None:
    """Let this run's schedule hold after a checkpoint was loaded, whose own rates DeepSpeed has put back.

    The same settings give the same rate to the bit, since it is computed as LambdaLR does: base rate times factor.
    """
    scheduler = engine.lr_scheduler
    scheduler.base_lrs = [learning_rate for _ in scheduler.base_lrs]
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, value in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"], group["initial_lr"] = value, learning_rate
    scheduler._last_lr = rates


def parameter_group_names(engine: Engine) -> list[list[str]]:
    """Return the names of the optimizer's parameters by group, in its order, as `parameter_groups` makes them."""
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    groups = [[name for name, p in named if p.dim() >= 2], [name for name, p in named if p.dim() < 2]]
    return [group for group in groups if group]


def _undo_trial_step(optimizer: Any) -> None:
    """Take back the update with zero gradients that DeepSpeed's ZeRO-0 half-precision optimizers make to allocate their
    state.

    Without this, Adam's bias correction is one step ahead (the first real update has 0.74 of its size) and the weights
    have decayed once; measured with DeepSpeed 0.19.8.
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


def missing_loss_scale(engine: Engine) -> float:
    """Return the loss scale that DeepSpeed's ZeRO-0 fp16 optimizers divide gradients by, but its backward() leaves out;
    else 1.

    Without this the gradients are smaller by the loss scale: what fp16 can't hold of them is lost, none is ever
    clipped, and Adam's epsilon is no longer small beside them. Measured with DeepSpeed 0.19.8.
    """
    scaling = getattr(engine.optimizer, "loss_scale_config", None)
    return float(scaling.cur_scale) if scaling is not None and scaling.use_grad_scaling else 1.0


def learning_rate(engine: Engine) -> float:
    """Return the rate of the next step."""
    return float(engine.get_lr()[0])


def loss_scale(engine: Engine) -> float:
    """Return the current loss scale; 1 where there is none."""
    for name in ("cur_scale", "loss_scale"):
        scale = getattr(engine.optimizer, name, None)
        if scale is not None:
            return float(scale)
    return 1.0


def lowest_loss_scale(engine: Engine) -> float | None:
    """Return what the loss scale can't go below; None where it does not adapt."""
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    scaling = getattr(engine.optimizer, "loss_scale_config", None)  # of ZeRO-0's fp16 optimizers
    if getattr(scaler, "dynamic", False):
        return float(scaler.min_scale)
    if scaling is not None and scaling.use_grad_scaling and scaling.dynamic_loss_scale:
        return float(scaling.min_loss_scale)
    return None
