"""Precision, loss scale and learning rate: the JSON over a default, a contradiction is an error."""

from typing import Any

import pytest

from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.config.optimizer import fill_optimizer
from dialogpt_ds.config.precision import fill_precision, resolve_precision
from dialogpt_ds.errors import UserError

NOTHING: frozenset[str] = frozenset()
ON, OFF = {"enabled": True}, {"enabled": False}


@pytest.mark.parametrize(
    ("arguments", "explicit", "json", "precision"),
    [
        ({}, NOTHING, None, "fp16"),
        ({"fp16": False}, {"fp16"}, None, "fp32"),
        ({}, NOTHING, {"bf16": ON}, "bf16"),
        ({}, NOTHING, {"fp16": ON}, "fp16"),
        ({}, NOTHING, {}, "fp32"),
        ({"fp16": True}, {"fp16"}, {}, "fp16"),
        ({"fp16": False}, {"fp16"}, {"bf16": ON}, "bf16"),
        ({"fp16": False}, {"fp16"}, {"fp16": OFF}, "fp32"),
    ],
)
def test_precision_that_holds(
    arguments: dict[str, Any], explicit: set[str], json: dict[str, Any] | None, precision: str
) -> None:
    assert resolve_precision(TrainingArguments(**arguments), frozenset(explicit), json) == precision


@pytest.mark.parametrize(("fp16", "json"), [(True, {"bf16": ON}), (False, {"fp16": ON}), (True, {"fp16": OFF})])
def test_precision_contradicted(fp16: bool, json: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--fp16 {fp16} on the command line"):
        resolve_precision(TrainingArguments(fp16=fp16), frozenset({"fp16"}), json)


def test_fp16_gets_a_loss_scale_that_does_not_start_with_dozens_of_skips() -> None:
    json: dict[str, Any] = {}
    fill_precision(json, "fp16", TrainingArguments(), NOTHING)
    assert json["fp16"]["loss_scale"] == 0
    assert json["fp16"]["initial_scale_power"] == 16


def test_a_loss_scale_must_agree_and_belong() -> None:
    with pytest.raises(UserError, match=r"--loss_scale 8.* on the command line, 128 in the DeepSpeed JSON"):
        fill_precision(
            {"fp16": {"loss_scale": 128}}, "fp16", TrainingArguments(loss_scale=8), frozenset({"loss_scale"})
        )
    with pytest.raises(UserError, match="belongs to fp16, this run is in bf16"):
        fill_precision({}, "bf16", TrainingArguments(loss_scale=8), frozenset({"loss_scale"}))


def test_the_optimizer_is_adamw_unless_the_json_says_otherwise() -> None:
    json: dict[str, Any] = {}
    assert fill_optimizer(json, 3e-4, False) == 3e-4
    params = json["optimizer"]["params"]
    assert json["optimizer"]["type"] == "AdamW"
    assert params == {
        "lr": 3e-4,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "torch_adam": True,
        "fused": True,
    }


def test_the_jsons_rate_holds_and_an_explicit_other_one_is_an_error() -> None:
    json = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}}
    assert fill_optimizer(json, 1e-5, False) == 1e-3
    assert json["optimizer"]["params"]["weight_decay"] == 0.1
    with pytest.raises(UserError, match=r"--learning_rate 0.01 on the command line, 0.001 in the DeepSpeed JSON"):
        fill_optimizer(json, 0.01, True)


@pytest.mark.parametrize("rate", [0, -1e-3, "x", True])
def test_a_rate_in_the_json_must_be_a_number_above_0(rate: object) -> None:
    with pytest.raises(UserError, match=r"optimizer.params.lr .* must be a number above 0"):
        fill_optimizer({"optimizer": {"type": "Lamb", "params": {"lr": rate}}}, 1e-5, False)
