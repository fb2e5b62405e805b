"""The figures in the comments of launch/*.sh that are called modelled are what the cost model says."""

import json
import re

import pytest
import torch

from dialogpt_ds.config.precision import Precision
from dialogpt_ds.hardware import GIB
from dialogpt_ds.model.calibration import preset_config
from dialogpt_ds.model.gpu_specs import gpu_of, link_of
from dialogpt_ds.model.loss import Planned, TargetLoss
from dialogpt_ds.model.memory import Layout, bytes_on_gpu, largest_layer, model_states
from dialogpt_ds.model.micro_batch_trace import planned_loss, trace
from dialogpt_ds.model.presets import VOCABULARY
from dialogpt_ds.model.roofline import cost_of
from dialogpt_ds.model.workload import Workload
from dialogpt_ds.training.step_cost import step_cost
from tests.conftest import ROOT

NEAR = 0.03
"""Comments are rounded."""


def layout(loss: TargetLoss, gpus: int, accumulation: int, precision: Precision) -> Layout:
    """The layout of ds_configs/zero1_*.json."""
    zero = json.loads((ROOT / "ds_configs" / f"zero1_{precision}.json").read_text())["zero_optimization"]
    parameters = list(loss.parameters())
    embedded = loss.model.get_input_embeddings().weight.numel()
    return Layout(
        gpus, gpus, accumulation, zero["stage"], zero["overlap_comm"], False, precision,
        sum(p.numel() for p in parameters), len(parameters), embedded, zero["reduce_bucket_size"], False, False,
    )  # fmt: skip


def modelled(
    model: str, rows: int, gpu: str, gpus: int = 8, accumulation: int = 1, precision: Precision = "fp16"
) -> tuple[float, float]:
    """Tokens a second of all GPUs, and GiB of each."""
    kind = gpu_of(gpu)
    planned = Planned(torch.device("cuda"), "varlen" if kind.capability >= (8, 0) else "mask")
    loss = planned_loss(preset_config(model), torch.float16 if precision == "fp16" else torch.bfloat16, planned)
    traced = trace(loss, Workload.of_equal_examples(rows, 512, 41, 0.6))
    laid_out = layout(loss, gpus, accumulation, precision)
    step = step_cost(laid_out, kind, link_of(kind, 1), cost_of(traced, kind, VOCABULARY))
    states = model_states(laid_out.num_parameters, largest_layer(loss), gpus, 1, precision)
    needed = bytes_on_gpu(next(state for state in states if state.name == "ZeRO-1"), laid_out, traced.peak)
    return traced.workload.tokens * accumulation * gpus / step.seconds, needed / GIB


@pytest.mark.parametrize(("model", "rows"), [("117M", 20), ("345M", 10), ("762M", 5)])
def test_the_run_scripts(model: str, rows: int) -> None:
    text = (ROOT / "launch" / f"run_{model}.sh").read_text()
    memory = re.search(r"#   memory +([\d.]+) GiB on each of 8 GPUs, modelled", text)
    speed = re.search(r"#   speed +([\d,]+) tokens/s on 8 A100 of 40 GB, ([\d,]+) on 8 H100", text)
    epochs = re.search(r"#   time +(\d) epochs take ([\d.]+) hours on those A100, ([\d.]+) on those H100", text)
    assert memory and speed and epochs  # noqa: PT018
    for place, gpu in ((1, "A100-40"), (2, "H100")):
        found, needed = modelled(model, rows, gpu)
        assert float(speed[place].replace(",", "")) == pytest.approx(found, rel=NEAR)
        assert float(memory[1]) == pytest.approx(needed, rel=NEAR)
        assert float(epochs[place + 1]) == pytest.approx(int(epochs[1]) * 6.01e9 / found / 3600, rel=NEAR)


def test_the_script_for_one_gpu() -> None:
    text = (ROOT / "launch" / "finetune_12GB.sh").read_text()
    first = re.search(r"#   memory +([\d.]+) GiB, modelled", text)
    larger = re.search(r"\(([\d.]+) with 4,096 tokens, ([\d.]+) with 8,192, ([\d.]+) with 16,384\)", text)
    speed = re.search(
        r"#   speed +([\d,]+) tokens/s on a T4, ([\d,]+) on an RTX 3090, ([\d,]+) on an RTX 4090, ([\d,]+) on an A100",
        text,
    )
    assert first and larger and speed  # noqa: PT018
    memory = [first[1], larger[1], larger[2], larger[3]]
    runs = [("T4", 2, "fp16", 0), ("RTX 3090", 8, "bf16", 1), ("RTX 4090", 8, "bf16", 1), ("A100-40", 16, "bf16", 2)]
    precision: Precision
    for place, (gpu, rows, precision, size) in enumerate(runs, 1):  # type: ignore[assignment]
        found, needed = modelled("345M", rows, gpu, 1, 64 // rows, precision)
        assert float(speed[place].replace(",", "")) == pytest.approx(found, rel=NEAR)
        assert float(memory[size]) == pytest.approx(needed, rel=NEAR)
    assert float(memory[3]) == pytest.approx(modelled("345M", 32, "A100-80", 1, 2, "bf16")[1], rel=NEAR)
