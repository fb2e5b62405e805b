"""What a dry run says about GPUs that are not here: whether the run fits, what to do if not, and what it can't tell."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.distributed.world import World
from dialogpt_ds.hardware import GIB
from dialogpt_ds.model.gpu_specs import gpu_of
from dialogpt_ds.model.memory import model_states
from dialogpt_ds.model.workload import Workload
from dialogpt_ds.training import dry_run
from dialogpt_ds.training.engine import model_of
from dialogpt_ds.training.forecast import forecast
from dialogpt_ds.training.planning import Planning, hosts_of, layout_of, planning_of, trace_of
from dialogpt_ds.training.settings import Settings
from tests.ranks.rank_tasks import settings_of, write_deepspeed

SmallWorld = tuple[Path, Path]
WORKLOAD = Workload.of_equal_examples(4, 64, 20, 0.6)


def planned(
    small_world: SmallWorld, folder: Path, *options: str, stage: int = 1, gpus: int = 8, **json: Any
) -> tuple[Settings, Planning]:
    argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
            "--output_dir", str(folder / "out"), "--deepspeed_config", write_deepspeed(folder, stage, "fp16", **json),
            "--dry_run", "True", *options]  # fmt: skip
    settings = settings_of(World(0, gpus, 0), argv)
    return settings, planning_of(settings, model_of(settings))


def test_what_does_not_fit_is_said_with_the_ways_out_that_are_left(small_world: SmallWorld, tmp_path: Path) -> None:
    settings, planning = planned(small_world, tmp_path, "--gpu", "T4")
    traced = trace_of(settings, planning, WORKLOAD)
    assert "DOES NOT FIT" not in forecast(settings, planning, traced, int(14 * GIB))
    said = forecast(settings, planning, traced, int(20 * GIB))
    assert "20.0 GiB of the 14.6 that a program gets on each GPU: IT DOES NOT FIT" in said
    assert "smaller micro-batches" in said
    assert "--activation_checkpointing, --chunked_head, ZeRO-2 or higher" in said
    options = ("--gpu", "T4", "--activation_checkpointing", "True", "--chunked_head", "True", "--train_batch_size", "2")
    settings, planning = planned(small_world, tmp_path, *options, stage=3)
    said = forecast(settings, planning, traced, int(20 * GIB)).split("Ways out: ")[1].splitlines()[0]
    assert said == "offload (ds_configs/zero2_fp16_offload_optimizer.json), a smaller --model"


def test_a_gpu_decides_on_the_kernel_of_attention(small_world: SmallWorld, tmp_path: Path) -> None:
    found = {
        gpu: planned(small_world, tmp_path, "--gpu", gpu)[1].planned.isolation for gpu in ("T4", "V100", "L4", "H100")
    }
    assert found == {"T4": "mask", "V100": "mask", "L4": "varlen", "H100": "varlen"}
    assert planned(small_world, tmp_path, "--gpu", "H100", "--dropout", "0.1")[1].planned.isolation == "mask"
    assert planned(small_world, tmp_path, "--gpu", "H100", "--attention", "eager")[1].planned.isolation == "mask"


def test_layouts_follow_the_configuration(small_world: SmallWorld, tmp_path: Path) -> None:
    settings, planning = planned(small_world, tmp_path, gpus=12)
    assert hosts_of(settings.world.size) == (6, 2)
    assert not layout_of(settings, planning).sends_fp32
    settings, planning = planned(small_world, tmp_path, communication_data_type="fp32")
    assert layout_of(settings, planning).sends_fp32


def test_a_model_that_does_not_run_on_meta_has_states_alone(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, planning = planned(small_world, tmp_path)

    def fails(*_: Any) -> None:
        raise NotImplementedError("no kernel\nfor it")

    monkeypatch.setattr(dry_run, "trace_of", fails)
    assert dry_run._traced(settings, planning, WORKLOAD) is None
    assert "does not run on PyTorch's device meta (NotImplementedError: no kernel)" in capsys.readouterr().out
    states = [replace(state, device=3 * GIB) for state in model_states(1_000, 100, 8, 1, "fp16")]
    table = dry_run.memory_table(states, None, settings, planning)
    assert "what a micro-batch needs is not counted" in table
    assert "ZeRO-1                                          3.00            3.00" in table


def test_memory_is_states_a_micro_batch_buffers_and_cuda(small_world: SmallWorld, tmp_path: Path) -> None:
    settings, planning = planned(small_world, tmp_path, "--gpu", "a100_80")
    assert planning.gpu == gpu_of("A100-80")
    traced = trace_of(settings, planning, WORKLOAD)
    state = next(state for state in model_states(1_000, 100, 8, 1, "fp16") if state.name == "ZeRO-1")
    needed = dry_run.memory_on_gpu(state, traced, settings, planning)
    assert needed > state.device + traced.peak + 0.8 * GIB
    assert dry_run.memory_on_gpu(replace(state, stage=3), traced, settings, planning) > needed, "gathered weights"
