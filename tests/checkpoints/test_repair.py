"""Adam's step after a load lies where the kernel reads it: `meta` stands for a GPU here."""

from types import SimpleNamespace

import pytest
import torch

from dialogpt_ds.checkpoints.load import _repair_steps
from dialogpt_ds.training.engine import _undo_trial_step


def optimizer_of(num: int, in_groups: bool, fused: bool) -> torch.optim.Optimizer:
    """Return AdamW after 3 updates of parameters on a GPU. Stage 3 of DeepSpeed keeps its groups' lists empty between
    steps."""
    parameters = [torch.nn.Parameter(torch.zeros(4, device="meta")) for _ in range(num)]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.param_groups[0]["fused"] = fused
    shared = torch.tensor(3.0)  # what DeepSpeed's universal loader of stage 3 leaves behind
    for parameter in parameters:
        optimizer.state[parameter] = {"step": shared, "exp_avg": torch.zeros_like(parameter)}
    if not in_groups:
        optimizer.param_groups[0]["params"] = []
    return optimizer


@pytest.mark.parametrize("in_groups", [True, False], ids=["stages 0 to 2", "stage 3"])
@pytest.mark.parametrize("fused", [True, False])
def test_each_step_is_its_own_and_lies_where_its_optimizer_reads_it(in_groups: bool, fused: bool) -> None:
    optimizer = optimizer_of(2, in_groups, fused)
    _repair_steps(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)))
    steps = [state["step"] for state in optimizer.state.values()]
    assert {step.device.type for step in steps} == {"meta" if fused else "cpu"}, (
        "torch's fused kernel wants all on one device"
    )
    assert steps[0] is not steps[1]
    if not fused:
        assert [step.item() for step in steps] == [3.0, 3.0]


def test_taking_back_the_trial_step_leaves_it_on_its_device() -> None:
    optimizer = optimizer_of(1, True, True)
    for state in optimizer.state.values():
        state["step"] = torch.ones((), device="meta")
    _undo_trial_step(SimpleNamespace(optimizer=optimizer, refresh_fp32_params=lambda: None))
    assert {state["step"].device.type for state in optimizer.state.values()} == {"meta"}
