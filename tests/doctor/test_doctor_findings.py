"""What the doctor makes of a machine's facts: made-up ones."""

import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.config.configuration import Configuration
from dialogpt_ds.config.precision import Precision
from dialogpt_ds.doctor import gpus, hosts, limits, network, software
from dialogpt_ds.doctor.facts import HostGpu, facts_in, to_line
from dialogpt_ds.doctor.host_facts import gpu_of_line
from dialogpt_ds.doctor.report import Finding, Report, ok, problem, warning
from dialogpt_ds.doctor.run_inputs import ModelSize
from dialogpt_ds.doctor.tasks import Clock
from dialogpt_ds.hardware import CpuRates
from dialogpt_ds.launching.machine_facts import DeviceFacts, NvmeFolder
from tests.doctor.made_up import A100, GIB, NODE, RANKS, V100, levels, node, only, pair


def test_nothing_is_wrong_with_two_equal_hosts() -> None:
    seen = pair()
    findings = [
        *gpus.gpu_findings(seen, RANKS, True),
        *gpus.cuda_findings(seen),
        *gpus.precision_findings(seen, "bf16", {}),
        *software.version_findings(seen, ["torch>=2.13,<2.15", "numpy>=1.26"]),
        *software.code_findings(seen, NODE),
        *hosts.machine_findings(seen),
        *limits.shm_findings(seen, RANKS),
        *limits.file_findings(seen, 4),
        *limits.memory_findings(seen, RANKS),
        *software.op_findings(seen, {"optimizer": {"params": {"torch_adam": True}}}),
        *network.name_findings(seen),
    ]
    assert set(levels(findings)) == {"ok"}, findings
    assert "worker-1, worker-2: 2 x NVIDIA A100-SXM4-40GB (40 GiB, capability 8.0), driver 550.54" in findings[0].text


def test_facts_survive_the_way_over_ssh_and_a_talkative_shell() -> None:
    assert facts_in(f"Welcome to worker-1!\n{to_line(NODE)}\nbye\n") == NODE
    looked_at = node(
        device=DeviceFacts("cpu", rates=CpuRates(fp32=2.0, bf16=1.0)),
        nvme_folders={"/nvme/run": NvmeFolder("/", True, False)},
    )
    assert facts_in(to_line(looked_at)) == looked_at
    assert facts_in(f"a banner without an end of line {to_line(NODE)}") == NODE
    assert facts_in("command not found") is None


def test_a_host_with_another_version_is_named_with_both() -> None:
    packages = NODE.packages | {"torch": "2.12.0+cu126", "numpy": "2.4.5"}
    torch, numpy = software.difference_findings(pair(packages=packages))
    assert (torch.level, numpy.level) == ("problem", "warning")
    assert torch.text == "worker-2: torch 2.12.0+cu126, on worker-1 it is 2.13.0+cu128"


def test_versions_outside_the_ranges_are_problems() -> None:
    lines = ["torch>=2.13,<2.15", "deepspeed>=0.20", "numpy>=1.26", "wandb>=0.31; python_version<'3'"]
    texts = software.out_of_range({"torch": "2.13.0+cu128", "deepspeed": "0.19.8", "numpy": ""}, lines)
    assert texts == ["deepspeed 0.19.8 is installed, >=0.20 is needed", "numpy is not installed (numpy>=1.26)"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"torch_cuda": None, "num_visible": 0},
            "PyTorch is the build for CPUs, so training would be on the CPU: pip install",
        ),
        ({"num_visible": 0, "num_device_files": 0, "gpus": []}, "in a container, start it with docker run --gpus all"),
        (
            {"num_visible": 0, "torch_error": "CUDA driver version is insufficient"},
            "PyTorch says: CUDA driver version is insufficient",
        ),
        ({"driver_cuda": "11.4", "num_visible": 0}, "the driver runs CUDA up to 11.4, PyTorch is built for 12.8"),
        ({"architectures": ["sm_90", "compute_90"]}, "PyTorch has no code for NVIDIA A100-SXM4-40GB (capability 8.0)"),
    ],
)
def test_gpus_that_pytorch_can_not_use_are_a_problem(changes: dict[str, Any], words: str) -> None:
    findings = gpus.cuda_findings([("", node(**changes))])
    assert set(levels(findings)) == {"problem"}
    assert any(words in finding.text for finding in findings), findings


def test_a_newer_minor_cuda_in_pytorch_is_no_problem_nor_is_an_older_architecture() -> None:
    assert only(
        gpus.cuda_findings(
            [("", node(driver_cuda="12.2", architectures=["sm_75", "sm_80"], gpus=[replace(A100, capability="8.6")]))]
        )
    )
    assert levels(gpus.cuda_findings([("", node(driver_cuda="12.2"))])) == ["ok"]


def test_gpus_left_out_on_purpose_are_no_problem() -> None:
    finding = only(gpus.cuda_findings([("", node(cpu_is_meant=True))]))
    assert (finding.level, finding.text) == (
        "ok",
        "GPUs are not used, as DS_ACCELERATOR or CUDA_VISIBLE_DEVICES in the environment says",
    )


def test_slots_are_held_against_gpus() -> None:
    few = only(gpus.gpu_findings(pair(), {"worker-1": 2, "worker-2": 8}, True))
    assert (few.level, few.text) == ("problem", "worker-2: 8 processes, but 2 GPUs")
    idle = only(gpus.gpu_findings(pair(), {"worker-1": 2, "worker-2": 1}, True))
    assert (idle.level, idle.text) == ("warning", "worker-2: 1 processes for 2 GPUs, so some are not used")


def test_memory_in_use_by_others_and_mixed_kinds_are_warnings() -> None:
    found = gpus.gpu_findings(pair(gpus=[V100, replace(V100, used=10 * GIB)]), RANKS, True)
    assert levels(found) == ["warning", "warning"]
    assert "worker-2: GPU 1 has 10.0 of 16 GiB in use already" in found[0].text
    assert "hosts with different GPUs train at the pace of the slowest" in found[1].text


def test_a_host_without_gpus_among_others_with_some_is_a_problem() -> None:
    found = gpus.gpu_findings(pair(num_visible=0, gpus=[]), RANKS, True)
    assert only(found).text == "worker-2: no GPU that PyTorch can use, and the other hosts have some"


def test_bf16_needs_a_gpu_that_has_it() -> None:
    seen = [("", node(gpus=[V100]))]
    assert (
        "bf16 needs compute capability 8.0, and a GPU there has 7.0"
        in only(gpus.precision_findings(seen, "bf16", {})).text
    )
    assert levels(gpus.precision_findings(seen, "fp16", {})) == ["ok"]
    old = [("", node(gpus=[replace(V100, capability="6.1")]))]
    assert levels(gpus.precision_findings(old, "fp16", {})) == ["warning"]


def test_what_a_host_lacks_for_precision_and_offload_is_one_line() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme/run"}}
    on_cpu = DeviceFacts("cpu", computes_fp16=False)
    seen = pair(
        device=on_cpu, nvme_folders={"/nvme/run": NvmeFolder("/nvme", True, False)}, ops_compatible={"async_io": False}
    )
    finding = only(gpus.precision_findings(seen[1:], "fp16", {"zero_optimization": zero}))
    first, second, third = finding.text.splitlines()
    assert first.startswith("worker-2: fp16 is on, but this device (cpu) can't compute in it")
    assert (
        second
        == "zero_optimization.offload_optimizer.nvme_path '/nvme/run' can't be written to (/nvme is read-only); name "
        "another folder"
    )
    assert "apt-get install libaio-dev" in third
    slow = replace(on_cpu, rates=CpuRates(fp32=119e9, bf16=25e9))
    warned = only(gpus.precision_findings([("", node(num_visible=0, device=slow))], "bf16", {}))
    assert (warned.level, warned.text[:33]) == ("warning", "bf16 is slower than fp32 on this ")


def test_a_host_without_a_compiler_can_build_nothing() -> None:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    finding = only(software.op_findings([("", node(compiler=None, compiler_name="clang++"))], offload))
    assert finding.level == "problem"
    assert finding.text.startswith(
        "no C++ compiler: DeepSpeed builds cpu_adam (the optimizer is offloaded to the host) on first use"
    )
    assert "there is no clang++ on PATH" in finding.text


def test_an_operation_that_ds_report_refuses_is_named() -> None:
    lamb = {"optimizer": {"type": "Lamb"}}
    finding = only(software.op_findings([("", node(ops_compatible={"fused_lamb": False}))], lamb))
    assert (finding.level, finding.text) == (
        "problem",
        "DeepSpeed says that fused_lamb (the optimizer is DeepSpeed's own Lamb) can't be built there (ds_report)",
    )


def test_lines_of_nvidia_smi_are_read() -> None:
    assert gpu_of_line("NVIDIA A100-SXM4-40GB, 40960, 3, 8.0, 550.54") == replace(A100, used=3 << 20)
    assert gpu_of_line("NVIDIA GB10, [N/A], [N/A], 12.1, 580.1") == HostGpu("NVIDIA GB10", 0, 0, "12.1", "580.1")
    assert gpu_of_line("No devices were found") is None


def test_an_operation_for_gpus_needs_cudas_compiler_of_the_same_version() -> None:
    lamb = {"optimizer": {"type": "Lamb"}}
    missing = only(software.op_findings([("", node(nvcc=""))], lamb))
    assert missing.level == "problem"
    assert missing.text.startswith("no nvcc: DeepSpeed builds fused_lamb (the optimizer is DeepSpeed's own Lamb)")
    assert "nvcc is of CUDA 11.8, PyTorch of 12.8" in only(software.op_findings([("", node(nvcc="11.8"))], lamb)).text
    assert levels(software.op_findings([("", node(nvcc="", ops_built=["fused_lamb"]))], lamb)) == ["ok"]


def test_the_folder_of_operations_that_deepspeed_was_not_installed_with_is_told() -> None:
    lamb = {"optimizer": {"type": "Lamb"}}
    for changes, words in (
        ({}, "Lamb; built on first use, in /home/ops)"),
        ({"ops_in_folder": ["fused_lamb"]}, "Lamb; built before, in /home/ops)"),
        ({"ops_built": ["fused_lamb"]}, "Lamb; built)"),
    ):
        assert words in only(software.op_findings([("", node(ops_folder="/home/ops", **changes))], lamb)).text


@pytest.mark.parametrize(("free", "level"), [(0.9, "problem"), (3.0, "warning"), (5.5, "ok")])
def test_room_for_one_checkpoint_is_needed_and_for_all_is_better(free: float, level: str) -> None:
    seen = [("", node(output_free=int(free * 10**9)))]
    assert levels(limits.output_findings(seen, Path("/out"), 10**9, of_run=54 * 10**8, keep=3)) == [level]


def configuration_of(stage: int, precision: Precision) -> Configuration:
    deepspeed = {"zero_optimization": {"stage": stage}}
    return Configuration(arguments=TrainingArguments(), deepspeed=deepspeed, precision=precision, notes=[])


@pytest.mark.parametrize(
    ("stage", "gpu", "level"),
    [
        (0, A100, "ok"),
        (0, V100, "warning"),
        (0, replace(V100, memory=12 * GIB), "problem"),
        (3, replace(V100, memory=12 * GIB), "ok"),
    ],
)
def test_the_states_of_a_stage_are_held_against_the_smallest_gpu(stage: int, gpu: HostGpu, level: str) -> None:
    """762M in fp16 at stage 0: 774 million parameters of 20 bytes, 14.4 GiB."""
    size = ModelSize(774_030_080, 64_328_960)
    configuration = configuration_of(stage, "fp16")
    seen = pair(gpus=[A100, gpu])
    assert levels(gpus.fit_findings(seen, RANKS, configuration, size)) == [level]


def test_processes_on_a_cpu_share_the_hosts_memory() -> None:
    size = ModelSize(124_439_808, 38_597_376)
    configuration = configuration_of(1, "fp32")
    small = node(num_visible=0, gpus=[], memory=(2 * GIB, 2 * GIB))
    finding = only(gpus.fit_findings([("", small)], {"": 2}, configuration, size))
    assert finding.level == "problem"
    assert finding.text.startswith(
        "2 processes need 3.2 GiB of the host's memory for weights, gradients and optimizer, and it has 2.0"
    )


def test_limits_grow_with_the_run() -> None:
    seen = [("", node(open_files=1_024))]
    assert levels(limits.file_findings(seen, 128)) == ["ok"]
    assert "2,560 may be needed" in only(limits.file_findings(seen, 512)).text
    assert levels(limits.shm_findings([("", node(shared_memory=(64 << 20, 64 << 20)))], {"": 8})) == ["warning"]
    assert levels(limits.memory_findings([("", node(memory=(8 * GIB, GIB)))], {"": 8})) == ["warning"]
    assert "can't be looked at" in only(limits.shm_findings([("", node(shared_memory=(0, 0)))], {"": 1})).text
    assert limits.shm_findings([("", node(shared_memory=(0, 0), failures={"limits": "OSError"}))], {"": 1}) == []


def test_a_check_that_crashes_or_hangs_is_a_warning_that_names_it() -> None:
    stream, never = StringIO(), threading.Event()
    report = Report(Clock(60.0), stream)

    def crash() -> list[Finding]:
        raise ValueError("no such thing")

    def hang() -> list[Finding]:
        never.wait()
        return []

    report.check("first", crash)
    report.check("second", hang, seconds=0.2)
    report.check("third", lambda: [ok("third", "good")])
    never.set()
    assert stream.getvalue().splitlines() == [
        "warning  first        this check could not be made: ValueError: no such thing",
        "warning  second       this check was not done after 0.5 s, and is left out",
        "ok       third        good",
    ]
    assert report.num_problems == 0
    assert report.closing_line().startswith("doctor: 1 ok, 2 warnings, 0 problems in ")


def test_what_two_checks_come_to_is_said_once_and_secrets_are_left_out() -> None:
    stream = StringIO()
    report = Report(Clock(60.0), stream)
    report.add(
        [problem("a", "broken", "mend it"), problem("b", "broken"), warning("c", "https://user:pass@host/ is slow")]
    )
    assert stream.getvalue().splitlines() == [
        "problem  a            broken",
        "                      way out: mend it",
        "warning  c            https://(left out)@host/ is slow",
    ]


def test_colours_are_for_terminals() -> None:
    assert problem("a", "x").lines(colour=True)[0].startswith("\x1b[1;31mproblem ")
    assert "\x1b" not in problem("a", "x").lines(colour=False)[0]
