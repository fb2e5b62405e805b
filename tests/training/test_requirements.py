"""What a run asks of the machine is looked at before it starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.errors import UserError
from dialogpt_ds.matmul import CpuRates
from dialogpt_ds.training.requirements import check_requirements
from tests.helpers import rank_tasks
from tests.helpers.rank_pool import RankPool

SmallWorld = tuple[Path, Path]


def nvme(path: str | None, name: str = "offload_optimizer") -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, name: {"device": "nvme", "nvme_path": path}}}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "offload_optimizer.nvme_path is missing; name a folder on the NVMe disk"),
        ("/no_such_disk_here", "offload_optimizer.nvme_path '/no_such_disk_here' does not exist; make it"),
        ("/proc/version/x", "offload_optimizer.nvme_path '/proc/version/x' can't be written to (/proc/version is no folder)"),
    ],
)
def test_a_place_for_nvme_offload_that_is_none_is_named(path: str | None, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_requirements("fp32", nvme(path))
    assert words in str(caught.value)


def test_offload_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"offload needs a C\+\+ compiler.*apt-get install g\+\+"):
        check_requirements("fp32", config)
    check_requirements("fp32", {"zero_optimization": {"stage": 2}})


def test_fp16_without_hardware_and_slow_bf16_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from dialogpt_ds.training import requirements

    with pytest.raises(UserError, match=r"fp16 is on, but this device \(cpu\) can't compute in it. Ways out: --deepspeed_config"):
        check_requirements("fp16", {})
    monkeypatch.setattr(requirements, "cpu_rates", lambda: CpuRates(fp32=119e9, bf16=25.04e9))
    warning = check_requirements("bf16", {})
    assert warning is not None
    assert warning.startswith(
        "warning: bf16 is slower than fp32 on this CPU (a matrix product on one core, measured now: 25 GFLOP/s in bf16, 119 in"
    )
    assert warning.endswith("take --deepspeed_config ds_configs/cpu_fp32.json")
    assert check_requirements("fp32", {}) is None
    monkeypatch.setattr(requirements, "cpu_rates", lambda: CpuRates(fp32=119e9, bf16=119e9))
    assert check_requirements("bf16", {}) is None


@pytest.mark.slow
def test_weights_and_optimizer_on_an_nvme_disk_change_no_loss(two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path) -> None:
    """Needs libaio-dev; building DeepSpeed's file access takes two minutes."""
    from deepspeed.accelerator import get_accelerator

    if shutil.which("g++") is None or not get_accelerator().get_op_builder("AsyncIOBuilder")().is_compatible():
        pytest.skip("libaio-dev is not installed")
    found = {}
    for device in ("none", "nvme"):
        place = {"device": device} | ({"nvme_path": str(tmp_path)} if device == "nvme" else {})
        zero = {"stage": 3, "offload_optimizer": place, "offload_param": place, "stage3_param_persistence_threshold": 0}
        config = rank_tasks.write_deepspeed(tmp_path, 3, "fp32", zero_optimization=zero | {"sub_group_size": 1_000_000})
        argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
                "--learning_rate", "1e-3", "--lr_schedule", "None", "--deepspeed_config", config]  # fmt: skip
        found[device] = two_ranks.run(rank_tasks.losses, argv, 4, timeout=500)[0]
    assert found["nvme"] == pytest.approx(found["none"], abs=2e-5)
    assert found["none"][-1] < found["none"][0] - 0.05
