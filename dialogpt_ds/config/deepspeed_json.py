"""DeepSpeed's JSON, read and checked before deepspeed is imported or a rank is started."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dialogpt_ds.config.deepspeed_keys import (
    AUTO_ALLOWED,
    FREE,
    NULL_BLOCKS,
    OWN_ADAM_ONLY,
    TABLE,
    TORCH_ADAM_ONLY,
    Node,
)
from dialogpt_ds.errors import UserError
from dialogpt_ds.redaction import without_secrets

_SHIPPED_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
"""The files of a source checkout; an installed package has none beside it."""

_NO_CLIPPING = "optimizer.params.max_grad_norm"

REFUSED = {
    "scheduler": "the learning rate follows the command line's --lr_schedule, and two schedules would contradict each "
    "other (DeepSpeed's WarmupLR family also gives rate 0 for the first two steps). Remove the block and set "
    "--lr_schedule, --warmup_steps and --learning_rate",
    _NO_CLIPPING: 'DeepSpeed does not take it as an argument of the optimizer. Write "gradient_clipping" at the top '
    "level",
    "amp": 'DeepSpeed no longer has Apex AMP. Use "fp16" or "bf16"',
    "comet.api_key": "DeepSpeed writes its configuration into every checkpoint. Set COMET_API_KEY in the environment",
    "elasticity": "DeepSpeed no longer has elastic training. Remove it; a checkpoint of this trainer resumes at "
    "another world size",
    "nebula": "DeepSpeed no longer has it. Remove it; checkpoints are written to output_dir",
    "curriculum_learning": "DeepSpeed no longer reads it here. Remove it; the order of the examples is the trainer's",
    **dict.fromkeys(
        [
            *("compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention"),
            *("graph_harvesting", "progressive_layer_drop", "zero_optimization.mics_shard_size"),
            *("zero_optimization.mics_hierarchical_params_gather", "zero_optimization.zeropp_loco_param"),
        ],
        "DeepSpeed removed this feature in the release that is installed. Remove the key",
    ),
}
"""Keys that mean something, or once did, and cannot be used: why, and the way out."""

_REFUSED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_allreduce_op": (
        ("sum",),
        "the loss of a step is normalised by the whole global batch for DeepSpeed's mean. Remove the key",
    ),
    "managed_gradient_accumulation": (
        (False,),
        "the trainer relies on DeepSpeed to step after gradient_accumulation_steps micro-batches. Remove the key",
    ),
    **{
        f"activation_checkpointing.{name}": (
            (True,),
            "DeepSpeed applies the block only to models that call its own checkpoint function, and would do nothing "
            "here. Give --activation_checkpointing on the command line, and remove the key",
        )
        for name in (
            "partition_activations",
            "contiguous_memory_optimization",
            "cpu_checkpointing",
            "synchronize_checkpoint_boundary",
        )
    },
    "compile.deepcompile": (
        (True,),
        "the trainer compiles the model by torch.compile. Give --torch_compile on the command line, and remove the key",
    ),
    "checkpoint.use_node_local_storage": (
        (True,),
        "a checkpoint is one folder with the files of all ranks, on a disk that all nodes share. Remove the key",
    ),
    "checkpoint.load_universal": (
        (True,),
        "a checkpoint of another layout is converted, and loaded as that, where it is needed. Remove the key",
    ),
}

_ON_COMMAND_LINE = {
    "train_batch_size": "--train_batch_size",
    "train_micro_batch_size_per_gpu": "--train_batch_size and --gradient_accumulation_steps",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "optimizer.params.lr": "--learning_rate",
    "fp16.enabled": "--fp16",
    "fp16.loss_scale": "--loss_scale",
}


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as read, before equal keys are lost."""


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """Return the object in a DeepSpeed JSON file.

    Raises:
        UserError: the file is missing or unreadable, is not JSON, has a key twice, or holds no object.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"DeepSpeed config {path!r} does not exist{_nearest_files(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed config {path!r} cannot be read as a text file in UTF-8: {error}") from error
    try:
        read = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}\n"
            "JSON has no comments, no comma before a closing bracket, and only double quotes."
        ) from error
    if not isinstance(read, _Pairs):
        raise UserError(f"{path}: a DeepSpeed config is an object in braces, this file holds {_show(read)}")
    repeated: list[str] = []
    config: dict[str, Any] = _without_pairs(read, "", repeated)
    if repeated:
        raise UserError(
            f"{path}: keys that appear twice, of which JSON readers keep only the last: {', '.join(repeated)}\n"
            "Remove all but one of each."
        )
    return config


def check_deepspeed_config(config: dict[str, Any], source: str) -> None:
    """Check the keys and values of a DeepSpeed configuration that was read from `source`.

    Raises:
        UserError: lists every problem: keys that DeepSpeed does not have, "auto", values of the wrong kind, and what
            this trainer cannot run with.
    """
    problems = [
        *_block_problems(config, _table_for(config), ""),
        *_optimizer_problems(config),
        *_contradictions(config),
    ]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  - ".join([f"{source}: {count} in the DeepSpeed configuration", *problems]))


def _nearest_files(missing: Path) -> str:
    """Return a suggestion of files that exist, or where to look."""
    folders = [missing.parent, Path("ds_configs"), _SHIPPED_CONFIGS]
    # The same folder may be reached in two ways; the first spelling is kept.
    files = {file.resolve(): file for folder in reversed(folders) for file in sorted(folder.glob("*.json"))}
    by_name = {file.name: str(file) for file in files.values()}
    near = difflib.get_close_matches(missing.name, by_name, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(by_name[name] for name in near)}?"
    if by_name:
        return f"; there are {', '.join(by_name[name] for name in sorted(by_name))}"
    return f" (no .json file in {missing.parent.absolute()} either)"


def _without_pairs(read: Any, path: str, repeated: list[str]) -> Any:
    """Return `read` with plain dicts; the dotted names of keys that an object has twice are added to `repeated`."""
    if isinstance(read, _Pairs):
        block: dict[str, Any] = {}
        for key, value in read:
            dotted = _dotted(path, key)
            if key in block and dotted not in repeated:
                repeated.append(dotted)
            block[key] = _without_pairs(value, dotted, repeated)
        return block
    if isinstance(read, list):
        return [_without_pairs(value, f"{path}[{index}]", repeated) for index, value in enumerate(read)]
    return read


def _dotted(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    """Return a value as it looks in the file, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table_for(config: dict[str, Any]) -> dict[str, Node]:
    """Return the table of keys; the arguments of an optimizer other than Adam are that optimizer's own matter."""
    optimizer = config.get("optimizer")
    name = optimizer.get("type") if isinstance(optimizer, dict) else None
    if not isinstance(name, str) or name.lower() in ("adam", "adamw"):
        return TABLE
    return TABLE | {"optimizer": {**_block(TABLE, "optimizer"), "params": FREE}}


def _block(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a block, or nothing where it is missing or of the wrong kind (which is reported elsewhere)."""
    block = config.get(key)
    return block if isinstance(block, dict) else {}


def _block_problems(block: dict[str, Any], known: dict[str, Node], path: str) -> Iterator[str]:
    for key, value in block.items():
        dotted = _dotted(path, key)
        if dotted in REFUSED:
            yield f"{dotted} ({_show(without_secrets({key: value})[key])}) cannot be used: {REFUSED[dotted]}."
        elif key not in known:
            yield f"{dotted} ({_show(value)}): DeepSpeed has no such key. {_where_instead(key, known)}"
        else:
            yield from _value_problems(dotted, value, known[key])


def _where_instead(key: str, known: dict[str, Node]) -> str:
    """Return what an unknown key was probably meant to be."""
    homes = [home for home in _homes(TABLE, key, "") if home not in REFUSED]
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.6)
    if 1 <= len(homes) <= 2:
        return f"It is read as {' or '.join(homes)}: move it there."
    if near:
        return f'Did you mean "{near[0]}"?'
    return "Correct the name or remove it."


def _homes(known: dict[str, Node], key: str, path: str) -> Iterator[str]:
    """Yield the dotted names under which a key is valid."""
    for name, node in known.items():
        if name == key:
            yield _dotted(path, name)
        if isinstance(node, dict):
            yield from _homes(node, key, _dotted(path, name))


def _value_problems(dotted: str, value: Any, node: Node) -> Iterator[str]:
    if value == "auto":
        yield from _leftover_problems(dotted, value)
    elif isinstance(node, dict):
        if isinstance(value, dict):
            yield from _block_problems(value, node, dotted)
        elif not (value is None and dotted in NULL_BLOCKS):
            yield f"{dotted} is {_show(value)}; it must be an object in braces. {_object_instead(dotted, value)}"
    elif not (node.accepts_null if value is None else node.holds(value)):
        yield f"{dotted} is {_show(value)}; it must be {node.must_be}. {_value_instead(value, node)}"
    elif dotted in _REFUSED_VALUES and value in _REFUSED_VALUES[dotted][0]:
        yield f"{dotted} is {_show(value)}, which cannot be used: {_REFUSED_VALUES[dotted][1]}."
    else:
        yield from _leftover_problems(dotted, value)


def _object_instead(dotted: str, value: Any) -> str:
    if dotted == "zero_optimization" and isinstance(value, bool):
        return f'Write {{"stage": {int(value)}}}.'
    if isinstance(value, bool):
        return f'Write {{"enabled": {_show(value)}}}.'
    return "Write an object or remove the key."


def _value_instead(value: Any, node: Node) -> str:
    """Return the way out for a value of the wrong kind."""
    if isinstance(value, str) and not isinstance(node, dict):
        try:
            unquoted = json.loads(value.lower())
        except json.JSONDecodeError:
            unquoted = None
        if unquoted is not None and node.holds(unquoted):
            return f"Write {_show(unquoted)} without quotes."
    return "Correct the value, or remove the key for DeepSpeed's default."


def _leftover_problems(dotted: str, value: Any) -> Iterator[str]:
    """Yield "auto" and numbers that are not finite, at any depth of a value that DeepSpeed has no schema for."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leftover_problems(_dotted(dotted, key), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leftover_problems(f"{dotted}[{index}]", inner)
    elif value == "auto" and dotted not in AUTO_ALLOWED:
        option = _ON_COMMAND_LINE.get(dotted)
        way_out = f"Remove the key: {option} gives the value." if option else "Write a value or remove the key."
        yield (
            f'{dotted} is "auto"; that is a convention of transformers\' Trainer, which fills such values in. '
            f"DeepSpeed would ignore it or stop. {way_out}"
        )
    elif isinstance(value, float) and not abs(value) < float("inf"):
        yield f"{dotted} is {_show(value)}; a number must be finite. Correct the value."


def _optimizer_problems(config: dict[str, Any]) -> Iterator[str]:
    optimizer = _block(config, "optimizer")
    if not optimizer:
        return
    if "type" not in optimizer:
        yield (
            'optimizer.type is missing; without it DeepSpeed ignores the block. Write "type": "AdamW" or remove the '
            "block."
        )
        return
    params = _block(optimizer, "params")
    if _table_for(config) is not TABLE:
        # Adam's arguments are looked up in the table, which refuses this one; DeepSpeed refuses it for every optimizer.
        if "max_grad_norm" in params:
            yield f"{_NO_CLIPPING} cannot be used: {REFUSED[_NO_CLIPPING]}."
        return
    is_torch = params.get("torch_adam") is True
    for key in params:
        if key in TORCH_ADAM_ONLY and not is_torch:
            yield f'optimizer.params.{key}: only torch\'s Adam takes it. Add "torch_adam": true or remove it.'
        if key in OWN_ADAM_ONLY and is_torch:
            yield f'optimizer.params.{key}: torch\'s Adam does not take it. Remove it or "torch_adam".'
    if params.get("amsgrad") is True and not is_torch:
        yield 'optimizer.params.amsgrad: only torch\'s Adam has AMSGrad. Add "torch_adam": true or remove it.'


def _contradictions(config: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with keys that are right by themselves."""
    half = [name for name in ("fp16", "bf16", "bfloat16") if _block(config, name).get("enabled") is True]
    if "fp16" in half and len(half) > 1:
        yield f"fp16.enabled and {half[1]}.enabled are both true; a run has one precision. Set one of them to false."
    if "bf16" in config and "bfloat16" in config:
        yield "bf16 and bfloat16 are the same block, and DeepSpeed reads only bf16. Remove bfloat16."
    zero = _block(config, "zero_optimization")
    for name in zero:
        if f"stage3_{name}" in zero:
            yield f"zero_optimization.{name} and zero_optimization.stage3_{name} are one setting. Remove one of them."
    stage = zero.get("stage", 0)
    for name, stages in (("offload_param", (3,)), ("offload_optimizer", (1, 2, 3))):
        device = _block(zero, name).get("device", "none")
        if device in ("cpu", "nvme") and stage in range(4) and stage not in stages:
            needed = "3" if len(stages) == 1 else "1, 2 or 3"
            yield (
                f"zero_optimization.{name}.device is {_show(device)} with zero_optimization.stage {_show(stage)}; "
                f"it needs stage {needed}. Change the stage or remove the block."
            )
    summed_in = _block(config, "data_types").get("grad_accum_dtype")
    computed_in = half[0].replace("bfloat16", "bf16") if half else "fp32"
    if summed_in not in (None, computed_in) and (summed_in != "fp32" or stage == 0):
        rule = "gradients are summed over micro-batches in the run's precision, or from stage 1 on in fp32"
        yield (
            f"data_types.grad_accum_dtype is {_show(summed_in)} in {computed_in} with ZeRO stage {_show(stage)}; "
            f"{rule}. Change it."
        )
