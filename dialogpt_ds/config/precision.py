"""Precision and loss scale: the command line's say and the JSON's, brought together."""

from typing import Any, Literal

from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.errors import UserError

Precision = Literal["fp16", "bf16", "fp32"]


def resolve_precision(
    arguments: TrainingArguments, explicit: frozenset[str], deepspeed: dict[str, Any] | None
) -> Precision:
    """Return the precision; the JSON over a default, an explicit contradiction is an error.

    Raises:
        UserError: `--fp16` and the JSON contradict each other.
    """
    if deepspeed is None:
        return "fp16" if arguments.fp16 else "fp32"
    enabled = {name: bool(deepspeed.get(name, {}).get("enabled", False)) for name in ("fp16", "bf16")}
    stated: Precision = "fp16" if enabled["fp16"] else "bf16" if enabled["bf16"] else "fp32"
    if "fp16" in explicit and arguments.fp16 != (stated == "fp16"):
        if arguments.fp16 and "fp16" not in deepspeed and "bf16" not in deepspeed:
            return "fp16"  # the JSON says nothing of precision
        if arguments.fp16 or stated == "fp16":
            raise UserError(
                f"--fp16 {arguments.fp16} on the command line, {stated} in the DeepSpeed JSON: leave --fp16 out, or "
                f"change "
                'the blocks "fp16" and "bf16" of the JSON'
            )
    return stated


def fill_precision(
    deepspeed: dict[str, Any], precision: Precision, arguments: TrainingArguments, explicit: frozenset[str]
) -> None:
    """Write the precision and the loss scale into the configuration.

    Raises:
        UserError: `--loss_scale` contradicts the JSON, or is given without fp16.
    """
    if precision != "fp16":
        if "loss_scale" in explicit and arguments.loss_scale:
            raise UserError(
                f"--loss_scale {arguments.loss_scale} belongs to fp16, this run is in {precision}: leave it out"
            )
        return
    block = deepspeed.setdefault("fp16", {})
    block["enabled"] = True
    stated = block.get("loss_scale")
    if stated is not None and "loss_scale" in explicit and stated != arguments.loss_scale:
        raise UserError(
            f"--loss_scale {arguments.loss_scale} on the command line, {stated} in the DeepSpeed JSON: leave one of "
            "them out"
        )
    block["loss_scale"] = arguments.loss_scale if stated is None else stated
    # From 2**16: a start at DeepSpeed's 2**32 would leave out the first dozen updates. Hysteresis 2 forgives a single
    # overflow.
    block.setdefault("initial_scale_power", 16)
    block.setdefault("hysteresis", 2)
    block.setdefault("loss_scale_window", 1_000)
    block.setdefault("min_loss_scale", 1)
