"""DeepSpeed's JSON: what is read, what is refused, and what the refusal says."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.config.deepspeed_json import REFUSED, check_deepspeed_config, read_deepspeed_json
from dialogpt_ds.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def written(folder: Path, text: str) -> str:
    """Write a config file and return its path."""
    path = folder / "config.json"
    path.write_text(text, encoding="utf-8")
    return str(path)


def message_of(config: dict[str, Any]) -> str:
    """Return the message with which a configuration is refused."""
    with pytest.raises(UserError) as refusal:
        check_deepspeed_config(config, "my.json")
    return str(refusal.value)


def the_problem(config: dict[str, Any]) -> str:
    """Return the one problem that a configuration has."""
    lines = message_of(config).splitlines()
    assert lines[0] == "my.json: 1 problem in the DeepSpeed configuration"
    assert len(lines) == 2, lines
    return lines[1].removeprefix("  - ")


# Reading


def test_a_file_is_read_as_plain_dicts(tmp_path: Path) -> None:
    config = read_deepspeed_json(
        written(tmp_path, '{"fp16": {"enabled": true}, "optimizer": {"params": {"betas": [0, 1]}}}')
    )
    assert config == {"fp16": {"enabled": True}, "optimizer": {"params": {"betas": [0, 1]}}}
    assert type(config) is dict
    assert type(config["fp16"]) is dict


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert read_deepspeed_json(written(tmp_path, '\ufeff{"fp16": {}}')) == {"fp16": {}}


def test_a_missing_file_names_the_nearest_file_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "zero_three.json").write_text("{}")
    with pytest.raises(UserError) as refusal:
        read_deepspeed_json(str(tmp_path / "zero_tree.json"))
    assert f"zero_tree.json' does not exist; did you mean {tmp_path / 'zero_three.json'}" in str(refusal.value)


def test_a_missing_file_names_the_nearest_shipped_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; did you mean .*zero2_fp16\.json"):
        read_deepspeed_json(str(tmp_path / "zero2_f16.json"))


def test_a_missing_file_with_an_unlike_name_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; there are .*cpu_bf16\.json, .*zero3_fp16\.json"):
        read_deepspeed_json(str(tmp_path / "qqqqqqqq"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a text file"):
        read_deepspeed_json(str(tmp_path))


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"log_level": "\xff"}')
    with pytest.raises(UserError, match="cannot be read as a text file in UTF-8"):
        read_deepspeed_json(str(tmp_path / "config.json"))


def test_invalid_json_names_file_line_and_column(tmp_path: Path) -> None:
    path = written(tmp_path, '{\n  "gradient_clipping": 1.0 // comment\n}\n')
    with pytest.raises(UserError) as refusal:
        read_deepspeed_json(path)
    assert str(refusal.value).startswith(f"{path}, line 2, column 28: not valid JSON")
    assert "JSON has no comments" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"fp16": {}, "fp16": {}}', ["fp16"]),
        ('{"fp16": {"enabled": true, "enabled": false}}', ["fp16.enabled"]),
        ('{"pipeline": {"parts": [{}, {"a": 1, "a": 2}]}}', ["pipeline.parts[1].a"]),
        ('{"bf16": {"a": 1, "a": 1, "a": 1}, "bf16": 2}', ["bf16.a", "bf16"]),
    ],
)
def test_a_key_that_appears_twice_is_named_with_its_path(tmp_path: Path, text: str, named: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        read_deepspeed_json(written(tmp_path, text))
    assert str(refusal.value).splitlines()[0].endswith(f"keep only the last: {', '.join(named)}")


def test_the_same_key_in_two_blocks_is_no_repetition(tmp_path: Path) -> None:
    text = '{"fp16": {"enabled": true}, "bf16": {"enabled": false}}'
    assert read_deepspeed_json(written(tmp_path, text))["fp16"] == {"enabled": True}


@pytest.mark.parametrize("text", ["[]", "null", "3", '"fp16"'])
def test_anything_but_an_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=f"is an object in braces, this file holds {text}".replace("[]", r"\[\]")):
        read_deepspeed_json(written(tmp_path, text))


# Names of keys


@pytest.mark.parametrize(
    ("config", "dotted", "way_out"),
    [
        ({"gradient_acumulation_steps": 4}, "gradient_acumulation_steps (4)", '"gradient_accumulation_steps"?'),
        ({"zero_optimisation": {}}, "zero_optimisation ({})", '"zero_optimization"?'),
        ({"Gradient_Clipping": 1}, "Gradient_Clipping (1)", '"gradient_clipping"?'),
        ({"checkpoint": {"load_universl": True}}, "checkpoint.load_universl (true)", '"load_universal"?'),
        (
            {"checkpoint": {"writer": {"typ": "fast"}}},
            'checkpoint.writer.typ ("fast")',
            '"type"?',
        ),
        (
            {"activation_checkpointing": {"partitioned_activations": True}},
            "activation_checkpointing.partitioned_activations",
            '"partition_activations"?',
        ),
        ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag (2)", '"stage"?'),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memmory": True}}},
            "zero_optimization.offload_optimizer.pin_memmory (true)",
            '"pin_memory"?',
        ),
        ({"fp16": {"inital_scale_power": 16}}, "fp16.inital_scale_power (16)", '"initial_scale_power"?'),
        ({"bf16": {"enable": True}}, "bf16.enable (true)", '"enabled"?'),
        ({"optimizer": {"type": "Adam", "parms": {}}}, "optimizer.parms ({})", '"params"?'),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_decy": 0.1}}},
            "optimizer.params.weight_decy (0.1)",
            '"weight_decay"?',
        ),
        (
            {"reduce_bucket_size": 1000},
            "reduce_bucket_size (1000)",
            "It is read as zero_optimization.reduce_bucket_size",
        ),
        ({"lr": 0.1}, "lr (0.1)", "It is read as optimizer.params.lr"),
        ({"qqqq": 1}, "qqqq (1)", "Correct the name or remove it."),
    ],
)
def test_an_unknown_key_at_any_level_is_named_with_the_nearest_one(
    config: dict[str, Any], dotted: str, way_out: str
) -> None:
    problem = the_problem(config)
    assert problem.startswith(dotted)
    assert "DeepSpeed has no such key" in problem
    assert way_out in problem


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bfloat16": {"enabled": True}},
        {"zero_optimization": {"stage": 3, "cpu_offload": True, "stage3_max_live_parameters": 1e9}},
        {"zero_optimization": {"stage": 3, "max_live_parameters": 5e8, "offload_param": None}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        {"checkpoint": {"tag_validation": "Fail", "writer": None}},
        {"pipeline": {"stages": "auto", "anything": 1}},
        {"data_types": {"keep_in_fp32_modules": "auto"}},
        {"zero_optimization": {"stage": 2, "zenflow": {"select_interval": "auto", "topk_ratio": 0.1}}},
        {"optimizer": {"type": "Lamb", "params": {"max_coeff": 0.3}}},
        {"optimizer": {"type": "AdamW", "params": {"lr": 0, "betas": [0.9, 0.95], "fused": True, "torch_adam": True}}},
        {"optimizer": {"type": "adam", "params": {"bias_correction": False, "adam_w_mode": False}}},
        {"gradient_clipping": 0},
        {"train_batch_size": 10**400, "steps_per_print": None},
    ],
)
def test_what_deepspeed_accepts_passes(config: dict[str, Any]) -> None:
    check_deepspeed_config(config, "my.json")


@pytest.mark.parametrize("dotted", sorted(REFUSED))
def test_a_key_that_cannot_be_used_is_refused_with_the_reason(dotted: str) -> None:
    config: Any = {"some": "value"}
    for name in reversed(dotted.split(".")):
        config = {name: config}
    if dotted.startswith("optimizer."):
        config["optimizer"]["type"] = "AdamW"
    assert the_problem(config) == f'{dotted} ({{"some": "value"}}) cannot be used: {REFUSED[dotted]}.'


def test_a_scheduler_is_refused_in_favour_of_the_command_line() -> None:
    problem = the_problem({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}})
    assert "--lr_schedule" in problem
    assert "rate 0 for the first two steps" in problem


# Values


@pytest.mark.parametrize(
    ("config", "dotted", "way_out"),
    [
        ({"gradient_clipping": "auto"}, "gradient_clipping", "Write a value or remove the key."),
        ({"fp16": {"enabled": "auto"}}, "fp16.enabled", "--fp16 gives the value"),
        ({"train_batch_size": "auto"}, "train_batch_size", "--train_batch_size gives the value"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.params.lr", "--learning_rate"),
        ({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}}, "optimizer.params.lr", "--learning_rate"),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size",
            "remove the key",
        ),
        ({"zero_optimization": "auto"}, "zero_optimization", "remove the key"),
        ({"optimizer": {"type": "auto"}}, "optimizer.type", "remove the key"),
        ({"autotuning": {"some": [1, {"deep": "auto"}]}}, "autotuning.some[1].deep", "remove the key"),
        ({"data_types": {"param_dtype": "auto"}}, "data_types.param_dtype", "remove the key"),
    ],
)
def test_auto_is_refused_wherever_it_is_left(config: dict[str, Any], dotted: str, way_out: str) -> None:
    problem = the_problem(config)
    assert problem.startswith(f'{dotted} is "auto"; that is a convention of transformers')
    assert way_out in problem


@pytest.mark.parametrize("key", ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [0, -8, 8.0, 2.5, True, None, [8], {}])
def test_a_batch_size_is_a_whole_number_of_at_least_one(key: str, value: Any) -> None:
    problem = the_problem({key: value})
    assert problem.startswith(f"{key} is {json.dumps(value)}; it must be a whole number, 1 or more.")


@pytest.mark.parametrize("value", [-1, True, None, [1.0], float("nan"), float("inf")])
def test_gradient_clipping_is_a_number_of_at_least_zero(value: Any) -> None:
    assert "; it must be a number, 0 or more. Correct the value" in the_problem({"gradient_clipping": value})


@pytest.mark.parametrize("value", [-1, 4, 2.0, 1.5, True, None])
def test_a_zero_stage_is_from_0_to_3(value: Any) -> None:
    problem = the_problem({"zero_optimization": {"stage": value}})
    assert problem.startswith(f"zero_optimization.stage is {json.dumps(value)}; it must be 0, 1, 2 or 3.")


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        ({"train_batch_size": "8"}, ['train_batch_size is "8"', "Write 8 without quotes."]),
        ({"fp16": {"enabled": "True"}}, ['fp16.enabled is "True"', "true or false", "Write true without quotes."]),
        ({"fp16": {"enabled": 1}}, ["fp16.enabled is 1", "true or false"]),
        ({"fp16": {"loss_scale": -1}}, ["fp16.loss_scale is -1", "a number, 0 or more"]),
        ({"fp16": True}, ["fp16 is true; it must be an object in braces", 'Write {"enabled": true}.']),
        ({"bf16": None}, ["bf16 is null; it must be an object in braces"]),
        ({"zero_optimization": True}, ["zero_optimization is true", 'Write {"stage": 1}.']),
        (
            {"zero_optimization": {"reduce_bucket_size": 0.5}},
            ["reduce_bucket_size is 0.5", "a whole number, 1 or more"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            ['offload_optimizer.device is "gpu"', 'one of "none", "cpu", "nvme"'],
        ),
        ({"optimizer": {"type": 3}}, ["optimizer.type is 3", "a string"]),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1]}}}, ["optimizer.params.betas is [0.9, 1]"]),
        ({"autotuning": []}, ["autotuning is []; it must be an object"]),
        ({"pipeline": {"x": float("nan")}}, ["pipeline.x is NaN", "must be finite"]),
        ({"gradient_allreduce_op": "sum"}, ['gradient_allreduce_op is "sum", which cannot be used']),
        ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation is false, which cannot be used"]),
        ({"checkpoint": {"load_universal": True}}, ["checkpoint.load_universal is true, which cannot be used"]),
        (
            {"checkpoint": {"use_node_local_storage": True}},
            ["use_node_local_storage is true", "a disk that all nodes share"],
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_the_rule(config: dict[str, Any], fragments: list[str]) -> None:
    problem = the_problem(config)
    for fragment in fragments:
        assert fragment in problem


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled are both true"),
        ({"fp16": {"enabled": True}, "bfloat16": {"enabled": True}}, "fp16.enabled and bfloat16.enabled are both true"),
        ({"bf16": {}, "bfloat16": {}}, "DeepSpeed reads only bf16"),
        ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.type is missing"),
        ({"optimizer": {"type": "Lion", "params": {"max_grad_norm": 1}}}, 'Write "gradient_clipping" at the top level'),
        ({"optimizer": {"type": "AdamW", "params": {"fused": True}}}, 'Add "torch_adam": true'),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, 'Add "torch_adam": true'),
        (
            {"optimizer": {"type": "AdamW", "params": {"bias_correction": True, "torch_adam": True}}},
            "optimizer.params.bias_correction: torch's Adam does not take it",
        ),
        (
            {"zero_optimization": {"max_reuse_distance": 1, "stage3_max_reuse_distance": 2}},
            "max_reuse_distance and zero_optimization.stage3_max_reuse_distance are one setting",
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "it needs stage 3."),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "it needs stage 1, 2 or 3."),
    ],
)
def test_keys_that_contradict_each_other_are_refused(config: dict[str, Any], fragment: str) -> None:
    assert fragment in the_problem(config)


def test_one_precision_switched_off_is_no_contradiction() -> None:
    check_deepspeed_config({"fp16": {"enabled": False}, "bf16": {"enabled": True}}, "my.json")


def test_all_problems_are_listed_at_once() -> None:
    message = message_of(
        {
            "gradient_clipping": "auto",
            "zero_optimisation": {},
            "scheduler": {},
            "zero_optimization": {"stage": 7, "offload_optimizer": {"pinmemory": True}},
            "fp16": {"enabled": True},
            "bf16": {"enabled": True},
        }
    )
    lines = message.splitlines()
    assert lines[0] == "my.json: 6 problems in the DeepSpeed configuration"
    assert [line.split()[1] for line in lines[1:]] == [
        "gradient_clipping",
        "zero_optimisation",
        "scheduler",
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer.pinmemory",
        "fp16.enabled",
    ]


def test_a_configuration_is_not_changed_by_the_check() -> None:
    config = {"optimizer": {"type": "Lion", "params": {"lr": 1}}, "zero_optimization": {"stage": 2}}
    before = copy.deepcopy(config)
    check_deepspeed_config(config, "my.json")
    assert config == before


def test_neither_deepspeed_nor_torch_is_imported() -> None:
    program = "import sys, dialogpt_ds.config.deepspeed_json; print({'torch', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["partition_activations", "cpu_checkpointing"])
def test_a_block_that_would_do_nothing_is_refused_with_the_option_that_does_it(name: str) -> None:
    assert "Give --activation_checkpointing on the command line" in the_problem(
        {"activation_checkpointing": {name: True}}
    )
    check_deepspeed_config({"activation_checkpointing": {name: False}}, "my.json")


def test_deepcompile_is_refused_with_the_option_that_compiles() -> None:
    assert "Give --torch_compile on the command line" in the_problem({"compile": {"deepcompile": True}})


def test_a_key_in_the_configuration_would_be_in_every_checkpoint() -> None:
    problem = the_problem({"comet": {"enabled": True, "api_key": "abc"}})
    assert "comet.api_key" in problem
    assert "abc" not in problem
    assert "COMET_API_KEY in the environment" in the_problem({"comet": {"api_key": "abc"}})


@pytest.mark.parametrize(
    ("half", "summed_in", "stage", "good"),
    [
        ("bf16", "fp32", 1, True),
        ("bf16", "fp32", 3, True),
        ("fp16", "fp32", 2, True),
        ("bf16", "bf16", 0, True),
        ("bf16", None, 0, True),
        ("bf16", "fp32", 0, False),
        ("fp16", "bf16", 2, False),
        (None, "fp16", 1, False),
    ],
)
def test_gradients_are_summed_in_the_runs_precision_or_in_fp32_where_deepspeed_can(
    half: str | None, summed_in: str | None, stage: int, good: bool
) -> None:
    config = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": summed_in}}
    if half:
        config[half] = {"enabled": True}
    if good:
        check_deepspeed_config(config, "c.json")
        return
    with pytest.raises(
        UserError, match=rf'data_types.grad_accum_dtype is "{summed_in}" in {half or "fp32"} with ZeRO stage {stage}; '
    ):
        check_deepspeed_config(config, "c.json")
