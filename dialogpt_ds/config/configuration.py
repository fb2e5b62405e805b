"""The command line and the DeepSpeed JSON, brought together: what the trainer runs with, and what the doctor looks
at."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dialogpt_ds.commandline import Parsed
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.config.deepspeed_json import check_deepspeed_config, read_deepspeed_json
from dialogpt_ds.config.offload import offload_devices
from dialogpt_ds.config.optimizer import fill_optimizer
from dialogpt_ds.config.precision import Precision, fill_precision, resolve_precision

BUILT_IN = "built-in ZeRO-1"
DEFAULT_CLIPPING = 1.0
BUCKET = 25_000_000
"""Numbers that are reduced at a time, as in ds_configs/, whose README says why; DeepSpeed's own default takes 2 GB for
them in fp32."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What holds, whatever was left open; nothing in it depends on processes and data."""

    arguments: TrainingArguments
    """Every argument with the value that holds."""
    deepspeed: dict[str, Any]
    """The final DeepSpeed configuration."""
    precision: Precision
    notes: list[str]
    """What was filled in, for the start-up table."""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def optimizer_type(self) -> str:
        """Type of the optimizer, as the JSON names it."""
        return str(self.deepspeed["optimizer"]["type"])

    @property
    def offload(self) -> tuple[str, str]:
        """Where optimizer and weights are kept: none (the GPU), cpu or nvme."""
        return offload_devices(self.deepspeed)


def resolve(parsed: Parsed[Any]) -> Configuration:
    """Return the configuration of a command line, TrainingArguments or what extends them.

    Raises:
        UserError: the JSON is wrong, or contradicts the command line.
    """
    arguments = parsed.arguments
    deepspeed, notes = deepspeed_config_of(arguments.deepspeed_config)
    precision = resolve_precision(arguments, parsed.explicit, deepspeed if arguments.deepspeed_config else None)
    fill_precision(deepspeed, precision, arguments, parsed.explicit)
    learning_rate = fill_optimizer(deepspeed, arguments.learning_rate, "learning_rate" in parsed.explicit)
    resolved = replace(
        arguments,
        learning_rate=learning_rate,
        fp16=precision == "fp16",
        loss_scale=deepspeed.get("fp16", {}).get("loss_scale", arguments.loss_scale),
        save_step=arguments.valid_step if arguments.save_step is None else arguments.save_step,
        log_dir=str(Path(arguments.log_dir or arguments.output_dir).expanduser()),
    )
    return Configuration(arguments=resolved, deepspeed=deepspeed, precision=precision, notes=notes)


def deepspeed_config_of(path: str) -> tuple[dict[str, Any], list[str]]:
    """Return a JSON, or the one that is built in, checked, with what was missing filled in and said; raises
    UserError."""
    notes = []
    if path:
        config = copy.deepcopy(read_deepspeed_json(path))
        check_deepspeed_config(config, path)
        if "bfloat16" in config:  # the old name of the same block
            config["bf16"] = config.pop("bfloat16")
        if "fp16" not in config and "bf16" not in config:
            notes.append("no precision in it")
    else:
        zero = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        config = {"zero_optimization": zero}
    # It waits for the device twice in every micro-batch; the trainer has clocks of its own, which don't.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    if config.get("gradient_clipping") is None:
        config["gradient_clipping"] = DEFAULT_CLIPPING
        notes.append(f"gradient_clipping {DEFAULT_CLIPPING} filled in")
    return config, notes
