"""The optimizer of the DeepSpeed configuration, and the learning rate."""

from typing import Any

from dialogpt_ds.errors import UserError


def fill_optimizer(deepspeed: dict[str, Any], learning_rate: float, is_explicit: bool) -> float:
    """Complete the optimizer block (AdamW by default) and return the learning rate that holds.

    Args:
        deepspeed: the configuration, which is changed.
        learning_rate: of the command line.
        is_explicit: whether that was given, and is no default.

    Raises:
        UserError: `--learning_rate` contradicts the JSON.
    """
    block = deepspeed.setdefault("optimizer", {"type": "AdamW"})
    params = block.setdefault("params", {})
    stated = params.get("lr")
    if stated is not None and is_explicit and stated != learning_rate:
        raise UserError(
            f"--learning_rate {learning_rate} on the command line, {stated} in the DeepSpeed JSON "
            "(optimizer.params.lr): leave one of them out"
        )
    params["lr"] = learning_rate if stated is None else stated
    if isinstance(params["lr"], bool) or not isinstance(params["lr"], (int, float)) or params["lr"] <= 0:
        raise UserError(f"optimizer.params.lr {params['lr']!r} in the DeepSpeed JSON must be a number above 0")
    if block.get("type", "").lower() in ("adam", "adamw"):
        params.setdefault("betas", [0.9, 0.999])
        params.setdefault("eps", 1e-8)
        params.setdefault("weight_decay", 0.01)
        offload = deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
        deepspeeds_own = {"bias_correction", "set_grad_none"} & params.keys()
        if offload.get("device", "none") == "none" and not deepspeeds_own:
            # torch's own AdamW needs no compiler; DeepSpeed's fused one builds a CUDA extension, and alone takes those
            # two.
            params.setdefault("torch_adam", True)
        if params.get("torch_adam") is True and not {"foreach", "fused", "differentiable"} & params.keys():
            # One pass over a parameter's state instead of one for each operation.
            params["fused"] = True
    return params["lr"]
