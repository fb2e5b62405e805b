"""Loading a checkpoint into an engine: as it was saved, or from its conversion for another world size, stage or
precision."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.checkpoints.universal import STATES
from dialogpt_ds.checkpoints.writer import CLIENT_STATE

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a dynamic loss scaler; the rest of it is configuration."""
NOT_HYPER_PARAMETERS = ("params", "lr", "initial_lr", "step")


def load_checkpoint(engine: Any, path: Path, universal: bool) -> dict[str, Any]:
    """Load a checkpoint, or the conversion of one, and return our state in it. Collective: every rank must call.

    Hyper-parameters of the optimizer (weight decay, betas, eps) stay those of the run; DeepSpeed gives those of the
    checkpoint back, and at stage 3 those of its first group to all.

    Args:
        engine: fresh, with the model and the optimizer of the checkpoint.
        path: of the checkpoint, or of the folder that convert() made of it.
        universal: which of the two it is.
    """
    hyper_parameters = [
        {key: value for key, value in group.items() if key not in NOT_HYPER_PARAMETERS}
        for group in engine.optimizer.param_groups
    ]
    client_state = (
        _load_universal(engine, path) if universal else engine.load_checkpoint(str(path.parent), tag=path.name)[1]
    )
    assert client_state is not None and CLIENT_STATE in client_state, path
    state = client_state[CLIENT_STATE]
    for group, values in zip(engine.optimizer.param_groups, hyper_parameters, strict=True):
        group.update(values)
    _repair_steps(engine)
    if universal:
        set_scaler_state(engine, state["loss_scaler"])
    return state


def _load_universal(engine: Any, path: Path) -> dict[str, Any]:
    configured = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = True
    try:
        if engine.zero_optimization():
            _, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
        else:
            # Counters and schedule are taken from the file; weights and moments of a stage-0 engine have no loader in
            # DeepSpeed.
            _, client_state = engine._load_checkpoint(str(path.parent), path.name, load_optimizer_states=False)
            _load_unpartitioned(engine, path / "zero")
    finally:
        engine._config.load_universal_checkpoint = configured
    return client_state


def _load_unpartitioned(engine: Any, zero: Path) -> None:
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    step = torch.load(zero / "optimizer_state.pt", weights_only=True)["optimizer_state_dict"]["state"][0]["step"]
    optimizer = torch_optimizer(engine)
    for parameter, owner, place in _places(engine):
        loaded = {
            key: torch.load(zero / names[parameter] / f"{key}.pt", map_location="cpu", weights_only=True)["param"]
            for key in STATES
        }
        owner.data.view(-1)[place].copy_(loaded["fp32"].flatten())
        parameter.data.copy_(loaded["fp32"])
        state = optimizer.state[owner]
        state["step"] = step.clone()
        for key in STATES[1:]:
            if key not in state:
                state[key] = torch.zeros_like(owner, dtype=torch.float32)
            state[key].view(-1)[place].copy_(loaded[key].flatten())


def _places(engine: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, slice]]:
    """Yield each parameter of a stage-0 engine, the tensor that holds its fp32 weights, and its place in there."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield parameter, master, slice(None)
    elif hasattr(wrapper, "fp32_groups_flat"):
        for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                yield parameter, flat, slice(offset, offset + parameter.numel())
                offset += parameter.numel()
    else:
        for group in wrapper.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, slice(None)


def torch_optimizer(engine: Any) -> Any:
    """Return the optimizer inside of DeepSpeed's wrappers: the one that has Adam's state."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def updates_made(engine: Any) -> int:
    """Return how many updates Adam has made, which its bias correction goes by; 0 for an optimizer that doesn't count.

    DeepSpeed's FusedAdam counts in the last parameter of each group alone.
    """
    return max((int(state["step"]) for state in torch_optimizer(engine).state.values() if "step" in state), default=0)


def _repair_steps(engine: Any) -> None:
    """Give every parameter a step of its own, in the type and on the device that the optimizer counts in.

    DeepSpeed lets all parameters of a stage-3 engine share one tensor, which each of them then advances; and torch's
    Adam counts in a tensor, DeepSpeed's in an integer. torch's fused kernel reads the step where the parameter is.
    """
    optimizer = torch_optimizer(engine)
    in_tensors = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    # Of all groups: stage 3 keeps their lists of parameters empty between steps, so a parameter can't be looked up in
    # them.
    beside_parameter = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            step = int(state["step"])
            device = parameter.device if beside_parameter else torch.device("cpu")
            state["step"] = torch.tensor(float(step), device=device) if in_tensors else step


def scaler_state(engine: Any) -> dict[str, Any]:
    """Return the state of a dynamic loss scaler as plain numbers; empty where there is none."""
    scaler = _scaler(engine)
    return {} if scaler is None else {key: getattr(scaler, key) for key in SCALER_STATE if hasattr(scaler, key)}


def set_scaler_state(engine: Any, state: dict[str, Any]) -> None:
    """Put the state of a dynamic loss scaler back; one of another stage may know less of it."""
    scaler = _scaler(engine)
    if scaler is None:
        return
    for key, value in state.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _scaler(engine: Any) -> Any | None:
    """Return what holds the state of a dynamic loss scale: an object of its own with ZeRO, a part of the optimizer
    without."""
    scaler = getattr(engine.optimizer, "loss_scale_config", None) or getattr(engine.optimizer, "loss_scaler", None)
    dynamic = getattr(scaler, "dynamic_loss_scale", False) or getattr(scaler, "dynamic", False)
    return scaler if engine.fp16_enabled() and dynamic else None
