"""The table of keys is that of the installed DeepSpeed."""

import importlib
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.config import deepspeed_keys as keys
from dialogpt_ds.config.deepspeed_json import REFUSED

MODELS = {
    "zero_optimization": "runtime.zero.config:DeepSpeedZeroConfig",
    "fp16": "runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "runtime.precision_config:DeepSpeedBF16Config",
    "bfloat16": "runtime.precision_config:DeepSpeedBF16Config",
    "comms_logger": "comm.config:CommsLoggerConfig",
    "tensorboard": "monitor.config:TensorBoardConfig",
    "csv_monitor": "monitor.config:CSVConfig",
    "wandb": "monitor.config:WandbConfig",
    "comet": "monitor.config:CometConfig",
    "compile": "compile.config:CompileConfig",
    "hybrid_engine": "runtime.config:HybridEngineConfig",
    "tensor_parallel": "runtime.tensor_parallel.config:TPTrainingConfig",
    "weight_quantization": "inference.config:WeightQuantConfig",
    "timers.throughput": "utils.config:DeepSpeedThroughputTimerConfig",
}
"""Blocks that DeepSpeed reads through pydantic."""

READ_BY_HAND = ("torch_autocast", "data_types", "activation_checkpointing", "checkpoint", "aio", "flops_profiler")
READ_BY_HAND += ("timers", "expert_parallel", "data_efficiency")
"""Blocks that DeepSpeed reads key by key, without noticing keys it does not know."""


class Recorder(dict[str, Any]):
    """A dict that remembers which keys were asked for."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def table_block(dotted: str) -> dict[str, Any]:
    """Return a block of the table."""
    block: Any = keys.TABLE
    for name in dotted.split("."):
        block = block[name]
    return block


def differences(model: Any, block: dict[str, Any], path: str) -> list[str]:
    """Compare names, nesting, and the kinds of plain values of a pydantic model with a block of the table."""
    fields = dict(model.model_fields)
    fields |= {field.alias: field for field in model.model_fields.values() if field.alias}
    removed = {dotted.rpartition(".")[2] for dotted in REFUSED if dotted.rpartition(".")[0] == path}
    found = [f"{path}.{name} is only in the table" for name in block.keys() - fields.keys()]
    found += [f"{path}.{name} is only in DeepSpeed" for name in fields.keys() - block.keys() - removed]
    for name in fields.keys() & block.keys():
        kinds = typing.get_args(fields[name].annotation) or (fields[name].annotation,)
        inner = [kind for kind in kinds if hasattr(kind, "model_fields")]
        node = block[name]
        if isinstance(node, dict) != bool(inner):
            found.append(f"{path}.{name} is a block on one side only")
        elif isinstance(node, dict):
            found += differences(inner[0], node, f"{path}.{name}")
        elif node is not keys.ANYTHING and (type(None) in kinds) != node.accepts_null:
            found.append(f"{path}.{name} may be null on one side only")
        elif bool in kinds and not (node.holds(True) and not node.holds(2)):
            found.append(f"{path}.{name} is a bool in DeepSpeed")
        elif int in kinds and not (node.holds(1) and not node.holds(1.5) and not node.holds(True)):
            found.append(f"{path}.{name} is an int in DeepSpeed")
        elif float in kinds and not (node.holds(0.5) and not node.holds(True)):
            found.append(f"{path}.{name} is a float in DeepSpeed")
    return found


@pytest.mark.parametrize("dotted", sorted(MODELS))
def test_the_table_has_the_fields_of_deepspeeds_model(dotted: str) -> None:
    module, _, name = MODELS[dotted].partition(":")
    model = getattr(importlib.import_module(f"deepspeed.{module}"), name)
    assert differences(model, table_block(dotted), dotted) == []


def test_the_table_has_the_keys_that_deepspeed_asks_for() -> None:
    """DeepSpeed reads a configuration that remembers every key it was asked for."""
    from deepspeed.runtime.config import DeepSpeedConfig

    blocks = {name: Recorder() for name in READ_BY_HAND}
    blocks["checkpoint"] = Recorder(writer=Recorder(type="fast"), parallel_write=Recorder())
    blocks["torch_autocast"] = Recorder(dtype="bf16", lower_precision_safe_modules=[])
    blocks["timers"] = Recorder(throughput={})
    blocks["expert_parallel"] = Recorder(enabled=False)
    optimizer = Recorder(type="AdamW", params={})
    config = Recorder(train_batch_size=1, optimizer=optimizer, **blocks)
    DeepSpeedConfig(config)

    # Read outside of DeepSpeedConfig, or only once torch.distributed runs.
    elsewhere = {"sequence_parallel_size", "data_parallel_size"}
    at_top = {name for name in REFUSED if "." not in name}
    # Read only by DeepSpeed's old `"zero_optimization": true`, which is refused here.
    assert config.asked - {"allgather_size"} - at_top == keys.TABLE.keys() - elsewhere
    # The pydantic blocks are handed over whole, so their keys are compared with the models above.
    asked = {name: block.asked for name, block in blocks.items()} | {"optimizer": optimizer.asked}
    assert asked == {name: set(table_block(name)) for name in asked}
    assert blocks["checkpoint"]["writer"].asked == set(table_block("checkpoint.writer"))
    assert blocks["checkpoint"]["parallel_write"].asked == set(table_block("checkpoint.parallel_write"))


def test_the_sizes_of_the_device_mesh_are_read_by_initialize() -> None:
    import deepspeed

    source = Path(deepspeed.__file__).read_text(encoding="utf-8")
    assert 'config["data_parallel_size"], config["sequence_parallel_size"]' in source


def test_keys_that_deepspeed_removed_are_refused_with_a_way_out() -> None:
    from deepspeed.runtime import config

    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{name}" for name in config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed == REFUSED.keys() - {"scheduler", "optimizer.params.max_grad_norm", "comet.api_key"}


def test_adams_arguments_are_those_of_the_implementations() -> None:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    def arguments(optimizer: Any) -> set[str]:
        return inspect.signature(optimizer).parameters.keys() - {"params", "model_params", "adamw_mode"}

    own = arguments(FusedAdam) | arguments(DeepSpeedCPUAdam)
    of_torch = arguments(torch.optim.AdamW)
    assert keys.ADAM_PARAMS.keys() == own | of_torch | {"torch_adam"}
    assert of_torch - own == keys.TORCH_ADAM_ONLY
    # These two are taken out by DeepSpeed before the implementation sees them.
    assert own - of_torch - {"adam_w_mode", "fp32_optimizer_states"} == keys.OWN_ADAM_ONLY
